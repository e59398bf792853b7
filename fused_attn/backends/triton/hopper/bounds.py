"""Which key tiles the 64 rows of a block reach: mixed in [first, split) and [resume, last), full in [split, resume)."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..masks import row_intervals, tile_bounds
from ..primitives import pointers
from .lists import HEAD

# First key tile of a block that reaches nothing: beyond every tile, so that a CTA's reach comes from its other blocks.
NOWHERE = gl.constexpr(2**30)


@triton.jit
def bounds_kernel(bounds, mask, sizes, PACK: tl.constexpr, BN: tl.constexpr):
    """One program per 64 rows, PACK of them for each query: a row of ``bounds``, an int32 matrix [batch|1, 1, blocks, 4]. For masks that tensors decide."""
    blocks = tl.cdiv(sizes.q_len * PACK, 64)
    block, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    q_idx = (block * 64 + tl.arange(0, 64)) // PACK
    start, end = row_intervals(mask, b, q_idx, sizes)
    first, split, resume, last = tile_bounds(start, end, q_idx, sizes, False, BN)
    at = pointers(bounds, b, b * 0, block, b * 0)
    tl.store(at, first // BN)
    # Cut off at the last reached key, which need not be a tile's.
    tl.store(at + 1, tl.cdiv(split, BN))
    tl.store(at + 2, tl.cdiv(resume, BN))
    tl.store(at + 3, tl.cdiv(last, BN))


@gluon.jit
def part_of(part, count):
    """The numbers [low, high) that part (number, of how many) has of ``count``."""
    each = (count + part[1] - 1) // part[1]
    low = gl.minimum(part[0] * each, count)
    return low, gl.minimum(low + each, count)


@gluon.jit
def within(x, low, high):
    """x, or the nearer of the ends."""
    return gl.minimum(gl.maximum(x, low), high)


@gluon.jit
def listed_tiles(lists, b, h, tile, part):
    """Where the numbers of a tile's key tiles begin, how many of them are mixed, and how many there are; those of a part, or of all."""
    at = pointers(lists, b, h, tile, tile * 0)
    mixed = gl.load(at)
    count = mixed + gl.load(at + 1)
    first = at + HEAD
    if part is not None:
        low, high = part_of(part, count)
        first, mixed, count = first + low, within(mixed, low, high) - low, high - low
    return first, mixed, count


@gluon.jit
def block_bounds(bounds, mask, b, block, part, sizes, PACK: gl.constexpr, BN: gl.constexpr):
    """(first, split, resume, last) in key tiles within ``part``, from the table or, without one, from the block's first and last row.

    Windows move with their rows, so that those two have the outermost ends; empty rows before and behind lie at the ends of the keys.
    """
    if bounds is not None:
        at = pointers(bounds, b, b * 0, gl.minimum(block, (sizes.q_len * PACK - 1) // 64), b * 0)
        first, split, resume, last = gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)
    else:
        low, full_high = row_intervals(mask, b, block * 64 // PACK, sizes)
        full_low, high = row_intervals(mask, b, gl.minimum((block * 64 + 63) // PACK, sizes.q_len - 1), sizes)
        first = low // BN
        last = gl.maximum((high + BN - 1) // BN, first)
        split = gl.minimum(gl.maximum((full_low + BN - 1) // BN, first), last)
        resume = gl.minimum(gl.maximum(full_high // BN, split), last)
    if part is not None:
        low, high = part_of(part, (sizes.kv_len + BN - 1) // BN)
        first, split = within(first, low, high), within(split, low, high)
        resume, last = within(resume, low, high), within(last, low, high)
    nothing = (first >= last) | (block * 64 >= sizes.q_len * PACK)
    return gl.where(nothing, NOWHERE, first), split, resume, gl.where(nothing, 0, last)


@gluon.jit
def tile_reach(bounds, mask, b, tile, part, sizes, NC: gl.constexpr, PACK: gl.constexpr, BN: gl.constexpr):
    """Key tiles [first, last) that any of a CTA's NC blocks reaches; first >= last where there are none."""
    first, _, _, last = block_bounds(bounds, mask, b, tile * NC, part, sizes, PACK, BN)
    for c in gl.static_range(1, NC):
        low, _, _, high = block_bounds(bounds, mask, b, tile * NC + c, part, sizes, PACK, BN)
        first = gl.minimum(first, low)
        last = gl.maximum(last, high)
    return first, gl.maximum(last, first)
