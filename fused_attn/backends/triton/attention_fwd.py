"""Flash attention forward (arXiv 2205.14135, 2307.08691): one program per tile of queries walks over the keys it can reach.

Row statistics stay in the unit of the product where nothing but a positive scale sits before the softmax (``score.raw``): scaling then
joins the factor of the exponent, and backward recomputes exactly the same one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_attn.backends.base import Forward
from fused_attn.backends.triton import arguments
from fused_attn.backends.triton.launch import Plan, Through, itself
from fused_attn.layout import empty_out
from fused_attn.lowering import LoweredAttention

from .masks import mixed_tiles, query_shift, reach, row_intervals, tile_bounds, tile_state
from .mending import mend_out
from .primitives import LOG2E, any_true, dot, dropout_row, is_flagged, keep_tile, load_rows, store_rows
from .score_tile import base_of, excess, exponentials, sigmoid, tile_scores

# Rows that one flag of ``redo`` stands for.
REDO_ROWS = tl.constexpr(64)


@triton.jit
def _step(carry, q, q_source, k, v, first, interval, near, place, mask, score, dropout, sizes, MASKED: tl.constexpr, tile):
    """One key tile of the online softmax: carry is (acc [tile.q, tile.dv], m [tile.q], l [tile.q])."""
    acc, m, l = carry
    b, h, q_idx = place[0], place[1], place[2]
    kv_idx = first + tl.arange(0, tile.kv)
    # Keys beyond the tile's reach are never read, so garbage in padding cannot get in.
    kv_ok = (kv_idx >= near[0]) & (kv_idx < near[1])
    if not MASKED:
        kv_ok = kv_idx < sizes.kv_len
    k_tile = load_rows(k, b, h // sizes.group, kv_idx, kv_ok, tile.head_dim, tile.d)
    k_source = (k, b, h // sizes.group, kv_idx, kv_ok)
    scores, _ = tile_scores(q, k_tile, q_source, k_source, interval, place, mask, score, sizes, MASKED, tile)
    if score.sigmoid is None:
        m_new = tl.maximum(m, tl.max(scores, 1))
        bases = base_of(m_new, score)
        p = exponentials(scores, bases)
        if q.dtype == tl.float16:
            # 2^excess, up to 2^32, has no place in float16.
            over = excess(tl.where(m_new == float("-inf"), 0.0, m_new), bases)
            p = p * tl.exp2(over * -1.0)[:, None]
            alpha = tl.exp2(excess(m, bases) - over)
        else:
            # The rounding of m * factor is that of the earlier tiles' base, whose exponentials they summed.
            alpha = tl.exp2(m * bases[1] - bases[0])
        l = l * alpha + tl.sum(p, 1)
        m = m_new
    else:
        # Nothing is divided by: the sum only says that the row has a key.
        p = sigmoid(scores, score)
        l = tl.maximum(l, tl.max(tl.where(scores == float("-inf"), 0.0, 1.0), 1))
    if dropout is not None:
        kept = keep_tile(dropout, dropout_row(dropout, b, h, sizes), q_idx, first, sizes, tile.q, tile.kv)
        p = tl.where(kept, p, 0.0)
    v_tile = load_rows(v, b, h // sizes.group, kv_idx, kv_ok, tile.value_dim, tile.dv)
    p = p.to(v_tile.dtype)
    if score.sigmoid is None:
        acc = acc * alpha[:, None]
    acc = dot(p, v_tile, acc, score.precision)
    return acc, m, l


@triton.jit
def _attention_fwd_kernel(q, k, v, out, lse, stats, sinks, redo, small, mask, score, dropout, sizes, tile):
    """lse [batch, heads, q_len] and stats [2, batch, heads, q_len] are contiguous; redo as in ``run``."""
    tiles = tl.cdiv(sizes.q_len, tile.q)
    # The last query tiles come first: with a causal mask they are the longest.
    q_tile, bh = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if redo is not None:
        blocks = tl.cdiv(sizes.q_len, REDO_ROWS)
        if not is_flagged(redo + bh * blocks, q_tile * tile.q // REDO_ROWS, blocks, (tile.q + REDO_ROWS - 1) // REDO_ROWS):
            return
    b, h = bh // sizes.heads, bh % sizes.heads
    q_idx = q_tile * tile.q + tl.arange(0, tile.q)
    rows = q_idx < sizes.q_len
    interval = row_intervals(mask, b, q_idx, sizes)
    near = reach(interval[0], interval[1], sizes)
    low, split, resume, high = tile_bounds(interval[0], interval[1], q_idx, sizes, mask.dense, tile.kv)
    place = (b, h, q_idx, query_shift(mask, b), q_tile)
    q_source = (q, b, h, q_idx, rows & (interval[0] < interval[1]))
    q_rows = load_rows(q, b, h, q_idx, q_source[4], tile.head_dim, tile.d)

    acc = tl.zeros([tile.q, tile.dv], tl.float32)
    m = tl.full([tile.q], float("-inf"), tl.float32)
    l = tl.zeros([tile.q], tl.float32)
    for first in range(split, resume, tile.kv):
        acc, m, l = _step((acc, m, l), q_rows, q_source, k, v, first, interval, near, place, mask, score, dropout, sizes, False, tile)
    n_left, n_right = mixed_tiles(low, split, resume, high, tile.kv)
    # Nothing is hoisted out of the loop: on sm_90 at head size 128 with modifications that costs 456 bytes of stack, against 8.
    for i in tl.range(0, n_left + n_right, disable_licm=True):
        first = tl.where(i < n_left, low + i * tile.kv, resume + (i - n_left) * tile.kv)
        if not mask.dense:
            acc, m, l = _step((acc, m, l), q_rows, q_source, k, v, first, interval, near, place, mask, score, dropout, sizes, True, tile)
        elif tile_state(mask, b, h, q_tile, first // tile.kv) != 0:
            acc, m, l = _step((acc, m, l), q_rows, q_source, k, v, first, interval, near, place, mask, score, dropout, sizes, True, tile)

    # A row without keys, or with scores of -inf alone; its maximum is -inf too where it attended to nothing but NaN.
    empty = l == 0.0
    top = tl.where(m == float("-inf"), 0.0, m)
    if q_rows.dtype == tl.float16:
        true = tl.full([tile.q], 1.0, tl.float32)
    else:
        true = tl.exp2(excess(top, base_of(top, score)) * -1.0)
    l = l * true
    if sinks is not None:
        # Only now: probabilities next to a sink that takes nearly all the weight would vanish in 16 bits before they meet the values.
        sink = tl.load(sinks + h).to(tl.float32)
        highest = tl.maximum(m, sink)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp2((m - base) * score.factor)
        acc = acc * shrink[:, None]
        l = l * shrink + tl.exp2((sink - base) * score.factor)
        m, top = highest, base
    inverse = true / tl.where(l == 0.0, 1.0, l)
    if dropout is not None:
        inverse = inverse * dropout.factor
    # 0 * NaN: an empty row is zeros whatever its values hold.
    result = tl.where(empty[:, None], 0.0, acc * inverse[:, None])
    store_rows(out, b, h, q_idx, rows, result, tile.value_dim, tile.dv)
    unit = score.factor / LOG2E
    tl.store(
        lse + bh.to(tl.int64) * sizes.q_len + q_idx,
        tl.where(l == 0.0, float("-inf"), top * unit + tl.log(tl.where(l == 0.0, 1.0, l))),
        mask=rows,
    )
    total = tl.num_programs(0).to(tl.int64) // tiles * sizes.q_len
    tl.store(stats + bh.to(tl.int64) * sizes.q_len + q_idx, m, mask=rows)
    tl.store(stats + total + bh.to(tl.int64) * sizes.q_len + q_idx, tl.where(empty, 0.0, l), mask=rows)

    if mask.restricts:
        # 0 * NaN is NaN: a broken value reaches rows of its tile that may not attend to it. It is rare, so look only afterwards.
        if any_true((result != result) & (rows & (l == l))[:, None]):
            tl.debug_barrier()
            for first in range(q_tile * tile.q, q_tile * tile.q + tile.q, small.q):
                mend_out(q, k, v, out, stats, total, b, h, first, mask, score, dropout, sizes, small)


def wide_output(stats: Tensor) -> Tensor | None:
    """The float32 output [batch, heads, q_len, value_dim] kept behind the two row statistics, where there is one.

    With a sink nearly all of a row's weight may lie on it; the rest is then below float16's range, and the sink's gradient is made of it.
    """
    return stats[2:].permute(1, 2, 3, 0) if stats.shape[0] > 2 else None


def attention_fwd(call: LoweredAttention, stats_shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and stats (row maximum in the kernel's unit, sum of exponentials or 0 in empty rows, and see ``wide_output``)."""
    batch, heads, q_len, _ = call.shape
    out = empty_out(call.q, call.v.shape[-1])
    lse = call.q.new_empty((batch, heads, q_len), dtype=torch.float32)
    stats = call.q.new_empty(stats_shape, dtype=torch.float32)
    run(call, Forward(out, lse, stats))
    return out, lse, stats


def run(call: LoweredAttention, into: Forward, redo: Tensor | None = None, through: Through = itself) -> None:
    """Fills in out, lse and stats, all of them or the tiles of queries that ``redo`` flags.

    Args:
        call: the problem.
        into: what is written; see ``attention_fwd``.
        redo: int32 [batch, heads, blocks of 64 queries], or None for everything.
        through: what starts the kernel.
    """
    batch, heads, _, _ = call.shape
    wide = wide_output(into.stats)
    plan = Plan.make(call, "fwd")
    tensors = (call.q, call.k, call.v, into.out if wide is None else wide)
    rest = (into.lse, into.stats, call.terms.sinks, redo, arguments.small_tile(call))
    plan.launch(through(_attention_fwd_kernel), plan.q_tiles * batch * heads, (*(arguments.matrix(t) for t in tensors), *rest))
    if wide is not None:
        into.out.copy_(wide)
