"""What every pass of attention's backward computes: the probabilities and score gradients of one tile, and its part of dq, dk and dv."""

from __future__ import annotations

import triton
import triton.language as tl

from .masks import reach, row_intervals, tile_state
from .primitives import cleaned, contract, dot, dropout_row, keep_tile, load_rows, pointers
from .score_mods import apply, pull_back
from .score_tile import load_statistics, pairs_allowed, probabilities, product


@triton.jit
def gradient_tile(
    rows_of, keys_of, place, grads, mask, score, dropout, sizes, MASKED: tl.constexpr, DOWN_TO: tl.constexpr, LATER: tl.constexpr, tile
):
    """Probabilities as they met the values, and score gradients before modification DOWN_TO, [tile.q, tile.kv] each, 0 where masked.

    LATER says that both are yet to be multiplied by the rows' ``inverse``.

    rows_of: (q, dout, bases, inverse, delta, row start, row end, row ok, matrices of q and, where there is one, dout);
    keys_of: (k, v, key indices, key ok, key head, matrices of k and v);
    place: (b, h, query indices, shift, query tile); grads: (dprobs, dscores) matrices or None.
    """
    q, dout, bases, inverse, delta, start, end, row_ok, row_matrices = rows_of
    k, v, kv_idx, kv_ok, kv_h, key_matrices = keys_of
    b, h, q_idx, shift = place[0], place[1], place[2], place[3]
    inside = row_ok[:, None] & kv_ok[None, :]
    at = (b, h, q_idx[:, None], (q_idx + shift)[:, None], kv_idx[None, :], inside)
    raw = product(q, k, (row_matrices[0], b, h, q_idx, row_ok), (key_matrices[0], b, kv_h, kv_idx, kv_ok), score, tile)
    scores = apply(raw, score, at, len(score.functions))
    ok = inside
    if MASKED:
        ok = ok & pairs_allowed(q_idx, kv_idx, (start, end), place, mask, tile)
        scores = tl.where(ok, scores, float("-inf"))
    p = probabilities(scores, bases, None if LATER else inverse, score)
    if MASKED or score.by_columns:
        # In a row that attended to a NaN even exp(-inf) * inverse is one, and exp(score) * 0 where a row of zeros, which stands for no query,
        # scores high: a product never does.
        p = tl.where(ok, p, 0.0)
    dp = tl.zeros([tile.q, tile.kv], tl.float32)
    weights = p
    if len(row_matrices) == 2:
        dout_source, v_source = (row_matrices[1], b, h, q_idx, row_ok), (key_matrices[1], b, kv_h, kv_idx, kv_ok)
        dp = contract(dout, v, dout_source, v_source, score.precision, tile.resident, tile.value_dim, tile.dv)
        if dropout is not None:
            kept = keep_tile(dropout, dropout_row(dropout, b, h, sizes), q_idx, tl.min(kv_idx, 0), sizes, tile.q, tile.kv)
            dp = tl.where(kept, dp * dropout.factor, 0.0)
            weights = tl.where(kept, p * dropout.factor, 0.0)
    if grads[0] is not None:
        dp += tl.load(pointers(grads[0], b, h, q_idx[:, None], kv_idx[None, :]), mask=inside, other=0.0).to(tl.float32)
    if score.sigmoid is None:
        ds = p * (dp - delta[:, None])
    else:
        ds = p * (1.0 - p) * dp
    if grads[1] is not None:
        ds += tl.load(pointers(grads[1], b, h, q_idx[:, None], kv_idx[None, :]), mask=inside, other=0.0).to(tl.float32)
    ds = pull_back(ds, raw, score, at, DOWN_TO)
    # A masked key may hold NaN: its products are replaced, not multiplied by zero.
    if MASKED:
        ds = tl.where(ok, ds, 0.0)
    return weights, ds


@triton.jit
def load_query_rows(q, dout, stats, delta, mask, score, b, h, q_idx, sizes, tile):
    """What ``gradient_tile`` needs of a query tile; rows without keys are read as zeros, whatever they hold."""
    rows = q_idx < sizes.q_len
    start, end = row_intervals(mask, b, q_idx, sizes)
    bases, inverse = load_statistics(stats, b, h, q_idx, rows, score)
    row_ok = rows & (inverse != 0.0)
    q_rows = load_rows(q, b, h, q_idx, row_ok, tile.head_dim, tile.d)
    if dout is not None:
        dout_rows = load_rows(dout, b, h, q_idx, row_ok, tile.value_dim, tile.dv)
    delta_rows = tl.load(pointers(delta, b, h, q_idx, q_idx * 0), mask=rows, other=0.0)
    # Triton 3.6 cannot return None: without dout q's rows stand in its place, and the matrices say that nothing reads them.
    if dout is None:
        return q_rows, q_rows, bases, inverse, delta_rows, start, end, row_ok, (q,)
    else:
        return q_rows, dout_rows, bases, inverse, delta_rows, start, end, row_ok, (q, dout)


@triton.jit
def load_keys(k, v, b, kv_h, kv_idx, kv_ok, tile):
    """Keys and values of a tile."""
    return load_rows(k, b, kv_h, kv_idx, kv_ok, tile.head_dim, tile.d), load_rows(v, b, kv_h, kv_idx, kv_ok, tile.value_dim, tile.dv)


@triton.jit
def dq_step(acc, first, near, rows_of, k, v, place, grads, mask, score, dropout, sizes, MASKED: tl.constexpr, CLEAN: tl.constexpr, tile):
    """acc [tile.q, tile.d] and what one tile of keys adds to it, for ``whole_dq``; CLEAN takes NaN and infinities of the keys as zeros."""
    # Rows are normalised at the end where all of ds is a multiple of the probabilities, and what these have too much leaves their range (float16).
    LATER: tl.constexpr = grads[1] is None and score.sigmoid is None and rows_of[0].dtype != tl.float16
    kv_idx = first + tl.arange(0, tile.kv)
    kv_ok = (kv_idx >= near[0]) & (kv_idx < near[1])
    k_tile, v_tile = load_keys(k, v, place[0], place[1] // sizes.group, kv_idx, kv_ok, tile)
    _, ds = gradient_tile(
        rows_of,
        (k_tile, v_tile, kv_idx, kv_ok, place[1] // sizes.group, (k, v)),
        place,
        grads,
        mask,
        score,
        dropout,
        sizes,
        MASKED,
        0,
        LATER,
        tile,
    )
    if tile.d > tile.resident:
        # Read once more, as in ``_dkdv_step``.
        k_tile, v_tile = load_keys(k, v, place[0], place[1] // sizes.group, kv_idx, kv_ok, tile)
    if CLEAN:
        k_tile = cleaned(k_tile)
    if score.scoring is None:
        acc = dot(ds.to(k_tile.dtype), k_tile, acc, score.precision)
    elif score.by_columns:
        q_source = (rows_of[8][0], place[0], place[1], place[2], rows_of[7], None)
        k_source = (k, place[0], place[1] // sizes.group, kv_idx, kv_ok, None)
        acc = score.scoring[1](acc, ds, q_source, k_source, score.scoring_args, tile)
    else:
        acc += score.scoring[1](ds, rows_of[0], k_tile, score.scoring_args, score.precision)
    return acc


@triton.jit
def whole_dq(acc, rows_of, grads, score):
    """dq from the sum of ``dq_step``."""
    LATER: tl.constexpr = grads[1] is None and score.sigmoid is None and rows_of[0].dtype != tl.float16
    if LATER:
        acc = acc * rows_of[3][:, None]
    return acc * score.scale


@triton.jit
def dkdv_step(
    carry, first, h, keys_of, place, q, dout, stats, delta, grads, mask, score, dropout, sizes, MASKED: tl.constexpr, CLEAN: tl.constexpr, tile
):  # fmt: skip
    """carry, (dk [tile.kv, tile.d], dv [tile.kv, tile.dv]), and what one tile of queries adds to it; CLEAN as in ``dq_step``."""
    dk, dv = carry
    b, shift = place
    q_idx = first + tl.arange(0, tile.q)
    rows_of = load_query_rows(q, dout, stats, delta, mask, score, b, h, q_idx, sizes, tile)
    here = (b, h, q_idx, shift, first // tile.q)
    weights, ds = gradient_tile(rows_of, keys_of, here, grads, mask, score, dropout, sizes, MASKED, 0, False, tile)
    q_rows, dout_rows = rows_of[0], rows_of[1]
    if dout is not None:
        if tile.dv > tile.resident:
            # Read once more: kept from before the scores, whole float32 rows leave no registers for them.
            dout_rows = load_rows(dout, b, h, q_idx, rows_of[7], tile.value_dim, tile.dv)
        if CLEAN:
            dout_rows = cleaned(dout_rows)
        dv = dot(tl.trans(weights.to(dout_rows.dtype)), dout_rows, dv, score.precision)
    if tile.d > tile.resident:
        q_rows = load_rows(q, b, h, q_idx, rows_of[7], tile.head_dim, tile.d)
    if CLEAN:
        q_rows = cleaned(q_rows)
    if score.scoring is None:
        dk = dot(tl.trans(ds.to(q_rows.dtype)), q_rows, dk, score.precision)
    elif score.by_columns:
        k_source = (keys_of[5][0], b, keys_of[4], keys_of[2], keys_of[3], None)
        dk = score.scoring[2](dk, ds, (q, b, h, q_idx, rows_of[7], None), k_source, score.scoring_args, tile)
    else:
        dk += score.scoring[2](ds, q_rows, keys_of[0], score.scoring_args, score.precision)
    return dk, dv


@triton.jit
def touches(mask, b, h, first, kv_first, kv_tile, sizes, tile):
    """Whether any query of a tile may attend to any key of a tile, by intervals and the summary of keep."""
    q_idx = first + tl.arange(0, tile.q)
    start, end = row_intervals(mask, b, q_idx, sizes)
    low, high = reach(start, end, sizes)
    return (low < kv_first + tile.kv) & (high > kv_first) & (tile_state(mask, b, h, first // tile.q, kv_tile) != 0)
