"""The one place where Triton kernels read a mask: row intervals, tile bounds, and the element test."""

import triton
import triton.language as tl

from .primitives import pointers


@triton.jit
def query_shift(mask, b):
    """Key position of query 0 in batch b; 64-bit where every batch has its own, which may lie beyond int32."""
    shift = b * 0 + mask.shift
    if mask.shifts is not None:
        shift = shift + tl.load(mask.shifts.ptr + b.to(tl.int64) * mask.shifts.batch)
    return shift


@triton.jit
def row_intervals(mask, b, q_idx, sizes):
    """First and one-past-last key of each row within [0, kv_len]; the only reader of window, kv_start and kv_end."""
    position = q_idx + query_shift(mask, b)
    start = position * 0
    end = start + sizes.kv_len
    if mask.left is not None:
        start = tl.maximum(start, position - mask.left)
    if mask.right is not None:
        end = tl.minimum(end, position + mask.right + 1)
    if mask.shifts is not None:
        start, end = tl.minimum(start, sizes.kv_len), tl.maximum(end, 0)
    inside = q_idx < sizes.q_len
    if mask.kv_start is not None:
        start = tl.maximum(start, tl.load(pointers(mask.kv_start, b, b * 0, q_idx, q_idx * 0), mask=inside, other=0))
    if mask.kv_end is not None:
        end = tl.minimum(end, tl.load(pointers(mask.kv_end, b, b * 0, q_idx, q_idx * 0), mask=inside, other=0))
    return tl.where(inside, start, 0).to(tl.int32), tl.where(inside, end, 0).to(tl.int32)


@triton.jit
def reach(start, end, sizes):
    """The keys that any row of a tile may attend to; first >= end where there are none."""
    empty = start >= end
    return tl.min(tl.where(empty, sizes.kv_len, start), 0), tl.max(tl.where(empty, 0, end), 0)


@triton.jit
def full_range(start, end, q_idx, sizes):
    """The keys that every row of a tile may attend to by its interval."""
    live = q_idx < sizes.q_len
    return tl.max(tl.where(live, start, 0), 0), tl.min(tl.where(live, end, sizes.kv_len), 0)


@triton.jit
def tile_bounds(start, end, q_idx, sizes, HAS_KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """Key tiles of a query tile as (first, split, resume, last): mixed in [first, split) and [resume, last), full in [split, resume)."""
    low, high = reach(start, end, sizes)
    full_low, full_high = full_range(start, end, q_idx, sizes)
    first = low // BLOCK * BLOCK
    last = tl.maximum(high, first)
    if HAS_KEEP:
        # Any tile of a dense mask may be mixed; its summary skips the empty ones.
        return first, last, last, last
    split = tl.minimum(tl.maximum((full_low + BLOCK - 1) // BLOCK * BLOCK, first), last)
    resume = tl.minimum(tl.maximum(full_high // BLOCK * BLOCK, split), last)
    return first, split, resume, last


@triton.jit
def mixed_tiles(first, split, resume, last, BLOCK: tl.constexpr):
    """How many mixed tiles lie before and after the full ones."""
    return (split - first + BLOCK - 1) // BLOCK, (last - resume + BLOCK - 1) // BLOCK


@triton.jit
def query_range(mask, b, kv_first, kv_end, sizes):
    """The queries whose window can reach keys [kv_first, kv_end); intervals and keep may exclude more."""
    shift = query_shift(mask, b)
    low = shift * 0
    high = low + sizes.q_len
    if mask.right is not None:
        low = tl.maximum(low, kv_first - mask.right - shift)
    if mask.left is not None:
        high = tl.minimum(high, kv_end + mask.left - shift)
    if mask.shifts is not None:
        low = tl.minimum(low, sizes.q_len)
    return low.to(tl.int32), tl.maximum(high, 0).to(tl.int32)


@triton.jit
def _within(query, mask, sizes):
    """A 64-bit query index as 32 bits, cut off at the ends of the queries."""
    if mask.shifts is not None:
        query = tl.minimum(tl.maximum(query, 0), sizes.q_len)
    return query.to(tl.int32)


@triton.jit
def query_bounds(mask, b, kv_first, sizes, PER_ROW: tl.constexpr, tile):
    """Query tiles of a key tile as (first, split, resume, last), like ``tile_bounds``; PER_ROW says that every one may be mixed."""
    kv_end = tl.minimum(kv_first + tile.kv, sizes.kv_len)
    low, high = query_range(mask, b, kv_first, kv_end, sizes)
    first = low // tile.q * tile.q
    last = tl.maximum(high, first)
    if PER_ROW:
        return first, last, last, last
    shift = query_shift(mask, b)
    full_low, full_high = low * 0, low * 0 + sizes.q_len
    if mask.right is not None:
        full_low = _within(tl.maximum(full_low, kv_end - 1 - mask.right - shift), mask, sizes)
    if mask.left is not None:
        full_high = _within(tl.minimum(full_high, kv_first + 1 + mask.left - shift), mask, sizes)
    split = tl.minimum(tl.maximum((full_low + tile.q - 1) // tile.q * tile.q, first), last)
    # The rows of the last tile beyond q_len are zeros, so it counts as full.
    full_tiles = tl.where(full_high >= sizes.q_len, tl.cdiv(sizes.q_len, tile.q), full_high // tile.q)
    return first, split, tl.minimum(tl.maximum(full_tiles * tile.q, split), last), last


@triton.jit
def tile_state(mask, b, h, q_tile, kv_tile):
    """0 where keep lets nothing of the tile through, 1 mixed, 2 everything; 2 without keep."""
    if mask.summary is None:
        return 2
    else:
        return tl.load(pointers(mask.summary, b, h, b * 0 + q_tile, b * 0 + kv_tile))


@triton.jit
def allowed(mask, b, h, q, kv, start, end, state):
    """Which pairs may attend; q, kv and the rows' start and end broadcast against each other, in either orientation."""
    ok = (kv >= start) & (kv < end)
    if mask.dense:
        # Spread first, compared then: the other way round it is no bool in Triton 3.9's interpreter. Compiled, both are one comparison.
        state = state + kv * 0
        # A tile that keeps everything needs no bytes of the mask.
        ok = ok & (state != 0)
        ok = ok & (tl.load(pointers(mask.keep, b, h, q, kv), mask=ok & (state == 1), other=1) != 0)
    return ok


@triton.jit
def _tile_summary_kernel(keep, summary, sizes, tile):
    """One program per tile of keep [batch|1, heads|1, q_len|1, kv_len|1]: 0 none, 1 mixed, 2 all."""
    kv_tiles = tl.cdiv(sizes.kv_len, tile.kv)
    q_tiles = tl.cdiv(sizes.q_len, tile.q)
    index, bh = tl.program_id(0) % (q_tiles * kv_tiles), tl.program_id(0) // (q_tiles * kv_tiles)
    b, h = bh // sizes.heads, bh % sizes.heads
    q_tile, kv_tile = index // kv_tiles, index % kv_tiles
    rows = q_tile * tile.q + tl.arange(0, tile.q)
    cols = kv_tile * tile.kv + tl.arange(0, tile.kv)
    inside = (rows < sizes.q_len)[:, None] & (cols < sizes.kv_len)[None, :]
    at = pointers(keep, b, h, rows[:, None], cols[None, :])
    some = tl.max(tl.max((tl.load(at, mask=inside, other=0) != 0).to(tl.int32), 1), 0)
    every = tl.min(tl.min((tl.load(at, mask=inside, other=1) != 0).to(tl.int32), 1), 0)
    tl.store(pointers(summary, b, h, q_tile, kv_tile), (some + every).to(tl.int8))
