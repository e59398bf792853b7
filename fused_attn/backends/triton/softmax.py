"""Masked softmax: a program owns a few rows; short rows are read once, long ones once for the statistics and once to write.

Every row of the [batch, middle, q_len, kv_len] scores has a 64-bit number r = (b * middle + h) * q_len + q; programs take runs of numbers, so
short rows of any shape fill a program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_attn.backends.base import Gradients
from fused_attn.backends.triton import arguments, config
from fused_attn.backends.triton.launch import run
from fused_attn.layout import laid_out_like
from fused_attn.lowering import LoweredSoftmax

from .masks import allowed, query_shift, row_intervals
from .primitives import LOG2E, dropout_row, keep_tile, pointers
from .score_mods import apply


@triton.jit
def _rows_of(n_rows, sizes, tile):
    """(b, h, q, whether the row exists, r) of a program's rows, [tile.q] each; rows beyond the last repeat it."""
    r = tl.program_id(0).to(tl.int64) * tile.q + tl.arange(0, tile.q)
    live = r < n_rows
    r = tl.minimum(r, n_rows - 1)
    outer = r // sizes.q_len
    return outer // sizes.heads, outer % sizes.heads, (r % sizes.q_len).to(tl.int32), live, r


@triton.jit
def _ok(place, kv_idx, interval, mask, sizes, state):
    """Which elements [tile.q, tile.kv] may be attended to; ``state`` 2 promises that ``keep`` lets them through."""
    b, h, q, live = place[0], place[1], place[2], place[3]
    inside = live[:, None] & (kv_idx < sizes.kv_len)[None, :]
    return inside & allowed(mask, b[:, None], h[:, None], q[:, None], kv_idx[None, :], interval[0][:, None], interval[1][:, None], state)


@triton.jit
def _scores(x, place, kv_idx, interval, mask, score, sizes):
    """Scores [tile.q, tile.kv] in the unit ``score.factor`` belongs to, -inf where masked, and where they are not masked."""
    b, h, q = place[0][:, None], place[1][:, None], place[2][:, None]
    ok = _ok(place, kv_idx, interval, mask, sizes, 1)
    values = tl.load(pointers(x, b, h, q, kv_idx[None, :]), mask=ok, other=0.0).to(tl.float32)
    if not score.raw:
        values = values * score.scale
    at = (b, h, q, q + query_shift(mask, b), kv_idx[None, :], ok)
    return tl.where(ok, apply(values, score, at, len(score.functions)), float("-inf")), ok


@triton.jit
def _finish(scores, ok, m, l, score, sizes, LOG: tl.constexpr, UNIFORM: tl.constexpr):
    """Probabilities or their logarithms from scores [tile.q, tile.kv] and row statistics [tile.q]."""
    empty = (l == 0.0)[:, None]
    total = tl.where(l == 0.0, 1.0, l)[:, None]
    if LOG:
        # Selected here and below: in a row that holds a NaN even what is masked would come out as one.
        result = tl.where(ok, (scores - m[:, None]) * (score.factor / LOG2E) - tl.log(total), float("-inf"))
        if UNIFORM:
            result = tl.where(empty, -tl.log(sizes.kv_len.to(tl.float32)), result)
    else:
        result = tl.where(ok, tl.exp2((scores - m[:, None]) * score.factor) / total, 0.0)
        if UNIFORM:
            result = tl.where(empty, 1.0 / sizes.kv_len, result)
    return result


@triton.jit
def _kept(dropout, place, kv_idx, sizes, tile):
    """What dropout leaves of a tile, whose rows are of any batches and heads."""
    if not dropout.is_part:
        return keep_tile(dropout, tl.zeros_like(place[4]), place[4], tl.min(kv_idx, 0), sizes, tile.q, tile.kv)
    else:
        return keep_tile(dropout, dropout_row(dropout, place[0], place[1], sizes), place[2], tl.min(kv_idx, 0), sizes, tile.q, tile.kv)


@triton.jit
def _write(result, out, probs, place, kv_idx, dropout, sizes, tile):
    """Stores the result, and with dropout the probabilities before it."""
    b, h, q = place[0][:, None], place[1][:, None], place[2][:, None]
    inside = place[3][:, None] & (kv_idx < sizes.kv_len)[None, :]
    if dropout is not None:
        tl.store(pointers(probs, b, h, q, kv_idx[None, :]), result.to(probs.ptr.dtype.element_ty), mask=inside)
        kept = _kept(dropout, place, kv_idx, sizes, tile)
        result = tl.where(kept, result * dropout.factor, 0.0)
    tl.store(pointers(out, b, h, q, kv_idx[None, :]), result.to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_fwd_kernel(
    x, out, probs, n_rows, mask, score, dropout, sizes, tile, LOG: tl.constexpr, UNIFORM: tl.constexpr, ONE_PASS: tl.constexpr
):
    place = _rows_of(n_rows, sizes, tile)
    interval = row_intervals(mask, place[0], place[2], sizes)
    kv_idx = tl.arange(0, tile.kv)
    if ONE_PASS:
        scores, ok = _scores(x, place, kv_idx, interval, mask, score, sizes)
        top = tl.max(scores, 1)
        m = tl.where(top == float("-inf"), 0.0, top)
        l = tl.sum(tl.exp2((scores - m[:, None]) * score.factor), 1)
        _write(_finish(scores, ok, m, l, score, sizes, LOG, UNIFORM), out, probs, place, kv_idx, dropout, sizes, tile)
    else:
        top = tl.full([tile.q], float("-inf"), tl.float32)
        l = tl.zeros([tile.q], tl.float32)
        for first in range(0, sizes.kv_len, tile.kv):
            scores, _ = _scores(x, place, first + kv_idx, interval, mask, score, sizes)
            higher = tl.maximum(top, tl.max(scores, 1))
            m = tl.where(higher == float("-inf"), 0.0, higher)
            l = l * tl.exp2((top - m) * score.factor) + tl.sum(tl.exp2((scores - m[:, None]) * score.factor), 1)
            top = higher
        m = tl.where(top == float("-inf"), 0.0, top)
        for first in range(0, sizes.kv_len, tile.kv):
            scores, ok = _scores(x, place, first + kv_idx, interval, mask, score, sizes)
            _write(_finish(scores, ok, m, l, score, sizes, LOG, UNIFORM), out, probs, place, first + kv_idx, dropout, sizes, tile)


@triton.jit
def _incoming(x, result, dout, place, kv_idx, interval, mask, score, dropout, sizes, LOG: tl.constexpr, UNIFORM: tl.constexpr, tile):
    """(probabilities, gradients that reach them, where the query may attend) [tile.q, tile.kv], whether a score is above -inf [tile.q].

    The first two are 0 where the query may not attend. In a row without scores nothing depends on anything; a uniform one has 1 / kv_len
    everywhere, so only the scores themselves (x) tell it from one whose scores are equal.
    """
    b, h, q = place[0][:, None], place[1][:, None], place[2][:, None]
    inside = place[3][:, None] & (kv_idx < sizes.kv_len)[None, :]
    y = tl.load(pointers(result, b, h, q, kv_idx[None, :]), mask=inside, other=float("-inf") if LOG else 0.0).to(tl.float32)
    g = tl.load(pointers(dout, b, h, q, kv_idx[None, :]), mask=inside, other=0.0).to(tl.float32)
    if dropout is not None:
        kept = _kept(dropout, place, kv_idx, sizes, tile)
        g = tl.where(kept, g * dropout.factor, 0.0)
    p = tl.exp2(y * LOG2E) if LOG else y
    some = y != float("-inf") if LOG else y != 0.0
    if UNIFORM:
        ok = _ok(place, kv_idx, interval, mask, sizes, 1)
        if x is not None:
            scores, _ = _scores(x, place, kv_idx, interval, mask, score, sizes)
            some = scores != float("-inf")
    else:
        # Only where the result is that of a masked element need keep be read.
        ok = _ok(place, kv_idx, interval, mask, sizes, tl.where(some, 2, 1))
    return tl.where(ok, p, 0.0), tl.where(ok, g, 0.0), ok, tl.max((ok & some).to(tl.int32), 1) > 0


@triton.jit
def _score_gradient(p, g, total, ok, alive, LOG: tl.constexpr):
    """``total`` is sum(g) for logarithms and sum(p * g) otherwise, ``alive`` whether the row has scores, [tile.q] each."""
    return tl.where(ok & alive[:, None], g - p * total[:, None] if LOG else p * (g - total[:, None]), 0.0)


@triton.jit
def _softmax_bwd_kernel(
    x, result, dout, dscores, dbias, totals, n_rows, mask, score, dropout, sizes, tile, LOG: tl.constexpr, UNIFORM: tl.constexpr, ONE_PASS: tl.constexpr
):  # fmt: skip
    """dbias is given here only when the bias has the scores' own shape; ``totals`` [2, rows] serves the other shapes.

    It holds each row's total, then 1 where the row has scores.
    """
    place = _rows_of(n_rows, sizes, tile)
    interval = row_intervals(mask, place[0], place[2], sizes)
    kv_idx = tl.arange(0, tile.kv)
    if ONE_PASS:
        p, g, ok, alive = _incoming(x, result, dout, place, kv_idx, interval, mask, score, dropout, sizes, LOG, UNIFORM, tile)
        total = tl.sum(g if LOG else p * g, 1)
        _write_gradient(_score_gradient(p, g, total, ok, alive, LOG), dscores, dbias, place, kv_idx, score, sizes)
    else:
        total = tl.zeros([tile.q], tl.float32)
        alive = total != 0.0
        for first in range(0, sizes.kv_len, tile.kv):
            p, g, _, some = _incoming(x, result, dout, place, first + kv_idx, interval, mask, score, dropout, sizes, LOG, UNIFORM, tile)
            total += tl.sum(g if LOG else p * g, 1)
            alive = alive | some
        for first in range(0, sizes.kv_len, tile.kv):
            p, g, ok, _ = _incoming(x, result, dout, place, first + kv_idx, interval, mask, score, dropout, sizes, LOG, UNIFORM, tile)
            _write_gradient(_score_gradient(p, g, total, ok, alive, LOG), dscores, dbias, place, first + kv_idx, score, sizes)
    if totals is not None:
        tl.store(totals + place[4], total, mask=place[3])
        tl.store(totals + n_rows + place[4], tl.where(alive, 1.0, 0.0), mask=place[3])


@triton.jit
def _write_gradient(ds, dscores, dbias, place, kv_idx, score, sizes):
    b, h, q = place[0][:, None], place[1][:, None], place[2][:, None]
    inside = place[3][:, None] & (kv_idx < sizes.kv_len)[None, :]
    if dscores is not None:
        tl.store(pointers(dscores, b, h, q, kv_idx[None, :]), (ds * score.scale).to(dscores.ptr.dtype.element_ty), mask=inside)
    if dbias is not None:
        tl.store(pointers(dbias, b, h, q, kv_idx[None, :]), ds.to(dbias.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_bwd_bias_kernel(
    x, result, dout, partial, totals, n_rows, over, owned, splits, mask, score, dropout, sizes, tile, LOG: tl.constexpr, UNIFORM: tl.constexpr
):  # fmt: skip
    """Score gradients added up over the rows that share a row of the bias.

    over and owned are (batches, middles, queries) to add up over and that the bias has; partial is [splits, rows of the bias, kv_len].
    """
    chunks = tl.cdiv(sizes.kv_len, tile.kv)
    chunk, rest = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    own, split = rest % (owned[0] * owned[1] * owned[2]), rest // (owned[0] * owned[1] * owned[2])
    kv_idx = chunk * tile.kv + tl.arange(0, tile.kv)
    members = over[0] * over[1] * over[2]
    total = tl.zeros([tile.q, tile.kv], tl.float32)
    for start in range(split * tile.q, members, splits * tile.q):
        n = start + tl.arange(0, tile.q)
        live = n < members
        n = tl.minimum(n, members - 1)
        q = (own % owned[2] + n % over[2]).to(tl.int32)
        h = own // owned[2] % owned[1] + n // over[2] % over[1]
        b = own // (owned[2] * owned[1]) + n // (over[2] * over[1])
        r = (b.to(tl.int64) * sizes.heads + h) * sizes.q_len + q
        place = (b, h, q, live, r)
        interval = row_intervals(mask, b, q, sizes)
        p, g, ok, _ = _incoming(x, result, dout, place, kv_idx, interval, mask, score, dropout, sizes, LOG, UNIFORM, tile)
        alive = tl.load(totals + n_rows + r, mask=live, other=0.0) != 0.0
        total += _score_gradient(p, g, tl.load(totals + r, mask=live, other=0.0), ok, alive, LOG)
    target = partial + rest.to(tl.int64) * sizes.kv_len + kv_idx
    tl.store(target, tl.sum(total, 0), mask=kv_idx < sizes.kv_len)


class _Plan:
    """How the rows of one call are spread over programs."""

    def __init__(self, call: LoweredSoftmax, chosen: config.TileConfig) -> None:
        batch, middle, q_len, kv_len = call.shape
        self.call, self.chosen, self.rows = call, chosen, batch * middle * q_len
        self.one_pass = kv_len <= chosen.block_kv
        terms = call.terms
        tile = arguments.Tile(*(tl.constexpr(v) for v in (chosen.block_q, chosen.block_kv, 0, 0, 0, 0, 0, False)))
        shared = (arguments.mask(terms, None), arguments.scores(terms, call.grid, call.scores.dtype), arguments.dropout(terms, call.shape))
        self.shared = (*shared, arguments.Sizes(middle, 1, q_len, kv_len), tile, call.log, call.uniform_empty)

    def launch(self, kernel: Any, programs: int, tensors: tuple[Any, ...], *constants: Any) -> None:
        run(kernel, programs, self.call.scores.device, (*tensors, *self.shared, *constants), {"num_warps": self.chosen.num_warps})

    @property
    def programs(self) -> int:
        return -(-self.rows // self.chosen.block_q)


def softmax_fwd(call: LoweredSoftmax) -> tuple[Tensor, Tensor | None]:
    """The result and, with dropout, the probabilities before it."""
    out = torch.empty_like(call.scores)
    probs = call.scores.new_empty(call.shape) if call.terms.dropout else None
    if out.numel():
        plan, kernel = _Plan(call, config.softmax(call.shape[3])), _softmax_fwd_kernel
        plan.launch(kernel, plan.programs, (*(arguments.matrix(t) for t in (call.scores, out, probs)), plan.rows), plan.one_pass)
    return out, probs


def softmax_bwd(call: LoweredSoftmax, result: Tensor, dout: Tensor, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of (scores, bias); ``result`` holds probabilities before dropout, or their logarithms."""
    biases = tuple(call.terms.parameters[1:])
    if not call.scores.numel():
        return tuple(torch.zeros_like(t) if need and t is not None else None for t, need in zip((call.scores, *biases), needs, strict=True))
    dscores = torch.empty_like(call.scores) if needs[0] else None
    bias = biases[0] if biases and needs[1] else None
    whole = bias is not None and bias.shape == call.shape
    shared = bias is not None and not whole and bias.shape[3] > 1
    dbias = torch.empty_like(bias) if whole and bias is not None else None
    plan, kernel = _Plan(call, config.softmax(call.shape[3])), _softmax_bwd_kernel
    totals = call.scores.new_empty((2, plan.rows), dtype=torch.float32) if shared else None
    tensors = tuple(arguments.matrix(t) for t in (call.scores if call.uniform_empty else None, result, dout, dscores, dbias))
    plan.launch(kernel, plan.programs, (*tensors, totals, plan.rows), plan.one_pass)
    if bias is not None and not whole:
        # A row's probabilities do not change when a constant is added to all its scores: without a key dimension the gradient is 0.
        dbias = _shared_bias_gradient(plan, result, dout, totals, bias) if totals is not None else torch.zeros_like(bias)
    return (dscores, dbias)[: len(needs)]


# Rows added up by one program before partial sums are handed to torch, and the most partial sums kept (float32 elements).
_ROWS_PER_PROGRAM = 64
_PARTIAL_ELEMENTS = 2**22


def _shared_bias_gradient(plan: _Plan, result: Tensor, dout: Tensor, totals: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias that broadcasts over batches, middles or queries."""
    full = plan.call.shape
    owned = tuple(bias.shape[:3])
    over = tuple(size // own for size, own in zip(full[:3], owned, strict=True))
    members, own_rows = over[0] * over[1] * over[2], owned[0] * owned[1] * owned[2]
    splits = max(1, min(members // _ROWS_PER_PROGRAM, _PARTIAL_ELEMENTS // bias.numel()))
    partial = bias.new_empty((splits, own_rows, full[3]), dtype=torch.float32)
    # Columns are independent here, so no program needs a whole row (16384 columns in float32: 80 bytes of stack on sm_120).
    plan = _Plan(plan.call, plan.chosen._replace(block_kv=min(plan.chosen.block_kv, 4096), num_warps=8))
    programs = -(-full[3] // plan.chosen.block_kv) * own_rows * splits
    kernel: Any = _softmax_bwd_bias_kernel
    tensors = (arguments.matrix(t) for t in (None, result, dout))  # whether a row has scores is in ``totals``
    plan.launch(kernel, programs, (*tensors, partial, totals, plan.rows, over, owned, splits))
    return laid_out_like(partial.sum(0).view(bias.shape).to(bias.dtype), bias)
