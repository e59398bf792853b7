"""A rectangle of a call as a call of its own: some batches, heads, queries and keys, which count from 0 for whoever computes it.

What the whole means stays what the part means: positions, masks, modifications and dropout are those of the whole there. Parts along the
keys give results that ``merging`` puts together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_attn.kernel_dropout import part_of
from fused_attn.lowering import Grid, KernelMask, LoweredAttention, Range, Terms
from fused_attn.mask_rules import Rule

Region = tuple[Range, Range, Range, Range]


@dataclass(frozen=True)
class _Moved:
    """A rule of the ``whole`` array, asked by a part that begins at ``first``."""

    rule: Rule
    whole: Grid
    first: tuple[int, ...]

    def allowed(self, grid: Grid) -> Tensor:
        ranges = [(start + by, end + by) for (start, end), by in zip(grid.ranges, self.first, strict=True)]
        return self.rule.allowed(self.whole.at(*ranges))


def terms_of(terms: Terms, whole: Grid, region: Region) -> Terms:
    """The terms of the part of a call; tensors are views where they need not change.

    Args:
        terms: of the whole; a modification or scoring that wants all heads at once cannot be cut (``is_divisible``).
        whole: the call's grid.
        region: half-open ranges of batches, heads, queries and keys.

    Example:
        >>> whole = Grid((1, 1, 4, 6), torch.device("cpu"), 2)
        >>> part = terms_of(Terms(KernelMask(right=0), 1.0, 2), whole, ((0, 1), (0, 1), (1, 4), (3, 6)))
        >>> part.q_offset  # query 1 stands at key 3, the part's first
        0
    """
    grid, (batches, heads, queries, keys) = whole.at(*region), region
    sinks = None if terms.sinks is None else terms.sinks[slice(*heads)]
    offset = _cut(terms.q_offset.to(torch.int64), 0, batches) if isinstance(terms.q_offset, Tensor) else terms.q_offset
    dropout = part_of(terms.dropout, (batches[0], heads[0], queries[0], keys[0]), whole.shape)
    mods = tuple([replace(m, tensors=tuple([grid.crop(t) for t in m.tensors])) for m in terms.mods])
    scoring = terms.scoring
    if scoring is not None:
        scoring = replace(scoring, tensors=tuple([_cut(t, 1, heads) for t in scoring.tensors]))
    mask = _mask_of(terms.mask, whole, region)
    return replace(terms, mask=mask, q_offset=offset + (queries[0] - keys[0]), mods=mods, sinks=sinks, dropout=dropout, scoring=scoring)


def _mask_of(mask: KernelMask, whole: Grid, region: Region) -> KernelMask:
    batches, _, queries, (first, end) = region
    keep = None if mask.keep is None else whole.at(*region).crop(mask.keep)
    kv_start, kv_end = (None if t is None else _cut(_cut(t, 0, batches), 1, queries) for t in (mask.kv_start, mask.kv_end))
    if (first, end) != (0, whole.shape[3]):
        kv_start, kv_end = (None if t is None else (t - first).clamp(0, end - first) for t in (kv_start, kv_end))
    rules = tuple([_Moved(rule, whole, tuple([start for start, _ in region])) for rule in mask.rules])
    return KernelMask(mask.left, mask.right, kv_start, kv_end, keep, rules)


def _cut(tensor: Tensor, dim: int, range_: Range) -> Tensor:
    """A range along a dimension, or everything where it is of size 1."""
    return tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, range_[0], range_[1] - range_[0])


def part(call: LoweredAttention, region: Region) -> LoweredAttention:
    """The part of a call; ranges of heads are whole groups.

    Example:
        >>> from fused_attn import Causal
        >>> from fused_attn.problem import AttentionProblem
        >>> q = torch.zeros(2, 4, 6, 8)
        >>> call = LoweredAttention(q, q, q, Terms(KernelMask(right=0), 1.0))
        >>> part(call, ((0, 2), (2, 4), (3, 6), (0, 3))).shape
        (2, 2, 3, 3)
    """
    batches, heads, queries, keys = (slice(*r) for r in region)
    group = call.shape[1] // max(1, call.k.shape[1])
    kv_heads = heads if group == 1 else slice(heads.start // group, -(-heads.stop // group))
    q, (k, v) = call.q[batches, heads, queries], (t[batches, kv_heads, keys] for t in (call.k, call.v))
    return LoweredAttention(q, k, v, terms_of(call.terms, call.grid, region))
