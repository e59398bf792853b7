"""What the Hopper kernels share, piece by piece on the simulator: modifications, dropout, bits of dense masks; and the pass over whole rows.

``python -m tests.hopper_aux [part ...]`` in a process without TRITON_INTERPRET prints the name of each part that it has checked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import fused_attn as fa
from fused_attn.backends.base import Forward
from fused_attn.backends.triton import arguments, score_mods
from fused_attn.backends.triton.hopper import dropout, keep, launch, modifications, rows
from fused_attn.backends.triton.hopper.forward_kernel import accumulator
from fused_attn.dropout import keep_factor
from fused_attn.lowering import Grid, KernelMask, LoweredAttention, Terms
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import ScoreMod
from tests import hopper, hopper_forward

SHAPE = (2, 4, 200, 300)
LOG2E = 1.4426950408889634


def lowered(**options: Any) -> LoweredAttention:
    """A call of SHAPE whose inputs nobody reads."""
    batch, heads, q_len, kv_len = SHAPE
    q, k = (torch.zeros(batch, heads, n, 64, dtype=torch.bfloat16) for n in (q_len, kv_len))
    given = dict.fromkeys(("mask", "sinks", "dropout", "return_aux", "scoring")) | {"score_mods": (), "scale": 0.125, "q_offset": 7}
    return AttentionProblem.check(q, k, k, given | options).lower()


@gluon.jit
def _modify(raw, out, slopes, score, b, h, q_first, kv_first, sizes, TRANSPOSED: gl.constexpr):
    """One 64 x 64 tile: log2 of exp(score), and the gradient of the scaled products where 1 arrives at each score."""
    layout: gl.constexpr = accumulator(64)
    place = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    across = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    at = place * 64 + across
    if TRANSPOSED:
        q_idx, kv_idx = across + q_first, place + kv_first
    else:
        q_idx, kv_idx = place + q_first, across + kv_first
    where = (b, h, q_idx, q_idx + 7, kv_idx, (q_idx < sizes.q_len) & (kv_idx < sizes.kv_len))
    s = gl.load(raw + at)
    factor, lift = modifications.exponents(score)
    gl.store(out + at, modifications.modified(s, score, where) * factor + lift)
    gl.store(slopes + at, modifications.pulled_back(gl.full_like(s, 1.0), s, score, where))


@triton.jit
def _doubled(scores, args, at):
    """A function as a user writes it: twice the scores, and what a table says of the key."""
    return scores * args[0] + tl.load(args[1].ptr + at[4] * args[1].col, mask=at[5], other=0.0)


@triton.jit
def _doubled_gradient(grads, scores, args, at):
    return grads * args[0]


@triton.jit
def _ranged(scores, args, at):
    """Names a tile's columns by itself, which has no layout in Gluon."""
    return scores + tl.arange(0, 64)[None, :]


def check_modifications() -> None:
    """Values to 2^-16 of the largest, in both orientations: caps (merged, and beyond LARGEST_CAP), slopes, biases, in several orders."""
    slopes, table = torch.rand(SHAPE[1]), torch.randn(SHAPE[0], 1, 1, SHAPE[3]).bfloat16()
    cap, alibi, bias = fa.SoftCap(3.0), fa.ALiBi(slopes), fa.Bias(table)
    orders = ((), (cap,), (fa.SoftCap(300.0),), (alibi,), (bias, fa.SoftCap(50.0)), (cap, alibi, bias, cap), (cap, alibi))
    for mods, transposed in zip(orders, (False, True) * len(orders), strict=False):
        call = lowered(score_mods=mods)
        score, raw = modifications.fast(arguments.scores(call.terms, call.grid, torch.bfloat16)), torch.randn(64, 64) * 40
        out, slope = torch.empty(2, 64, 64).fill_(torch.nan)
        args = (raw, out, slope, score, 1, 3, 64, 128, arguments.sizes(call), transposed)
        launch.launch(_modify, (1,), args)
        whole = torch.zeros(SHAPE, dtype=torch.float64)
        part = (1, 3, slice(64, 128), slice(128, 192))
        whole[part] = (raw.mT if transposed else raw).double() / 8
        exact = whole.requires_grad_()
        for mod in mods:
            exact = mod.apply(exact, call.grid)
        right = exact.detach()[part], torch.autograd.grad(exact.sum(), whole)[0][part] if mods else torch.ones(64, 64)
        for got, want in zip((out / LOG2E, slope), right, strict=True):
            want = want.mT if transposed else want
            error, limit = float((got - want).abs().max()), 2.0**-16 * float(want.abs().max())
            assert error <= limit, f"{mods}, transposed {transposed}: error {error} > {limit}"


@dataclass(frozen=True)
class _Ranged(ScoreMod):
    """A modification without tensors whose function is ``_ranged``."""

    name: ClassVar[str] = "test_ranged"

    def apply(self, scores: Tensor, grid: Grid) -> Tensor:
        return scores


def explained(mod: ScoreMod, function: Any, call: LoweredAttention) -> list[str]:
    """What ``explain`` says of Hopper's kernels where the modification has that device function."""
    score_mods.register(mod.name, function)
    interpreted = os.environ.pop("TRITON_INTERPRET")  # which makes the backend take tensors of the CPU here
    try:
        notes = fa.explain(call.q, call.k, call.v, score_mods=(mod,), on="sm_90").notes
    finally:
        del score_mods.FUNCTIONS[mod.name]
        os.environ["TRITON_INTERPRET"] = interpreted
    return [note for note in notes if "Hopper" in note]


def check_functions_of_users() -> None:
    """What Gluon compiles is taken, what it does not is named."""
    score_mods.FUNCTIONS |= {"doubled": (_doubled, _doubled_gradient), "ranged": (_ranged, None)}
    args = {"doubled": (2.0, arguments.matrix(torch.zeros(1, 1, 1, 300, dtype=torch.float16)), None), "ranged": (None,)}
    score = arguments.scores(lowered().terms, lowered().grid, torch.bfloat16)
    found = {}
    for name in ("doubled", "ranged"):
        value, gradient = score_mods.FUNCTIONS.pop(name)
        given = score._replace(functions=(value,), gradients=(gradient,), mods=(args[name],))
        found[name] = modifications.reasons(given)
    assert found["doubled"] == [], found
    call = lowered()
    note = ["plain Triton kernels, not those for Hopper: " + reason for reason in found["ranged"]]
    assert explained(_Ranged(), _ranged, call) == note, explained(_Ranged(), _ranged, call)
    assert len(found["ranged"]) == 1 and "_ranged" in found["ranged"][0] and "arange" in found["ranged"][0], found


@gluon.jit
def _drop(out, dropout_args, b, h, q_first, kv_first, sizes, GROUP: gl.constexpr, TRANSPOSED: gl.constexpr, COLUMNS: gl.constexpr):
    layout: gl.constexpr = accumulator(COLUMNS)
    b = gl.program_id(0) + b
    at = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None] * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    ones = gl.full_like(at, 1).to(gl.float32)
    if TRANSPOSED:
        words = dropout.words_of_columns(dropout_args, b, h, q_first, kv_first, sizes, layout, COLUMNS)
        found = dropout.thinned_by(ones, dropout.marked(ones * 0.0, words, dropout_args))
    else:
        words = dropout.words_of_rows(dropout_args, b, h, q_first, kv_first, sizes, GROUP, layout, COLUMNS)
        found = dropout.thinned(ones, words, dropout_args)
    gl.store(out + at, found)


def check_dropout() -> None:
    """The same bits as the definition's: both orientations and widths, heads packed into rows, counters beyond 32 bits."""
    part = fa.Dropout(0.3, seed=-5, origin=(3, 1, 100, 8), extent=(2**15, 2**7, 2**10, 2**15))
    for given, group, transposed, columns in (
        (fa.Dropout(0.3, seed=5), 1, False, 128),
        (fa.Dropout(0.7, seed=5), 1, True, 64),
        (fa.Dropout(0.3, seed=5), 4, False, 64),
        (part, 1, False, 64),
        (part, 1, True, 128),
    ):
        call, h = lowered(dropout=given), 0 if group > 1 else 2
        out = torch.full((64, columns), torch.nan)
        numbers = (1, h, 64, 128, arguments.sizes(call), group, transposed, columns)
        launch.launch(_drop, (1,), (out, arguments.dropout(call.terms, SHAPE), *numbers))
        assert call.terms.dropout is not None
        kept = (keep_factor(call.terms.dropout, call.grid, torch.float32) != 0)[1]
        if transposed:
            right = kept[h, 64 : 64 + columns, 128:192].mT
        else:
            place = torch.arange(64)
            right = kept[h + place % group, 64 + place // group, 128 : 128 + columns]
        assert torch.equal(out == 1, right) and bool((out >= 0).all()), (given, group, transposed, columns)


@gluon.jit
def _mask(out, state, mask, b, h, row, column, row_count, column_count, sizes, GROUP: gl.constexpr, COLUMNS: gl.constexpr):
    layout: gl.constexpr = accumulator(COLUMNS)
    b, h, row = gl.program_id(0) + b, gl.program_id(0) + h, gl.program_id(0) + row
    words = keep.load_words(mask.keep, b, h, row, row_count, column, column_count, GROUP, COLUMNS)
    at = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None] * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    gl.store(out + at, keep.masked(gl.full_like(at, 1).to(gl.float32), words, COLUMNS))
    gl.store(state, keep.state(mask, b, h, row // 64, column // 64, sizes, 2, 2))


def _keep(shape: tuple[int, ...]) -> Tensor:
    keep = torch.rand(shape) < 0.5
    if shape[2] > 1 and shape[3] > 1:
        keep[:, :, :64, :64], keep[:, :, 64:, 128:256] = False, True
    return keep


def check_bits() -> None:
    """Words and states of masks that broadcast along any dimension, in both orientations, within the mask and across its ends."""
    for shape, group, transposed, columns, row, column in (
        (SHAPE, 1, False, 128, 128, 128),
        (SHAPE, 1, True, 64, 256, 64),
        (SHAPE, 4, False, 64, 16, 256),
        ((1, 4, 1, 300), 1, False, 64, 64, 64),
        ((2, 1, 200, 1), 1, True, 128, 192, 64),
    ):
        form = KernelMask(keep=_keep(shape))
        _, states = keep.pack(form.keep, transposed)
        expanded = keep.pack(form.keep.expand(SHAPE[0], SHAPE[1], *form.keep.shape[2:]), transposed)[1]
        assert torch.equal(expanded, states), "an expanded mask is packed once"
        assert torch.equal(states, form.tile_summary(Grid(SHAPE, torch.device("cpu")), 64, 64)), shape
        out, state = torch.empty(64, columns).fill_(torch.nan), torch.full((1,), -1, dtype=torch.int32)
        counts, h = SHAPE[2:][:: -1 if transposed else 1], 0 if group > 1 else 1
        sizes = arguments.Sizes(SHAPE[1], 1, *SHAPE[2:])
        args = (out, state, keep.mask_arguments(Terms(form, 1.0), transposed), 1, h, row, column, *counts, sizes, group, columns)
        launch.launch(_mask, (1,), args)
        whole = form.keep.expand(SHAPE)[1]
        place = torch.arange(64)
        at = row + place // group
        right = (whole.mT if transposed else whole)[h + place % group, at.clamp(max=counts[0] - 1), column : column + columns]
        inside = at < counts[0]
        assert torch.equal((out == 1)[inside, : right.shape[1]], right[inside]), (shape, transposed)
        assert bool((out[~inside] == -torch.inf).all()), "rows beyond the end keep nothing"
        if not transposed:
            part = whole[h, row // 64 * 64 :, column:][:128, :128]
            assert int(state) == (2 if bool(part.all()) else int(bool(part.any()))), (shape, int(state))


@dataclass(frozen=True)
class Rows:
    """A call, what it is asked for, and the simulator's mode."""

    case: hopper_forward.Case
    request: fa.AuxRequest


_ALL = fa.AuxRequest(probs=True, scores=True, max_scores=True, entropy=True)


def row_cases() -> Iterator[Rows]:
    """Rows that TMA stores and rows that it does not, every kind of mask, several heads per key head, each mode of the simulator."""
    case = hopper_forward.Case
    yield Rows(case(q_len=129, kv_len=136, q_offset=7, mask="causal", extra="softcap", heads=(4, 2)), _ALL)
    yield Rows(case(q_len=129, kv_len=300, q_offset=30, mask="dense", extra="everything", batch=2, mode="early"), _ALL)
    documents = case(128, 64, 70, 264, "documents", "bias", q_offset=0, mode="random")
    yield Rows(documents, fa.AuxRequest(probs=True, scores=True, scores_dtype=torch.float32))
    lengths = case(256, 256, 65, 71, "window", "alibi", q_offset=3, dtype=torch.float16)
    yield Rows(lengths, fa.AuxRequest(probs=True, scores=True, scores_dtype=torch.float64, entropy=True))


def check_rows(which: Rows) -> None:
    """Everything that is asked for, to one rounding of its dtype beside float32's arithmetic."""
    torch.manual_seed(0)
    options, inputs = hopper_forward.options_of(which.case), hopper_forward.inputs_of(which.case)
    call = AttentionProblem.check(*inputs, options).lower()
    given = {name: value for name, value in options.items() if name != "return_aux"}
    wide = (t.double() for t in inputs)
    _, exact = fa.attention(*wide, **given, return_aux=replace(_ALL, lse=True), backend="eager")
    base = exact.max_scores.masked_fill(exact.max_scores == -torch.inf, 0.0)
    total = torch.where(exact.lse == -torch.inf, 0.0, torch.exp(exact.lse - base))
    unit = call.terms.scale if arguments.unit_is_raw(call.terms) else 1.0
    hopper.simulate(**hopper_forward.MODES[which.case.mode])
    found = rows.attention_aux(call, Forward(call.q, exact.lse, torch.stack((exact.max_scores / unit, total)).float()), which.request)
    for name in which.request.names:
        got, right = getattr(found, name), getattr(exact, name)
        limit = torch.finfo(got.dtype).eps / 2 * right.abs() + 2e-5
        error = torch.where(got == right, 0.0, (got.double() - right).abs())
        assert bool((error <= limit).all()), f"{which}: {name} errs by {float(error.max())}"


def check_picked() -> None:
    """Chosen rows and heads, in any order and repeated: TMA's rows and others, grouped heads, a dense mask; once through the public function."""
    rows_of, heads_of = torch.tensor([5, -1, 70, 5, 199]), torch.tensor([3, 0, -2])
    mods = {"score_mods": (fa.SoftCap(4.0), fa.ALiBi(torch.rand(4))), "sinks": torch.randn(4)}
    dense = {"mask": fa.Causal() & fa.Dense(torch.rand(1, 1, 200, 129) > 0.4)}
    for kv_len, options, asked in (
        (136, mods | {"mask": fa.SlidingWindow(90, 20)}, fa.AuxRequest(probs=True, scores=True, rows=rows_of, heads=heads_of)),
        (129, dense, fa.AuxRequest(scores=True, scores_dtype=torch.float32, rows=rows_of)),
        (136, {}, fa.AuxRequest(probs=True, heads=heads_of)),
    ):
        inputs = [torch.randn(2, heads, n, 64).bfloat16() for heads, n in ((4, 200), (2, kv_len), (2, kv_len))]
        given, wide = options | {"q_offset": 0}, [t.double() for t in inputs]
        exact = fa.attention(*wide, **given, return_aux=replace(asked, lse=True), backend="eager")[1]
        if options:
            every = dict.fromkeys(("mask", "scale", "sinks", "dropout", "return_aux", "scoring")) | {"score_mods": ()}
            call = AttentionProblem.check(*inputs, every | given).lower()
            found = rows.attention_picked(call, exact.lse.float(), asked)
        else:
            found = fa.attention(*inputs, **given, return_aux=asked, backend="triton")[1]
            assert "rows_kernel" in [name for name, _ in hopper.compiled], "the definition computed them"
        for name in asked.names:
            got, right = getattr(found, name), getattr(exact, name)
            limit = torch.finfo(got.dtype).eps / 2 * right.abs() + 2e-5
            error = torch.where(got == right, 0.0, (got.double() - right).abs())
            assert got.shape == right.shape and bool((error <= limit).all()), f"{name}: {float(error.max())}"
        hopper.compiled.clear()


PARTS: dict[str, Any] = {
    "modifications": check_modifications,
    "functions": check_functions_of_users,
    "dropout": check_dropout,
    "bits": check_bits,
    "rows": lambda: [check_rows(which) for which in row_cases()],
    "picked": check_picked,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    hopper.simulate()
    for part, check in PARTS.items():
        if part in (sys.argv[1:] or PARTS):
            check()
            print(part, flush=True)
