"""Keys of few queries in several parts, so that a small grid fills the chip: each part a row's own, merged in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fused_attn.backends.triton import arguments
from fused_attn.backends.triton.masks import row_intervals
from fused_attn.backends.triton.primitives import pointers
from fused_attn.lowering import LoweredAttention

from .launch import launch
from .store import settled, store_statistics, strayed

# Keys of a part at least, by padded head size: K and V of 1024 keys of 128 columns are 512 KB, a part's accumulators 32 KB. Estimated.
_KEYS = {64: 2048, 128: 1024, 256: 512}
# Rows of a block, beyond which there is work enough; parts at most, which are merged as one tile.
_ROWS, _PARTS = 64, 32


def parts(kv_len: int, head_size: int, rows: int) -> int:
    """Into how many parts the keys go: by their number, the padded head size and the packed query rows alone.

    Example:
        >>> parts(16384, 128, 8), parts(16384, 128, 65), parts(1000, 128, 8)
        (16, 1, 1)
    """
    return 1 if rows > _ROWS else max(1, min(_PARTS, kv_len // _KEYS[head_size]))


@gluon.jit
def combine_kernel(
    statistics, accumulators, out, lse, stats, sinks, redo, splits, mask, score, dropout, sizes, value_dim,
    BOUNDED: gl.constexpr, PARTS: gl.constexpr, COLS: gl.constexpr,
):  # fmt: skip
    """One program per row of out [batch, heads, q_len, value_dim], a matrix.

    statistics [2, splits, rows] holds each part's base and sum, accumulators [splits, rows, value_dim] what it added up; PARTS and COLS are
    powers of two not below splits and value_dim.
    """
    every: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    number = gl.arange(0, PARTS, gl.SliceLayout(1, every))
    cols = gl.arange(0, COLS, gl.SliceLayout(0, every))
    at, total = gl.program_id(0).to(gl.int64), gl.num_programs(0).to(gl.int64)
    q, bh = (at % sizes.q_len).to(gl.int32), (at // sizes.q_len).to(gl.int32)
    b, h = bh // sizes.heads, bh % sizes.heads
    of_part = number * total + at
    hi_of = gl.load(statistics + of_part, mask=number < splits, other=float("-inf"))
    l_of = gl.load(statistics + splits * total + of_part, mask=number < splits, other=0.0)
    inside = (number < splits)[:, None] & (cols < value_dim)[None, :]
    o_of = gl.load(accumulators + of_part[:, None] * value_dim + cols[None, :], mask=inside, other=0.0)
    hi = gl.max(hi_of, 0)
    weight = gl.exp2(hi_of - gl.where(hi == float("-inf"), 0.0, hi))
    # A part without keys adds nothing whatever its values hold. A sum that is NaN has a base that may be lost in the maximum.
    o = gl.sum(gl.where((l_of == 0.0)[:, None], 0.0, o_of * weight[:, None]), 0)
    l = gl.sum(gl.where(l_of == 0.0, 0.0, l_of * weight), 0)
    start, end = row_intervals(mask, b, q, sizes)
    sink = None
    if sinks is not None:
        sink = gl.load(sinks + h).to(gl.float32)
    keys = l
    hi, l, inverse, empty, bad = settled(hi, l, sink, start, end, score, dropout, BOUNDED)
    result = gl.where(empty, 0.0, o * inverse)
    if mask.restricts or BOUNDED:
        bad = bad | strayed(o, result, keys, cols < value_dim, BOUNDED, 0)
    gl.store(redo + bh * ((sizes.q_len + 63) // 64) + q // 64, 1, mask=bad)
    store_statistics(hi, l, empty, lse, stats, at, q < sizes.q_len, total, score)
    if sinks is not None:
        gl.store(stats + (cols.to(gl.int64) + 2) * total + at, result, mask=cols < value_dim)
    gl.store(pointers(out, b, h, q, cols), result.to(out.ptr.dtype.element_ty), mask=cols < value_dim)


def room(call: LoweredAttention, splits: int) -> tuple[Tensor, Tensor]:
    """Where the parts leave bases and sums, float32 [2, splits, batch, heads, q_len], and accumulators [splits, batch, heads, q_len, value_dim]."""
    rows = call.shape[:3]
    return call.q.new_empty((2, splits, *rows), dtype=torch.float32), call.q.new_empty(
        (splits, *rows, call.v.shape[-1]), dtype=torch.float32
    )


def combine(
    call: LoweredAttention, from_parts: tuple[Tensor, Tensor], into: tuple[Any, ...], shared: tuple[Any, ...], bounded: bool, columns: int
) -> None:
    """Merges parts.

    Args:
        call: the problem.
        from_parts: what ``room`` gave, filled in.
        into: out, lse, stats, sinks and redo as the forward kernel has them.
        shared: mask, score and dropout arguments of the forward kernel.
        bounded: as the forward kernel has it.
        columns: the padded value_dim.
    """
    splits = from_parts[1].shape[0]
    out, *rest = into
    args = (*from_parts, arguments.matrix(out), *rest, splits, *shared, arguments.sizes(call), call.v.shape[-1])
    rows = call.shape[0] * call.shape[1] * call.shape[2]
    launch(combine_kernel, (rows,), (*args, bounded, max(4, 1 << (splits - 1).bit_length()), columns))
