"""Device functions shared by every kernel: addressing, exponentials, tanh, Philox.

Offsets are 64-bit, so tensors and strides beyond 2^31 elements work.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def is_one(argument):
    """Whether an integer argument is 1, which Triton compiles as a constant."""
    return isinstance(argument, int) and argument == 1


@triton.jit
def base(t, b, h):
    """Pointer to [b, h] of a matrix argument."""
    return t.ptr + b.to(tl.int64) * t.batch + h.to(tl.int64) * t.head


@triton.jit
def pointers(t, b, h, rows, cols):
    """Pointers to rows x cols; rows and cols are index vectors that broadcast against each other."""
    return base(t, b, h) + (rows.to(tl.int64) * t.row + cols.to(tl.int64) * t.col)


@triton.jit
def load_rows(t, b, h, rows, ok, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK], zeros where ``ok`` is False and beyond COLS columns."""
    cols = tl.arange(0, BLOCK)
    inside = ok[:, None]
    if COLS < BLOCK:
        inside = inside & (cols < COLS)[None, :]
    return tl.load(pointers(t, b, h, rows[:, None], cols[None, :]), mask=inside, other=0.0)


@triton.jit
def store_rows(t, b, h, rows, ok, values, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes [rows, BLOCK] where ``load_rows`` would read."""
    cols = tl.arange(0, BLOCK)
    inside = ok[:, None]
    if COLS < BLOCK:
        inside = inside & (cols < COLS)[None, :]
    tl.store(pointers(t, b, h, rows[:, None], cols[None, :]), values.to(t.ptr.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in float32."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as integers and would multiply those; products of 16-bit values are exact in float32.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _slice(source, first, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns [first, first + WIDTH) of the rows that a source (matrix, b, h, rows, ok) names."""
    cols = first + tl.arange(0, WIDTH)
    inside = source[4][:, None] & (cols < COLS)[None, :]
    return tl.load(pointers(source[0], source[1], source[2], source[3][:, None], cols[None, :]), mask=inside, other=0.0)


@triton.jit
def contract(a, b, a_source, b_source, PRECISION: tl.constexpr, RESIDENT: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """a b^T. Rows of more than RESIDENT columns do not fit the registers: they are read again from their sources, a slice at a time."""
    acc = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    if BLOCK > RESIDENT:
        # A loop at run time: unrolled, ptxas hoists the slices' loads above the products and spills (sm_120: 96 bytes at 16 x 16 tiles
        # of 128 columns, where the loop leaves room for 32 x 32).
        for first in range(0, BLOCK, 32):
            acc = dot(_slice(a_source, first, COLS, 32), tl.trans(_slice(b_source, first, COLS, 32)), acc, PRECISION)
        return acc
    else:
        return dot(a, tl.trans(b), acc, PRECISION)


@triton.jit
def is_finite(x):
    """False for NaN and infinities."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def any_true(x):
    """Whether any element of a 2-D bool tile is True."""
    return tl.max(x.to(tl.int32)) > 0


@triton.jit
def is_flagged(redo, first, blocks, AT_ONCE: tl.constexpr):
    """Whether any of AT_ONCE flags from ``first`` on is set, of those before ``blocks``."""
    at = first + tl.arange(0, AT_ONCE)
    return tl.max(tl.load(redo + at, mask=at < blocks, other=0), 0) != 0


@triton.jit
def cleaned(x):
    """Zeros where NaN or infinite."""
    return tl.where(is_finite(x), x, 0.0).to(x.dtype)


@triton.jit
def count_broken(ok, x, acc):
    """acc + how many NaNs and infinities of x each row meets, given 1 where it meets a row of x and 0 elsewhere: exact in 16 bits."""
    return dot(ok.to(tl.bfloat16), tl.where(is_finite(x), 0.0, 1.0).to(tl.bfloat16), acc, "ieee")


@triton.jit
def fused(a, b, c):
    """a * b + c in one rounding, in float32; the interpreter's own ``tl.fma`` has two."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def tanh(x):
    """tanh with float32's relative precision near 0 too: Cephes' polynomial below 0.625, the exponential form above."""
    square = x * x
    poly = tl.fma(square, -5.70498872745e-3, 2.06390887954e-2)
    poly = tl.fma(poly, square, -5.37397155531e-2)
    poly = tl.fma(poly, square, 1.33314422036e-1)
    poly = tl.fma(poly, square, -3.33332819422e-1)
    small = tl.fma(x * square, poly, x)
    magnitude = tl.abs(x)
    large = tl.fma(1.0 / (tl.exp2(magnitude * (2.0 * LOG2E)) + 1.0), -2.0, 1.0)
    return tl.where(magnitude < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def dropout_row(dropout, b, h, sizes):
    """Where the queries of [b, h] begin, as ``keep_tile`` takes it: a row where the call is the whole problem, else a counter."""
    if not dropout.is_part:
        return (b * sizes.heads + h).to(tl.int64) * sizes.q_len
    else:
        return b.to(tl.int64) * dropout.batch + h.to(tl.int64) * dropout.head + dropout.first


@triton.jit
def _words(dropout, rows, groups, group):
    """The four Philox words of (row, key group) pairs; rows and group broadcast against each other."""
    if groups is None:
        counter = rows + group
    else:
        counter = rows * groups + group
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    return tl.philox(tl.load(dropout.seed), low, high, zero, zero, 7)


@triton.jit
def keep_tile(dropout, first, q_idx, kv_first, sizes, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """Which elements of a tile dropout leaves, bool [BLOCK_Q, BLOCK_KV], as fused_attn.dropout defines it.

    ``first`` is a ``dropout_row`` or one for each of the queries ``q_idx`` [BLOCK_Q]; ``kv_first`` is a multiple of 4.
    """
    if not dropout.is_part:
        groups = (sizes.kv_len + 3) // 4
        row = (first + q_idx)[:, None]
    else:
        groups = None
        row = (first + q_idx.to(tl.int64) * dropout.row)[:, None]
    limit = dropout.limit.to(tl.uint32)
    if BLOCK_Q * BLOCK_KV >= 1024 and dropout.shift == 0:
        # One call serves four neighbouring keys: word j belongs to key 4 * group + j.
        w0, w1, w2, w3 = _words(dropout, row, groups, (kv_first // 4 + tl.arange(0, BLOCK_KV // 4))[None, :])
        even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
        odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
        return tl.reshape(tl.join(even, odd), (BLOCK_Q, BLOCK_KV)) != 0
    else:
        # A quarter of a small tile has fewer elements than a block has threads, and joining such replicated tiles gave wrong
        # masks on sm_80 (Triton 3.7.1, PTX simulator); here, and where the first key stands inside a group, every element makes its own call.
        kv = (kv_first + tl.arange(0, BLOCK_KV) + dropout.shift)[None, :]
        w0, w1, w2, w3 = _words(dropout, row, groups, kv // 4)
        lane = kv % 4
        word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
        return word >= limit
