"""Which elements of an accumulator tile dropout leaves: the same bits as ``primitives.keep_tile``, by one Philox call per four keys.

The tile's layout gives a pair of neighbouring lanes (queries x keys), or four lanes (keys x queries), the same four words. So the words are
computed in a layout of their own, in which every lane makes a quarter as many calls as it has elements, all different; the words
then change lanes by shuffles within a warp, for a warp keeps its rows.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fused_attn.backends.triton.primitives import dropout_row

ROWS = gl.constexpr(64)


@gluon.constexpr_function
def _by_rows(keys):
    """Words of [64 queries, keys // 4]: of the two lanes with queries g and g + 8 of a key group the even one calls for g."""
    registers = [[0, 2 << i] for i in range((keys // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[8, 0], [0, 1], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, keys // 4])


@gluon.constexpr_function
def _by_columns(queries):
    """Words of [64 // 4 keys, queries]: four lanes share keys 4 n to 4 n + 3 of queries 2 t and 2 t + 1, and the keys 8 further."""
    registers = [[0, 8 << i] for i in range((queries // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[0, 2], [0, 4], [0, 1], [2, 0], [1, 0]], [[4, 0], [8, 0]], [], [16, queries])


@gluon.jit
def _first_counters(dropout, b, h, q_idx, sizes):
    """The counter of each query's first four keys, int64."""
    first = dropout_row(dropout, b, h, sizes)
    if not dropout.is_part:
        counters = (first + q_idx) * ((sizes.kv_len + 3) // 4)
    else:
        counters = first + q_idx.to(gl.int64) * dropout.row
    return counters


@gluon.constexpr_function
def _product_of(multiplier):
    """Both halves of a product of 32 by 32 bits, by one instruction, which ``umulhi`` and ``mul`` would make two of."""
    return "{.reg .u64 whole; mul.wide.u32 whole, $2, " + str(multiplier) + "; mov.b64 {$1, $0}, whole;}"


@gluon.jit
def _product(x, MULTIPLIER: gl.constexpr):
    """High and low half of x times a constant."""
    asm: gl.constexpr = _product_of(MULTIPLIER)
    return gl.inline_asm_elementwise(asm, "=r,=r,r", [x], dtype=(gl.uint32, gl.uint32), is_pure=True, pack=1)


@gluon.jit
def _words(seed, counters):
    """The words of four keys, uint32 each: Philox4x32-7 as ``fused_attn.dropout`` defines it."""
    key0 = (seed & 0xFFFFFFFF).to(gl.uint32)
    key1 = ((seed >> 32) & 0xFFFFFFFF).to(gl.uint32)
    # The first round, whose third and fourth word are 0.
    high, c3 = _product((counters & 0xFFFFFFFF).to(gl.uint32), 0xD2511F53)
    c0, c2 = ((counters >> 32) & 0xFFFFFFFF).to(gl.uint32) ^ key0, high ^ key1
    c1 = gl.zeros_like(c0)
    for i in gl.static_range(1, 7):
        first, low1 = _product(c2, 0xCD9E8D57)
        second, low3 = _product(c0, 0xD2511F53)
        c0 = first ^ c1 ^ (key0 + ((i * 0x9E3779B9) & 0xFFFFFFFF))
        c2 = second ^ c3 ^ (key1 + ((i * 0xBB67AE85) & 0xFFFFFFFF))
        c1, c3 = low1, low3
    return c0, c1, c2, c3


@gluon.jit
def _exchanged(words, is_odd):
    """What lanes g + 8 and g of a key group take from each other: words 0 and 1 of both their queries the even one, 2 and 3 the odd one."""
    asm: gl.constexpr = """{
        .reg .pred odd; .reg .b32 a, b;
        setp.ne.u32 odd, $8, 0;
        selp.b32 a, $4, $6, odd; selp.b32 b, $5, $7, odd;
        shfl.sync.bfly.b32 a, a, 1, 31, -1; shfl.sync.bfly.b32 b, b, 1, 31, -1;
        selp.b32 $0, a, $4, odd; selp.b32 $1, b, $5, odd; selp.b32 $2, $6, a, odd; selp.b32 $3, $7, b, odd;
    }"""
    w0, w1, w2, w3 = words
    return gl.inline_asm_elementwise(
        asm,
        "=r,=r,=r,=r,r,r,r,r,r",
        [w0, w1, w2, w3, is_odd],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def words_of_rows(dropout, b, h, first_query, first_key, sizes, GROUP: gl.constexpr, LAYOUT: gl.constexpr, KEYS: gl.constexpr):
    """The word that decides on each element (see ``thinned``), uint32 [64 queries, KEYS] in the accumulator's layout.

    Args:
        dropout: ``arguments.DropoutArgs`` with shift 0.
        b: batch.
        h: query head.
        first_query: of the tile.
        first_key: of the tile, a multiple of 4.
        sizes: ``arguments.Sizes``.
        GROUP: heads packed into a tile's rows: row r is query first_query + r // GROUP of head h + r % GROUP.
        LAYOUT: of the accumulator.
        KEYS: of the tile.
    """
    layout: gl.constexpr = _by_rows(KEYS)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    counters = _first_counters(dropout, b, h + rows % GROUP, first_query + rows // GROUP, sizes)
    groups = (first_key // 4 + gl.arange(0, KEYS // 4, gl.SliceLayout(0, layout))).to(gl.uint32)
    words = _words(gl.load(dropout.seed), counters[:, None] + groups[None, :])
    a, b, c, d = _exchanged(words, (rows[:, None] & 8) + groups[None, :].to(gl.int32) * 0)
    # Query g's two words, then those of g + 8: lanes now stand for keys where their layout says 8 rows.
    mine = gl.join(gl.join(a, c), gl.join(b, d)).reshape([4, 2, 8, KEYS // 4, 2, 2]).permute([0, 4, 2, 3, 1, 5]).reshape([ROWS, KEYS])
    return gl.convert_layout(mine, LAYOUT)


@gluon.jit
def words_of_columns(dropout, b, h, first_query, first_key, sizes, LAYOUT: gl.constexpr, QUERIES: gl.constexpr):
    """``words_of_rows`` for a transposed tile, uint32 [64 keys, QUERIES]."""
    layout: gl.constexpr = _by_columns(QUERIES)
    counters = _first_counters(dropout, b, h, first_query + gl.arange(0, QUERIES, gl.SliceLayout(0, layout)), sizes)
    groups = (first_key // 4 + gl.arange(0, ROWS // 4, gl.SliceLayout(1, layout))).to(gl.uint32)
    w0, w1, w2, w3 = _words(gl.load(dropout.seed), counters[None, :] + groups[:, None])
    words = gl.join(gl.join(w0, w2), gl.join(w1, w3)).permute([0, 2, 3, 1])
    return gl.convert_layout(words.reshape([ROWS, QUERIES]), LAYOUT)


@gluon.jit
def thinned(x, words, dropout):
    """x where the words let it stay, else 0; float32 in the words' layout."""
    # Written out, for LLVM gathers the comparisons of a tile in bit fields (2580 instead of 2452 instructions per tile at head size 128).
    asm: gl.constexpr = "{.reg .pred in; setp.hs.u32 in, $2, $3; selp.f32 $0, $1, 0f00000000, in;}"
    return gl.inline_asm_elementwise(asm, "=f,f,r,r", [x, words, dropout.limit.to(gl.uint32)], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def marked(p, words, dropout):
    """Probabilities p >= 0, and -p where dropout removes: the words need no registers any longer. See ``thinned_by``."""
    asm: gl.constexpr = "{.reg .pred in; .reg .f32 minus; neg.f32 minus, $1; setp.hs.u32 in, $2, $3; selp.f32 $0, $1, minus, in;}"
    return gl.inline_asm_elementwise(asm, "=f,f,r,r", [p, words, dropout.limit.to(gl.uint32)], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def thinned_by(x, marks):
    """x where the marks let it stay, else 0; marks of ``marked`` probabilities, -0 among them."""
    asm: gl.constexpr = "{.reg .pred in; .reg .s32 sign; mov.b32 sign, $2; setp.ge.s32 in, sign, 0; selp.f32 $0, $1, 0f00000000, in;}"
    return gl.inline_asm_elementwise(asm, "=f,f,f", [x, marks], dtype=gl.float32, is_pure=True, pack=1)
