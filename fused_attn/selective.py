"""Selective attention as a score modification: what earlier queries no longer need, they take off the scores of later ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_attn.lowering import Grid
from fused_attn.score_mods import ScoreMod


@dataclass(frozen=True)
class Selective(ScoreMod):
    """Subtracts F from the scores of every head, the exclusive running sum over queries of head 0's positive scores (arXiv 2410.02703).

    F_ij = sum over i' < i of max(s0_i'j, 0), where s0 are the scores of head 0 after all other modifications. Pairs that may not attend
    add nothing, and neither do a query's own position, the first query's, and every key before it (the prefix). It comes last among the
    modifications. Kernels run on blocks of queries, in O(q_len * kv_len / block) memory.

    Example:
        >>> grid = Grid((1, 1, 3, 3), torch.device("cpu"))
        >>> Selective().apply(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 4.0], [1.0, 1.0, 1.0]])[None, None], grid)
        tensor([[[[ 1.,  2.,  3.],
                  [ 1., -1.,  1.],
                  [ 1., -1., -6.]]]])
    """

    name: ClassVar[str] = "selective"
    positional: ClassVar[bool] = True
    by_parts: ClassVar[bool] = True
    kernels: ClassVar[tuple[str, ...]] = ("bias",)

    def apply(self, scores: Tensor, grid: Grid) -> Tensor:
        return self.masked(scores, grid, None)

    def masked(self, scores: Tensor, grid: Grid, allowed: Tensor | None) -> Tensor:
        """``apply`` where only some pairs may attend; ``allowed`` broadcasts to the scores."""
        return scores - before(self.taken(scores[:, :1], grid, None if allowed is None else allowed[:, :1]))

    def taken(self, first: Tensor, grid: Grid, allowed: Tensor | None) -> Tensor:
        """What each query takes off later ones, [batch, 1, q, kv], from head 0's scores of that shape."""
        start = grid.q_offset[:, None, None, None] if isinstance(grid.q_offset, Tensor) else grid.q_offset
        takes = (grid.kv_idx > start) & (grid.kv_idx != grid.q_pos)
        takes = takes if allowed is None else takes & allowed
        return first.masked_fill(~takes, 0.0).relu()


def is_selective(mods: Sequence[ScoreMod]) -> bool:
    """Whether the last modification is ``Selective``."""
    return len(mods) > 0 and isinstance(mods[-1], Selective)


def before(taken: Tensor) -> Tensor:
    """The exclusive running sum over queries."""
    return torch.nn.functional.pad(taken.cumsum(2)[:, :, :-1], (0, 0, 1, 0)) if taken.shape[2] else taken
