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


@gluon.jit
def _words(seed, counters):
    """The words of four keys, uint32 with the key as last dimension: Philox4x32-7 as ``fused_attn.dropout`` defines it."""
    a: gl.constexpr = 0xD2511F53
    b: gl.constexpr = 0xCD9E8D57
    key0 = (seed & 0xFFFFFFFF).to(gl.uint32)
    key1 = ((seed >> 32) & 0xFFFFFFFF).to(gl.uint32)
    c0 = (counters & 0xFFFFFFFF).to(gl.uint32)
    # The first round, whose third and fourth word are 0.
    product = c0.to(gl.uint64) * a
    c0 = ((counters >> 32) & 0xFFFFFFFF).to(gl.uint32) ^ key0
    c1 = gl.zeros_like(c0)
    c2 = (product >> 32).to(gl.uint32) ^ key1
    c3 = product.to(gl.uint32)
    for i in gl.static_range(1, 7):
        # One multiplication of 32 by 32 bits gives both halves, which ``umulhi`` and ``mul`` would make two of.
        k0 = key0 + ((i * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = key1 + ((i * 0xBB67AE85) & 0xFFFFFFFF)
        first = c2.to(gl.uint64) * b
        second = c0.to(gl.uint64) * a
        c0 = (first >> 32).to(gl.uint32) ^ c1 ^ k0
        c1 = first.to(gl.uint32)
        c2 = (second >> 32).to(gl.uint32) ^ c3 ^ k1
        c3 = second.to(gl.uint32)
    return gl.join(gl.join(c0, c2), gl.join(c1, c3))


@gluon.jit
def kept_of_rows(dropout, b, h, first_query, first_key, sizes, GROUP: gl.constexpr, LAYOUT: gl.constexpr, KEYS: gl.constexpr):
    """Which elements stay, bool [64 queries, KEYS] in the accumulator's layout.

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
    words = _words(gl.load(dropout.seed), counters[:, None] + groups[None, :]).reshape([ROWS, KEYS])
    return gl.convert_layout(words, LAYOUT) >= dropout.limit.to(gl.uint32)


@gluon.jit
def kept_of_columns(dropout, b, h, first_query, first_key, sizes, LAYOUT: gl.constexpr, QUERIES: gl.constexpr):
    """``kept_of_rows`` for a transposed tile, bool [64 keys, QUERIES]."""
    layout: gl.constexpr = _by_columns(QUERIES)
    counters = _first_counters(dropout, b, h, first_query + gl.arange(0, QUERIES, gl.SliceLayout(0, layout)), sizes)
    groups = (first_key // 4 + gl.arange(0, ROWS // 4, gl.SliceLayout(1, layout))).to(gl.uint32)
    words = _words(gl.load(dropout.seed), counters[None, :] + groups[:, None]).permute([0, 2, 3, 1]).reshape([ROWS, QUERIES])
    return gl.convert_layout(words, LAYOUT) >= dropout.limit.to(gl.uint32)
