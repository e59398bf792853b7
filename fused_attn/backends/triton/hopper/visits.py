"""Which query tiles each key tile meets, as lists, where tensors decide that: intervals per row, a dense mask."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_attn.backends.triton import arguments, launch
from fused_attn.backends.triton.masks import full_range, reach, row_intervals
from fused_attn.backends.triton.primitives import pointers
from fused_attn.lowering import LoweredAttention

from .walk import Lists

# Tiles that a program looks at together.
_CHUNK = 128


@triton.jit
def _reach_kernel(bounds, spans, mask, sizes, tile):
    """bounds int32 [batch|1, query tiles, 4]: keys that any row of a tile may attend to, and keys that every row may.

    spans int32 [2, batch|1, query tiles * tile.q]: each row's interval.
    """
    q_tiles = tl.cdiv(sizes.q_len, tile.q)
    b, q_tile = tl.program_id(0) // q_tiles, tl.program_id(0) % q_tiles
    q_idx = q_tile * tile.q + tl.arange(0, tile.q)
    start, end = row_intervals(mask, b, q_idx, sizes)
    low, high = reach(start, end, sizes)
    full_low, full_high = full_range(start, end, q_idx, sizes)
    to = spans + tl.program_id(0).to(tl.int64) * tile.q + tl.arange(0, tile.q)
    tl.store(to, start)
    tl.store(to + tl.num_programs(0).to(tl.int64) * tile.q, end)
    at = bounds + tl.program_id(0).to(tl.int64) * 4
    tl.store(at, low)
    tl.store(at + 1, high)
    tl.store(at + 2, full_low)
    tl.store(at + 3, full_high)


@triton.jit
def _meeting(bounds, mask, own, q_tile, kv_tile, sizes, tile):
    """(whether tiles meet, whether in full) as int32; own: (batch of the bounds, batch, key head, heads of it that count)."""
    q_tiles, kv_tiles = tl.cdiv(sizes.q_len, tile.q), tl.cdiv(sizes.kv_len, tile.kv)
    inside = (q_tile < q_tiles) & (kv_tile < kv_tiles)
    at = bounds + (own[0].to(tl.int64) * q_tiles + q_tile) * 4
    first, last = kv_tile * tile.kv, kv_tile * tile.kv + tile.kv
    meets = (tl.load(at, mask=inside, other=0) < last) & (tl.load(at + 1, mask=inside, other=0) > first)
    full = (tl.load(at + 2, mask=inside, other=0) <= first) & (tl.load(at + 3, mask=inside, other=0) >= last)
    some, every = meets.to(tl.int32), (meets & full).to(tl.int32)
    if mask.summary is not None:
        any_kept, all_kept = some * 0, some * 0 + 1
        for member in range(own[3]):
            for i in tl.static_range(tile.q // 64):
                for j in tl.static_range(tile.kv // 64):
                    q_block, kv_block = q_tile * (tile.q // 64) + i, kv_tile * (tile.kv // 64) + j
                    there = inside & (q_block * 64 < sizes.q_len) & (kv_block * 64 < sizes.kv_len)
                    state = pointers(mask.summary, own[1], own[2] * own[3] + member, q_block, kv_block)
                    any_kept = any_kept | (tl.load(state, mask=there, other=0) != 0).to(tl.int32)
                    all_kept = all_kept & (tl.load(state, mask=there, other=2) == 2).to(tl.int32)
        some, every = some & any_kept, every & all_kept
    return some, every


@triton.jit
def _own(index, tiles, kv_heads, of_bounds, group):
    b, kv_h = index // tiles // kv_heads, index // tiles % kv_heads
    return b * of_bounds, b, kv_h, group


@triton.jit
def _lists_kernel(bounds, lists, kv_heads, of_bounds, group, mask, sizes, tile, CHUNK: tl.constexpr):
    """One program per (batch, key head, key tile) that the lists tell apart: full tiles from the front, mixed ones from the back."""
    q_tiles, kv_tiles = tl.cdiv(sizes.q_len, tile.q), tl.cdiv(sizes.kv_len, tile.kv)
    row = tl.program_id(0)
    own = _own(row, kv_tiles, kv_heads, of_bounds, group)
    to = lists.tiles + row.to(tl.int64) * q_tiles
    full, mixed = row * 0, row * 0
    for first in range(0, q_tiles, CHUNK):
        q_tile = first + tl.arange(0, CHUNK)
        some, every = _meeting(bounds, mask, own, q_tile, row % kv_tiles, sizes, tile)
        partly = some - every
        tl.store(to + (full + tl.cumsum(every, 0) - 1), q_tile, mask=every != 0)
        tl.store(to + (q_tiles - mixed - tl.cumsum(partly, 0)), q_tile, mask=partly != 0)
        full, mixed = full + tl.sum(every, 0), mixed + tl.sum(partly, 0)
    tl.store(lists.counts + row * 2, full)
    tl.store(lists.counts + row * 2 + 1, mixed)


@triton.jit
def _ranks_kernel(bounds, lists, kv_heads, of_bounds, group, mask, sizes, tile, CHUNK: tl.constexpr):
    """One program per (batch, key head, query tile): how many key tiles before each meet it."""
    q_tiles, kv_tiles = tl.cdiv(sizes.q_len, tile.q), tl.cdiv(sizes.kv_len, tile.kv)
    own = _own(tl.program_id(0), q_tiles, kv_heads, of_bounds, group)
    q_tile = tl.program_id(0) % q_tiles
    rows = tl.program_id(0) // q_tiles * kv_tiles
    before = q_tile * 0
    for first in range(0, kv_tiles, CHUNK):
        kv_tile = first + tl.arange(0, CHUNK)
        some, _ = _meeting(bounds, mask, own, q_tile + kv_tile * 0, kv_tile, sizes, tile)
        at = lists.ranks + (rows + kv_tile).to(tl.int64) * q_tiles + q_tile
        tl.store(at, before + tl.cumsum(some, 0) - some, mask=kv_tile < kv_tiles)
        before += tl.sum(some, 0)


def lists(call: LoweredAttention, mask: arguments.MaskArgs, tile: arguments.Tile, ordered: bool) -> tuple[Lists, Tensor]:
    """The lists of a call, and its rows' intervals, int32 [2, batch|1, q_len rounded up to whole tiles]; ``mask`` has the states of 64 x 64 tiles of ``keep`` as its summary, see ``keep.mask_arguments``."""
    batch, heads, q_len, kv_len = call.shape
    kv_heads = call.k.shape[1]
    q_tiles, kv_tiles = -(-q_len // tile.q.value), -(-kv_len // tile.kv.value)
    form = call.terms.mask
    by_row = (form.kv_start, form.kv_end, call.terms.q_offset)
    of_bounds = batch if any(isinstance(t, Tensor) and t.shape[0] > 1 for t in by_row) else 1
    batches = batch if of_bounds > 1 or (form.keep is not None and form.keep.shape[0] > 1) else 1
    own_heads = kv_heads if form.keep is not None and form.keep.shape[1] > 1 else 1

    def table(*shape: int) -> Tensor:
        return call.q.new_empty(shape, dtype=torch.int32)

    spans = table(2, of_bounds, q_tiles * tile.q.value)
    bounds, rows = table(of_bounds, q_tiles, 4), batches * own_heads * kv_tiles
    tiles = table(rows, q_tiles)
    made = Lists(
        tiles,
        table(rows, 2),
        table(rows, q_tiles) if ordered else tiles,
        own_heads * kv_tiles * (batches > 1),
        kv_tiles * (own_heads > 1),
        int(of_bounds > 1),
    )
    own = (own_heads, int(of_bounds > 1), heads // kv_heads if own_heads > 1 else 1)
    shared = (mask, arguments.sizes(call), tile)

    def run(kernel: Any, programs: int, args: tuple[Any, ...]) -> None:
        launch.run(kernel, programs, call.q.device, args, {"num_warps": 4})

    run(_reach_kernel, of_bounds * q_tiles, (bounds, spans, *shared))
    run(_lists_kernel, rows, (bounds, made, *own, *shared, _CHUNK))
    if ordered:
        run(_ranks_kernel, batches * own_heads * q_tiles, (bounds, made, *own, *shared, _CHUNK))
    return made, spans
