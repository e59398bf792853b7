"""Flash attention backward (arXiv 2205.14135): three passes that recompute the probabilities tile by tile.

``delta`` gives each row's sum of p * dp, ``dq`` walks over keys, ``dkdv`` over queries (and the query heads of a group), so every gradient
is summed by one program in a fixed order: bit-reproducible without atomics. ``attention_bwd_bias`` is a fourth pass per trainable bias, ``attention_bwd_weight`` one for additive attention's weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_attn.backends.base import Forward, Gradients, Incoming, gradients_without_scores, sink_gradient
from fused_attn.backends.triton import arguments
from fused_attn.backends.triton.launch import Plan, Through, itself
from fused_attn.lowering import LoweredAttention
from fused_attn.score_mods import in_own_shape, on_device

from .attention_bwd_bias import bias_gradient
from .attention_bwd_weight import weight_gradient
from .attention_fwd import wide_output
from .gradient_tile import dkdv_step, dq_step, load_keys, load_query_rows, touches, whole_dq
from .masks import mixed_tiles, query_bounds, query_shift, reach, row_intervals, tile_bounds, tile_state
from .mending import mend_dkdv, mend_dq
from .primitives import any_true, is_one, load_rows, pointers, store_rows
from .score_tile import pairs_allowed, row_statistics, store_statistics


@triton.jit
def _attention_bwd_delta_kernel(out, dout, dlse, probs, dprobs, stats, delta, ready, mask, score, dropout, sizes, tile):
    """What the other passes read of each row: sum(out * dout) + sum(probs * dprobs) - dlse, and its statistics as ``store_statistics``.

    delta, None where nobody asks, and dlse are [batch, heads, q_len, 1] matrices.
    """
    tiles = tl.cdiv(sizes.q_len, tile.q)
    q_tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // sizes.heads, bh % sizes.heads
    q_idx = q_tile * tile.q + tl.arange(0, tile.q)
    rows = q_idx < sizes.q_len
    bases, inverse = row_statistics(stats, b, h, q_idx, rows, score)
    store_statistics(ready, b, h, q_idx, rows, bases, inverse, score)
    if delta is not None:
        place = (b, h, q_idx, 0, q_tile)
        total = _delta(out, dout, dlse, probs, dprobs, place, rows, mask, sizes, tile)
        tl.store(pointers(delta, b, h, q_idx, q_idx * 0), total, mask=rows)


@triton.jit
def _delta(out, dout, dlse, probs, dprobs, place, rows, mask, sizes, tile):
    """The sum of the rows at ``place`` [tile.q]."""
    b, h, q_idx = place[0], place[1], place[2]
    total = tl.zeros([tile.q], tl.float32)
    if dout is not None:
        o = load_rows(out, b, h, q_idx, rows, tile.value_dim, tile.dv).to(tl.float32)
        g = load_rows(dout, b, h, q_idx, rows, tile.value_dim, tile.dv).to(tl.float32)
        # A row without keys is zeros whatever arrives at it, and 0 * NaN is NaN.
        total += tl.sum(tl.where(o == 0.0, 0.0, o * g), 1)
    if dlse is not None:
        total -= tl.load(pointers(dlse, b, h, q_idx, q_idx * 0), mask=rows, other=0.0)
    if dprobs is not None:
        interval = row_intervals(mask, b, q_idx, sizes)
        for first in range(0, sizes.kv_len, tile.kv):
            kv_idx = first + tl.arange(0, tile.kv)
            inside = rows[:, None] & (kv_idx < sizes.kv_len)[None, :]
            p = tl.load(pointers(probs, b, h, q_idx[:, None], kv_idx[None, :]), mask=inside, other=0.0).to(tl.float32)
            inside = inside & pairs_allowed(q_idx, kv_idx, interval, place, mask, tile)
            arriving = tl.load(pointers(dprobs, b, h, q_idx[:, None], kv_idx[None, :]), mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(p * arriving, 1)
    return total


@triton.jit
def _attention_bwd_dq_kernel(q, k, v, dout, dq, stats, delta, dprobs, dscores, redo, small, mask, score, dropout, sizes, tile):
    tiles = tl.cdiv(sizes.q_len, tile.q)
    q_tile, bh = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // sizes.heads, bh % sizes.heads
    if redo is not None:
        if tl.load(redo + bh // sizes.group) == 0:
            return
    q_idx = q_tile * tile.q + tl.arange(0, tile.q)
    rows_of = load_query_rows(q, dout, stats, delta, mask, score, b, h, q_idx, sizes, tile)
    start, end, inverse = rows_of[5], rows_of[6], rows_of[3]
    near = reach(start, end, sizes)
    low, split, resume, high = tile_bounds(start, end, q_idx, sizes, mask.dense, tile.kv)
    place = (b, h, q_idx, query_shift(mask, b), q_tile)
    grads = (dprobs, dscores)
    acc = tl.zeros([tile.q, tile.d], tl.float32)
    for first in range(split, resume, tile.kv):
        acc = dq_step(acc, first, near, rows_of, k, v, place, grads, mask, score, dropout, sizes, False, False, tile)
    n_left, n_right = mixed_tiles(low, split, resume, high, tile.kv)
    # As in the forward: 176 bytes of stack against none (sm_80, head size 64, with modifications).
    for i in tl.range(0, n_left + n_right, disable_licm=True):
        first = tl.where(i < n_left, low + i * tile.kv, resume + (i - n_left) * tile.kv)
        if not mask.dense:
            acc = dq_step(acc, first, near, rows_of, k, v, place, grads, mask, score, dropout, sizes, True, False, tile)
        elif tile_state(mask, b, h, q_tile, first // tile.kv) != 0:
            acc = dq_step(acc, first, near, rows_of, k, v, place, grads, mask, score, dropout, sizes, True, False, tile)
    rows = q_idx < sizes.q_len
    store_rows(dq, b, h, q_idx, rows, whole_dq(acc, rows_of, grads, score), tile.head_dim, tile.d)
    # 0 * NaN: a row whose own statistics are finite may have got a NaN from a key it may not attend to, an empty one from any key.
    # Column by column, such a pair is left out (``additive.slopes``).
    if not score.by_columns:
        if any_true((acc != acc) & (rows & (inverse == inverse))[:, None]):
            tl.debug_barrier()
            for first in range(q_tile * tile.q, q_tile * tile.q + tile.q, small.q):
                mend_dq(q, k, v, dout, dq, stats, delta, grads, b, h, first, mask, score, dropout, sizes, small)


@triton.jit
def _attention_bwd_dkdv_kernel(q, k, v, dout, dk, dv, stats, delta, dprobs, dscores, redo, small, mask, score, dropout, sizes, tile):
    """One program per tile of keys and key head."""
    tiles = tl.cdiv(sizes.kv_len, tile.kv)
    kv_heads = sizes.heads // sizes.group
    kv_tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, kv_h = bh // kv_heads, bh % kv_heads
    if redo is not None:
        if tl.load(redo + bh) == 0:
            return
    kv_first = kv_tile * tile.kv
    kv_idx = kv_first + tl.arange(0, tile.kv)
    kv_ok = kv_idx < sizes.kv_len
    k_tile, v_tile = load_keys(k, v, b, kv_h, kv_idx, kv_ok, tile)
    keys_of = (k_tile, v_tile, kv_idx, kv_ok, kv_h, (k, v))
    place = (b, query_shift(mask, b))
    grads = (dprobs, dscores)
    dk_acc = tl.zeros([tile.kv, tile.d], tl.float32)
    dv_acc = tl.zeros([tile.kv, tile.dv], tl.float32)
    # Column by column, a second loop for full tiles costs more registers than it saves tests: 128 bytes of stack (sm_120, float32, Triton 3.8).
    ONE_LOOP: tl.constexpr = score.by_columns and tile.d > 128
    PER_ROW: tl.constexpr = mask.kv_start is not None or mask.kv_end is not None or mask.dense or ONE_LOOP
    low, split, resume, high = query_bounds(mask, b, kv_first, sizes, PER_ROW, tile)
    n_left, n_right = mixed_tiles(low, split, resume, high, tile.q)
    # 0, which the compiler may not know: a loop that runs once at most has the zeros of its sums written behind the fence of the warpgroup
    # products that add to them (the simulator reports it).
    nothing = 0
    if is_one(sizes.q_len):
        nothing = tl.program_id(1)
    for member in range(sizes.group):
        h = kv_h * sizes.group + member
        for first in range(split, resume + nothing, tile.q):
            dk_acc, dv_acc = dkdv_step(
                (dk_acc, dv_acc), first, h, keys_of, place, q, dout, stats, delta, grads, mask, score, dropout, sizes, False, False, tile
            )
        for i in tl.range(0, n_left + n_right + nothing, disable_licm=True):
            first = tl.where(i < n_left, low + i * tile.q, resume + (i - n_left) * tile.q)
            if not PER_ROW:
                dk_acc, dv_acc = dkdv_step(
                    (dk_acc, dv_acc), first, h, keys_of, place, q, dout, stats, delta, grads, mask, score, dropout, sizes, True, False, tile
                )
            elif touches(mask, b, h, first, kv_first, kv_tile, sizes, tile):
                dk_acc, dv_acc = dkdv_step(
                    (dk_acc, dv_acc), first, h, keys_of, place, q, dout, stats, delta, grads, mask, score, dropout, sizes, True, False, tile
                )
    store_rows(dk, b, kv_h, kv_idx, kv_ok, dk_acc * score.scale, tile.head_dim, tile.d)
    store_rows(dv, b, kv_h, kv_idx, kv_ok, dv_acc, tile.value_dim, tile.dv)
    # 0 * NaN: a key may have got a NaN from a query that may not attend to it, or whose row is empty.
    if score.by_columns:
        broken = any_true(dv_acc != dv_acc)
    else:
        broken = any_true(dk_acc != dk_acc) | any_true(dv_acc != dv_acc)
    if broken:
        tl.debug_barrier()
        for first in range(kv_first, kv_first + tile.kv, small.kv):
            mend_dkdv(q, k, v, dout, dk, dv, stats, delta, grads, b, kv_h, first, (low, high), mask, score, dropout, sizes, small)


def attention_bwd(call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of (q, k, v, sinks, *modification tensors), None where not needed."""
    if 0 in call.shape:
        return gradients_without_scores(call, incoming, needs)
    arriving = Arriving.of(call, forward, incoming)
    dq, dk, dv = room(call, needs)
    products(arriving, (dq, dk, dv))
    if dv is not None and incoming.dout is None:
        dv.zero_()
    return dq, dk if needs[1] else None, dv if needs[2] else None, *other_gradients(arriving, forward, needs)


def room(call: LoweredAttention, needs: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Memory for dq, dk and dv; the last two come out of one pass."""
    keys = needs[1] or needs[2]
    dq, dk, dv = (torch.empty_like(t) if need else None for t, need in ((call.q, needs[0]), (call.k, keys), (call.v, keys)))
    return dq, dk, dv


def products(arriving: Arriving, into: Sequence[Tensor | None], redo: Tensor | None = None, through: Through = itself) -> None:
    """Fills in dq, dk and dv, all of them or those of the key heads that ``redo``, int32 [batch, kv_heads], flags; ``through`` starts kernels."""
    call, (dq, dk, dv) = arriving.call, into
    batch, heads, _, _ = call.shape
    small = arguments.small_tile(call)
    if dq is not None:
        plan, kernel = arriving.plan("bwd_dq"), through(_attention_bwd_dq_kernel)
        plan.launch(kernel, plan.q_tiles * batch * heads, (*arriving.operands, arguments.matrix(dq), *arriving.scores, redo, small))
    if dk is not None and dv is not None:
        plan, kernel = arriving.plan("bwd_dkdv"), through(_attention_bwd_dkdv_kernel)
        programs = plan.kv_tiles * batch * call.k.shape[1]
        both = (arguments.matrix(dk), arguments.matrix(dv))
        plan.launch(kernel, programs, (*arriving.operands, *both, *arriving.scores, redo, small))


def other_gradients(arriving: Arriving, forward: Forward, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of (sinks, *scoring tensors, *modification tensors), None where not needed."""
    call = arriving.call
    dsinks = sink_gradient(call, forward.stats, arriving.delta) if needs[3] else None
    scoring = () if call.terms.scoring is None else call.terms.scoring.tensors
    dmods: list[Tensor | None] = [weight_gradient(call, arriving, t) if need else None for t, need in zip(scoring, needs[4:], strict=False)]
    for place, mod in enumerate(call.terms.mods):
        wanted = zip(on_device(mod, call.grid).tensors, needs[4 + len(dmods) :], strict=False)
        grads = tuple([bias_gradient(call, arriving, place, t) if need else None for t, need in wanted])
        dmods += in_own_shape(grads, mod, call.grid)
    return dsinks, *dmods


class Rows(NamedTuple):
    """What passes read of each row: the sum of p * dp, float32 [batch, heads, q_len], and [2, batch, heads, q_len] of ``store_statistics``."""

    delta: Tensor
    statistics: Tensor

    @classmethod
    def of(cls, call: LoweredAttention) -> Rows:
        """Room for a call's."""
        sizes = call.shape[:3]
        return cls(call.q.new_empty(sizes, dtype=torch.float32), call.q.new_empty((2, *sizes), dtype=torch.float32))


@dataclass(slots=True)
class Arriving:
    """The arguments that every pass shares; ``delta`` [batch, heads, q_len] float32 is each row's sum of p * dp, less what arrives at lse."""

    call: LoweredAttention
    delta: Tensor
    operands: tuple[Any, ...]
    scores: tuple[Any, ...]
    more_tiles: bool

    @classmethod
    def of(
        cls, call: LoweredAttention, forward: Forward, incoming: Incoming, room: Rows | None = None, through: Through = itself
    ) -> Arriving:  # fmt: skip
        """Computes ``delta`` and the rows' statistics, into ``room`` if that is given; ``through`` starts the kernel."""
        tensors = (call.q, call.k, call.v, incoming.dout)
        q, k, v, dout, dprobs, dscores = (arguments.matrix(t) for t in (*tensors, incoming.dprobs, incoming.dscores))
        delta, statistics = room or Rows.of(call)
        rows, ready = arguments.matrix(delta[..., None]), arguments.matrix(statistics)
        dlse = None if incoming.dlse is None else arguments.matrix(incoming.dlse[..., None])
        plan, wide = Plan.make(call, "aux"), wide_output(forward.stats)
        given = (arguments.matrix(forward.out if wide is None else wide), dout, dlse, arguments.matrix(incoming.probs), dprobs)
        into = (arguments.matrix(forward.stats), rows, ready)
        plan.launch(through(_attention_bwd_delta_kernel), plan.q_tiles * call.shape[0] * call.shape[1], (*given, *into))
        scores = (ready, rows, dprobs, dscores)
        return cls(call, delta, (q, k, v, dout), scores, incoming.dprobs is not None or incoming.dscores is not None)

    def plan(self, stage: str) -> Plan:
        """How a pass of the backward runs."""
        return Plan.make(self.call, stage, self.more_tiles)
