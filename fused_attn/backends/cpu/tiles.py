"""How attention's score array is cut into tiles: a block of query rows against the keys that any of them reaches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import copysign, inf, isfinite
from typing import overload

import torch
from torch import Tensor

from fused_attn.backends.cpu import devices
from fused_attn.backends.cpu.mask_tiles import Limits, MaskTiles, Region
from fused_attn.checks import has_finite_products
from fused_attn.lowering import LoweredAttention, stat_dtype
from fused_attn.score_mods import SCORE_MODS, Bias
from fused_attn.scoring import SCORINGS

# Elements of one temporary, 2 MB of float32. Forward/backward of float32 B1 H8 L2048 D64 on one core: 2^18 186/435 ms, 2^19 160/370,
# 2^20 165/395.
TILE = 1 << 19
# The same on other devices, 16 MB of float32: an operation shall last longer than its launch (chosen by the size, not by a sweep).
DEVICE_TILE = 1 << 22
# Query rows of a tile; same case: 32 rows 215/458 ms, 64 rows 181/415, 128 rows 167/394, 256 rows 160/370.
MAX_ROWS, MIN_ROWS = 256, 16
# Elements of a tile of a scoring's own code, which may hold head_dim values for each of them.
SCORED = TILE >> 3

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

    region: Region
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

    def allowed(self, device: torch.device) -> Tensor:
        """Which pairs may attend, bool in the tile's shape."""
        allowed = torch.ones(self.shape, dtype=torch.bool, device=device)
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
        scoring, is_cpu = self.call.terms.scoring, devices.at_hand(self.call.q)
        return SCORED if scoring is not None and scoring.layout is not None else TILE if is_cpu else DEVICE_TILE

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

    def _of_heads(self, where: Region, steps: tuple[int, int]) -> Iterator[Tile]:
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
        widest = max(self.masks.widths) if self.masks else kv_len
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
        fits = max(1, self.largest // size)
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
        # torch refuses a factor of a product that its dtype cannot hold; as a number it would become infinite.
        scale = call.terms.scale
        self.scale = scale if abs(scale) <= torch.finfo(self.dtype).max else copysign(inf, scale)

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
