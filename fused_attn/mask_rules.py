"""Masks that no interval and no stored tensor describes: rules, which answer for one region of the score array at a time.

Whoever holds rules chooses what they cost: evaluated region by region they cost the region, written out they cost one byte per pair.
Every function goes through its grid in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fused_attn.checks import captured

if TYPE_CHECKING:
    from fused_attn.lowering import Grid

# Elements of a block: masks compare int64 indices, of which two temporaries of 2 MB are alive at once.
BLOCK = 1 << 18


class Rule(Protocol):
    """Whatever says of any region which of its pairs are allowed; every mask does."""

    def allowed(self, grid: Grid) -> Tensor:
        """Bool, 4-D, broadcastable to the grid's [batch, heads, q, kv]; size 1 where it does not depend on the dimension."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """A stored tensor as a rule: one that is not multiplied out with another of a different broadcast shape.

    Args:
        keep: bool [batch|1, heads|1, q_len|1, kv_len|1].
    """

    keep: Tensor

    def allowed(self, grid: Grid) -> Tensor:
        return grid.crop(self.keep)


def evaluated(rules: tuple[Rule, ...], grid: Grid) -> Tensor:
    """What all rules allow of the grid's region, [batch|1, heads|1, q|1, kv|1]."""
    first, *rest = (rule.allowed(grid) for rule in rules)
    for other in rest:
        first = first & other
    return first


def corner(rules: tuple[Rule, ...], grid: Grid) -> Tensor:
    """What all rules allow of every batch and head's first two rows and columns, which show along what dimensions they differ."""
    batches, heads, rows, columns = grid.ranges
    first_rows, first_columns = ((start, min(start + 2, end)) for start, end in (rows, columns))
    return evaluated(rules, grid.at(batches, heads, first_rows, first_columns))


def are_captured(rules: tuple[Rule, ...], grid: Grid) -> bool:
    """Whether values of what the rules allow cannot be looked at."""
    return captured(grid.kv_idx) or captured(corner(rules, grid))


def extent(rules: tuple[Rule, ...], grid: Grid) -> tuple[int, ...]:
    """The shape that all rules together need: the grid's, with size 1 along dimensions that they do not depend on.

    Example:
        >>> from fused_attn import KeyPadding
        >>> from fused_attn.lowering import Grid
        >>> extent((KeyPadding(torch.ones(2, 6, dtype=torch.bool)),), Grid((2, 3, 4, 6), torch.device("cpu")))
        (2, 1, 1, 6)
    """
    sizes = grid.sizes
    return sizes if 0 in sizes else tuple(full if here > 1 else 1 for here, full in zip(corner(rules, grid).shape, sizes, strict=True))


def _row_blocks(shape: tuple[int, ...], grid: Grid) -> Iterator[Grid]:
    """The grid in blocks of rows of which each needs at most ``BLOCK`` elements, or one row."""
    batches, heads, (first, end), columns = grid.ranges
    step = max(1, BLOCK // (shape[0] * shape[1] * grid.sizes[3]))
    for start in range(first, end, step):
        yield grid.at(batches, heads, (start, min(start + step, end)), columns)


def filled(rules: tuple[Rule, ...], grid: Grid, shape: tuple[int, ...] | None = None) -> Tensor:
    """What all rules allow of the grid's region, as one tensor of the shape ``extent``, which need not be given."""
    shape = extent(rules, grid) if shape is None else shape
    if 0 in grid.sizes:
        return torch.ones(shape, dtype=torch.bool, device=grid.device)
    if shape[2] == 1 or grid.sizes[2] * shape[0] * shape[1] * grid.sizes[3] <= BLOCK:
        return evaluated(rules, grid)
    result, first = torch.empty(shape, dtype=torch.bool, device=grid.device), grid.ranges[2][0]
    for block in _row_blocks(shape, grid):
        start, end = block.ranges[2]
        result[:, :, start - first : end - first] = evaluated(rules, block)
    return result


def intervals(rules: tuple[Rule, ...], grid: Grid) -> tuple[Tensor, Tensor] | None:
    """First and one-past-last key of every row, int32 [batch|1, q_len], or None where a row has gaps or heads differ.

    It looks at values and stops at the first block of rows that says no.
    """
    if 0 in grid.shape:
        nothing = torch.zeros((1, grid.shape[2]), dtype=torch.int32, device=grid.device)
        return nothing, nothing
    shape, starts, ends = extent(rules, grid), [], []
    for block in _row_blocks(shape, grid):
        allowed = evaluated(rules, block)
        rows, kv_len = block.ranges[2][1] - block.ranges[2][0], grid.shape[3]
        found = _run_of(allowed.expand(*allowed.shape[:2], rows, kv_len))
        if found is None:
            return None
        starts.append(found[0])
        ends.append(found[1])
    return torch.cat(starts, 1), torch.cat(ends, 1)


def _run_of(allowed: Tensor) -> tuple[Tensor, Tensor] | None:
    """The run of True in every row of [batch, heads, rows, keys], the same for all heads, int32 [batch, rows]; (0, 0) where there is none."""
    head = allowed[:, 0]
    if allowed.shape[1] > 1 and not bool((allowed == head[:, None]).all()):
        return None
    keys, numbers = head.shape[-1], head.view(torch.uint8)  # argmax takes no bool
    some = head.any(-1)
    start = numbers.argmax(-1).where(some, 0)
    end = (keys - numbers.flip(-1).argmax(-1)).where(some, 0)
    index = torch.arange(keys, device=allowed.device)
    if not bool((((index >= start[..., None]) & (index < end[..., None])) == head).all()):
        return None
    return start.to(torch.int32), end.to(torch.int32)


def multiplies_out(a: Tensor, b: Tensor) -> bool:
    """Whether two broadcast together have more elements than either; where values cannot be looked at, sizes cannot either."""
    if captured(a) or captured(b):
        return False
    size = 1
    for n, m in zip(a.shape, b.shape, strict=True):
        size *= n if m == 1 else m
    return size > max(a.numel(), b.numel())
