"""What the one-pass backward does with one transposed tile of scores [64 keys, queries] between its products."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fused_attn.backends.triton.masks import query_shift
from fused_attn.backends.triton.primitives import pointers

from .dropout import words_of_columns
from .keep import bits
from .modifications import _pulled_back_through, exponents, modified, pulled_back


class Given(NamedTuple):
    """Gradients of probabilities and scores [batch, heads, q_len, kv_len], None where none arrive, and the bias whose gradient leaves.

    ``written`` is the modification's place, a constant, -1 for none; ``dbias`` its gradient's matrix [batch, heads, q_len, kv_len], or None
    where that leaves in the tiles in which the bias came.
    """

    dprobs: Any
    dscores: Any
    dbias: Any
    written: Any


@gluon.jit
def coordinates(h, q_tile, W: gl.constexpr, route, mask, sizes, tile, LAYOUT: gl.constexpr):
    """(b, h, queries [1, tile.q], their positions, keys [64, 1], which pairs exist): what modifications ask."""
    queries = q_tile * tile.q + gl.arange(0, tile.q, gl.SliceLayout(0, LAYOUT))
    keys = (route.kv_tile * tile.kv + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)))[:, None]
    inside = (queries < sizes.q_len)[None, :] & (keys < sizes.kv_len)
    return route.b, h, queries[None, :], (queries + query_shift(mask, route.b))[None, :], keys, inside


@gluon.jit
def _from(x, a, b):
    """x where a >= b, else 0; written out, for LLVM gathers a tile's comparisons into bit fields."""
    code: gl.constexpr = "{ .reg .pred p; setp.ge.s32 p, $2, $3; selp.f32 $0, $1, 0f00000000, p; }"
    return gl.inline_asm_elementwise(code, "=f,f,r,r", [x, a, b], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _within(x, place, count):
    """x where 0 <= place < count, else 0; written out as ``_from`` is, and unsigned: what lies before is huge."""
    code: gl.constexpr = "{ .reg .pred p; setp.lt.u32 p, $2, $3; selp.f32 $0, $1, 0f00000000, p; }"
    return gl.inline_asm_elementwise(code, "=f,f,r,r", [x, place, count], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _kept_bits(x, words):
    """x where the words keep a pair, else 0; written out as ``keep.masked`` is."""
    code: gl.constexpr = "{ .reg .pred p; setp.ne.b32 p, $2, 0; selp.f32 $0, $1, 0f00000000, p; }"
    LAYOUT: gl.constexpr = x.type.layout
    of_pairs = bits(words, LAYOUT, x.shape[1])
    return gl.inline_asm_elementwise(code, "=f,f,r", [x, of_pairs], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _near(key, mask, sizes):
    """A key's index in 32 bits; where every batch has a shift of its own it may lie beyond, and any before the first or after the last will do."""
    if mask.shifts is not None:
        key = gl.minimum(gl.maximum(key, -1), sizes.kv_len)
    return key.to(gl.int32)


@gluon.jit
def cut(x, at, words, spans, mask, sizes):
    """x [64, queries] of a mixed tile, 0 where a pair may not attend.

    words: of a dense mask (``keep.load_words``), or None; spans: shared memory with the rows' starts and ends where tensors give them, or None.
    One bound after the other: rows' intervals in registers (``masks.row_intervals``) are half a tile's worth of them, and spill.
    """
    positions, keys = at[3], at[4]
    if spans is not None:
        x = _from(x, keys, spans[0].load(gl.SliceLayout(0, x.type.layout))[None, :])
        x = _from(x, spans[1].load(gl.SliceLayout(0, x.type.layout))[None, :] - 1, keys)
    else:
        x = _from(x, sizes.kv_len - 1, keys)
        # Rows beyond the end are 0 already.
        if mask.left is not None and mask.right is not None and mask.shifts is None:
            # One comparison for both ends: two keep two numbers per column, 4 local accesses in a trip at head size 64.
            x = _within(x, keys - positions + mask.left, mask.left + mask.right + 1)
        else:
            if mask.left is not None:
                x = _from(x, keys, _near(positions - mask.left, mask, sizes))
            if mask.right is not None:
                x = _from(x, _near(positions + mask.right, mask, sizes), keys)
    if mask.dense:
        x = _kept_bits(x, words)
    return x


@gluon.jit
def from_delta(shared, st, tile, LAYOUT: gl.constexpr):
    """-delta of a stage's queries as a tile [64 keys, queries]."""
    minus = shared.minus.index(st).reshape([tile.q]).load(gl.SliceLayout(0, LAYOUT))
    return minus[None, :].broadcast_to([64, tile.q])


@gluon.jit
def probabilities(s, lse, at, tiles, score):
    """exp(score - lse) of raw products s; lse [queries] in log2; tiles: of biases, as ``modified`` takes them."""
    factor, lift = exponents(score)
    minus = lse * -1.0
    if len(score.functions) > 0:
        minus = minus + lift
    return gl.exp2(gl.fma(modified(s, score, at, tiles), factor, minus[None, :]))


@gluon.jit
def dropout_words(dropout, at, q_tile, first_key, sizes, tile, LAYOUT: gl.constexpr):
    """The word that decides on each pair, as ``dropout.words_of_rows``."""
    return words_of_columns(dropout, at[0], at[1], q_tile * tile.q, first_key, sizes, LAYOUT, tile.q)


@gluon.jit
def written_bias(ds, s, at, tiles, place, given, score):
    """Writes the gradient of a bias, what comes down to it of ds: into the tile's place in shared memory, or to global memory."""
    for i in gl.static_range(len(score.functions) - given.written):
        ds = _pulled_back_through(ds, s, score, at, tiles, len(score.functions) - 1 - i)
    if given.dbias is None:
        place.store(ds.to(place.dtype))
    else:
        gl.store(pointers(given.dbias, at[0], at[1], at[2], at[4]), ds.to(given.dbias.ptr.dtype.element_ty), mask=at[5])


@gluon.jit
def score_gradients(p, dp, s, at, tiles, place, words, spans, given, mask, score, sizes, MASKED: gl.constexpr):
    """p * dp pulled back through the modifications; dp is the gradient of the probabilities less delta."""
    if given.dprobs is not None:
        dp = dp + gl.load(pointers(given.dprobs, at[0], at[1], at[2], at[4]), mask=at[5], other=0.0).to(gl.float32)
    ds = p * dp
    if given.dscores is not None:
        ds = ds + gl.load(pointers(given.dscores, at[0], at[1], at[2], at[4]), mask=at[5], other=0.0).to(gl.float32)
    # p is 0 where a mask forbids, unless something was added; and no slope of a modification makes something of that but a NaN.
    if MASKED and given.dscores is not None:
        ds = cut(ds, at, words, spans, mask, sizes)
    if given.written >= 0:
        written_bias(ds, s, at, tiles, place, given, score)
    return pulled_back(ds, s, score, at, tiles)
