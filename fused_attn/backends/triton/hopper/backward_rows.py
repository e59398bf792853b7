"""What the one-pass backward has done per row before and after it: statistics as its exponents take them, and dq in 16 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_attn.backends.triton.primitives import any_true, pointers, store_rows

# Beyond it the rounding of one fused multiply-add moves a probability by more than 2^-11: half a unit of float16, an eighth of bfloat16's.
LIMIT = tl.constexpr(2.0**13)
# Stands for a row without keys: an exponent less this is 0, and a product by 0 is no NaN.
NOWHERE = tl.constexpr(2.0**100)
# dq is summed in panels of 8 columns, [batch, heads, head_dim / 8, rows, 8]: the accumulator of a warpgroup's product, 4 lanes with 8 bytes
# each per row, then fills shared memory line by line. In rows of 128 bytes two rows met in the same banks, whatever the swizzle: 4 wavefronts
# per store instead of 2, 17 % of what the pass stored at head size 128.
PANEL = tl.constexpr(8)
# Rows that make one line of 128 bytes.
FOLD = tl.constexpr(4)


@triton.jit
def in_panels(sums, b, h, q_idx, sizes, tile):
    """Where rows of dq [rows, tile.d] lie in its sums, and which of these columns there are; ``sums``: a matrix of all panels' rows."""
    cols = tl.arange(0, tile.d)
    room = tl.cdiv(sizes.q_len, tile.kv) * tile.kv
    at = pointers(sums, b, h, (cols // PANEL)[None, :] * room + q_idx[:, None], (cols % PANEL)[None, :])
    return at, (cols < tile.head_dim)[None, :] & (q_idx >= 0)[:, None]


@triton.jit
def _backward_rows_kernel(stats, delta, lse, minus, sums, skipped, score, sizes, tile):
    """lse, minus [batch, heads, q_len rounded up, 1]: log2 of the rows' sums of exponentials, and -delta; zeros in ``sums``, where dq is added up.

    skipped int32 [batch, key heads]: 1 where a row's numbers are beyond what one rounding per exponent allows.
    """
    tiles = tl.cdiv(sizes.q_len, tile.q)
    q_tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // sizes.heads, bh % sizes.heads
    q_idx = q_tile * tile.q + tl.arange(0, tile.q)
    rows = q_idx < sizes.q_len
    at = pointers(stats, b * 0, b, h, q_idx)
    m, l = tl.load(at, mask=rows, other=0.0), tl.load(at + stats.batch, mask=rows, other=0.0)
    d = tl.load(pointers(delta, b, h, q_idx, q_idx * 0), mask=rows, other=0.0)
    empty = l == 0.0
    log = tl.fma(m, score.factor, tl.log2(tl.where(empty, 1.0, l)))
    fine = empty | ((tl.abs(log) <= LIMIT) & (tl.abs(d) < float("inf")))
    if tl.min(fine.to(tl.int32), 0) == 0:
        tl.store(skipped + (b * (sizes.heads // sizes.group) + h // sizes.group), 1)
    tl.store(pointers(lse, b, h, q_idx, q_idx * 0), tl.where(empty, NOWHERE, log))
    tl.store(pointers(minus, b, h, q_idx, q_idx * 0), tl.where(empty, 0.0, d * -1.0))
    at, inside = in_panels(sums, b, h, q_idx, sizes, tile)
    tl.store(at, tl.zeros([tile.q, tile.d], tl.float32), mask=inside)


@triton.jit
def _backward_dq_kernel(sums, dq, skipped, broke, score, sizes, tile):
    """dq from its float32 sums; heads of which any gradient has a NaN are marked in ``skipped``."""
    tiles = tl.cdiv(sizes.q_len, tile.q)
    q_tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // sizes.heads, bh % sizes.heads
    q_idx = q_tile * tile.q + tl.arange(0, tile.q)
    rows = q_idx < sizes.q_len
    at, inside = in_panels(sums, b, h, q_idx, sizes, tile)
    acc = tl.load(at, mask=inside & rows[:, None], other=0.0) * score.scale
    store_rows(dq, b, h, q_idx, rows, acc, tile.head_dim, tile.d)
    head = b * (sizes.heads // sizes.group) + h // sizes.group
    if any_true(acc != acc) | (tl.load(broke + head) != 0):
        tl.store(skipped + head, 1)
