"""Gradients of entropies, column sums and largest scores, and probabilities of chosen rows and heads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fused_attn as fa
from fused_attn import statistics
from fused_attn.masks import from_mask_mod
from fused_attn.testing import DIFFERENTIABLE, EVERYTHING, STATISTICS, check_inputs, inputs_of

pytestmark = pytest.mark.quick

OPTIONS = {
    "plain": {},
    "causal": {"mask": fa.Causal(), "q_offset": 6, "score_mods": (fa.SoftCap(2.0), fa.ALiBi(torch.linspace(0.1, 0.4, 4)))},
    "padded": {"mask": fa.ValidLengths(torch.tensor([30, 0])), "sinks": torch.linspace(-1, 1, 4), "dropout": fa.Dropout(0.3, seed=4)},
    "rule": {"mask": from_mask_mod(lambda b, h, q, k: (q + k + h) % 3 != 0), "score_mods": (fa.Bias(torch.randn(2, 1, 37, 43)),)},
    "decay": {"mask": fa.Causal(), "q_offset": torch.tensor([6, 0]), "score_mods": (fa.DecayBias(torch.randn(1, 4, 43)),)},
    "l2": {"mask": fa.Documents(torch.arange(43) // 9, torch.arange(37) // 9), "scoring": fa.NegativeL2(torch.full((4, 1, 1), 0.2))},
}


def tensors(dtype=torch.float32):
    made = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=made).to(dtype) for shape in ((2, 4, 37, 24), (2, 2, 43, 24), (2, 2, 43, 20))]


@pytest.mark.parametrize(
    ("through", "dtype"), [(STATISTICS, torch.float32), ((*DIFFERENTIABLE, *STATISTICS), torch.bfloat16)], ids=["alone", "all"]
)
@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "l2"])
def test_error_rule(name, through, dtype, backend, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 4 * 43 * 10)  # several blocks
    check_inputs(inputs_of(*tensors(dtype), **OPTIONS[name]), backend, through, name)


@pytest.mark.parametrize("name", OPTIONS)
def test_formulas(name, backend):
    q, k, v = (t.double().requires_grad_() for t in tensors())
    if backend in ("triton", "cuda"):
        q, k, v = (t.detach().float().requires_grad_() for t in (q, k, v))
    _, aux = fa.attention(q, k, v, **OPTIONS[name], return_aux=EVERYTHING, backend=backend)
    _, plain = fa.attention(q, k, v, **OPTIONS[name], return_aux=fa.AuxRequest(probs=True, scores=True), backend="eager")
    p = plain.probs
    formulas = {
        "entropy": -(p * p.masked_fill(p == 0, 1.0).log()).sum(-1),
        "column_sums": p.sum(2),
        "max_scores": plain.scores.amax(-1),
    }
    for statistic, want in formulas.items():
        got = getattr(aux, statistic)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if got.dtype == torch.float32 else {}
        torch.testing.assert_close(got, want, check_dtype=False, **tolerance)
        arriving = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(want).masked_fill(want == -torch.inf, 0.0)
        grads = torch.autograd.grad(got, (q, k, v), arriving.to(got), retain_graph=True, allow_unused=True)
        wanted = torch.autograd.grad(want, (q, k, v), arriving, retain_graph=True, allow_unused=True)
        for g, right in zip(grads[:2], wanted[:2], strict=True):
            torch.testing.assert_close(g, right, check_dtype=False, **{key: 10 * x for key, x in tolerance.items()})
        assert grads[2] is None or grads[2].equal(torch.zeros_like(grads[2]))


def test_equal_maxima_share(backend):
    q = torch.ones(1, 1, 2, 4, requires_grad=True)
    k = torch.ones(1, 1, 4, 4).index_fill(2, torch.tensor([0]), -1.0).requires_grad_()
    _, aux = fa.attention(q, k, k, scale=1.0, return_aux=fa.AuxRequest(max_scores=True), backend=backend)
    _, dk = torch.autograd.grad(aux.max_scores, (q, k), torch.tensor([[[3.0, 6.0]]]))
    torch.testing.assert_close(dk[0, 0, :, 0], torch.tensor([0.0, 3.0, 3.0, 3.0]))


def test_parameters_get_their_share(backend):
    q, k, v = tensors()
    bias, sinks = torch.randn(1, 4, 1, 43).requires_grad_(), torch.randn(4).requires_grad_()

    def entropy(name):
        _, aux = fa.attention(q, k, v, score_mods=(fa.Bias(bias),), sinks=sinks, return_aux=fa.AuxRequest(entropy=True), backend=name)
        return torch.autograd.grad(aux.entropy.square().sum(), (bias, sinks))

    for got, right in zip(entropy(backend), entropy("eager"), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_twice_differentiable(backend):
    q, k, v = (t[:1, :2, :4].clone().requires_grad_() for t in tensors())

    def second(name):
        _, aux = fa.attention(q, k, v, mask=fa.Causal(), return_aux=EVERYTHING, backend=name)
        total = aux.entropy.square().sum() + aux.column_sums.square().sum() + aux.max_scores.square().sum()
        first = torch.autograd.grad(total, (q, k), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (q, k))

    for got, right in zip(second(backend), second("eager"), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


def test_in_compiled_graphs_and_batched():
    torch._dynamo.reset()
    q, k, v = (t.requires_grad_() for t in tensors())

    def total(q, k, v):
        _, aux = fa.attention(q, k, v, mask=fa.Causal(), q_offset=6, return_aux=EVERYTHING, backend="cpu")
        return aux.entropy.sum() + aux.column_sums.square().sum() + aux.max_scores.sum()

    grads = torch.autograd.grad(total(q, k, v), (q, k), retain_graph=True)
    compiled = torch.autograd.grad(torch.compile(total, backend="aot_eager", fullgraph=True)(q, k, v), (q, k))
    for got, right in zip(compiled, grads, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)
    _, aux = fa.attention(q, k, v, return_aux=fa.AuxRequest(entropy=True), backend="cpu")
    arriving = torch.randn(3, *aux.entropy.shape)
    batched = torch.autograd.grad(aux.entropy, q, arriving, is_grads_batched=True, retain_graph=True)[0]
    for got, g in zip(batched, arriving, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(aux.entropy, q, g, retain_graph=True)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [None, torch.tensor([2, -4, 2])], ids=["all", "some"])
@pytest.mark.parametrize("rows", [None, torch.tensor([5, 0, -1, 5])], ids=["every", "few"])
@pytest.mark.parametrize("name", OPTIONS)
def test_chosen_rows_and_heads(name, rows, heads, backend):
    q, k, v = (t.requires_grad_() for t in tensors())
    request = fa.AuxRequest(probs=True, scores=True, lse=True, rows=rows, heads=heads)
    out, aux = fa.attention(q, k, v, **OPTIONS[name], return_aux=request, backend=backend)
    plain, whole = fa.attention(q, k, v, **OPTIONS[name], return_aux=fa.AuxRequest(probs=True, scores=True, lse=True), backend="eager")
    assert out.equal(fa.attention(q, k, v, **OPTIONS[name], backend=backend))
    assert aux.lse.shape == whole.lse.shape
    picked = [t if heads is None else t[:, heads] for t in (whole.probs, whole.scores)]
    picked = [t if rows is None else t[:, :, rows] for t in picked]
    for got, right in zip((aux.probs, aux.scores), picked, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    arriving = [torch.randn_like(t) for t in picked]
    pairs = ((out, aux.probs, aux.scores), (plain, *picked))
    grads, wanted = (torch.autograd.grad(pair, (q, k, v), (torch.ones_like(out), *arriving)) for pair in pairs)
    for got, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


def test_chosen_rows_beside_other_options(backend):
    q, k, v = tensors()
    rows, heads = torch.tensor([1, 30], dtype=torch.int32), torch.tensor([3])
    for options in (
        {"mask": fa.ValidLengths(torch.tensor([0, 43])), "empty_rows": "uniform"},
        {"mask": fa.Causal(), "q_offset": 0, "normalizer": fa.Sigmoid()},
    ):
        if backend == "cuda" and "normalizer" in options:
            continue
        _, aux = fa.attention(q, k, v, **options, return_aux=fa.AuxRequest(probs=True, rows=rows, heads=heads), backend=backend)
        _, whole = fa.attention(q, k, v, **options, return_aux=fa.AuxRequest(probs=True), backend="eager")
        torch.testing.assert_close(aux.probs, whole.probs[:, heads][:, :, rows.long()], rtol=1e-4, atol=1e-5)
        assert aux.scores is None


ERRORS = {
    "range": ({"rows": torch.tensor([37])}, ValueError, r"rows must lie in \[-37, 37\)"),
    "negative": ({"heads": torch.tensor([-5])}, ValueError, r"heads must lie in \[-4, 4\)"),
    "dtype": ({"rows": torch.tensor([1.0])}, TypeError, "rows must be an int tensor"),
    "shape": ({"rows": torch.tensor([[1]])}, ValueError, r"rows must have shape \[n\]; got \[1, 1\]"),
    "list": ({"rows": [1, 2]}, TypeError, "rows must be an int tensor"),
    "nothing": ({"probs": False, "lse": True, "rows": torch.tensor([1])}, ValueError, "with probs=True or scores=True"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_chosen_rows(name):
    request, error, match = ERRORS[name]
    with pytest.raises(error, match=match):
        fa.attention(*tensors(), return_aux=fa.AuxRequest(**{"probs": True} | request))


def test_requests_compare_by_value():
    a, b, c = (fa.AuxRequest(probs=True, rows=torch.tensor([1, n])) for n in (2, 2, 3))
    assert a == b
    assert hash(a) == hash(b)
    assert a != c


_MEMORY = """
import resource, torch, fused_attn as fa
q, k, v = (torch.randn(1, 2, 6000, 16, requires_grad=True) for _ in range(3))
fa.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], backend="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
request = fa.AuxRequest(probs=True, entropy=True, rows=torch.tensor([0, 900, 5999]))
out, aux = fa.attention(q, k, v, mask=fa.Causal(), return_aux=request, backend="cpu")
(out.sum() + aux.probs.square().sum()).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_weights_of_a_long_sequence_without_the_matrix():
    """The probabilities of all rows would be 275 MiB, eight times with what autograd keeps."""
    # As in test_selective: what is freed goes back at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    used = int(subprocess.run([sys.executable, "-c", _MEMORY], check=True, capture_output=True, text=True, env=environment).stdout)
    assert used < 150


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_chosen_rows_in_any_integer_dtype(dtype):
    q = torch.randn(1, 1, 300, 4)
    rows = torch.tensor([0, 100] if dtype == torch.uint8 else [-1, 100, -128], dtype=dtype)
    _, aux = fa.attention(q, q, q, return_aux=fa.AuxRequest(probs=True, rows=rows))
    torch.testing.assert_close(aux.probs, (q @ q.mT / 2).softmax(-1)[:, :, rows.long()])


def test_chosen_rows_in_a_graph_of_any_length():
    torch._dynamo.reset()
    mask = from_mask_mod(lambda b, h, i, j: (i + j) % 3 != 0)

    def weights(q, rows):
        return fa.attention(q, q, q, mask=mask, return_aux=fa.AuxRequest(probs=True, rows=rows))[1].probs

    compiled = torch.compile(weights, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 2, 9, 4), (3, 3, 12, 4)):
        q, rows = torch.randn(shape), torch.tensor([1, -1, 4])
        torch.testing.assert_close(compiled(q, rows), weights(q, rows))
