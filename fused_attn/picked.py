"""Probabilities and scores of some queries and heads, O(rows * kv_len) memory, by the definition: what is given out is that large anyway."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxOutput, AuxRequest
from fused_attn.backends import eager
from fused_attn.lowering import Grid, KernelMask, stat_dtype
from fused_attn.mask_rules import Rule
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import is_authored


@dataclass(frozen=True)
class PickedGrid(Grid):
    """Some queries and heads of a grid, in any order.

    Args:
        heads: int64 [n], or None for all of them.
        rows: int64 [n] of queries, or None for all of them.
    """

    heads: Tensor | None = None
    rows: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        batch, heads, q_len, kv_len = self.shape
        return batch, heads if self.heads is None else len(self.heads), q_len if self.rows is None else len(self.rows), kv_len

    @property
    def q_idx(self) -> Tensor:
        return torch.arange(self.shape[2], device=self.device)[:, None] if self.rows is None else self.rows[:, None]

    def crop(self, tensor: Tensor) -> Tensor:
        for dim, indices in ((1, self.heads), (2, self.rows)):
            if indices is not None and tensor.shape[dim] != 1:
                tensor = tensor.index_select(dim, indices)
        return tensor


def picked(problem: AttentionProblem, request: AuxRequest) -> AuxOutput:
    """The probabilities and scores that a request picks, [batch, n heads, n rows, kv_len] each, differentiable."""
    _, count, q_len, _ = problem.shape
    heads, rows = request.indices(count, q_len)
    q, k, modifiers = problem.modifiers.as_product(problem.q, problem.k)
    # The code of users finds all heads; theirs are picked afterwards.
    late = heads if modifiers.scoring is not None or any(map(is_authored, modifiers.score_mods)) else None
    whole = problem.grid
    grid = PickedGrid(whole.shape, whole.device, whole.q_offset, None, heads if late is None else None, rows)
    if modifiers.sinks is not None and grid.heads is not None:
        modifiers = replace(modifiers, sinks=modifiers.sinks.index_select(0, grid.heads))
    allowed = None if modifiers.mask is None else _allowed(modifiers.mask.lower(whole).settled(whole), whole, grid)
    dtype = stat_dtype(q.dtype)
    pair = grid.crop(q).to(dtype), _keys_of(k, count, grid.heads).to(dtype)
    found = eager.Rows.of(pair, modifiers, grid, allowed, problem.empty_rows).aux(request, problem.q.dtype)
    if late is None:
        return found
    return AuxOutput(*(None if t is None else t.index_select(1, late) for t in (found.probs, found.scores)))


def _keys_of(k: Tensor, count: int, heads: Tensor | None) -> Tensor:
    """The keys [batch, kv_heads, kv_len, head_dim] of some of ``count`` query heads, once per query head."""
    if heads is None:
        return eager.repeated(k, count)
    return k.index_select(1, heads // (count // max(1, k.shape[1])))


def _allowed(form: KernelMask, whole: Grid, grid: PickedGrid) -> Tensor | None:
    """What a mask allows of the picked rows and heads, broadcastable to them."""
    allowed = None if form.keep is None else grid.crop(form.keep)
    if form.has_intervals:
        ends = (t if grid.rows is None else t.index_select(1, grid.rows) for t in form.row_intervals(whole))
        start, end = (t[:, None, :, None] for t in ends)
        inside = (whole.kv_idx >= start) & (whole.kv_idx < end)
        allowed = inside if allowed is None else allowed & inside
    for rule in form.rules:
        answer = _row_by_row(rule, whole, grid.rows)
        answer = answer if grid.heads is None or answer.shape[1] == 1 else answer.index_select(1, grid.heads)
        allowed = answer if allowed is None else allowed & answer
    return allowed


def _row_by_row(rule: Rule, whole: Grid, rows: Tensor | None) -> Tensor:
    """A rule answers for runs of queries, so picked ones are asked for one at a time."""
    if rows is None:
        return rule.allowed(whole)
    batches, heads, _, keys = whole.ranges
    answers = [rule.allowed(whole.at(batches, heads, (row, row + 1), keys)) for row in rows.tolist()]
    return torch.cat(answers, 2) if answers else whole.kv_idx.new_ones((1, 1, 0, 1), dtype=torch.bool)
