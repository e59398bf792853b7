"""What a mask says of a tile: limits of its scores, and how far its rows reach."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fused_attn.backends.cpu import devices
from fused_attn.lowering import Grid, KernelMask, Range
from fused_attn.mask_rules import Pairs, evaluated, extent, filled

Limits = tuple[tuple[slice, Tensor], ...]
Room = Callable[[tuple[int, ...]], Tensor]
Region = tuple[Range, Range, Range, Range]


def _exact(columns: Range, dtype: torch.dtype) -> torch.dtype:
    """A dtype in which twice the columns' indices and one are exact; not every device has float64."""
    return torch.int64 if columns[1] - columns[0] > 1 << 22 else dtype


@lru_cache(maxsize=8)
def _window_limit(sides: tuple[int | None, int | None], rows: int, columns: Range, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The limit of a plain window, [1, 1, rows, columns], columns counted from the first row's position.

    Blocks along the diagonal, heads and later calls share it. Indices are doubled, so that the centre of a key is one of them.
    """
    (first, end), (left, right), exact = columns, sides, _exact(columns, dtype)

    def doubled(start: int, end: int, odd: int) -> Tensor:
        return torch.arange(2 * start + odd, 2 * end + odd, 2, dtype=exact, device=device)

    row = doubled(0, rows, 0)[:, None]
    after = None if left is None else doubled(first + left, end + left, 1) - row
    before = None if right is None else row - doubled(first - right, end - right, -1)
    limit = torch.minimum(after, before) if after is not None and before is not None else before if after is None else after
    assert limit is not None
    return limit.to(dtype).mul_(torch.inf)[None, None]


class MaskTiles:
    """The limits of any tile; rows' intervals are computed once per call, the last tile's answer is kept for the next heads.

    Rules are evaluated for one tile at a time, so that no mask costs more than a tile.
    """

    def __init__(self, mask: KernelMask, grid: Grid, dtype: torch.dtype) -> None:
        self.mask, self.grid, self.dtype = mask, grid, dtype
        self._intervals: tuple[Tensor, Tensor] | None = None
        self._widths: list[int] | None = None
        self._bounds: dict[int, list[list[list[int]]]] = {}
        self.is_window = mask.kv_start is None and mask.kv_end is None and not mask.has_pairs and isinstance(grid.q_offset, int)
        self.last: tuple[object, Limits] | None = None
        self._rules = mask.rules if mask.keep is None else (Pairs(mask.keep), *mask.rules)
        self._extent = extent(self._rules, grid) if self._rules else (1, 1, 1, 1)
        self.per_head = self._extent[1] != 1
        rows = any(t is not None and t.shape[0] != 1 for t in (mask.kv_start, mask.kv_end))
        self.per_batch = isinstance(grid.q_offset, Tensor) or rows or self._extent[0] != 1
        self._last_pairs: tuple[tuple[object, Range], Tensor] | None = None

    def _place(self, region: Region) -> tuple[Range, Range]:
        """The batches and heads of a region as far as the mask tells them apart."""
        return region[0] if self.per_batch else (0, 0), region[1] if self.per_head else (0, 0)

    def _pairs(self, region: Region) -> Tensor:
        """What ``keep`` and the rules allow of the region, bool [b|1, h|1, q|1, keys|1]; the last region's answer serves its parts too."""
        grid = self.grid.at(*region)
        if not self.mask.rules:
            return evaluated(self._rules, grid)
        key, (k0, k1) = (*self._place(region), region[2]), region[3]
        if self._last_pairs is not None:
            (known, (start, end)), pairs = self._last_pairs
            if known == key and start <= k0 and k1 <= end:
                return pairs[..., k0 - start : k1 - start] if pairs.shape[3] != 1 else pairs
        shape = tuple(1 if full == 1 else size for full, size in zip(self._extent, grid.sizes, strict=True))
        pairs = filled(self._rules, grid, shape)
        self._last_pairs = (key, (k0, k1)), pairs
        return pairs

    @property
    def intervals(self) -> tuple[Tensor, Tensor]:
        """First and one-past-last key of every row, [batch|1, q_len]."""
        if self._intervals is None:
            start, end = torch.broadcast_tensors(*self.mask.row_intervals(self.grid))
            self._intervals = start, end
        return self._intervals

    @property
    def widths(self) -> list[int]:
        """The longest interval of any row, per batch or one for all."""
        if not self.mask.has_intervals:
            return [self.grid.shape[3]]
        if self._widths is None:
            self._widths = (self.intervals[1] - self.intervals[0]).amax(1).clamp(min=1).tolist()
        return self._widths

    def bounds(self, rows: int) -> list[list[list[int]]]:
        """Per batch (or one for all) and block of rows: first and end of the reach, first and end of the part open to every row."""
        if not self.mask.has_intervals:
            kv_len = self.grid.shape[3]
            return [[[0, kv_len, 0, kv_len]] * -(-self.grid.shape[2] // rows)]
        if rows not in self._bounds:
            self._bounds[rows] = self.mask.tile_bounds(self.grid, rows).permute(1, 2, 0).tolist()
        return self._bounds[rows]

    def trimmed(self, region: Region, full: Range) -> tuple[Range, Range]:
        """The region's keys without leading and trailing ones that ``keep`` or a rule denies to all its rows, and its full part."""
        if not self.mask.has_pairs:
            return region[3], full
        (k0, k1), pairs = region[3], self._pairs(region)
        if not devices.at_hand(pairs):
            return (k0, k1), (k1, k0)
        keep = pairs.view(torch.uint8)
        columns = keep.amax((0, 1, 2)).expand(k1 - k0)
        found = columns.nonzero()
        if found.shape[0] == 0:
            return (k0, k0 + 1), (k1, k0)
        first, last = int(found[0]), int(found[-1]) + 1
        kept = keep[..., first:last] if keep.shape[3] != 1 else keep
        return (k0 + first, k0 + last), full if int(kept.amin()) else (k1, k0)

    def _parts(self, keys: Range, full: Range) -> list[Range]:
        """Where a region is partly masked: everywhere, or left and right of the full part."""
        (k0, k1), f0, f1 = keys, max(full[0], keys[0]), min(full[1], keys[1])
        return [(a, b) for a, b in ([(k0, f0), (f1, k1)] if f0 < f1 else [(k0, k1)]) if a < b]

    def limits(self, region: Region, full: Range) -> Limits:
        """+inf where a key may be attended and -inf elsewhere, for each partly masked range of columns."""
        k0, parts = region[3][0], self._parts(region[3], full)
        if self.is_window:
            return tuple((slice(a - k0, b - k0), self._window(region[2], (a, b))) for a, b in parts)
        key = (*self._place(region), region[2][0], tuple(parts))
        if self.last is None or self.last[0] != key:
            self.last = key, tuple((slice(a - k0, b - k0), self._limit(region, (a, b))) for a, b in parts)
        return self.last[1]

    def _window(self, queries: Range, columns: Range) -> Tensor:
        assert isinstance(self.grid.q_offset, int)
        shift, sides = queries[0] + self.grid.q_offset, (self.mask.left, self.mask.right)
        return _window_limit(sides, queries[1] - queries[0], (columns[0] - shift, columns[1] - shift), self.dtype, self.grid.device)

    def additive(self, region: Region, full: Range, room: Room) -> Tensor | None:
        """0 where a key may be attended and -inf elsewhere, [batch|1, heads|1, rows|1, keys], in memory of ``room``; None where all may."""
        (k0, k1), parts = region[3], self._parts(region[3], full)
        if not parts:
            return None
        batches, heads, rows, _ = (end - start for start, end in region)
        rows = rows if self.mask.has_intervals or self._extent[2] != 1 else 1
        total = room((batches if self.per_batch else 1, heads if self.per_head else 1, rows, k1 - k0))
        if parts != [(k0, k1)]:
            total.zero_()
        for a, b in parts:
            self._close(total[..., a - k0 : b - k0], region, (a, b))
        return total

    def _close(self, target: Tensor, region: Region, columns: Range) -> None:
        """Writes 0 and -inf; products, because masked_fill_ and where() are 10 times slower."""
        if self.is_window:
            torch.clamp(self._window(region[2], columns), max=0.0, out=target)
            return
        if self.mask.has_pairs:
            pairs = self._pairs((*region[:3], columns))
            target.copy_(pairs.logical_not().view(torch.int8).neg_()).mul_(torch.finfo(self.dtype).max).mul_(2.0)
        if self.mask.has_intervals:
            inside = self._inside(region, columns).mul_(torch.inf).clamp_(max=0.0)
            target.copy_(inside) if not self.mask.has_pairs else torch.minimum(target, inside, out=target)

    def _limit(self, region: Region, columns: Range) -> Tensor:
        """+inf where a key may be attended, -inf elsewhere, [b|1, h|1, q|1, columns|1]; arithmetic, because where() is 10 times slower."""
        limit = None
        if self.mask.has_pairs:
            limit = self._pairs((*region[:3], columns)).view(torch.uint8).to(self.dtype).sub_(0.5)
        if self.mask.has_intervals:
            inside = self._inside(region, columns)
            limit = inside if limit is None else torch.minimum(limit, inside)
        assert limit is not None
        return limit.mul_(torch.inf).to(self.dtype)

    def _inside(self, region: Region, columns: Range) -> Tensor:
        """Positive inside the rows' intervals, negative outside, never 0: doubled distances of key centres from the ends."""
        batches, queries, exact = slice(*region[0]), slice(*region[2]), _exact(columns, self.dtype)
        centre = torch.arange(1, 2 * (columns[1] - columns[0]) + 1, 2, dtype=exact, device=self.grid.device)
        ends = ((t if t.shape[0] == 1 else t[batches])[:, queries, None] - columns[0] for t in self.intervals)
        start, end = (t.mul(2).to(exact)[:, None] for t in ends)
        inside = centre - start
        return torch.minimum(inside, end - centre, out=inside).to(self.dtype)
