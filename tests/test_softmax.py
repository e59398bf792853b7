"""Masked softmax on every backend: the error rule over all cases, and the contract that holds whatever the flags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_attn as fa
from fused_attn.testing import SOFTMAX_CASES, SOFTMAX_QUICK, SoftmaxCase, check_softmax, make_softmax


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=n, marks=[pytest.mark.quick] if n in SOFTMAX_QUICK else []) for n, c in SOFTMAX_CASES.items()]
)
def test_error_rule(case: SoftmaxCase, backend: str, device: torch.device) -> None:
    if backend in ("triton", "cuda") and case.dtype == torch.float64:
        with pytest.raises(fa.UnsupportedError, match="float64"):
            check_softmax(case, backend, device)
    else:
        check_softmax(case, backend, device)


@pytest.mark.quick
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kv_len", [1, 5, 130, 5000])
def test_empty_rows(kv_len: int, log: bool, empty_rows: Any, backend: str, device: torch.device) -> None:
    """Rows without keys: 0 or 1/kv_len (their logarithms with log), and no gradient, even where one arrives."""
    scores = torch.randn(3, 2, kv_len, device=device, requires_grad=True)
    lens = torch.tensor([0, 1, kv_len], device=device)
    out = fa.masked_softmax(scores, fa.ValidLengths(lens), log=log, empty_rows=empty_rows, backend=backend)
    value = torch.tensor(1.0 / kv_len if empty_rows == "uniform" else 0.0)
    torch.testing.assert_close(out[0], (value.log() if log else value).to(device).expand(2, kv_len))
    torch.testing.assert_close((out.exp() if log else out)[1:].sum(-1), torch.ones(2, 2, device=device))
    (grad,) = torch.autograd.grad(out, scores, torch.ones_like(out) + torch.arange(kv_len, device=device))
    assert grad.isfinite().all() and (grad[0] == 0).all()
    if kv_len > 1:
        assert (grad[2] != 0).any() and (grad[1] == 0).all()


@pytest.mark.quick
@pytest.mark.parametrize("dim", range(-4, 4))
def test_every_dim(dim: int, backend: str, device: torch.device) -> None:
    """Without a mask it is torch's softmax, along any dimension, also of permuted scores."""
    scores = torch.randn(2, 3, 5, 7, device=device).permute(2, 0, 3, 1).requires_grad_()
    bias = torch.randn(3, device=device)
    out = fa.masked_softmax(scores, scale=0.5, bias=bias, dim=dim, backend=backend)
    want = (scores * 0.5 + bias).softmax(dim)
    torch.testing.assert_close(out, want)
    incoming = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(o, scores, incoming)[0] for o in (out, want)))


@pytest.mark.quick
def test_masked_elements_with_nan_never_leak_and_genuine_ones_come_out(backend: str, device: torch.device) -> None:
    scores = torch.randn(2, 3, 40, device=device)
    mask = fa.ValidLengths(torch.tensor([17, 40], device=device))
    clean = fa.masked_softmax(scores, mask, backend=backend)
    for bad in (torch.nan, torch.inf, -torch.inf):
        poisoned = scores.clone()
        poisoned[0, :, 17:] = bad
        poisoned.requires_grad_()
        out = fa.masked_softmax(poisoned, mask, backend=backend)
        assert torch.equal(out, clean)
        (grad,) = torch.autograd.grad(out, poisoned, torch.randn_like(out))
        assert grad.isfinite().all() and (grad[0, :, 17:] == 0).all()
    poisoned = scores.clone()
    poisoned[0, 1, 3] = torch.nan
    bad_rows = fa.masked_softmax(poisoned, mask, backend=backend).isnan().any(-1)
    assert bad_rows.tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.quick
@pytest.mark.parametrize("full", [(), (0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 3), (1, 2), (0, 1, 2, 3)], ids=str)
def test_bias_gradient_in_its_own_shape(full: tuple[int, ...], backend: str, device: torch.device) -> None:
    check_softmax(SoftmaxCase((2, 3, 17, 33), full=full, bias=True, mask="Causal0", dropout=0.1), backend, device)


@pytest.mark.quick
def test_every_requires_grad_subset(backend: str, device: torch.device) -> None:
    for scores_grad, bias_grad in ((True, False), (False, True), (True, True), (False, False)):
        scores = torch.randn(2, 3, 9, device=device, requires_grad=scores_grad)
        bias = torch.randn(9, device=device, requires_grad=bias_grad)
        out = fa.masked_softmax(scores, bias=bias, backend=backend)
        assert out.requires_grad == (scores_grad or bias_grad)
        if out.requires_grad:
            out.square().sum().backward()
        assert (scores.grad is not None) == scores_grad and (bias.grad is not None) == bias_grad


@pytest.mark.quick
@pytest.mark.parametrize("name", ["eager", "cpu"])
@pytest.mark.parametrize("log", [False, True])
def test_gradcheck_and_gradgradcheck(log: bool, name: str) -> None:
    scores = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    dropout = None if log else fa.Dropout(0.3, seed=2)

    def run(s: Tensor, b: Tensor) -> Tensor:
        out = fa.masked_softmax(s, fa.ValidLengths(torch.tensor([0, 4])), scale=0.7, bias=b, log=log, dropout=dropout, backend=name)
        return out.masked_fill(out == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, (scores, bias)) and torch.autograd.gradgradcheck(run, (scores, bias))


@pytest.mark.quick
def test_double_backward(backend: str, device: torch.device) -> None:
    base = torch.randn(2, 3, 70, device=device)

    def second(name: str) -> Tensor:
        scores = base.clone().requires_grad_()
        out = fa.masked_softmax(scores, fa.Causal(), q_offset=40, dropout=fa.Dropout(0.2, seed=1), backend=name)
        (first,) = torch.autograd.grad(out.square().sum(), scores, create_graph=True)
        return torch.autograd.grad(first.square().sum(), scores)[0]

    torch.testing.assert_close(second(backend), second("eager"))


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "transposed", "sliced", "stride0"])
@pytest.mark.parametrize("length", [33, 3000])
def test_layouts_give_the_same_answer(length: int, layout: str, backend: str, device: torch.device) -> None:
    check_softmax(SoftmaxCase((2, 3, 4, length), mask="bool", full=(0, 3), bias=True, layout=layout), backend, device)


@pytest.mark.quick
def test_inputs_and_incoming_gradients_are_never_written(backend: str, device: torch.device) -> None:
    inputs = make_softmax(SoftmaxCase((2, 3, 65), mask="bool", full=(0, 2), bias=True, dropout=0.2), device)
    tensors = [inputs.scores, inputs.bias, inputs.incoming, inputs.options["mask"]]
    before = [(t.clone(), t._version) for t in tensors]
    scores, bias = inputs.scores.detach().requires_grad_(), inputs.bias.detach().requires_grad_()
    fa.masked_softmax(scores, bias=bias, backend=backend, **inputs.options).backward(inputs.incoming)
    assert all(torch.equal(t, copy) and t._version == version for t, (copy, version) in zip(tensors, before, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize("length", [130, 70001])
def test_repeating_and_slicing_give_the_same_bits(length: int, kernel_backend: str, device: torch.device) -> None:
    scores = torch.randn(3, 2, length, device=device)
    lens = torch.tensor([length, length // 2, 0], device=device)
    incoming = torch.randn_like(scores)

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        part = scores[rows].clone().requires_grad_()
        out = fa.masked_softmax(part, fa.ValidLengths(lens[rows]), backend=kernel_backend)
        return out.detach(), torch.autograd.grad(out, part, incoming[rows])[0]

    whole, again = run(slice(0, 3)), run(slice(0, 3))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for b in range(3):
        for one, all_rows in zip(run(slice(b, b + 1)), whole, strict=True):
            assert torch.equal(one, all_rows[b : b + 1])


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3), (2, 3, 0), (0, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
def test_sizes_of_zero(shape: tuple[int, ...], empty_rows: Any, backend: str, device: torch.device) -> None:
    scores = torch.randn(shape, device=device, requires_grad=True)
    out = fa.masked_softmax(scores, empty_rows=empty_rows, backend=backend)
    assert out.shape == shape
    out.sum().backward()
    assert scores.grad is None or scores.grad.shape == shape


@pytest.mark.quick
def test_future_keys_change_nothing(backend: str, device: torch.device) -> None:
    scores = torch.randn(2, 50, 50, device=device)
    later = torch.arange(50, device=device) >= 30
    for options in (
        {},
        {"log": True},
        {"dropout": fa.Dropout(0.3, seed=1)},
        {"bias": torch.randn(50, device=device)},
        {"scale": -2.0},
        {"empty_rows": "uniform"},
    ):
        one, two = (fa.masked_softmax(scores + shift * later, fa.Causal(), backend=backend, **options) for shift in (0.0, 5.0))
        assert torch.equal(one[:, :30], two[:, :30]) and not torch.equal(one[:, 30:], two[:, 30:])


@pytest.mark.quick
def test_checkpointing_and_manual_seed_control_dropout(backend: str, device: torch.device) -> None:
    base = torch.randn(2, 5, 40, device=device)

    def run(scores: Tensor) -> Tensor:
        return fa.masked_softmax(scores, dropout=fa.Dropout(0.4), backend=backend)

    results = []
    for wrapped in (False, True):
        torch.manual_seed(9)
        scores = base.clone().requires_grad_()
        out = checkpoint(run, scores, use_reentrant=False) if wrapped else run(scores)
        out.square().sum().backward()
        results.append((out.detach(), scores.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(run(base), run(base))
