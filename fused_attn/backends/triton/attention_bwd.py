"""Flash attention backward (arXiv 2205.14135): three passes that recompute the probabilities tile by tile.

``delta`` gives each row's sum of p * dp, ``dq`` walks over keys, ``dkdv`` over queries (and the query heads of a group), so every gradient
is summed by one program in a fixed order: bit-reproducible without atomics. ``bias`` is a fourth pass per trainable bias; it recomputes
the score gradients and adds them up over what the bias broadcasts along, straight into the bias' own shape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_attn.backends.base import Forward, Gradients, Incoming, gradients_without_scores, sink_gradient
from fused_attn.backends.triton import arguments
from fused_attn.backends.triton.launch import Plan
from fused_attn.layout import laid_out_like
from fused_attn.lowering import LoweredAttention
from fused_attn.score_mods import in_own_shape, on_device

from .attention_aux import row_statistics
from .attention_fwd import exponentials, product, wide_output
from .masks import allowed, mixed_tiles, query_bounds, query_shift, reach, row_intervals, tile_bounds, tile_state
from .primitives import any_true, contract, dot, is_finite, keep_tile, load_rows, pointers, store_rows
from .score_mods import apply, pull_back


@triton.jit
def _attention_bwd_delta_kernel(out, dout, dlse, probs, dprobs, delta, mask, score, dropout, sizes, tile):
    """sum(out * dout) + sum(probs * dprobs) - dlse per row; delta and dlse are [batch, heads, q_len, 1] matrices."""
    tiles = tl.cdiv(sizes.q_len, tile.q)
    q_tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // sizes.heads, bh % sizes.heads
    q_idx = q_tile * tile.q + tl.arange(0, tile.q)
    rows = q_idx < sizes.q_len
    total = tl.zeros([tile.q], tl.float32)
    if dout is not None:
        o = load_rows(out, b, h, q_idx, rows, tile.value_dim, tile.dv).to(tl.float32)
        total += tl.sum(o * load_rows(dout, b, h, q_idx, rows, tile.value_dim, tile.dv).to(tl.float32), 1)
    if dlse is not None:
        total -= tl.load(pointers(dlse, b, h, q_idx, q_idx * 0), mask=rows, other=0.0)
    if dprobs is not None:
        for first in range(0, sizes.kv_len, tile.kv):
            kv_idx = first + tl.arange(0, tile.kv)
            inside = rows[:, None] & (kv_idx < sizes.kv_len)[None, :]
            p = tl.load(pointers(probs, b, h, q_idx[:, None], kv_idx[None, :]), mask=inside, other=0.0).to(tl.float32)
            g = tl.load(pointers(dprobs, b, h, q_idx[:, None], kv_idx[None, :]), mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(p == 0.0, 0.0, p * g), 1)
    tl.store(pointers(delta, b, h, q_idx, q_idx * 0), total, mask=rows)


@triton.jit
def _gradient_tile(rows_of, keys_of, place, grads, mask, score, dropout, sizes, MASKED: tl.constexpr, DOWN_TO: tl.constexpr, tile):
    """Probabilities as they met the values, and score gradients before modification DOWN_TO, [tile.q, tile.kv] each, 0 where masked.

    rows_of: (q, dout, m, inverse, delta, row start, row end, row ok, matrices of q and dout);
    keys_of: (k, v, key indices, key ok, key head, matrices of k and v);
    place: (b, h, query indices, shift, query tile); grads: (dprobs, dscores) matrices or None.
    """
    q, dout, m, inverse, delta, start, end, row_ok, row_matrices = rows_of
    k, v, kv_idx, kv_ok, kv_h, key_matrices = keys_of
    b, h, q_idx, shift, q_tile = place
    inside = row_ok[:, None] & kv_ok[None, :]
    at = (b, h, q_idx[:, None], (q_idx + shift)[:, None], kv_idx[None, :], inside)
    raw = product(q, k, (row_matrices[0], b, h, q_idx, row_ok), (key_matrices[0], b, kv_h, kv_idx, kv_ok), score, tile)
    scores = apply(raw, score, at, len(score.functions))
    ok = inside
    if MASKED:
        state = tile_state(mask, b, h, q_tile, tl.min(kv_idx, 0) // tile.kv)
        ok = ok & allowed(mask, b, h, q_idx[:, None], kv_idx[None, :], start[:, None], end[:, None], state)
        scores = tl.where(ok, scores, float("-inf"))
    p = exponentials(scores, m[:, None], score) * inverse[:, None]
    dp = tl.zeros([tile.q, tile.kv], tl.float32)
    weights = p
    if dout is not None:
        dout_source, v_source = (row_matrices[1], b, h, q_idx, row_ok), (key_matrices[1], b, kv_h, kv_idx, kv_ok)
        dp = contract(dout, v, dout_source, v_source, score.precision, tile.resident, tile.value_dim, tile.dv)
        if dropout is not None:
            kept = keep_tile(
                dropout, (b * sizes.heads + h).to(tl.int64) * sizes.q_len, q_idx, tl.min(kv_idx, 0), sizes.kv_len, tile.q, tile.kv
            )
            dp = tl.where(kept, dp * dropout.factor, 0.0)
            weights = tl.where(kept, p * dropout.factor, 0.0)
    if grads[0] is not None:
        dp += tl.load(pointers(grads[0], b, h, q_idx[:, None], kv_idx[None, :]), mask=inside, other=0.0).to(tl.float32)
    ds = p * (dp - delta[:, None])
    if grads[1] is not None:
        ds += tl.load(pointers(grads[1], b, h, q_idx[:, None], kv_idx[None, :]), mask=inside, other=0.0).to(tl.float32)
    ds = pull_back(ds, raw, score, at, DOWN_TO)
    # A masked key may hold NaN: its products are replaced, not multiplied by zero.
    if MASKED:
        ds = tl.where(ok, ds, 0.0)
    return weights, ds


@triton.jit
def _load_query_rows(q, dout, stats, delta, mask, b, h, q_idx, sizes, tile):
    """What ``_gradient_tile`` needs of a query tile; rows without keys are read as zeros, whatever they hold."""
    rows = q_idx < sizes.q_len
    start, end = row_intervals(mask, b, q_idx, sizes)
    m, inverse = row_statistics(stats, b, h, q_idx, rows)
    row_ok = rows & (inverse != 0.0)
    q_rows = load_rows(q, b, h, q_idx, row_ok, tile.head_dim, tile.d)
    dout_rows = None
    if dout is not None:
        dout_rows = load_rows(dout, b, h, q_idx, row_ok, tile.value_dim, tile.dv)
    delta_rows = tl.load(pointers(delta, b, h, q_idx, q_idx * 0), mask=rows, other=0.0)
    return q_rows, dout_rows, m, inverse, delta_rows, start, end, row_ok, (q, dout)


@triton.jit
def _load_keys(k, v, b, kv_h, kv_idx, kv_ok, CLEAN: tl.constexpr, tile):
    k_tile = load_rows(k, b, kv_h, kv_idx, kv_ok, tile.head_dim, tile.d)
    v_tile = load_rows(v, b, kv_h, kv_idx, kv_ok, tile.value_dim, tile.dv)
    if CLEAN:
        k_tile = tl.where(is_finite(k_tile), k_tile, 0.0).to(k_tile.dtype)
    return k_tile, v_tile


@triton.jit
def _dq_step(acc, first, near, rows_of, k, v, place, grads, mask, score, dropout, sizes, MASKED: tl.constexpr, CLEAN: tl.constexpr, tile):
    kv_idx = first + tl.arange(0, tile.kv)
    kv_ok = (kv_idx >= near[0]) & (kv_idx < near[1])
    k_tile, v_tile = _load_keys(k, v, place[0], place[1] // sizes.group, kv_idx, kv_ok, CLEAN, tile)
    _, ds = _gradient_tile(
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
        tile,
    )
    if tile.d > tile.resident:
        # Read once more, as in ``_dkdv_step``.
        k_tile, v_tile = _load_keys(k, v, place[0], place[1] // sizes.group, kv_idx, kv_ok, CLEAN, tile)
    return dot(ds.to(k_tile.dtype), k_tile, acc, score.precision)


@triton.jit
def _attention_bwd_dq_kernel(q, k, v, dout, dq, stats, delta, dprobs, dscores, mask, score, dropout, sizes, tile):
    tiles = tl.cdiv(sizes.q_len, tile.q)
    q_tile, bh = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // sizes.heads, bh % sizes.heads
    q_idx = q_tile * tile.q + tl.arange(0, tile.q)
    rows_of = _load_query_rows(q, dout, stats, delta, mask, b, h, q_idx, sizes, tile)
    start, end, inverse = rows_of[5], rows_of[6], rows_of[3]
    near = reach(start, end, sizes)
    low, split, resume, high = tile_bounds(start, end, q_idx, sizes, mask.dense, tile.kv)
    place = (b, h, q_idx, query_shift(mask, b), q_tile)
    grads = (dprobs, dscores)
    acc = tl.zeros([tile.q, tile.d], tl.float32)
    for first in range(split, resume, tile.kv):
        acc = _dq_step(acc, first, near, rows_of, k, v, place, grads, mask, score, dropout, sizes, False, False, tile)
    n_left, n_right = mixed_tiles(low, split, resume, high, tile.kv)
    for i in range(n_left + n_right):
        first = tl.where(i < n_left, low + i * tile.kv, resume + (i - n_left) * tile.kv)
        if not mask.dense:
            acc = _dq_step(acc, first, near, rows_of, k, v, place, grads, mask, score, dropout, sizes, True, False, tile)
        elif tile_state(mask, b, h, q_tile, first // tile.kv) != 0:
            acc = _dq_step(acc, first, near, rows_of, k, v, place, grads, mask, score, dropout, sizes, True, False, tile)
    rows = q_idx < sizes.q_len
    store_rows(dq, b, h, q_idx, rows, acc * score.scale, tile.head_dim, tile.d)
    if mask.restricts:
        # 0 * NaN again: a row whose own statistics are finite got a NaN from a key it may not attend to.
        if any_true((acc != acc) & (rows & (inverse == inverse))[:, None]):
            acc = tl.zeros([tile.q, tile.d], tl.float32)
            for first in range(low, high, tile.kv):
                acc = _dq_step(acc, first, near, rows_of, k, v, place, grads, mask, score, dropout, sizes, True, True, tile)
            store_rows(dq, b, h, q_idx, rows, acc * score.scale, tile.head_dim, tile.d)


@triton.jit
def _dkdv_step(carry, first, h, keys_of, place, q, dout, stats, delta, grads, mask, score, dropout, sizes, MASKED: tl.constexpr, tile):
    dk, dv = carry
    b, shift = place
    q_idx = first + tl.arange(0, tile.q)
    rows_of = _load_query_rows(q, dout, stats, delta, mask, b, h, q_idx, sizes, tile)
    here = (b, h, q_idx, shift, first // tile.q)
    weights, ds = _gradient_tile(rows_of, keys_of, here, grads, mask, score, dropout, sizes, MASKED, 0, tile)
    q_rows, dout_rows = rows_of[0], rows_of[1]
    if dout is not None:
        if tile.dv > tile.resident:
            # Read once more: kept from before the scores, whole float32 rows leave no registers for them.
            dout_rows = load_rows(dout, b, h, q_idx, rows_of[7], tile.value_dim, tile.dv)
        dv = dot(tl.trans(weights.to(dout_rows.dtype)), dout_rows, dv, score.precision)
    if tile.d > tile.resident:
        q_rows = load_rows(q, b, h, q_idx, rows_of[7], tile.head_dim, tile.d)
    return dot(tl.trans(ds.to(q_rows.dtype)), q_rows, dk, score.precision), dv


@triton.jit
def touches(mask, b, h, first, kv_first, kv_tile, sizes, tile):
    """Whether any query of a tile may attend to any key of a tile, by intervals and the summary of keep."""
    q_idx = first + tl.arange(0, tile.q)
    start, end = row_intervals(mask, b, q_idx, sizes)
    low, high = reach(start, end, sizes)
    return (low < kv_first + tile.kv) & (high > kv_first) & (tile_state(mask, b, h, first // tile.q, kv_tile) != 0)


@triton.jit
def _attention_bwd_dkdv_kernel(q, k, v, dout, dk, dv, stats, delta, dprobs, dscores, mask, score, dropout, sizes, tile):
    """One program per tile of keys and key head."""
    tiles = tl.cdiv(sizes.kv_len, tile.kv)
    kv_heads = sizes.heads // sizes.group
    kv_tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, kv_h = bh // kv_heads, bh % kv_heads
    kv_first = kv_tile * tile.kv
    kv_idx = kv_first + tl.arange(0, tile.kv)
    kv_ok = kv_idx < sizes.kv_len
    k_tile, v_tile = _load_keys(k, v, b, kv_h, kv_idx, kv_ok, False, tile)
    keys_of = (k_tile, v_tile, kv_idx, kv_ok, kv_h, (k, v))
    place = (b, query_shift(mask, b))
    grads = (dprobs, dscores)
    dk_acc = tl.zeros([tile.kv, tile.d], tl.float32)
    dv_acc = tl.zeros([tile.kv, tile.dv], tl.float32)
    PER_ROW: tl.constexpr = mask.kv_start is not None or mask.kv_end is not None or mask.dense
    low, split, resume, high = query_bounds(mask, b, kv_first, sizes, PER_ROW, tile)
    n_left, n_right = mixed_tiles(low, split, resume, high, tile.q)
    for member in range(sizes.group):
        h = kv_h * sizes.group + member
        for first in range(split, resume, tile.q):
            dk_acc, dv_acc = _dkdv_step(
                (dk_acc, dv_acc), first, h, keys_of, place, q, dout, stats, delta, grads, mask, score, dropout, sizes, False, tile
            )
        for i in range(n_left + n_right):
            first = tl.where(i < n_left, low + i * tile.q, resume + (i - n_left) * tile.q)
            if not PER_ROW:
                dk_acc, dv_acc = _dkdv_step(
                    (dk_acc, dv_acc), first, h, keys_of, place, q, dout, stats, delta, grads, mask, score, dropout, sizes, True, tile
                )
            elif touches(mask, b, h, first, kv_first, kv_tile, sizes, tile):
                dk_acc, dv_acc = _dkdv_step(
                    (dk_acc, dv_acc), first, h, keys_of, place, q, dout, stats, delta, grads, mask, score, dropout, sizes, True, tile
                )
    store_rows(dk, b, kv_h, kv_idx, kv_ok, dk_acc * score.scale, tile.head_dim, tile.d)
    store_rows(dv, b, kv_h, kv_idx, kv_ok, dv_acc, tile.value_dim, tile.dv)


@triton.jit
def _attention_bwd_bias_kernel(
    q,
    k,
    v,
    dout,
    dbias,
    stats,
    delta,
    dprobs,
    dscores,
    steps,
    PLACE: tl.constexpr,
    OVER_Q: tl.constexpr,
    OVER_KV: tl.constexpr,
    mask,
    score,
    dropout,
    sizes,
    tile,
):
    """Score gradients before modification PLACE, added up over what the bias broadcasts along.

    A program owns one (query tile, key tile, batch, head) of those that ``dbias`` has and walks over the others: steps is
    (query tiles, key tiles, batches, heads) to walk over, each 1 where dbias has the dimension.
    """
    q_tiles, kv_tiles = tl.cdiv(sizes.q_len, tile.q), tl.cdiv(sizes.kv_len, tile.kv)
    own_q, own_kv, own_heads = q_tiles // steps[0], kv_tiles // steps[1], sizes.heads // steps[3]
    own = tl.program_id(0)
    q_own, kv_own = own % own_q, own // own_q % own_kv
    h_own, b_own = own // (own_q * own_kv) % own_heads, own // (own_q * own_kv * own_heads)
    total = tl.zeros([tile.q, tile.kv], tl.float32)
    for step in range(steps[0] * steps[1] * steps[2] * steps[3]):
        q_tile, kv_tile = q_own + step % steps[0], kv_own + step // steps[0] % steps[1]
        outer = step // (steps[0] * steps[1])
        h, b = h_own + outer % steps[3], b_own + outer // steps[3]
        if touches(mask, b, h, q_tile * tile.q, kv_tile * tile.kv, kv_tile, sizes, tile):
            q_idx, kv_idx = q_tile * tile.q + tl.arange(0, tile.q), kv_tile * tile.kv + tl.arange(0, tile.kv)
            rows_of = _load_query_rows(q, dout, stats, delta, mask, b, h, q_idx, sizes, tile)
            kv_ok = kv_idx < sizes.kv_len
            k_tile, v_tile = _load_keys(k, v, b, h // sizes.group, kv_idx, kv_ok, False, tile)
            place = (b, h, q_idx, query_shift(mask, b), q_tile)
            keys_of = (k_tile, v_tile, kv_idx, kv_ok, h // sizes.group, (k, v))
            _, ds = _gradient_tile(rows_of, keys_of, place, (dprobs, dscores), mask, score, dropout, sizes, True, PLACE, tile)
            total += ds
    q_idx, kv_idx = q_own * tile.q + tl.arange(0, tile.q), kv_own * tile.kv + tl.arange(0, tile.kv)
    if not OVER_Q and not OVER_KV:
        inside = (q_idx < sizes.q_len)[:, None] & (kv_idx < sizes.kv_len)[None, :]
        tl.store(pointers(dbias, b_own, h_own, q_idx[:, None], kv_idx[None, :]), total.to(dbias.ptr.dtype.element_ty), mask=inside)
    elif OVER_KV:
        tl.store(pointers(dbias, b_own, h_own, q_idx, q_idx * 0), tl.sum(total, 1).to(dbias.ptr.dtype.element_ty), mask=q_idx < sizes.q_len)
    else:
        tl.store(
            pointers(dbias, b_own, h_own, kv_idx * 0, kv_idx), tl.sum(total, 0).to(dbias.ptr.dtype.element_ty), mask=kv_idx < sizes.kv_len
        )


def attention_bwd(call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of (q, k, v, sinks, *modification tensors), None where not needed."""
    if 0 in call.shape:
        return gradients_without_scores(call, incoming, needs)
    arriving = _Arriving(call, forward, incoming)
    keys = needs[1] or needs[2]
    dq, dk, dv = (torch.empty_like(t) if need else None for t, need in ((call.q, needs[0]), (call.k, keys), (call.v, keys)))
    batch, heads, _, _ = call.shape
    if dq is not None:
        plan, kernel = arriving.plan("bwd_dq"), _attention_bwd_dq_kernel
        plan.launch(kernel, plan.q_tiles * batch * heads, (*arriving.operands, arguments.matrix(dq), *arriving.scores))
    if dk is not None and dv is not None:
        plan, kernel = arriving.plan("bwd_dkdv"), _attention_bwd_dkdv_kernel
        programs = plan.kv_tiles * batch * call.k.shape[1]
        plan.launch(kernel, programs, (*arriving.operands, arguments.matrix(dk), arguments.matrix(dv), *arriving.scores))
        dv = dv if incoming.dout is not None else torch.zeros_like(dv)
    dsinks = sink_gradient(call, forward.stats, arriving.delta) if needs[3] else None
    dmods: list[Tensor | None] = []
    for place, mod in enumerate(call.terms.mods):
        wanted = zip(on_device(mod, call.grid).tensors, needs[4 + len(dmods) :], strict=False)
        grads = tuple([_bias_gradient(call, arriving, place, t) if need else None for t, need in wanted])
        dmods += in_own_shape(grads, mod, call.grid)
    return dq, dk if needs[1] else None, dv if needs[2] else None, dsinks, *dmods


class _Arriving:
    """The arguments that every pass shares, and ``delta`` [batch, heads, q_len], which the first pass computes."""

    def __init__(self, call: LoweredAttention, forward: Forward, incoming: Incoming) -> None:
        self.call, self.more_tiles = call, incoming.dprobs is not None or incoming.dscores is not None
        self.delta = call.q.new_empty(call.shape[:3], dtype=torch.float32)
        dout, dprobs, dscores = (arguments.matrix(t) for t in (incoming.dout, incoming.dprobs, incoming.dscores))
        delta = arguments.matrix(self.delta[..., None])
        dlse = None if incoming.dlse is None else arguments.matrix(incoming.dlse[..., None])
        self.operands = (*(arguments.matrix(t) for t in (call.q, call.k, call.v)), dout)
        self.scores = (arguments.matrix(forward.stats), delta, dprobs, dscores)
        plan, wide = Plan.make(call, "aux"), wide_output(forward.stats)
        tensors = (arguments.matrix(forward.out if wide is None else wide), dout, dlse, arguments.matrix(incoming.probs), dprobs, delta)
        plan.launch(_attention_bwd_delta_kernel, plan.q_tiles * call.shape[0] * call.shape[1], tensors)

    def plan(self, stage: str) -> Plan:
        return Plan.make(self.call, stage, self.more_tiles)


def _bias_gradient(call: LoweredAttention, arriving: _Arriving, place: int, bias: Tensor) -> Tensor:
    """The gradient of a bias [batch|1, heads|1, q_len|1, kv_len|1] in its own shape."""
    batch, heads, q_len, kv_len = call.shape
    plan = arriving.plan("bwd_bias")
    over_kv = bias.shape[3] == 1 and kv_len > 1
    over_q = bias.shape[2] == 1 and q_len > 1 and not over_kv
    if over_q or over_kv:
        # Sums over rows or columns leave one value per (batch, head, row): O(length), added up over the rest by torch.
        shape = (batch, heads, q_len, 1) if over_kv else (batch, heads, 1, kv_len)
        steps = (1, plan.kv_tiles, 1, 1) if over_kv else (plan.q_tiles, 1, 1, 1)
        result = bias.new_empty(shape, dtype=torch.float32)
    else:
        steps = (1, 1, batch // bias.shape[0], heads // bias.shape[1])
        result = torch.empty_like(bias)
    programs = plan.q_tiles * plan.kv_tiles * batch * heads // (steps[0] * steps[1] * steps[2] * steps[3])
    constants = (steps, place, over_q, over_kv)
    plan.launch(_attention_bwd_bias_kernel, programs, (*arriving.operands, arguments.matrix(result), *arriving.scores, *constants))
    return laid_out_like(result.sum_to_size(bias.shape).to(bias.dtype), bias)
