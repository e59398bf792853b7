"""Scores of one tile with a graph of their own: how the cpu backend differentiates the code of scorings and score modifications."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_attn.backends.cpu import additive
from fused_attn.backends.cpu.tiles import Operands, Tile
from fused_attn.kernel_score import KernelScore
from fused_attn.lowering import Grid
from fused_attn.score_mods import SCORE_MODS, modified
from fused_attn.scoring import SCORINGS, Additive, scored


def vectors(work: Operands, tile: Tile) -> tuple[Tensor, Tensor]:
    """The tile's q [batch, heads, rows, head_dim] and k [batch, kv_heads, keys, head_dim], finite."""
    batch, heads, rows, keys = tile.shape
    q, k = work.rows(work.q, tile), work.k[tile.keys]
    if work.is_careful:
        q, k = (t.masked_fill(~t.isfinite(), 0.0) for t in (q, k))
    return q.view(batch, heads, rows, q.shape[-1]), k.view(batch, k.shape[0] // batch, keys, k.shape[-1])


def own_scores(work: Operands, tile: Tile, pair: tuple[Tensor, Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
    """What a scoring's own code makes of ``vectors`` and its tensors, NaN for what is not finite of q and k, [batch, heads, rows, keys]."""
    score = work.call.terms.scoring
    assert score is not None
    q, k = pair
    groups = q.shape[1] // k.shape[1]
    if score.name == Additive.name:
        scores = additive.scores(q, k, tensors[0].expand(-1, work.call.shape[1], -1, -1)[:, slice(*tile.region[1])])
    else:
        scores = scored(SCORINGS[score.name].from_kernel(replace(score, tensors=tensors)), q, k.repeat_interleave(groups, 1))
    if not work.is_careful:
        return scores
    keys = ~work.k[tile.keys].isfinite().all(-1).view(*k.shape[:2], 1, -1).repeat_interleave(groups, 1)
    broken = keys | ~work.rows(work.q, tile).isfinite().all(-1).view(*q.shape[:3], 1)
    return scores + torch.zeros_like(scores).masked_fill(broken, torch.nan)  # added, so that what arrives flows on


class _CroppedGrid(Grid):
    """A region whose parameters were cropped beforehand, so that autograd's gradients are no larger than the tile."""

    __slots__ = ()

    def crop(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True, slots=True)
class Leaves:
    """Modified scores of a tile with their graph; leaves are what they were made of (raw scores, or q and k) and the parameters' parts."""

    sources: tuple[Tensor, ...]
    parts: tuple[Tensor, ...]
    result: Tensor

    @classmethod
    def of(cls, work: Operands, tile: Tile, raw: Tensor | None, hidden: Tensor | None, wants: tuple[bool, ...]) -> Leaves:
        """From raw scores, or from q and k where the scoring's own code makes them.

        Args:
            work: the call's operands.
            tile: the tile.
            raw: scores before the modifications, or None.
            hidden: True where nobody attends; nothing flows back from there, whatever a modification gives (0 * NaN is NaN).
            wants: which of the parameters want a gradient.
        """
        terms, grid, left = work.call.terms, work.call.grid.at(*tile.region), list(wants)
        sources = tuple(t.detach().requires_grad_() for t in (vectors(work, tile) if raw is None else (raw,)))
        parts: list[Tensor] = []

        def leaves_of(score: KernelScore) -> tuple[Tensor, ...]:
            whole = score is terms.scoring
            tensors = tuple([t.requires_grad_(left.pop(0)) for t in _parts(score, grid, work.dtype, whole)])
            parts.extend(tensors)
            return tensors

        with torch.enable_grad():
            scores = sources[0]
            if terms.scoring is not None:
                scores = own_scores(work, tile, (sources[0], sources[1]), leaves_of(terms.scoring))
            scores = scores if hidden is None else scores.masked_fill(hidden, 0.0)
            for score in terms.mods:
                mod = SCORE_MODS[score.name].from_kernel(replace(score, tensors=leaves_of(score)))
                here = _CroppedGrid(grid.shape, grid.device, grid.q_offset, grid.region) if score.layout is None else grid
                # Code of the user's may write into what it is given, which a leaf forbids.
                scores = modified(mod, scores.clone() if scores is sources[0] and score.layout is not None else scores, here)
                scores = scores if hidden is None else scores.masked_fill(hidden, 0.0)
        return cls(sources, tuple(parts), scores)

    def pull_back(self, dscores: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Gradients of the sources, and of those parts that want one."""
        wanted, count = [t for t in self.parts if t.requires_grad], len(self.sources)
        if not self.result.requires_grad:
            return tuple(torch.zeros_like(t) for t in self.sources), (None,) * len(wanted)
        grads = torch.autograd.grad(self.result, [*self.sources, *wanted], dscores, allow_unused=True)
        sources = tuple(torch.zeros_like(t) if g is None else g for t, g in zip(self.sources, grads[:count], strict=True))
        return sources, grads[count:]


def _parts(score: KernelScore, grid: Grid, dtype: torch.dtype, whole: bool) -> tuple[Tensor, ...]:
    """Fresh views of the tensors: what belongs to the region, or all of them where the code that reads them cuts them."""
    if whole or score.layout is not None:
        return tuple(t.detach() for t in score.tensors)
    return tuple(t.view_as(t) for t in (grid.crop(t).detach().to(dtype) for t in score.tensors))
