"""Additive scores sum_d w_d tanh(q_d + k_d) on the device, column by column: no [BLOCK_Q, BLOCK_KV, head_dim] tile.

A column of a tile that is in registers cannot be taken out of it, so queries and keys are read from their sources, a vector per column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import INTERPRETED, base, pointers, tanh


@triton.jit
def bend(x, PRECISE: tl.constexpr):
    """tanh(x); in hardware where the inputs are bfloat16.

    tanh.approx errs by up to 2^-11 of its result. bfloat16 rounds q + k and its tanh by 2^-9 in plain torch; float16 by 2^-11, so that errors
    of one sign break the error rule (1 problem in 9, by 6 % of the bound).
    """
    if PRECISE or INTERPRETED:
        return tanh(x)
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def column(source, d):
    """Column d of the rows that a source (matrix, b, h, rows, ok) names, in float32; NaN for what is not finite, as in every backend.

    Sources that gradients loop over end with None, for Triton 3.6: see ``arguments.MaskArgs``.
    """
    x = tl.load(pointers(source[0], source[1], source[2], source[3], source[3] * 0 + d), mask=source[4], other=0.0).to(tl.float32)
    return x + (x - x)


@triton.jit
def weight_of(args, h, d):
    """args: (weight [1, heads|1, 1, head_dim],)."""
    return tl.load(base(args[0], h * 0, h) + (h.to(tl.int64) * 0 + d) * args[0].col).to(tl.float32)


@triton.jit
def score(q_source, k_source, args, tile):
    """Scores [tile.q, tile.kv]."""
    PRECISE: tl.constexpr = q_source[0].ptr.dtype.element_ty != tl.bfloat16
    scores = tl.zeros([tile.q, tile.kv], tl.float32)
    for d in range(tile.head_dim):
        bent = bend(column(q_source, d)[:, None] + column(k_source, d)[None, :], PRECISE)
        scores = tl.fma(bent, weight_of(args, q_source[2], d), scores)
    return scores


@triton.jit
def place(acc, part, d, COLS: tl.constexpr):
    """acc [rows, COLS] with part [rows] added to column d."""
    return tl.where((tl.arange(0, COLS) == d)[None, :], acc + part[:, None], acc)


@triton.jit
def slopes(ds, rows, cols, d, PRECISE: tl.constexpr):
    """Sum over columns of ds (1 - tanh^2), [rows]; what a pair holds that got no gradient does not count."""
    bent = bend(column(rows, d)[:, None] + column(cols, d)[None, :], PRECISE)
    return tl.sum(tl.where(ds == 0.0, 0.0, ds * tl.fma(-bent, bent, 1.0)), 1)


@triton.jit
def dq(acc, ds, q_source, k_source, args, tile):
    """acc [tile.q, tile.d] and the tile's part of dq."""
    PRECISE: tl.constexpr = q_source[0].ptr.dtype.element_ty != tl.bfloat16
    for d in range(tile.head_dim):
        acc = place(acc, slopes(ds, q_source, k_source, d, PRECISE) * weight_of(args, q_source[2], d), d, tile.d)
    return acc


@triton.jit
def dk(acc, ds, q_source, k_source, args, tile):
    """acc [tile.kv, tile.d] and the tile's part of dk."""
    PRECISE: tl.constexpr = q_source[0].ptr.dtype.element_ty != tl.bfloat16
    # Transposed, so that sums over queries stay within a warp.
    ds = tl.trans(ds)
    for d in range(tile.head_dim):
        acc = place(acc, slopes(ds, k_source, q_source, d, PRECISE) * weight_of(args, q_source[2], d), d, tile.d)
    return acc


@triton.jit
def dweight(acc, ds, q_source, k_source, tile):
    """acc [tile.q, tile.d] and the tile's part of the weight's gradient, one row per query."""
    PRECISE: tl.constexpr = q_source[0].ptr.dtype.element_ty != tl.bfloat16
    for d in range(tile.head_dim):
        bent = bend(column(q_source, d)[:, None] + column(k_source, d)[None, :], PRECISE)
        acc = place(acc, tl.sum(tl.where(ds == 0.0, 0.0, ds * bent), 1), d, tile.d)
    return acc
