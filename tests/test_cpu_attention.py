"""Attention on every build of the CPU library: the error rule on drawn problems, NaN placement, bits, memory, and the faults it once had."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.backends.cpu import blocks, library
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import ScoreMod
from fused_attn.testing import (
    DIFFERENTIABLE,
    EVERYTHING,
    STATISTICS,
    Case,
    Inputs,
    budget,
    call,
    check_inputs,
    evaluate,
    excess,
    in_double,
    input_names,
    inputs_of,
    laid_out,
    make_inputs,
    vocabulary,
)
from tests import loops
from tests.guarded import guarded, guarded_results

GRID = Grid((2, 2, 4, 4), torch.device("cpu"))
MASKS = list(vocabulary(Mask, GRID))
MODS = [name for name in vocabulary(ScoreMod, GRID) if not name.startswith("Selective")]
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 257)
DIMS = (1, 3, 5, 8, 16, 40, 64, 80, 96, 128, 160, 192, 256, 320, 512)
LAYOUTS = ("contiguous", "permuted", "transposed", "sliced", "stride0")
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")


def drawn_bias(rng: random.Random, shape: tuple[int, int, int, int], dtype: torch.dtype) -> fa.Bias:
    """A bias of some broadcast shape, dtype and layout."""
    sizes = [n if rng.random() < 0.55 else 1 for n in shape]
    while len(sizes) > 2 and sizes[0] == 1 and rng.random() < 0.5:
        sizes = sizes[1:]
    return fa.Bias(laid_out(torch.randn(sizes).to(rng.choice((torch.float32, dtype))), rng.choice(("contiguous", "transposed", "sliced"))))


@functools.cache
def drawn(number: int) -> tuple[Inputs, tuple[str, ...], list[str], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A problem, the outputs at which gradients arrive, the gradients wanted; eager's results, exact ones, and bands."""
    rng = random.Random(number)
    torch.manual_seed(number)
    sizes = rng.choice(((1, 1, 1), (2, 1, 1), (1, 4, 2), (1, 2, 1), (2, 4, 1)))
    mods = tuple(rng.choice(MODS) for _ in range(rng.choice((0, 0, 1, 2, 3))))
    lengths, (dim, value_dim) = (rng.choice(LENGTHS), rng.choice(LENGTHS)), (rng.choice(DIMS), rng.choice(DIMS))
    if number % 16 == 0:  # several parts of the backward, several chunks of its keys
        sizes, lengths, dim, value_dim = (1, 2, 1), (600, 1100), 16, 24
    if any(m.startswith("DecayBias") for m in mods):  # it needs every query on a key
        lengths = (min(lengths), max(lengths))
    case = Case(
        sizes, lengths, (dim, value_dim if rng.random() < 0.5 else dim), rng.choice(DTYPES), tuple(rng.sample(MASKS, rng.choice((0, 1, 2)))), mods,
        rng.random() < 0.3, rng.choice((0.0, 0.2, 1.0)), rng.choice(("top", "bottom", "mixed")), rng.choice(LAYOUTS),
        rng.choice(("normal", "outliers", "repeated")), rng.choice(("float32", "inputs")),
    )  # fmt: skip
    inputs = make_inputs(case)
    problem, terms = inputs.problem, inputs.problem.modifiers
    options: dict[str, Any] = {
        "mask": terms.mask, "scale": rng.choice((None, 0.3, -0.5)), "q_offset": terms.q_offset, "score_mods": list(terms.score_mods),
        "sinks": terms.sinks, "dropout": terms.dropout,
    }  # fmt: skip
    if rng.random() < 0.4:
        options["score_mods"].insert(rng.randrange(len(mods) + 1), drawn_bias(rng, problem.shape, problem.q.dtype))
    if terms.dropout is not None and rng.random() < 0.5:
        origin = (rng.randrange(3), rng.randrange(3), rng.randrange(50), rng.randrange(9))
        whole = tuple(n + o for n, o in zip(problem.shape, origin, strict=True))
        options["dropout"] = terms.dropout.part(origin, whole)  # type: ignore[arg-type]
    inputs = Inputs(inputs_of(problem.q, problem.k, problem.v, **options).problem, inputs.incoming)
    through = tuple(n for n in (*DIFFERENTIABLE, *STATISTICS) if rng.random() < (0.8 if n == "out" else 0.3)) or ("out",)
    wanted = ["q", *(n for n in input_names(inputs.problem)[1:] if rng.random() < 0.7)]
    if rng.random() < 0.2:
        wanted[0] = "k"
    exactly, dtype = in_double(inputs), problem.q.dtype
    plain = evaluate(lambda p: budget.eager.attention(p, dtype), inputs, through, wanted)
    exact = evaluate(budget.eager.attention, exactly, through, wanted)
    return inputs, through, wanted, plain, exact, budget.attention_bands(exactly, exact, dtype, through)


@contextmanager
def counted(build: str) -> Iterator[None]:
    """Fails where a build of the library is chosen and none of its passes runs."""
    passes: list[str] = []
    run = library.run

    def counting(name: str, fields: Any) -> None:
        passes.append(name)
        run(name, fields)

    library.run = counting  # type: ignore[assignment]
    try:
        yield
    finally:
        library.run = run
    assert bool(passes) == (build != "off")


@pytest.mark.parametrize("number", range(48))
def test_drawn_problems_hold_the_error_rule(number: int, cpu_build: str) -> None:
    inputs, through, wanted, plain, exact, bands = drawn(number)
    with counted(cpu_build):
        got = evaluate(lambda p: call(p, "cpu"), inputs, through, wanted)
    budget.report(f"{cpu_build} on {number}", (excess(n, got[n], plain[n], exact[n], bands[n]) for n in got))


@pytest.mark.parametrize("dim", [16, 40])
def test_weights_of_huge_scores_stay_weights(dim: int, cpu_build: str) -> None:
    """Contracted with the subtraction of the maximum, a scaled score of 1e9 gave a weight of e^10 in the backward."""
    q, k, v = (torch.randn(1, 1, n, dim) * size for n, size in ((48, 1e4), (128, 1e4), (128, 1.0)))
    v.requires_grad_()
    out = fa.attention(q, k, v, scale=0.1237, backend="cpu")
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    torch.testing.assert_close(dv.sum(2), torch.full_like(dv[:, :, 0], 48.0))


def test_a_nan_sink_leaves_the_largest_score(cpu_build: str) -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (5, 33, 33))
    mask = fa.Dense(torch.arange(5)[:, None].expand(5, 33) > 0)  # the first row is empty
    _, want = fa.attention(q, k, v, mask=mask, return_aux=EVERYTHING, backend="cpu")
    out, aux = fa.attention(q, k, v, mask=mask, sinks=torch.tensor([NAN, 0.0]), return_aux=EVERYTHING, backend="cpu")
    assert torch.equal(aux.max_scores, want.max_scores) and aux.lse[:, 0].isnan().all() and aux.lse[:, 1].isfinite().all()
    assert out[:, 0, 1:].isnan().all() and bool((out[:, :, 0] == 0).all()) and out[:, 1].isfinite().all()


@pytest.mark.parametrize("sink", [NAN, INF, -INF, 3.0])
def test_a_sink_beside_no_scores(sink: float, cpu_build: str) -> None:
    q, k, v = (torch.randn(1, 1, n, 8) for n in (50, 140, 140))
    bias = fa.Bias(torch.randn(1, 1, 50, 140).masked_fill(torch.arange(50)[:, None] == 7, -INF))
    inputs = inputs_of(q, k, v, mask=fa.Causal(), q_offset=-4, score_mods=(bias,), sinks=torch.tensor([sink]))
    right = evaluate(budget.eager.attention, in_double(inputs), DIFFERENTIABLE)
    got = evaluate(lambda p: call(p, "cpu"), inputs, DIFFERENTIABLE)
    for name in got:
        problem = loops.differences(got[name], right[name], 1e-3, is_gradient=name.startswith("d"))
        assert not problem, f"{name}: {problem}"


@pytest.mark.parametrize("through", ["out", "scores"])
def test_a_row_of_minus_infinity_is_empty_under_a_sigmoid(through: str, cpu_build: str) -> None:
    leaves = [torch.randn(1, 1, n, 8, requires_grad=True) for n in (3, 20, 20)]
    bias = torch.zeros(3, 1).index_fill(0, torch.tensor([1]), -INF).requires_grad_()
    v = leaves[2].detach().index_fill(2, torch.tensor([5]), INF).requires_grad_()
    request = fa.AuxRequest(scores=True)
    out, aux = fa.attention(*leaves[:2], v, normalizer=fa.Sigmoid(), score_mods=(fa.Bias(bias),), return_aux=request, backend="cpu")
    assert bool((out[0, 0, 1] == 0).all())
    given = out if through == "out" else aux.scores
    dq, dbias = torch.autograd.grad(given, (leaves[0], bias), torch.full_like(given, INF))
    assert bool((dq[0, 0, 1] == 0).all()) and float(dbias[1]) == 0 and not dq[0, 0, 0].isfinite().all()


def test_a_nan_shows_in_the_largest_score_of_a_sigmoid(cpu_build: str) -> None:
    q, k, v = (torch.randn(1, 1, n, 16) for n in (5, 40, 40))
    k[0, 0, 3] = NAN
    request = fa.AuxRequest(max_scores=True)
    _, aux = fa.attention(q, k, v, normalizer=fa.Sigmoid(), return_aux=request, backend="cpu")
    assert aux.max_scores.isnan().all()


def test_entropy_of_weights_below_the_normal_numbers(cpu_build: str) -> None:
    q, k, v = torch.ones(1, 1, 1, 1), torch.full((1, 1, 40, 1), -90.0), torch.ones(1, 1, 40, 1)
    inputs = inputs_of(q, k, v, sinks=torch.zeros(1))
    got = evaluate(lambda p: call(p, "cpu"), inputs)
    assert not budget.violations(inputs, {"entropy": got["entropy"]})


@pytest.mark.parametrize("shared", [False, True], ids=["of-heads", "shared"])
def test_additive_scores(shared: bool, cpu_build: str) -> None:
    q, k, v = (torch.randn(2, h, n, d) for h, n, d in ((2, 50, 17), (1, 131, 17), (1, 131, 16)))
    scoring = fa.Additive(torch.randn(17) if shared else torch.randn(2, 17))
    mods = (fa.SoftCap(3.0), fa.Bias(torch.randn(1, 1, 50, 131)))
    check_inputs(inputs_of(q, k, v, scoring=scoring, mask=fa.Causal(), q_offset=60, score_mods=mods), "cpu", DIFFERENTIABLE)


def poked(shape: tuple[int, ...], rng: random.Random, values: tuple[float, ...]) -> Tensor:
    tensor = torch.randn(shape)
    for _ in range(rng.choice((0, 1, 3)) if values else 0):
        tensor[tuple(rng.randrange(n) for n in shape)] = rng.choice(values)
    return tensor


@pytest.mark.parametrize("number", range(24))
def test_nan_and_infinities_lie_where_the_definition_has_them(number: int, cpu_build: str) -> None:
    """Outputs exactly, gradients up to what of NaN and infinity it is; placements in q, k, v, the bias and what arrives."""
    rng = random.Random(number)
    torch.manual_seed(number)
    values = rng.choice(((NAN,), (INF,), (NAN, -INF)))
    q_len, kv_len = rng.choice((1, 5, 50)), rng.choice((5, 33, 140))
    q, k, v = (poked((2, h, n, d), rng, values) for h, n, d in ((2, q_len, 16), (1, kv_len, 16), (1, kv_len, 5)))
    keep = torch.rand(1, 2, q_len, kv_len) < rng.choice((0.05, 0.5, 0.95))
    bias = poked((1, rng.choice((1, 2)), q_len, kv_len), rng, (-INF, -INF, NAN))
    mods = rng.choice(((), (fa.Bias(bias),), (fa.SoftCap(2.0), fa.Bias(bias))))
    inputs = inputs_of(q, k, v, mask=rng.choice((None, fa.Dense(keep), fa.Causal())), q_offset=kv_len - q_len, score_mods=mods)
    incoming = {n: poked(tuple(t.shape), rng, (NAN,) if rng.random() < 0.4 else ()) for n, t in inputs.incoming.items()}
    inputs, through = Inputs(inputs.problem, incoming), ("out", *rng.sample(("probs", "lse", "scores"), rng.randrange(3)))
    right = evaluate(budget.eager.attention, in_double(inputs), through)
    got = evaluate(lambda p: call(p, "cpu"), inputs, through)
    for name in got:
        problem = loops.differences(got[name], right[name], 1e-3, is_gradient=name.startswith("d"))
        assert not problem, f"{name}: {problem}"


@pytest.mark.parametrize("at_end", [False, True], ids=["begin", "end"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("sizes", [(3, 5, 7, 33), (64, 64, 49, 131), (16, 17, 3, 257)], ids=str)
def test_nothing_is_read_or_written_outside(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, at_end: bool, cpu_build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs, outputs and gradients against pages that may not be touched, with rows that end inside vectors."""
    dim, value_dim, q_len, kv_len = sizes
    if cpu_build == "off":
        pytest.skip("torch's own operations")

    def placed(tensor: Tensor) -> Tensor:
        return guarded(tensor, at_end)

    q, k, v = (placed(torch.randn(1, h, n, d).to(dtype)) for h, n, d in ((2, q_len, dim), (1, kv_len, dim), (1, kv_len, value_dim)))
    biases = [fa.Bias(placed(torch.randn(shape).to(dtype))) for shape in ((1, 2, q_len, kv_len), (q_len, kv_len), (1, kv_len))]
    keys = fa.KeyPadding(placed(torch.rand(1, kv_len) < 0.8)) & fa.Causal() & fa.ValidLengths(placed(torch.tensor([kv_len - 2])))
    kinds: tuple[dict[str, Any], ...] = (
        {"score_mods": (*biases, fa.SoftCap(2.0), fa.ALiBi(placed(torch.rand(2))))},
        {"mask": fa.Dense(placed(torch.rand(1, 2, q_len, kv_len) < 0.7)), "sinks": placed(torch.randn(2).to(dtype))},
        {"mask": keys, "dropout": fa.Dropout(0.3, seed=3)},
    )
    for options in kinds:
        made = inputs_of(q, k, v, **({"q_offset": 0} | options))
        inputs = Inputs(made.problem, {name: placed(t) for name, t in made.incoming.items()})
        want = evaluate(lambda p: call(p, "cpu"), inputs, DIFFERENTIABLE)
        with guarded_results(monkeypatch, at_end):
            got = evaluate(lambda p: call(p, "cpu"), inputs, DIFFERENTIABLE)
        for name in got:
            assert torch.equal(got[name], want[name]), name


def everything(dtype: torch.dtype = torch.float32, batch: int = 2) -> Inputs:
    """A problem whose parts are shared by several items of the backward and several tasks of the forward."""
    q, k, v = (torch.randn(batch, h, n, 24).to(dtype) for h, n in ((2, 530), (1, 300), (1, 300)))
    mods = (fa.Bias(torch.randn(1, 1, 530, 300)), fa.ALiBi(torch.rand(2)), fa.Bias(torch.randn(1, 1, 1, 300)))
    return inputs_of(
        q, k, v, mask=fa.SlidingWindow(200, 30), q_offset=-100, score_mods=mods, sinks=torch.randn(2), dropout=fa.Dropout(0.2, seed=3)
    )


def test_the_number_of_threads_changes_no_bit(cpu_build: str) -> None:
    if cpu_build == "off":
        pytest.skip("torch's own operations")
    inputs, before = everything(), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(evaluate(lambda p: call(p, "cpu"), inputs, DIFFERENTIABLE))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            if name == "dsinks":  # summed by torch
                torch.testing.assert_close(other[name], value)
            else:
                assert torch.equal(other[name], value), name


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_out_is_the_same_with_and_without_auxiliary_outputs(dtype: torch.dtype, cpu_build: str) -> None:
    problem = everything(dtype).problem
    alone = AttentionProblem(problem.q, problem.k, problem.v, problem.modifiers)
    assert torch.equal(call(alone, "cpu")[0], call(problem, "cpu")[0])


def test_views_that_negate_lazily(cpu_build: str) -> None:
    """Their memory does not hold their values."""
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.complex64).conj().imag for n in (7, 33, 33))
    bias = torch.randn(1, 2, 7, 33, dtype=torch.complex64).conj().imag
    assert q.is_neg() and bias.is_neg()
    got, want = (
        fa.attention(*(t.resolve_neg() if resolved else t for t in (q, k, v)), score_mods=(fa.Bias(bias.resolve_neg() if resolved else bias),), backend="cpu")
        for resolved in (False, True)
    )  # fmt: skip
    torch.testing.assert_close(got, want)


MEMORY = """
import resource, torch, fused_attn as fa
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def run(n):
    q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
    fa.attention(q, k, v, mask=fa.SlidingWindow(40, 40), score_mods=(fa.SoftCap(3.0),), backend="cpu").sum().backward()
run(100)
before = peak()
run(16384)
print(peak() - before)
"""


def test_memory_grows_with_the_length_alone(cpu_build: str) -> None:
    """16384 x 16384 scores would be 1 GiB; inputs, gradients and tiles are some MiB."""
    if not library.isa():
        pytest.skip("tests/test_layouts.py measures torch's own operations")
    variables = {"FUSED_ATTN_CPU": cpu_build, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEMORY], env={**os.environ, **variables}, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024


def test_a_batch_slice_has_the_bits_of_a_batch_of_one(cpu_build: str) -> None:
    """Work is cut by what one sequence says: 600 queries are several blocks of the forward and parts of the backward."""
    q, k, v, incoming = (torch.randn(3, h, 600, 16) for h in (4, 2, 2, 4))
    ends = torch.tensor([600, 17, 300])

    def run(batch: slice) -> tuple[Tensor, ...]:
        leaves = [t[batch].clone().requires_grad_() for t in (q, k, v)]
        # Blocks of torch operations begin where a batch's own keys do, and torch sums columns from there.
        request = fa.AuxRequest(column_sums=cpu_build != "off", entropy=True)
        out, aux = fa.attention(*leaves, mask=fa.ValidLengths(ends[batch]), backend="cpu", return_aux=request)
        statistics = [t for t in (aux.column_sums, aux.entropy) if t is not None]
        return out, *statistics, *torch.autograd.grad(out, leaves, incoming[batch])

    for whole, alone in zip(run(slice(None)), run(slice(2, 3)), strict=True):
        assert torch.equal(whole[2:], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_that_are_written_out_in_blocks(dtype: torch.dtype, cpu_build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that blocks share are added up, the others put one below another."""
    monkeypatch.setattr(blocks, "WRITTEN", 1 << 12)
    mask = fa.Causal() | ~fa.SlidingWindow(20, 30) | fa.KeyPadding(torch.rand(2, 130) < 0.3)
    mods = (fa.Bias(torch.randn(1, 4, 130, 130)), fa.SoftCap(3.0), fa.Bias(torch.randn(1, 4, 1, 130).to(dtype)))
    vectors = (torch.randn(2, 4, 130, 16).to(dtype) for _ in range(3))
    options = {"mask": mask, "score_mods": mods, "sinks": torch.randn(4), "dropout": fa.Dropout(0.2, seed=1)}
    check_inputs(inputs_of(*vectors, **options), "cpu", DIFFERENTIABLE)


def test_a_bool_may_be_any_byte(cpu_build: str) -> None:
    """A view of other bytes as bool: torch takes all but 0 as true."""
    q, k, v = torch.randn(3, 1, 2, 40, 16).unbind(0)
    keep = torch.rand(40, 40) < 0.5
    odd = (keep.to(torch.uint8) * torch.randint(1, 256, (40, 40), dtype=torch.uint8)).view(torch.bool)
    for backend in ("cpu", "blocked"):
        torch.testing.assert_close(fa.attention(q, k, v, mask=odd, backend=backend), fa.attention(q, k, v, mask=keep, backend="eager"))
        torch.testing.assert_close(fa.masked_softmax(q @ k.mT, odd, backend=backend), fa.masked_softmax(q @ k.mT, keep, backend="eager"))


@pytest.mark.parametrize("dim", [8, 33, 80])
def test_a_weight_of_one_has_no_score_gradient(dim: int, cpu_build: str) -> None:
    """To the bit, as in the definition: sums over the output and over the values are made in one order. Saturated rows, and a row with one score above -inf."""
    q, k, v, incoming = torch.randn(4, 1, 2, 70, dim).unbind(0)
    leaves = [(q * 1e4).requires_grad_(), (k * 1e4).requires_grad_(), v.requires_grad_()]
    for grad in torch.autograd.grad(fa.attention(*leaves, backend="cpu"), leaves[:2], incoming):
        assert grad.abs().max() == 0
    bias = torch.full((70, 70), -INF).triu(1).requires_grad_()
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = fa.attention(*leaves, score_mods=(fa.Bias(bias),), backend="cpu")
    dq, dbias = torch.autograd.grad(out, (leaves[0], bias), incoming)
    assert dq[:, :, 0].abs().max() == 0 and dbias[0].abs().max() == 0
