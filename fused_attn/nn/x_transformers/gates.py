"""Gates on what attention gives: by the input, by the output, by heads (arXiv 2306.12929)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fused_attn.nn.x_transformers.refusals import needs


class LowRank(nn.Module):
    """up(activation(down(x))), zero at first."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, activation: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        needs(rank < max(dim_in, dim_out), f"a gate's rank must be below its sizes {dim_in} or {dim_out}", repr(rank), "Lower it")
        self.down, self.up = nn.Linear(dim_in, rank, bias=False), nn.Linear(rank, dim_out, bias=False)
        nn.init.zeros_(self.up.weight)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim_in]."""
        hidden = self.down(x)
        result: Tensor = self.up(hidden if self.activation is None else self.activation(hidden))
        return result


def gate(dim_in: int, dim_out: int, rank: int | None, activation: Callable[[Tensor], Tensor] | None) -> nn.Module:
    """A linear map without bias that is zero at first, of low rank where one is given.

    Example:
        >>> gate(8, 4, None, None), type(gate(8, 4, 2, None)).__name__
        (Linear(in_features=8, out_features=4, bias=False), 'LowRank')
    """
    if rank is not None:
        return LowRank(dim_in, dim_out, rank, activation)
    linear = nn.Linear(dim_in, dim_out, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def by_heads(logits: Tensor, heads: int) -> Tensor:
    """Logits [batch, length, heads] or [batch, length, heads * dim] as [batch, length, heads, 1 or dim]."""
    parts: Tensor = logits.unflatten(-1, (heads, -1))
    return parts
