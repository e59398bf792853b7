"""A dense mask as the Hopper kernels read it: one bit per pair, and for each 64 x 64 tile whether it lets nothing, something or all through.

One pass over the bytes packs words of 32 keys per query, or for the backward's transposed tiles words of 32 queries per key. Dimensions
that the mask broadcasts along keep size 1. Bits beyond the ends say nothing: whoever tests them compares with the row's interval too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fused_attn.backends.triton import arguments
from fused_attn.backends.triton.primitives import pointers
from fused_attn.lowering import Terms

from . import launch

# Rows of a tile that a warpgroup works on, and queries and keys of a tile that has a state.
SIDE = gl.constexpr(64)
# What a state says; the same numbers as in ``lowering.KernelMask.tile_summary``.
NOTHING, MIXED, EVERYTHING = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@triton.jit
def _pack_kernel(keep, words, states, heads, q_len, kv_len, TRANSPOSED: tl.constexpr):
    """One program per 64 x 64 tile of keep [batch|1, heads|1, q_len|1, kv_len|1]; the three arguments are matrices.

    words: int32 [batch|1, heads|1, q_len|1, kv_len / 32|1], TRANSPOSED [batch|1, heads|1, kv_len|1, q_len / 32|1].
    states: int8 [batch|1, heads|1, q_len / 64|1, kv_len / 64|1].
    """
    q_tiles, kv_tiles = tl.cdiv(q_len, 64), tl.cdiv(kv_len, 64)
    kv_tile, rest = tl.program_id(0) % kv_tiles, tl.program_id(0) // kv_tiles
    q_tile, bh = rest % q_tiles, rest // q_tiles
    b, h = bh // heads, bh % heads
    rows, cols = q_tile * 64 + tl.arange(0, 64), kv_tile * 64 + tl.arange(0, 64)
    # Where there is but one row or column, its stride is 0: it stands for all.
    inside = ((rows < q_len) | (q_len == 1))[:, None] & ((cols < kv_len) | (kv_len == 1))[None, :]
    bits = (tl.load(pointers(keep, b, h, rows[:, None], cols[None, :]), mask=inside, other=0) != 0).to(tl.int32)
    some = tl.max(tl.max(bits, 1), 0)
    every = tl.min(tl.min(tl.where(inside, bits, 1), 1), 0)
    tl.store(pointers(states, b, h, q_tile, kv_tile), (some + every).to(tl.int8))
    half, place = tl.arange(0, 2), tl.arange(0, 32)
    if not TRANSPOSED:
        # Different bits: their sum is their union.
        found = tl.sum(tl.reshape(bits, (64, 2, 32)) << place[None, None, :], 2)
        at = kv_tile * 2 + half
        there = (rows < q_len)[:, None] & (at < tl.cdiv(kv_len, 32))[None, :]
        tl.store(pointers(words, b, h, rows[:, None], at[None, :]), found, mask=there)
    else:
        found = tl.sum(tl.reshape(bits, (2, 32, 64)) << place[None, :, None], 1)
        at = q_tile * 2 + half
        there = (at < tl.cdiv(q_len, 32))[:, None] & (cols < kv_len)[None, :]
        tl.store(pointers(words, b, h, cols[None, :], at[:, None]), found, mask=there)


def pack(keep: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Words and states of a mask.

    Args:
        keep: bool [batch|1, heads|1, q_len|1, kv_len|1], any strides, none of the sizes 0.
        transposed: words of 32 queries per key instead of words of 32 keys per query.

    Returns:
        int32 words [batch|1, heads|1, rows|1, ceil(columns / 32)|1], where bit i of word j belongs to column 32 j + i, and int8 states
        [batch|1, heads|1, ceil(q_len / 64)|1, ceil(kv_len / 64)|1]: 0 nothing may attend, 1 mixed, 2 everything may.
    """
    # What was expanded stands in memory once, and is packed once.
    for dim in range(4):
        keep = keep[(slice(None),) * dim + (slice(1),)] if keep.stride(dim) == 0 else keep
    batch, heads, q_len, kv_len = keep.shape
    rows, columns = (kv_len, q_len) if transposed else (q_len, kv_len)
    words = torch.empty((batch, heads, rows, -(-columns // 32)), dtype=torch.int32, device=keep.device)
    states = torch.empty((batch, heads, -(-q_len // 64), -(-kv_len // 64)), dtype=torch.int8, device=keep.device)
    args = (*(arguments.matrix(t) for t in (keep, words, states)), heads, q_len, kv_len, tl.constexpr(transposed))
    launch.start(_pack_kernel, (states.numel(), 1, 1), keep.device, args, 4)
    return words, states


def mask_arguments(terms: Terms, transposed: bool = False) -> arguments.MaskArgs:
    """``arguments.mask`` with words in place of ``keep`` and states as the ``summary``; for a call without empty dimensions."""
    args, keep = arguments.mask(terms, None), terms.mask.keep
    if keep is None:
        return args
    words, states = pack(keep, transposed)
    return args._replace(keep=arguments.matrix(words), summary=arguments.matrix(states))


@gluon.constexpr_function
def _places(columns):
    """The accumulator's layout of [64, columns] as [64, columns // 32, 4, 4, 2]: column 8 i + 2 j + k of a word is lane j's."""
    words = [[0, 1 << i, 0, 0, 0] for i in range((columns // 32).bit_length() - 1)]
    registers = [[0, 0, 0, 0, 1], [8, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0], *words]
    lanes = [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [4, 0, 0, 0, 0]]
    warps = [[16, 0, 0, 0, 0], [32, 0, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, columns // 32, 4, 4, 2])


@gluon.constexpr_function
def _per_word(columns):
    """The layout of [64, columns // 32] words, which lanes j hold alike."""
    return gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, _places(columns))))


@gluon.jit
def _along(DIM: gl.constexpr, SIZE: gl.constexpr, COLUMNS: gl.constexpr):
    """Indices along one of the last three dimensions, [1, 1, ...]."""
    every: gl.constexpr = _places(COLUMNS)
    if DIM == 2:
        place = gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, every)))))[
            None, None, :, None, None
        ]
    elif DIM == 3:
        place = gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, every)))))[
            None, None, None, :, None
        ]
    else:
        place = gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, every)))))[
            None, None, None, None, :
        ]
    return place


@gluon.jit
def load_words(words, b, h, first_row, row_count, first_column, column_count, GROUP: gl.constexpr, COLUMNS: gl.constexpr, chosen=None):
    """The words of a tile, int32 [64, COLUMNS // 32] in a layout of their own: COLUMNS / 16 per lane, to be loaded ahead of ``bits``.

    Args:
        words: the matrix in ``MaskArgs.keep``; rows are queries (transposed: keys), columns keys (queries).
        b: batch.
        h: query head.
        first_row: of the tile.
        row_count: of the call.
        first_column: of the tile, a multiple of 32.
        column_count: of the call.
        GROUP: heads packed into a tile's rows, as in ``dropout.words_of_rows``.
        COLUMNS: of the tile, at least 32.
        chosen: None, or int32 rows of the mask for each row of the call, by ``rows.Choice``.
    """
    layout: gl.constexpr = _per_word(COLUMNS)
    place = gl.arange(0, SIDE, gl.SliceLayout(1, layout))
    rows = (first_row + place // GROUP)[:, None]
    at = (first_column // 32 + gl.arange(0, COLUMNS // 32, gl.SliceLayout(0, layout)))[None, :]
    there = (rows < row_count) & (at < (column_count + 31) // 32)
    if chosen is not None:
        rows = gl.load(chosen + rows, mask=rows < row_count, other=0)
    return gl.load(pointers(words, b, (h + place % GROUP)[:, None], rows, at), mask=there, other=0)


@gluon.jit
def bits(words, LAYOUT: gl.constexpr, COLUMNS: gl.constexpr):
    """int32 [64, COLUMNS] in the accumulator's layout: not 0 where the words keep a pair."""
    # After one shift per word a lane's tests are with constants, one instruction each.
    shifted = words[:, :, None, None, None] >> (_along(3, 4, COLUMNS) * 2)
    found = shifted & (1 << (_along(2, 4, COLUMNS) * 8 + _along(4, 2, COLUMNS)))
    return gl.convert_layout(found.reshape([SIDE, COLUMNS]), LAYOUT)


@gluon.jit
def masked(s, words, COLUMNS: gl.constexpr):
    """s [64, COLUMNS] with -inf where the words do not keep a pair: two instructions per score."""
    # Written out, for LLVM gathers comparisons of a tile into bit fields, and that takes seven.
    code: gl.constexpr = "{ .reg .pred p; setp.ne.b32 p, $2, 0; selp.f32 $0, $1, 0fFF800000, p; }"
    layout: gl.constexpr = s.type.layout
    return gl.inline_asm_elementwise(code, "=f,f,r", [s, bits(words, layout, COLUMNS)], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def kept_place(place, words, COLUMNS: gl.constexpr):
    """int32 place [64, COLUMNS], -1 where the words do not keep a pair; as ``masked``."""
    code: gl.constexpr = "{ .reg .pred p; setp.ne.b32 p, $2, 0; selp.b32 $0, $1, -1, p; }"
    layout: gl.constexpr = place.type.layout
    return gl.inline_asm_elementwise(code, "=r,r,r", [place, bits(words, layout, COLUMNS)], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def state(mask, b, h, q_block, kv_block, sizes, Q_BLOCKS: gl.constexpr, KV_BLOCKS: gl.constexpr):
    """The state of a tile of Q_BLOCKS x KV_BLOCKS blocks of 64 from that of each, which begin at block (q_block, kv_block)."""
    low = gl.to_tensor(EVERYTHING)
    high = gl.to_tensor(NOTHING)
    # Blocks beyond the end count as the last one.
    last_q = (sizes.q_len + SIDE - 1) // SIDE - 1
    last_kv = (sizes.kv_len + SIDE - 1) // SIDE - 1
    for i in gl.static_range(Q_BLOCKS):
        for j in gl.static_range(KV_BLOCKS):
            q, kv = gl.minimum(q_block + i, last_q), gl.minimum(kv_block + j, last_kv)
            found = gl.load(pointers(mask.summary, b, h, q, kv)).to(gl.int32)
            low, high = gl.minimum(low, found), gl.maximum(high, found)
    return gl.where(low == high, low, MIXED)
