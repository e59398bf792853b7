"""Results once more, exactly, where a NaN may have come from a pair that may not attend: 0 * NaN is NaN in a product of whole tiles.

It is rare, and costs the passes that call it nothing otherwise: small tiles, one sum after the other, leave them their registers
(hoisting out of the loop for dk and dv would cost 88 bytes of stack on sm_100, Triton 3.9). What is attended and broken
(``count_broken``) explains a NaN; one that nothing explains gives way to the result from operands without NaN and infinities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gradient_tile import dkdv_step, dq_step, load_query_rows, whole_dq
from .masks import query_shift, reach, row_intervals
from .primitives import any_true, cleaned, count_broken, dot, dropout_row, keep_tile, load_rows, store_rows
from .score_tile import load_statistics, normalised, pairs_allowed, probabilities, tile_scores


@triton.jit
def mend_out(q, k, v, out, stats, total, b, h, first, mask, score, dropout, sizes, tile):
    """Rows [first, first + tile.q) of the output; ``stats`` points to the row maxima, ``total`` elements before the sums."""
    q_idx = first + tl.arange(0, tile.q)
    rows = q_idx < sizes.q_len
    r = (b * sizes.heads + h).to(tl.int64) * sizes.q_len + q_idx
    m = tl.load(stats + r, mask=rows, other=0.0)
    l = tl.load(stats + total + r, mask=rows, other=0.0)
    bases, inverse = normalised(m, l, score)
    if dropout is not None:
        inverse = inverse * dropout.factor
    before = load_rows(out, b, h, q_idx, rows, tile.value_dim, tile.dv).to(tl.float32)
    if any_true((before != before) & (l == l)[:, None]):
        interval = row_intervals(mask, b, q_idx, sizes)
        near = reach(interval[0], interval[1], sizes)
        place = (b, h, q_idx, query_shift(mask, b), 0)
        q_source = (q, b, h, q_idx, rows & (l != 0.0))
        q_rows = load_rows(q, b, h, q_idx, q_source[4], tile.head_dim, tile.d)
        hits, signs, clean = tl.zeros_like(before), tl.zeros_like(before), tl.zeros_like(before)
        for kv_first in range(near[0] // tile.kv * tile.kv, near[1], tile.kv):
            kv_idx = kv_first + tl.arange(0, tile.kv)
            kv_ok = kv_idx < sizes.kv_len
            k_tile = load_rows(k, b, h // sizes.group, kv_idx, kv_ok, tile.head_dim, tile.d)
            k_source = (k, b, h // sizes.group, kv_idx, kv_ok)
            scores, ok = tile_scores(q_rows, k_tile, q_source, k_source, interval, place, mask, score, sizes, True, tile)
            weights = probabilities(scores, bases, inverse, score)
            if dropout is not None:
                first_row = dropout_row(dropout, b, h, sizes)
                weights = tl.where(keep_tile(dropout, first_row, q_idx, kv_first, sizes, tile.q, tile.kv), weights, 0.0)
            v_tile = load_rows(v, b, h // sizes.group, kv_idx, kv_ok, tile.value_dim, tile.dv)
            clean = dot(weights.to(v_tile.dtype), cleaned(v_tile), clean, score.precision)
            hits = count_broken(tl.where(ok, 1.0, 0.0), v_tile, hits)
            v_tile = v_tile.to(tl.float32)
            sign = tl.where(v_tile == float("inf"), 1.0, tl.where(v_tile == float("-inf"), -1.0, 0.0))
            signs = dot(tl.where(ok & (weights > 0.0), 1.0, 0.0).to(tl.bfloat16), sign.to(tl.bfloat16), signs, "ieee")
        # Infinities of one sign are the right value, where others of the tile made a NaN of them.
        reached = tl.where((tl.abs(signs) == hits) & (l == l)[:, None], signs * float("inf"), float("nan"))
        after = tl.where(before != before, tl.where(hits == 0.0, clean, reached), before)
        store_rows(out, b, h, q_idx, rows, after, tile.value_dim, tile.dv)


@triton.jit
def mend_dq(q, k, v, dout, dq, stats, delta, grads, b, h, first, mask, score, dropout, sizes, tile):
    """Rows [first, first + tile.q) of dq."""
    q_idx = first + tl.arange(0, tile.q)
    rows = q_idx < sizes.q_len
    before = load_rows(dq, b, h, q_idx, rows, tile.head_dim, tile.d).to(tl.float32)
    if any_true(before != before):
        rows_of = load_query_rows(q, dout, stats, delta, mask, score, b, h, q_idx, sizes, tile)
        interval = (rows_of[5], rows_of[6])
        near = reach(interval[0], interval[1], sizes)
        place = (b, h, q_idx, query_shift(mask, b), 0)
        hits, clean = tl.zeros_like(before), tl.zeros_like(before)
        for kv_first in range(near[0] // tile.kv * tile.kv, near[1], tile.kv):
            clean = dq_step(clean, kv_first, near, rows_of, k, v, place, grads, mask, score, dropout, sizes, True, True, tile)
            kv_idx = kv_first + tl.arange(0, tile.kv)
            kv_ok = kv_idx < sizes.kv_len
            ok = rows_of[7][:, None] & kv_ok[None, :] & pairs_allowed(q_idx, kv_idx, interval, place, mask, tile)
            hits = count_broken(tl.where(ok, 1.0, 0.0), load_rows(k, b, h // sizes.group, kv_idx, kv_ok, tile.head_dim, tile.d), hits)
        after = tl.where((before != before) & (hits == 0.0), whole_dq(clean, rows_of, grads, score), before)
        store_rows(dq, b, h, q_idx, rows, after, tile.head_dim, tile.d)


@triton.jit
def _clean_dkdv(q, k, v, dout, stats, delta, grads, b, kv_h, kv_idx, span, mask, score, dropout, sizes, OF_K: tl.constexpr, tile):
    """dk or dv [tile.kv, padded] once more from queries and gradients without NaN and infinities; what is not asked for costs nothing."""
    kv_ok = kv_idx < sizes.kv_len
    k_tile = load_rows(k, b, kv_h, kv_idx, kv_ok, tile.head_dim, tile.d)
    v_tile = load_rows(v, b, kv_h, kv_idx, kv_ok, tile.value_dim, tile.dv)
    keys_of = (k_tile, v_tile, kv_idx, kv_ok, kv_h, (k, v))
    place = (b, query_shift(mask, b))
    dk, dv = tl.zeros([tile.kv, tile.d], tl.float32), tl.zeros([tile.kv, tile.dv], tl.float32)
    for member in range(sizes.group):
        h = kv_h * sizes.group + member
        for first in tl.range(span[0] // tile.q * tile.q, span[1], tile.q, num_stages=1, disable_licm=True):
            both = dkdv_step(
                (dk, dv), first, h, keys_of, place, q, dout, stats, delta, grads, mask, score, dropout, sizes, True, True, tile
            )
            if OF_K:
                dk = both[0]
            else:
                dv = both[1]
    return dk if OF_K else dv


@triton.jit
def _broken_rows(t, stats, b, kv_h, kv_idx, span, mask, score, sizes, COLS: tl.constexpr, BLOCK: tl.constexpr, tile):
    """How many broken elements of t (q, or what arrives at the output) each key is attended by, [tile.kv, BLOCK]."""
    hits = tl.zeros([tile.kv, BLOCK], tl.float32)
    for member in range(sizes.group):
        h = kv_h * sizes.group + member
        for first in range(span[0] // tile.q * tile.q, span[1], tile.q):
            q_idx = first + tl.arange(0, tile.q)
            rows = q_idx < sizes.q_len
            _, inverse = load_statistics(stats, b, h, q_idx, rows, score)
            row_ok = rows & (inverse != 0.0)
            ok = pairs_allowed(q_idx, kv_idx, row_intervals(mask, b, q_idx, sizes), (b, h, q_idx, 0, 0), mask, tile)
            ok = row_ok[:, None] & (kv_idx < sizes.kv_len)[None, :] & ok
            hits = count_broken(tl.trans(tl.where(ok, 1.0, 0.0)), load_rows(t, b, h, q_idx, row_ok, COLS, BLOCK), hits)
    return hits


@triton.jit
def mend_dkdv(q, k, v, dout, dk, dv, stats, delta, grads, b, kv_h, kv_first, span, mask, score, dropout, sizes, tile):
    """Rows [kv_first, kv_first + tile.kv) of dk and dv; ``span`` holds the queries that may attend to them."""
    kv_idx = kv_first + tl.arange(0, tile.kv)
    kv_ok = kv_idx < sizes.kv_len
    if not score.by_columns:
        before = load_rows(dk, b, kv_h, kv_idx, kv_ok, tile.head_dim, tile.d).to(tl.float32)
        if any_true(before != before):
            clean = _clean_dkdv(q, k, v, dout, stats, delta, grads, b, kv_h, kv_idx, span, mask, score, dropout, sizes, True, tile)
            hits = _broken_rows(q, stats, b, kv_h, kv_idx, span, mask, score, sizes, tile.head_dim, tile.d, tile)
            # Read once more rather than kept over the loops.
            before = load_rows(dk, b, kv_h, kv_idx, kv_ok, tile.head_dim, tile.d).to(tl.float32)
            after = tl.where((before != before) & (hits == 0.0), clean * score.scale, before)
            store_rows(dk, b, kv_h, kv_idx, kv_ok, after, tile.head_dim, tile.d)
    if dout is not None:
        before_v = load_rows(dv, b, kv_h, kv_idx, kv_ok, tile.value_dim, tile.dv).to(tl.float32)
        if any_true(before_v != before_v):
            clean_v = _clean_dkdv(q, k, v, dout, stats, delta, grads, b, kv_h, kv_idx, span, mask, score, dropout, sizes, False, tile)
            hits_v = _broken_rows(dout, stats, b, kv_h, kv_idx, span, mask, score, sizes, tile.value_dim, tile.dv, tile)
            before_v = load_rows(dv, b, kv_h, kv_idx, kv_ok, tile.value_dim, tile.dv).to(tl.float32)
            after_v = tl.where((before_v != before_v) & (hits_v == 0.0), clean_v, before_v)
            store_rows(dv, b, kv_h, kv_idx, kv_ok, after_v, tile.value_dim, tile.dv)
