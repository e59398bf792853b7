"""Normalisations of x-transformers under its names of parameters; ``unit_offset`` keeps gamma minus one, so that weight decay pulls to 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fused_attn.nn.x_transformers.parameters import constant


class LayerNorm(nn.Module):
    """Layer normalisation without bias, over the last dimension.

    Example:
        >>> LayerNorm(2)(torch.tensor([1.0, 3.0]))
        tensor([-1.0000,  1.0000], grad_fn=<MulBackward0>)
    """

    def __init__(self, dim: int, unit_offset: bool = False) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.ln = nn.LayerNorm(dim, elementwise_affine=False)
        self.gamma = constant(1.0 - unit_offset, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim]."""
        normed: Tensor = self.ln(x)
        return normed * (self.gamma + float(self.unit_offset))


class RMSNorm(nn.Module):
    """x / ||x|| * sqrt(dim) * gain, over the last dimension (arXiv 1910.07467)."""

    def __init__(self, dim: int, unit_offset: bool = False) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.scale: float = dim**0.5
        self.g = constant(1.0 - unit_offset, self._gains(dim))

    @staticmethod
    def _gains(dim: int) -> int:
        return dim

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim]."""
        unit: Tensor = normalize(x, dim=-1)
        return unit * self.scale * (self.g + float(self.unit_offset))


class ScaleNorm(RMSNorm):
    """``RMSNorm`` with one gain for all elements (arXiv 1910.05895)."""

    @staticmethod
    def _gains(dim: int) -> int:
        return 1


class SimpleRMSNorm(nn.Module):
    """``RMSNorm`` without gain."""

    def __init__(self, dim: int, unit_offset: bool = False) -> None:
        super().__init__()
        self.scale: float = dim**0.5

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim]."""
        unit: Tensor = normalize(x, dim=-1)
        return unit * self.scale


class MultiheadRMSNorm(nn.Module):
    """``SimpleRMSNorm`` of [batch, heads, length, dim] with a gain per head, kept minus one."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.rmsnorm = SimpleRMSNorm(dim)
        self.gamma = constant(0.0, heads, 1, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, heads, length, dim]."""
        normed: Tensor = self.rmsnorm(x)
        return normed * (self.gamma + 1.0)


class _Adaptive(nn.Module):
    """A gain made of a condition [batch, dim_condition] or [batch, 1 or length, dim_condition]."""

    def __init__(self, dim: int, dim_condition: int | None = None) -> None:
        super().__init__()
        self.to_gamma = nn.Linear(dim_condition or dim, dim, bias=False)
        nn.init.zeros_(self.to_gamma.weight)

    def _gain(self, condition: Tensor) -> Tensor:
        gamma: Tensor = self.to_gamma(condition[:, None] if condition.dim() == 2 else condition)
        return gamma + 1.0


class AdaptiveLayerNorm(_Adaptive):
    """``LayerNorm`` whose gain comes from a condition."""

    def __init__(self, dim: int, dim_condition: int | None = None) -> None:
        super().__init__(dim, dim_condition)
        self.ln = nn.LayerNorm(dim, elementwise_affine=False)

    def forward(self, x: Tensor, *, condition: Tensor) -> Tensor:
        """x [batch, length, dim]."""
        normed: Tensor = self.ln(x)
        return normed * self._gain(condition)


class AdaptiveRMSNorm(_Adaptive):
    """``RMSNorm`` whose gain comes from a condition."""

    def __init__(self, dim: int, dim_condition: int | None = None) -> None:
        super().__init__(dim, dim_condition)
        self.scale: float = dim**0.5

    def forward(self, x: Tensor, *, condition: Tensor) -> Tensor:
        """x [batch, length, dim]."""
        unit: Tensor = normalize(x, dim=-1)
        return unit * self.scale * self._gain(condition)


class DynamicTanh(nn.Module):
    """gamma * tanh(alpha * x) + beta (arXiv 2503.10622)."""

    def __init__(self, dim: int, init_alpha: float = 1.0, gamma: float = 1.0, beta: float = 0.0, unit_offset: bool = False) -> None:
        super().__init__()
        self.pre_tanh_scale = constant(0.0 if unit_offset else init_alpha)
        self.gamma = constant(1.0 - unit_offset, dim)
        self.beta = constant(0.0, dim)
        self.pre_tanh_scale_offset = init_alpha if unit_offset else 0.0
        self.gamma_offset = float(unit_offset)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim]."""
        squashed = (x * (self.pre_tanh_scale + self.pre_tanh_scale_offset)).tanh()
        return squashed * (self.gamma + self.gamma_offset) + self.beta


class Derf(nn.Module):
    """gamma * erf(alpha * x + s) + beta (arXiv 2512.10938)."""

    def __init__(self, dim: int, init_alpha: float = 0.5, init_bias: float = 0.0, unit_offset: bool = False) -> None:
        super().__init__()
        self.scale_offset = float(unit_offset)
        self.alpha = constant(init_alpha - self.scale_offset)
        self.s = constant(init_bias)
        self.gamma = constant(1.0 - self.scale_offset, dim)
        self.beta = constant(0.0, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim]."""
        return torch.erf(x * (self.alpha + self.scale_offset) + self.s) * (self.gamma + self.scale_offset) + self.beta
