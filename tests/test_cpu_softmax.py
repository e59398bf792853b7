"""Masked softmax on every build of the CPU library: the error rule, where NaN goes, and bits that depend on neither threads nor batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn import backends
from fused_attn.backends.cpu import blocks, library, softmax_native
from fused_attn.problem import SoftmaxProblem
from fused_attn.testing import SoftmaxCase, check_softmax

pytestmark = pytest.mark.quick
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 257, 1023, 1025)
OPTIONS: dict[str, Any] = {"mask": None, "scale": 1.0, "bias": None, "dim": -1, "log": False, "dropout": None, "empty_rows": "zero"}


def gradients(scores: Tensor, incoming: Tensor, backend: str, **options: Any) -> tuple[Tensor, ...]:
    """The result, and the gradients of scores and bias."""
    leaves = [scores.detach().requires_grad_()]
    if (bias := options.pop("bias", None)) is not None:
        leaves.append(bias.detach().requires_grad_())
        options["bias"] = leaves[1]
    out = fa.masked_softmax(leaves[0], backend=backend, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, incoming)


def test_the_library_takes_what_it_can(cpu_build: str) -> None:
    """No test here passes on torch's operations by mistake: the calls reach the library, and float64 does not."""
    calls = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        call = SoftmaxProblem.check(torch.randn(2, 3, 5).to(dtype), OPTIONS | {"q_offset": None}).lower()
        calls.append(softmax_native.takes(call))
    assert calls == [cpu_build != library.OFF] * 3 + [False]


@pytest.mark.parametrize("kind", ["plain", "bool", "lengths", "log", "dropout", "bias"])
def test_every_length_of_row(kind: str, cpu_build: str) -> None:
    """Rows that share a vector, that stay in registers, and longer ones, each with whole vectors and with a rest."""
    options: dict[str, Any] = {
        "plain": {},
        "bool": {"mask": "bool", "full": (0, 1, 2)},
        "lengths": {"mask": "ValidLengths1", "empty_rows": "uniform"},
        "log": {"log": True, "mask": "bool", "full": (0, 2), "scale": -0.7},
        "dropout": {"dropout": 0.3, "scale": 0.5},
        "bias": {"bias": True, "full": (2,), "dtype": torch.bfloat16},
    }[kind]
    for length in LENGTHS:
        check_softmax(SoftmaxCase((3, 7, length), **options), "cpu")


@pytest.mark.parametrize("length", [5, 21])
def test_bias_gradient_of_every_shape(length: int, cpu_build: str) -> None:
    for full in ((), (0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 3), (1, 2), (0, 1, 2, 3)):
        check_softmax(SoftmaxCase((2, 3, 9, length), full=full, bias=True, mask="Causal0", log=len(full) == 1, scale=0.3), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["permuted", "transposed", "sliced", "stride0"])
def test_every_layout(layout: str, dtype: torch.dtype, cpu_build: str) -> None:
    for length in (4, 7, 40, 300):
        check_softmax(SoftmaxCase((2, 3, 4, length), mask="bool", full=(0, 3), bias=True, layout=layout, dtype=dtype), "cpu")
    check_softmax(SoftmaxCase((30, 5, 18), dim=0, mask="bool", full=(0, 2), layout=layout, dtype=dtype), "cpu")


def poisoned(scores: Tensor, allowed: Tensor) -> Tensor:
    """Rows with NaN or infinities where they may be attended and where not, and rows of -inf alone."""
    scores = scores.clone()
    for row, (value, where) in enumerate(
        (v, w) for v in (torch.nan, torch.inf, -torch.inf) for w in (allowed, ~allowed, torch.ones_like(allowed))
    ):
        scores[row] = torch.where(where[row] & (torch.rand(scores.shape[1:]) < 0.4), value, scores[row])
    scores[9] = -torch.inf
    return scores


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
@pytest.mark.parametrize("length", [1, 3, 8, 21, 140])
def test_nan_and_infinities_stand_where_the_definition_puts_them(length: int, empty_rows: Any, log: bool, cpu_build: str) -> None:
    allowed = torch.rand(12, 2, length) < 0.6
    allowed[10] = False
    scores, incoming = poisoned(torch.randn(12, 2, length), allowed), torch.randn(12, 2, length)
    incoming[11] = torch.where(allowed[11], incoming[11], torch.nan)
    for mask in (allowed, fa.ValidLengths(torch.arange(12) % (length + 1))):
        got, want = (gradients(scores, incoming, name, mask=mask, log=log, empty_rows=empty_rows) for name in ("cpu", "eager"))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("length", [4, 6, 33, 700])
@pytest.mark.parametrize("full", [(), (2,), (0, 2)], ids=str)
def test_threads_and_batches_change_no_bits(full: tuple[int, ...], length: int, cpu_build: str) -> None:
    shape = (4, 900, length) if length < 100 else (4, 50, length)
    scores, incoming, keep = torch.randn(shape), torch.randn(shape), torch.rand(shape) < 0.7
    bias = torch.randn([n if d in full else 1 for d, n in enumerate(shape)])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(scores, incoming, "cpu", mask=keep, bias=bias))
    finally:
        torch.set_num_threads(before)
    if cpu_build != library.OFF:  # torch's own sums share their work by the number of threads
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    one = gradients(scores[2:3], incoming[2:3], "cpu", mask=keep[2:3], bias=bias[2:3] if 0 in full else bias)
    kept = 3 if 0 in full and cpu_build != library.OFF else 2
    assert all(torch.equal(a, b[2:3]) for a, b in zip(one[:kept], results[0][:kept], strict=True))


def test_masks_written_out_by_blocks_of_rows(cpu_build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is no interval is evaluated for some rows at a time; the result is that of its whole tensor."""
    rule = fa.Causal() & ~fa.Documents(torch.arange(40) // 7)
    scores, incoming, bias = torch.randn(2, 3, 40, 40), torch.randn(2, 3, 40, 40), torch.randn(1, 3, 1, 40)
    options: dict[str, Any] = {"bias": bias, "dropout": fa.Dropout(0.2, seed=3), "q_offset": 0}
    keep = torch.ones(40, 40, dtype=torch.bool).tril() & (torch.arange(40)[:, None] // 7 != torch.arange(40) // 7)
    whole = gradients(scores, incoming, "cpu", mask=keep, **options)
    monkeypatch.setattr(blocks, "WRITTEN", 11 * 40)
    parts = gradients(scores, incoming, "cpu", mask=rule, **options)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_several_stored_masks_and_a_mask_per_column(cpu_build: str) -> None:
    scores, incoming = torch.randn(3, 2, 6, 50), torch.randn(3, 2, 6, 50)
    padding, heads, rows = torch.rand(3, 50) < 0.8, torch.rand(2, 6, 1) < 0.9, torch.rand(6, 50) < 0.8
    mask = fa.KeyPadding(padding) & fa.Dense(rows) & fa.Dense(heads) & fa.SlidingWindow(20, 20)
    got, want = (gradients(scores, incoming, name, mask=mask, q_offset=10) for name in ("cpu", "eager"))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_values_that_memory_does_not_hold(cpu_build: str) -> None:
    """torch negates the imaginary part of a conjugate lazily; what is read is the negated value."""
    lazy = torch.randn(3, 7, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    torch.testing.assert_close(fa.masked_softmax(lazy, backend="cpu"), lazy.softmax(-1))


def test_auto_runs_on_the_library(cpu_build: str) -> None:
    assert backends.resolve(SoftmaxProblem.check(torch.randn(2, 3), OPTIONS | {"q_offset": None}), "auto") == "cpu"
