"""What attention gives out besides its output, in passes of their own, so that asking for it cannot change the output.

``rows`` walks over the keys of a query tile (probabilities, scores, maximum, entropy), ``columns`` over the queries of a key tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fused_attn.auxiliary import AuxRequest
from fused_attn.backends.base import AuxTensors, Forward
from fused_attn.backends.triton import arguments
from fused_attn.backends.triton.launch import Plan
from fused_attn.lowering import LoweredAttention

from .attention_bwd import _attention_bwd_delta_kernel
from .masks import query_range, query_shift, reach, row_intervals
from .primitives import load_rows, pointers
from .score_tile import load_statistics, probabilities, row_statistics, tile_scores


@triton.jit
def _attention_rows_kernel(q, k, stats, probs, scores_out, top_out, entropy_out, mask, score, dropout, sizes, tile):
    """One program per query tile; top_out and entropy_out are [batch, heads, q_len, 1] matrices, absent ones None."""
    tiles = tl.cdiv(sizes.q_len, tile.q)
    q_tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // sizes.heads, bh % sizes.heads
    q_idx = q_tile * tile.q + tl.arange(0, tile.q)
    rows = q_idx < sizes.q_len
    interval = row_intervals(mask, b, q_idx, sizes)
    near = reach(interval[0], interval[1], sizes)
    place = (b, h, q_idx, query_shift(mask, b), q_tile)
    q_source = (q, b, h, q_idx, rows & (interval[0] < interval[1]))
    q_rows = load_rows(q, b, h, q_idx, q_source[4], tile.head_dim, tile.d)
    bases, inverse = row_statistics(stats, b, h, q_idx, rows, score)
    top = tl.full([tile.q], float("-inf"), tl.float32)
    broken = tl.zeros([tile.q], tl.int32)
    entropy = tl.zeros([tile.q], tl.float32)
    unit = score.scale if score.raw else 1.0
    for first in range(0, sizes.kv_len, tile.kv):
        kv_idx = first + tl.arange(0, tile.kv)
        near_kv = (kv_idx >= near[0]) & (kv_idx < near[1])
        k_tile = load_rows(k, b, h // sizes.group, kv_idx, near_kv, tile.head_dim, tile.d)
        k_source = (k, b, h // sizes.group, kv_idx, near_kv)
        scores, ok = tile_scores(q_rows, k_tile, q_source, k_source, interval, place, mask, score, sizes, True, tile)
        # Selected, not multiplied: in a row that attended to a NaN even exp(-inf) * inverse is one.
        p = tl.where(ok, probabilities(scores, bases, inverse, score), 0.0)
        inside = rows[:, None] & (kv_idx < sizes.kv_len)[None, :]
        if probs is not None:
            tl.store(pointers(probs, b, h, q_idx[:, None], kv_idx[None, :]), p.to(probs.ptr.dtype.element_ty), mask=inside)
        if scores_out is not None:
            tl.store(
                pointers(scores_out, b, h, q_idx[:, None], kv_idx[None, :]),
                (scores * unit).to(scores_out.ptr.dtype.element_ty),
                mask=inside,
            )
        if top_out is not None:
            # The maximum loses NaN.
            broken = tl.maximum(broken, tl.max((scores != scores).to(tl.int32), 1))
            top = tl.maximum(top, tl.max(scores, 1))
        if entropy_out is not None:
            entropy -= tl.sum(tl.where(p > 0.0, p * tl.log(tl.where(p > 0.0, p, 1.0)), p), 1)
    if top_out is not None:
        tl.store(pointers(top_out, b, h, q_idx, q_idx * 0), tl.where(broken > 0, float("nan"), top * unit), mask=rows)
    if entropy_out is not None:
        tl.store(pointers(entropy_out, b, h, q_idx, q_idx * 0), entropy, mask=rows)


@triton.jit
def _attention_columns_kernel(q, k, ready, sums, mask, score, dropout, sizes, tile):
    """One program per key tile: probabilities summed over the queries, [batch, heads, kv_len, 1]."""
    tiles = tl.cdiv(sizes.kv_len, tile.kv)
    kv_tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // sizes.heads, bh % sizes.heads
    kv_idx = kv_tile * tile.kv + tl.arange(0, tile.kv)
    kv_ok = kv_idx < sizes.kv_len
    k_tile = load_rows(k, b, h // sizes.group, kv_idx, kv_ok, tile.head_dim, tile.d)
    total = tl.zeros([tile.q, tile.kv], tl.float32)
    low, high = query_range(mask, b, kv_tile * tile.kv, kv_tile * tile.kv + tile.kv, sizes)
    for first in range(low // tile.q * tile.q, high, tile.q):
        q_idx = first + tl.arange(0, tile.q)
        rows = q_idx < sizes.q_len
        interval = row_intervals(mask, b, q_idx, sizes)
        bases, inverse = load_statistics(ready, b, h, q_idx, rows, score)
        q_source = (q, b, h, q_idx, rows & (interval[0] < interval[1]))
        q_rows = load_rows(q, b, h, q_idx, q_source[4], tile.head_dim, tile.d)
        place = (b, h, q_idx, query_shift(mask, b), first // tile.q)
        k_source = (k, b, h // sizes.group, kv_idx, kv_ok)
        scores, ok = tile_scores(q_rows, k_tile, q_source, k_source, interval, place, mask, score, sizes, True, tile)
        total += tl.where(ok, probabilities(scores, bases, inverse, score), 0.0)
    tl.store(pointers(sums, b, h, kv_idx, kv_idx * 0), tl.sum(total, 0), mask=kv_ok)


def attention_aux(call: LoweredAttention, forward: Forward, request: AuxRequest) -> AuxTensors:
    """The requested tensors; lse is not among them, the forward leaves it anyway."""
    batch, heads, q_len, kv_len = call.shape

    def room(wanted: bool, *shape: int, dtype: torch.dtype) -> torch.Tensor | None:
        return call.q.new_empty(shape, dtype=dtype) if wanted else None

    result = AuxTensors(
        room(request.probs, *call.shape, dtype=call.q.dtype),
        room(request.scores, *call.shape, dtype=request.scores_dtype or call.q.dtype),
        room(request.max_scores, batch, heads, q_len, dtype=torch.float32),
        room(request.column_sums, batch, heads, kv_len, dtype=torch.float32),
        room(request.entropy, batch, heads, q_len, dtype=torch.float32),
    )
    plan = Plan.make(call, "aux")
    q, k, stats = (arguments.matrix(t) for t in (call.q, call.k, forward.stats))
    if request.probs or request.scores or request.max_scores or request.entropy:
        kernel: Any = _attention_rows_kernel
        per_row = (arguments.matrix(None if t is None else t[..., None]) for t in (result.max_scores, result.entropy))
        plan.launch(
            kernel, plan.q_tiles * batch * heads, (q, k, stats, arguments.matrix(result.probs), arguments.matrix(result.scores), *per_row)
        )
    if result.column_sums is not None:
        kernel, ready = _attention_columns_kernel, arguments.matrix(torch.empty_like(forward.stats[:2]))
        plan.launch(_attention_bwd_delta_kernel, plan.q_tiles * batch * heads, (None, None, None, None, None, stats, None, ready))
        plan.launch(kernel, plan.kv_tiles * batch * heads, (q, k, ready, arguments.matrix(result.column_sums[..., None])))
    return result
