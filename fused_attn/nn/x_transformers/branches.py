"""What wraps a layer: scales of its output, tokens shifted on its input, joins of distant layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.nn.x_transformers.parameters import constant


def on_output(out: Any, scale: Callable[[Tensor], Tensor]) -> Any:
    """A layer's output, alone or the first of a tuple, after a function."""
    return scale(out) if isinstance(out, Tensor) else (scale(out[0]), *out[1:])


class Scale(nn.Module):
    """A layer times a number.

    Example:
        >>> Scale(0.5, nn.Identity())(torch.tensor(4.0))
        tensor(2.)
    """

    def __init__(self, scale: float, fn: nn.Module) -> None:
        super().__init__()
        self.scale, self.fn = scale, fn

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        """What the layer gives, its output scaled."""
        return on_output(self.fn(x, **kwargs), lambda out: out * self.scale)


class LayerScale(nn.Module):
    """A layer times a learned gain per element (arXiv 2103.17239)."""

    def __init__(self, fn: nn.Module, dim: int, init_value: float = 0.0, unit_offset: bool = False) -> None:
        super().__init__()
        self.unit_offset, self.fn = unit_offset, fn
        self.gamma = constant(init_value - unit_offset, dim)

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        """What the layer gives, its output scaled."""
        return on_output(self.fn(x, **kwargs), lambda out: out * (self.gamma + float(self.unit_offset)))


class AdaptiveLayerScale(nn.Module):
    """A layer times a gain in (0, 1) that comes from a condition (arXiv 2212.09748)."""

    def __init__(self, fn: nn.Module, dim: int, dim_condition: int | None = None, init_bias_value: float = -2.0) -> None:
        super().__init__()
        self.fn = fn
        self.to_gamma = nn.Linear(dim_condition or dim, dim)
        nn.init.zeros_(self.to_gamma.weight)
        nn.init.constant_(self.to_gamma.bias, init_bias_value)

    def forward(self, x: Tensor, *, condition: Tensor, **kwargs: Any) -> Any:
        """What the layer gives, its output scaled."""
        gamma = self.to_gamma(condition[:, None] if condition.dim() == 2 else condition).sigmoid()
        return on_output(self.fn(x, **kwargs), lambda out: out * gamma)


class ShiftTokens(nn.Module):
    """A layer that finds parts of each token's features at its neighbours' places: part n comes from ``shifts[n]`` positions before."""

    def __init__(self, shifts: tuple[int, ...], fn: nn.Module) -> None:
        super().__init__()
        self.shifts, self.fn = shifts, fn

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        """x [batch, length, dim]; the layer's arguments, of which ``mask`` [batch, length] hides positions from their neighbours."""
        size = x.shape[-1] // len(self.shifts)
        parts = x.split(size, -1)
        moved = [shifted(part, n, kwargs.get("mask")) for part, n in zip(parts, self.shifts, strict=False)]
        return self.fn(torch.cat((*moved, *parts[len(self.shifts) :]), -1), **kwargs)


def shifted(x: Tensor, amount: int, mask: Tensor | None = None) -> Tensor:
    """x [batch, length, dim] ``amount`` positions later, zeros where nothing comes from.

    Example:
        >>> shifted(torch.tensor([[[1.0], [2.0]]]), 1).flatten()
        tensor([0., 1.])
    """
    if amount == 0:
        return x
    amount = min(amount, x.shape[1])
    x = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
    return nn.functional.pad(x, (0, 0, amount, -amount))


class ConcatCombine(nn.Module):
    """A linear map of an earlier layer's input beside the stream (a U-net's skip)."""

    def __init__(self, dim: int, prev_layer_ind: int) -> None:
        super().__init__()
        self.prev_layer_ind = prev_layer_ind
        self.combine = nn.Linear(dim * 2, dim, bias=False)

    def forward(self, x: Tensor, prev_layers: list[Tensor]) -> Tensor:
        """x [batch, length, dim]."""
        combined: Tensor = self.combine(torch.cat((prev_layers[self.prev_layer_ind], x), -1))
        return combined
