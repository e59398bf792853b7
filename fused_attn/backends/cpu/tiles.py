"""How the cpu backend cuts attention's score array into tiles: a block of query rows against the keys that any of them reaches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import isfinite
from typing import overload

import torch
from torch import Tensor

from fused_attn.checks import has_finite_products
from fused_attn.lowering import Grid, KernelMask, LoweredAttention, Range, stat_dtype
from fused_attn.mask_rules import Pairs, evaluated, extent, filled
from fused_attn.score_mods import SCORE_MODS, Bias
from fused_attn.scoring import SCORINGS

# Elements of one temporary, 2 MB of float32. Forward/backward of float32 B1 H8 L2048 D64 on one core: 2^18 186/435 ms, 2^19 160/370,
# 2^20 165/395.
TILE = 1 << 19
# Query rows of a tile; same case: 32 rows 215/458 ms, 64 rows 181/415, 128 rows 167/394, 256 rows 160/370.
MAX_ROWS, MIN_ROWS = 256, 16
# Elements of a tile of a scoring's own code, which may hold head_dim values for each of them.
SCORED = TILE >> 3

Limits = tuple[tuple[slice, Tensor], ...]
_NOTHING: Limits = ()


@dataclass(frozen=True, slots=True)
class Tile:
    """One rectangle of the score array that is in memory at a time.

    Args:
        region: half-open ranges of batches, query heads, queries and keys.
        pairs: range of the (batch, key head) pairs, flattened.
        groups: range among the query heads that share a key head.
        limits: for each range of columns (relative to the tile) that is partly masked, +inf where a key may be attended and -inf
            elsewhere, broadcastable to those columns.
    """

    region: tuple[Range, Range, Range, Range]
    pairs: slice
    groups: slice
    limits: Limits

    @property
    def shape(self) -> tuple[int, int, int, int]:
        (b0, b1), (h0, h1), (q0, q1), (k0, k1) = self.region
        return b1 - b0, h1 - h0, q1 - q0, k1 - k0

    @property
    def rows(self) -> tuple[slice, slice, slice]:
        """Index of the tile's rows in [batch, heads, q_len, ...]."""
        return slice(*self.region[0]), slice(*self.region[1]), slice(*self.region[2])

    @property
    def index(self) -> tuple[slice, slice, slice, slice]:
        """Index of the tile in [batch, heads, q_len, kv_len]."""
        return (*self.rows, slice(*self.region[3]))

    def allowed(self) -> Tensor:
        """Which pairs may attend, bool in the tile's shape."""
        allowed = torch.ones(self.shape, dtype=torch.bool, device="cpu")
        for columns, limit in self.limits:
            allowed[..., columns] &= limit > 0
        return allowed

    @property
    def keys(self) -> tuple[slice, slice]:
        """Index of the tile's keys in [batch * kv_heads, kv_len, ...]."""
        return self.pairs, slice(*self.region[3])


def is_finite(*tensors: Tensor | None) -> bool:
    """Whether no element is NaN or infinite; a sum that overflows says no, which only costs time (isfinite is 15 times slower)."""
    return all(isfinite(t.sum(dtype=stat_dtype(t.dtype)).item()) for t in tensors if t is not None)


def _exact(columns: Range, dtype: torch.dtype) -> torch.dtype:
    """A dtype in which indices of the columns and their halves are exact."""
    return torch.float64 if columns[1] - columns[0] > 1 << 22 else dtype


def _arange(start: int, end: int, dtype: torch.dtype) -> Tensor:
    """Whatever torch's default device is: results may be kept for later calls."""
    return torch.arange(start, end, dtype=dtype, device="cpu")


@lru_cache(maxsize=8)
def _window_limit(sides: tuple[int | None, int | None], rows: int, columns: Range, dtype: torch.dtype) -> Tensor:
    """The limit of a plain window, [1, 1, rows, columns], columns counted from the first row's position.

    Blocks along the diagonal, heads and later calls share it.
    """
    (first, end), (left, right), exact = columns, sides, _exact(columns, dtype)
    row = _arange(0, rows, exact)[:, None]
    after = None if left is None else _arange(first + left, end + left, exact) + 0.5 - row
    before = None if right is None else row + 0.5 - _arange(first - right, end - right, exact)
    limit = torch.minimum(after, before) if after is not None and before is not None else before if after is None else after
    assert limit is not None
    return limit.mul_(torch.inf).to(dtype)[None, None]


class MaskTiles:
    """The limits of any tile; rows' intervals are computed once per call, the last tile's answer is kept for the next heads.

    Rules are evaluated for one tile at a time, so that no mask costs more than a tile.
    """

    def __init__(self, mask: KernelMask, grid: Grid, dtype: torch.dtype) -> None:
        self.mask, self.grid, self.dtype = mask, grid, dtype
        self._intervals: tuple[Tensor, Tensor] | None = None
        self.is_window = mask.kv_start is None and mask.kv_end is None and not mask.has_pairs and isinstance(grid.q_offset, int)
        self.last: tuple[object, Limits] | None = None
        self._rules = mask.rules if mask.keep is None else (Pairs(mask.keep), *mask.rules)
        self._extent = extent(self._rules, grid) if self._rules else (1, 1, 1, 1)
        rows = any(t is not None and t.shape[0] != 1 for t in (mask.kv_start, mask.kv_end))
        self._per_batch = isinstance(grid.q_offset, Tensor) or rows or self._extent[0] != 1
        self._last_pairs: tuple[tuple[object, Range], Tensor] | None = None

    def _place(self, region: tuple[Range, Range, Range, Range]) -> tuple[Range, Range]:
        """The batches and heads of a region as far as the mask tells them apart."""
        return region[0] if self._per_batch else (0, 0), region[1] if self._extent[1] != 1 else (0, 0)

    def _pairs(self, region: tuple[Range, Range, Range, Range]) -> Tensor:
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
    def widest(self) -> int:
        """The longest interval of any row."""
        if not self.mask.has_intervals:
            return self.grid.shape[3]
        return max(1, int((self.intervals[1] - self.intervals[0]).amax()))

    def bounds(self, rows: int) -> list[list[list[int]]]:
        """Per batch (or one for all) and block of rows: first and end of the reach, first and end of the part open to every row."""
        if not self.mask.has_intervals:
            kv_len = self.grid.shape[3]
            return [[[0, kv_len, 0, kv_len]] * -(-self.grid.shape[2] // rows)]
        bounds: list[list[list[int]]] = self.mask.tile_bounds(self.grid, rows).permute(1, 2, 0).tolist()
        return bounds

    def trimmed(self, region: tuple[Range, Range, Range, Range], full: Range) -> tuple[Range, Range]:
        """The region's keys without leading and trailing ones that ``keep`` or a rule denies to all its rows, and its full part."""
        if not self.mask.has_pairs:
            return region[3], full
        keep = self._pairs(region).view(torch.uint8)
        (k0, k1), columns = region[3], keep.amax((0, 1, 2)).expand(region[3][1] - region[3][0])
        found = columns.nonzero()
        if found.shape[0] == 0:
            return (k0, k0 + 1), (k1, k0)
        first, last = int(found[0]), int(found[-1]) + 1
        kept = keep[..., first:last] if keep.shape[3] != 1 else keep
        return (k0 + first, k0 + last), full if int(kept.amin()) else (k1, k0)

    def limits(self, region: tuple[Range, Range, Range, Range], full: Range) -> Limits:
        """Where the region is partly masked: everywhere, or left and right of the full part."""
        (q0, q1), (k0, k1) = region[2:]
        f0, f1 = max(full[0], k0), min(full[1], k1)
        parts = [(k0, f0), (f1, k1)] if f0 < f1 else [(k0, k1)]
        parts = [(a, b) for a, b in parts if a < b]
        if self.is_window:
            shift, sides = q0 + self.grid.q_offset, (self.mask.left, self.mask.right)
            return tuple((slice(a - k0, b - k0), _window_limit(sides, q1 - q0, (a - shift, b - shift), self.dtype)) for a, b in parts)
        key = (*self._place(region), q0, tuple(parts))
        if self.last is None or self.last[0] != key:
            self.last = key, tuple((slice(a - k0, b - k0), self._limit(region, (a, b))) for a, b in parts)
        return self.last[1]

    def _limit(self, region: tuple[Range, Range, Range, Range], columns: Range) -> Tensor:
        """+inf where a key may be attended, -inf elsewhere, [b|1, h|1, q|1, columns|1]; arithmetic, because where() is 10 times slower."""
        limit = None
        if self.mask.has_pairs:
            limit = self._pairs((*region[:3], columns)).view(torch.uint8).to(self.dtype).sub_(0.5)
        if self.mask.has_intervals:
            inside = self._inside(region, columns)
            limit = inside if limit is None else torch.minimum(limit, inside)
        assert limit is not None
        return limit.mul_(torch.inf).to(self.dtype)

    def _inside(self, region: tuple[Range, Range, Range, Range], columns: Range) -> Tensor:
        """Positive inside the rows' intervals, negative outside, never 0: distances of key centres from the ends."""
        batches, queries, exact = slice(*region[0]), slice(*region[2]), _exact(columns, self.dtype)
        centre = _arange(0, columns[1] - columns[0], exact).add_(0.5)
        ends = ((t if t.shape[0] == 1 else t[batches])[:, queries, None] - columns[0] for t in self.intervals)
        start, end = (t.to(exact)[:, None] for t in ends)
        return torch.minimum(centre - start, end - centre)


def _is_tame(call: LoweredAttention) -> bool:
    """Whether finite inputs give finite scores and derivatives in masked pairs as well: no code of the user's is asked."""
    scoring = call.terms.scoring
    return (scoring is None or SCORINGS[scoring.name].is_tame) and all(SCORE_MODS[m.name].is_tame for m in call.terms.mods)


def _is_finite_or_lowest(name: str, tensor: Tensor) -> bool:
    """Whether a modification's tensor holds finite numbers, or -inf beside them in a bias, which every later step takes well."""
    total = float(tensor.sum(dtype=stat_dtype(tensor.dtype)))
    return isfinite(total) or (name == Bias.name and total == -torch.inf)


@dataclass(frozen=True, slots=True)
class Plan:
    """The tiles of one call in the order they are computed.

    It never depends on the number of batches, so neither do the results' bits, but where a modification needs all batches at once.

    Args:
        call: the call.
        masks: the limits of its tiles, or None where nothing is masked.
        all_heads: whether a tile holds every head, because a modification's own code works on its tensors as the author shaped them.
        all_batches: whether it holds every batch, because one of those tensors may have a dimension of batches.
    """

    call: LoweredAttention
    masks: MaskTiles | None
    all_heads: bool = False
    all_batches: bool = False

    @classmethod
    def of(cls, call: LoweredAttention) -> Plan:
        mask, batch = call.terms.mask, call.shape[0]
        masks = None if mask.is_trivial or 0 in call.shape else MaskTiles(mask, call.grid, stat_dtype(call.q.dtype))
        authored = [m for m in call.terms.entries if m.layout is not None]
        return cls(call, masks, bool(authored), batch > 1 and any(batch in t.shape for m in authored for t in m.tensors))

    @property
    def largest(self) -> int:
        """Elements of the largest tile."""
        scoring = self.call.terms.scoring
        return TILE if scoring is None or scoring.layout is None else SCORED

    @property
    def is_small(self) -> bool:
        batch, heads, q_len, kv_len = self.call.shape
        return (batch if self.all_batches else 1) * heads * q_len * kv_len <= self.largest

    def __iter__(self) -> Iterator[Tile]:
        if 0 in self.call.shape:
            return iter(())
        return self._of_batches() if self.is_small else self._of_rows()

    def _of_batches(self) -> Iterator[Tile]:
        """Whole batches, all keys: for problems where one batch fits into a tile."""
        batch, heads, q_len, kv_len = self.call.shape
        kv_heads = self.call.k.shape[1]
        step = max(1, self.largest // (heads * q_len * kv_len))
        for b0 in range(0, batch, step):
            b1 = min(b0 + step, batch)
            region = ((b0, b1), (0, heads), (0, q_len), (0, kv_len))
            limits = self.masks.limits(region, (kv_len, 0)) if self.masks else ()
            yield Tile(region, slice(b0 * kv_heads, b1 * kv_heads), slice(0, heads // kv_heads), limits)

    def _of_rows(self) -> Iterator[Tile]:
        """Blocks of query rows against their reach, within one batch and a few heads, or all of them."""
        batch, _, q_len, kv_len = self.call.shape
        rows, step, group_step = self._steps()
        bounds = self.masks.bounds(rows) if self.masks else [[[0, kv_len, 0, kv_len]] * -(-q_len // rows)]
        batches = [(0, batch)] if self.all_batches else [(b, b + 1) for b in range(batch)]
        for block, (b0, b1) in product(range(-(-q_len // rows)), batches):
            reaches = [of_batch[block] for of_batch in (bounds[b0:b1] if len(bounds) > 1 else bounds)]
            first, last = min(r[0] for r in reaches), max(r[1] for r in reaches)
            full = max(r[2] for r in reaches), min(r[3] for r in reaches)
            keys = (first, last) if first < last else (0, 1)
            queries = (block * rows, min((block + 1) * rows, q_len))
            yield from self._of_heads(((b0, b1), queries, keys, full), (step, group_step))

    def _of_heads(self, where: tuple[Range, Range, Range, Range], steps: tuple[int, int]) -> Iterator[Tile]:
        ((b0, b1), queries, keys, full), (step, group_step) = where, steps
        kv_heads = self.call.k.shape[1]
        groups = self.call.q.shape[1] // kv_heads
        for n, g in product(range(0, kv_heads, step), range(0, groups, group_step)):
            n1, g1 = min(n + step, kv_heads), min(g + group_step, groups)
            heads = (n * groups + g, (n1 - 1) * groups + g1)
            region, limits = ((b0, b1), heads, queries, keys), _NOTHING
            if self.masks:
                columns, open_to_all = self.masks.trimmed(region, full)
                region = (*region[:3], columns)
                limits = self.masks.limits(region, open_to_all)
            yield Tile(region, slice(b0 * kv_heads + n, (b1 - 1) * kv_heads + n1), slice(g, g1), limits)

    def _steps(self) -> tuple[int, int, int]:
        """Query rows, key heads and query heads per key head of a tile."""
        q_len, kv_len, kv_heads = self.call.q.shape[2], self.call.k.shape[2], self.call.k.shape[1]
        groups = self.call.q.shape[1] // kv_heads
        widest = self.masks.widest if self.masks else kv_len
        rows, fewest, together = MAX_ROWS, MIN_ROWS, groups
        if self.all_heads:  # memory must not grow with heads * kv_len * MIN_ROWS
            fewest, together = 1, groups * kv_heads * (self.call.shape[0] if self.all_batches else 1)
        # A narrow reach wastes about rows / widest of the work on keys that only some rows see.
        while rows > fewest and (together * rows * min(kv_len, widest + rows) > self.largest or (rows > 64 and rows > widest // 2)):
            rows //= 2
        rows = min(rows, q_len)
        if self.all_heads:
            return rows, kv_heads, groups
        size = rows * min(kv_len, widest + rows)
        fits = max(1, TILE // size)
        return rows, max(1, min(kv_heads, fits // groups)), min(groups, fits)


class Operands:
    """q, k, v in the dtype of arithmetic, one matrix per (batch, key head): q [pairs, groups, q_len, head_dim], k and v [pairs, kv_len, ...]."""

    def __init__(self, call: LoweredAttention, *arriving: Tensor | None) -> None:
        self.call, self.plan, self.dtype = call, Plan.of(call), stat_dtype(call.q.dtype)
        batch, heads = call.q.shape[:2]
        self.pairs = batch * call.k.shape[1]
        self.groups = heads // max(1, call.k.shape[1])
        self.q = self.grouped(call.q)
        self.k, self.v = self._matrices(call.k), self._matrices(call.v)
        self.is_careful = (self.plan.masks is not None and not _is_tame(call)) or self._may_break(arriving)
        self.buffers: dict[str, Tensor] = {}

    def _may_break(self, arriving: tuple[Tensor | None, ...]) -> bool:
        """Whether any score, gradient or product of values may be NaN or infinite: then products are taken over allowed pairs alone."""
        dout, *others = arriving or (None,)
        products = (self.q, self.k), (self.v, self.v if dout is None else dout)
        sinks = self.call.terms.sinks
        if sinks is not None and not bool((sinks < torch.inf).all()):  # -inf is no sink, and well
            return True
        if not (is_finite(*others) and all(has_finite_products(a, b) for a, b in products)):
            return True
        return not all(_is_finite_or_lowest(m.name, t) for m in self.call.terms.mods for t in m.tensors)

    def grouped(self, tensor: Tensor) -> Tensor:
        """[batch, heads, q_len, dim] as [pairs, groups, q_len, dim] in the dtype of arithmetic."""
        wide = tensor.to(self.dtype)
        return (
            wide.reshape(self.pairs, self.groups, *tensor.shape[2:])
            if tensor.numel()
            else wide.new_empty(self.pairs, self.groups, *tensor.shape[2:])
        )

    def _matrices(self, tensor: Tensor) -> Tensor:
        wide = tensor.to(self.dtype)
        wide = wide if wide.stride(-1) == 1 else wide.contiguous()
        return wide.reshape(self.pairs, *tensor.shape[2:]) if tensor.numel() else wide.new_empty(self.pairs, *tensor.shape[2:])

    def rows(self, grouped: Tensor, tile: Tile) -> Tensor:
        """The tile's rows of a grouped tensor as matrices [pairs, groups * rows, dim]."""
        part = grouped[tile.pairs, tile.groups, slice(*tile.region[2])]
        return part.reshape(part.shape[0], part.shape[1] * part.shape[2], part.shape[3])

    @overload
    def matrices(self, values: Tensor, tile: Tile) -> Tensor: ...
    @overload
    def matrices(self, values: None, tile: Tile) -> None: ...
    @overload
    def matrices(self, values: Tensor | None, tile: Tile) -> Tensor | None: ...

    def matrices(self, values: Tensor | None, tile: Tile) -> Tensor | None:
        """[batch, heads, rows, keys] of a tile as matrices [pairs, groups * rows, keys]."""
        return None if values is None else values.reshape(tile.pairs.stop - tile.pairs.start, -1, tile.shape[3])

    def buffer(self, name: str, tile: Tile) -> Tensor:
        """A reused temporary as matrices [pairs, groups * rows, keys]."""
        batches, heads, rows, keys = tile.shape
        size, pairs = batches * heads * rows * keys, tile.pairs.stop - tile.pairs.start
        room = self.buffers.get(name)
        if room is None or room.shape[0] < size:
            room = self.buffers[name] = self.q.new_empty(size)
        return room[:size].view(pairs, -1, keys)
