"""The online softmax of one 64-row block, whose exponentials cost one multiply-add each."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..masks import query_shift
from .dropout import thinned, words_of_rows
from .keep import load_words, masked
from .modifications import exponents, modified
from .stream import packed_heads

# What of a tile's pairs a mask may cut, besides the bits of a dense one: once every row has started, the ends alone.
NOTHING, BITS_ONLY, END_ONLY, BOTH_ENDS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2), gl.constexpr(3)


@gluon.jit
def cut(s, place, count):
    """s where 0 <= place < count, else -inf.

    Written in PTX: LLVM makes a vector of the comparisons, and ptxas keeps that as bits (827 instead of 628 instructions in a masked trip
    at head size 128).
    """
    asm: gl.constexpr = "{.reg .pred in; setp.lt.u32 in, $2, $3; selp.f32 $0, $1, 0fFF800000, in;}"
    return gl.inline_asm_elementwise(asm, "=f,f,r,r", [s, place, count], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def tile_scores(s, i, n, row, shared, mask, score, sizes, MASK: gl.constexpr, BN: gl.constexpr):
    """Scores [64, BN] of key tile ``i``, the CTA's ``n``-th, as ``modifications.modified`` leaves them.

    row = (b, first head, query of each row, start, end, first row, consumer); rows hold PACK heads of one query after the other.
    """
    b, h, rows, start, end, first, consumer = row
    PACK: gl.constexpr = packed_heads(shared.q.tiles.shape)
    cols = i * BN + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
    if not score.raw:
        inside = (rows < sizes.q_len)[:, None] & (cols < sizes.kv_len)[None, :]
        head = (h + gl.arange(0, 64, gl.SliceLayout(1, s.type.layout)) % PACK)[:, None] if PACK > 1 else h
        at = (b, head, rows[:, None], (rows + query_shift(mask, b))[:, None], cols[None, :], inside)
        if shared.BIAS >= 0:
            at_tile = n * shared.consumers + consumer
            shared.bias.ring.wait_full(at_tile)
            bias = shared.bias.tile(at_tile).load(s.type.layout)
            shared.bias.ring.release(at_tile)
            # Only a bias looks for a tile, and there is but one (``loaded_bias``).
            s = modified(s, score, at, (bias,) * len(score.functions))
        else:
            s = modified(s, score, at)
    if MASK != NOTHING and mask.dense:
        s = masked(s, load_words(mask.keep, b, h, first // PACK, sizes.q_len, i * BN, sizes.kv_len, PACK, BN), BN)
    if MASK == END_ONLY:
        s = cut(s, cols[None, :], gl.maximum(end, 0)[:, None])
    if MASK == BOTH_ENDS:
        # One unsigned comparison for both ends: what lies before the start is huge.
        s = cut(s, cols[None, :] - start[:, None], gl.maximum(end - start, 0)[:, None])
    return s


@gluon.jit
def online(s, hi, l, score, SAFE: gl.constexpr, BOUNDED: gl.constexpr):
    """Probabilities [64, BN] against the rows' new bases, those bases, the sums, and what the old accumulator must be multiplied by.

    A base is the rounded product hi = fl(max * factor), so that an exponential costs one FMA. Its rounding multiplies a whole row and
    cancels in O / l, as long as it stays small (``store.LIMIT``). SAFE where a row may have met no score above -inf. BOUNDED scores all
    have the base of a score of 0 (``bounded_base``), and nothing is multiplied.
    """
    factor, lift = exponents(score)
    if BOUNDED:
        p = gl.exp2(gl.fma(s, factor, lift))
        new, alpha = hi, l
        l = l + gl.sum(p, 1)
    else:
        new = gl.maximum(hi, gl.max(s, 1) * factor)
        base = gl.where(new == float("-inf"), 0.0, new) if SAFE else new
        # Times -1 becomes part of the FMA; a minus sign is 0 - x, an addition of its own.
        p = gl.exp2(gl.fma(s, factor, base[:, None] * -1.0))
        alpha = gl.exp2(hi - base)
        l = gl.fma(l, alpha, gl.sum(p, 1))
    return p, new, l, alpha


@gluon.jit
def bounded_base(l, score):
    """The bases of bounded scores; -inf in rows without any, as elsewhere."""
    return gl.where(l == 0.0, float("-inf"), exponents(score)[1] * -1.0)


@gluon.jit
def dropped(p, i, row, shared, dropout, sizes, BN: gl.constexpr):
    """What dropout leaves of the probabilities of key tile ``i``; the factor 1 / (1 - p) comes with the row's sum."""
    if dropout is not None:
        b, h, _, _, _, first, _ = row
        PACK: gl.constexpr = packed_heads(shared.q.tiles.shape)
        LAYOUT: gl.constexpr = p.type.layout
        p = thinned(p, words_of_rows(dropout, b, h, first // PACK, i * BN, sizes, PACK, LAYOUT, BN), dropout)
    return p
