"""How a branch's output joins the stream that runs past it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fused_attn.nn.x_transformers.parameters import constant


class Joining(nn.Module):
    """Base of what joins a branch to the stream."""

    def prepare(self, stream: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the layer reads of the stream, what it joins, and what ``forward`` wants to know besides."""
        return stream, stream, {}


class Residual(Joining):
    """branch + scale * stream.

    Example:
        >>> Residual(2)(torch.ones(2), torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(self, dim: int, scale_residual: bool | float = False, scale_residual_constant: float = 1.0, **_: Any) -> None:
        super().__init__()
        self.residual_scale = constant(1.0, dim) if scale_residual else None
        self.scale_residual_constant = scale_residual_constant

    def scaled(self, residual: Tensor) -> Tensor:
        """The stream as the branch meets it."""
        residual = residual if self.residual_scale is None else residual * self.residual_scale
        return residual if self.scale_residual_constant == 1 else residual * self.scale_residual_constant

    def forward(self, x: Tensor, residual: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """x and residual [batch, length, dim]; mask bool [batch, length]."""
        return x + self.scaled(residual)


class GRUGating(Residual):
    """A GRU cell whose input is the branch and whose state is the stream (arXiv 1910.06764)."""

    def __init__(self, dim: int, scale_residual: bool | float = False, **_: Any) -> None:
        super().__init__(dim, scale_residual)
        self.gru = nn.GRUCell(dim, dim)

    def forward(self, x: Tensor, residual: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """x and residual [batch, length, dim]."""
        gated: Tensor = self.gru(x.flatten(0, 1), self.scaled(residual).flatten(0, 1))
        return gated.reshape_as(x)


class OrthogonalResidualUpdate(Residual):
    """The stream plus what of the branch is orthogonal to it (arXiv 2505.11881)."""

    def __init__(self, dim: int, scale_residual: bool | float = False, **_: Any) -> None:
        super().__init__(dim, scale_residual)

    def forward(self, x: Tensor, residual: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """x and residual [batch, length, dim]."""
        residual = self.scaled(residual)
        return residual + orthogonal(x, residual)


class MVSplitResidualUpdate(Joining):
    """Mean over the sequence and what deviates from it join the stream with gains of their own (arXiv 2605.06169)."""

    def __init__(self, dim: int, init_alpha: float = 0.0, init_beta: float = 0.03, learned: bool = False, **_: Any) -> None:
        super().__init__()
        self.learned = learned
        if learned:
            self.to_alpha, self.to_beta = nn.Linear(dim, dim), nn.Linear(dim, dim)
            for layer, bias in ((self.to_alpha, init_alpha), (self.to_beta, init_beta)):
                nn.init.zeros_(layer.weight)
                nn.init.constant_(layer.bias, bias)
        else:
            self.alpha, self.beta = constant(init_alpha, dim), constant(init_beta, dim)

    def forward(self, x: Tensor, residual: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """x and residual [batch, length, dim]; mask bool [batch, length]."""
        mean, of_stream = _mean(x, mask), _mean(residual, mask)
        alpha = self.to_alpha(mean) if self.learned else self.alpha
        beta = self.to_beta(mean) if self.learned else self.beta
        return residual + (x - mean) * beta + (mean - of_stream) * alpha


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the length, [batch, 1, dim], of positions that count."""
    if mask is None:
        return x.mean(-2, keepdim=True)
    count = mask.sum(-1, keepdim=True)[..., None]
    return x.masked_fill(~mask[..., None], 0.0).sum(-2, keepdim=True) / count.clamp(min=1e-5)


def orthogonal(x: Tensor, y: Tensor) -> Tensor:
    """x without its part along y, each batch element one vector of all its numbers, in float64.

    Example:
        >>> orthogonal(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]]))
        tensor([[0., 1.]])
    """
    flat, unit = x.flatten(1).to(torch.float64), normalize(y.flatten(1).to(torch.float64), dim=-1)
    return (flat - (flat * unit).sum(-1, keepdim=True) * unit).view_as(x).to(x.dtype)
