"""What the one-pass backward has done per row before and after it: statistics as its exponents take them, and dq in 16 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_attn.backends.triton.primitives import any_true, load_rows, pointers, store_rows

# Beyond it the rounding of one fused multiply-add moves a probability by more than 2^-11: half a unit of float16, an eighth of bfloat16's.
LIMIT = tl.constexpr(2.0**13)
# Stands for a row without keys: an exponent less this is 0, and a product by 0 is no NaN.
NOWHERE = tl.constexpr(2.0**100)


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
    store_rows(sums, b, h, q_idx, rows, tl.zeros([tile.q, tile.d], tl.float32), tile.head_dim, tile.d)


@triton.jit
def _backward_dq_kernel(sums, dq, skipped, broke, score, sizes, tile):
    """dq from its float32 sums; heads of which any gradient has a NaN are marked in ``skipped``."""
    tiles = tl.cdiv(sizes.q_len, tile.q)
    q_tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // sizes.heads, bh % sizes.heads
    q_idx = q_tile * tile.q + tl.arange(0, tile.q)
    rows = q_idx < sizes.q_len
    acc = load_rows(sums, b, h, q_idx, rows, tile.head_dim, tile.d) * score.scale
    store_rows(dq, b, h, q_idx, rows, acc, tile.head_dim, tile.d)
    head = b * (sizes.heads // sizes.group) + h // sizes.group
    if any_true(acc != acc) | (tl.load(broke + head) != 0):
        tl.store(skipped + head, 1)
