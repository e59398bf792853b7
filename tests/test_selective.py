"""Selective attention: blocks of queries with what earlier ones took off the scores, on every backend."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fused_attn as fa
from fused_attn import query_blocks
from fused_attn.masks import from_mask_mod
from fused_attn.testing import DIFFERENTIABLE, EVERYTHING, STATISTICS, check_inputs, inputs_of

pytestmark = pytest.mark.quick

LONG_BIAS = torch.randn(2, 4, 37, 43, generator=torch.Generator().manual_seed(5))
OPTIONS = {
    "causal": {"mask": fa.Causal(), "q_offset": 6},
    "top": {"mask": fa.Causal(), "q_offset": 0, "score_mods": (fa.SoftCap(2.0),)},
    "padded": {"mask": fa.Causal() & fa.ValidLengths(torch.tensor([43, 5])), "q_offset": torch.tensor([6, 3]), "sinks": torch.zeros(4)},
    "bias": {"mask": fa.Causal(), "q_offset": 6, "score_mods": (fa.Bias(LONG_BIAS), fa.ALiBi(torch.linspace(0.1, 0.4, 4)))},
    "documents": {"mask": fa.Causal() & fa.Documents(torch.arange(43) // 15), "q_offset": 6, "dropout": fa.Dropout(0.3, seed=6)},
    "rule": {"mask": from_mask_mod(lambda b, h, q, k: (k <= q + 6) & ((q + k + h) % 5 != 0)), "q_offset": 6},
    "keep": {"mask": fa.Causal() & fa.Dense(torch.arange(37 * 43).view(37, 43) % 7 != 0), "q_offset": 6},
    "open": {"q_offset": 6, "score_mods": (fa.DecayBias(torch.randn(1, 4, 43, generator=torch.Generator().manual_seed(7))),)},
}


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(query_blocks, "BLOCK", 16)  # 16, 16 and 5 queries


def tensors(dtype=torch.float32):
    made = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=made).to(dtype) for shape in ((2, 4, 37, 24), (2, 2, 43, 24), (2, 2, 43, 20))]


def selective(options):
    return options | {"score_mods": (*options.get("score_mods", ()), fa.Selective())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_error_rule(name, dtype, backend):
    through = (*DIFFERENTIABLE, *STATISTICS) if name in ("causal", "bias") else DIFFERENTIABLE
    check_inputs(inputs_of(*tensors(dtype), **selective(OPTIONS[name])), backend, through, name)


def original(q, k, v, allowed, mask_first):
    """As the paper's appendix and x-transformers write it, on scores whose masked elements are the lowest number."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.finfo(q.dtype).max)
    gate = scores[:, 0].relu()
    i, j = scores.shape[-2:]
    gate = gate.clone()
    gate[..., : j - i + 1] = 0.0  # the prefix and the first own token
    gate = gate * (1 - torch.eye(j, dtype=q.dtype)[j - i :])
    taken = torch.nn.functional.pad(gate, (0, 0, 1, -1)).cumsum(-2)
    return (scores - taken[:, None]).softmax(-1) @ v


def test_the_package_that_has_it(backend):
    q, k, v = (t.requires_grad_() for t in (tensors()[0], *(t.repeat_interleave(2, 1) for t in tensors()[1:])))
    allowed = torch.ones(37, 43, dtype=torch.bool).tril(6)
    want = original(q, k, v, allowed, 6)
    out = fa.attention(q, k, v, mask=fa.Causal(), q_offset=6, score_mods=(fa.Selective(),), backend=backend)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    arriving = torch.randn_like(out)
    for got, right in zip(*(torch.autograd.grad(t, (q, k, v), arriving) for t in (out, want)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=2e-5)


def test_later_queries_change_nothing_before_them(backend):
    q, k, v = tensors()
    options = {"mask": fa.Causal(), "q_offset": 6, "score_mods": (fa.Selective(),), "backend": backend}
    out = fa.attention(q, k, v, **options)
    for tensor, place in ((q, 21), (k, 27), (v, 27)):
        tensor[:, :, place:] = torch.nan
    changed = fa.attention(q, k, v, **options)
    assert changed[:, :, :21].equal(out[:, :, :21]) or torch.allclose(changed[:, :, :21], out[:, :, :21], rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 0])
def test_lengths(length, backend):
    q, k, v = (t[:, :, :length].clone().requires_grad_() for t in (*tensors()[:1], *(t.repeat_interleave(2, 1) for t in tensors()[1:])))
    results = []
    for name in (backend, "eager"):
        out, aux = fa.attention(q, k, v, mask=fa.Causal(), score_mods=(fa.Selective(),), return_aux=EVERYTHING, backend=name)
        results.append([out, aux.probs, aux.column_sums, *torch.autograd.grad(out.sum(), (q, k, v))])
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_twice_differentiable():
    q, k, v = (t[:1, :2, :18].double().requires_grad_() for t in tensors())

    def attend(q, k, v):
        return fa.attention(q[..., :3], k[..., :3], v[..., :2], mask=fa.Causal(), score_mods=(fa.Selective(),), backend="cpu")

    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, (q, k, v), fast_mode=True)


def test_every_subset_of_inputs_may_want_a_gradient():
    bias = torch.randn(1, 4, 37, 1)
    leaves = [t.requires_grad_() for t in (*tensors(), bias)]

    def grads(name, wanted):
        inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        out = fa.attention(*inputs[:3], mask=fa.Causal(), q_offset=6, score_mods=(fa.Bias(inputs[3]), fa.Selective()), backend=name)
        return torch.autograd.grad(out.square().sum(), [inputs[i] for i in wanted])

    for wanted in ((0,), (1,), (2,), (3,), (0, 3), (1, 2)):
        for got, right in zip(grads("cpu", wanted), grads("eager", wanted), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


def test_in_a_compiled_graph():
    torch._dynamo.reset()
    q, k, v = (t.requires_grad_() for t in tensors())

    def attend(q, k, v):
        return fa.attention(q, k, v, mask=fa.Causal(), q_offset=6, score_mods=(fa.SoftCap(3.0), fa.Selective()), backend="cpu")

    plain, compiled = attend(q, k, v), torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-6)
    for got, right in zip(*(torch.autograd.grad(t.sum(), (q, k, v)) for t in (compiled, plain)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_errors():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="Selective must be the last modification"):
        fa.attention(q, k, v, q_offset=6, score_mods=(fa.Selective(), fa.SoftCap(2.0)))
    with pytest.raises(ValueError, match="q_offset must be given"):
        fa.attention(q, k, v, score_mods=(fa.Selective(),))
    request = fa.AuxRequest(probs=True, rows=torch.tensor([0]))
    with pytest.raises(fa.UnsupportedError, match="picked out of a Selective call"):
        fa.attention(q, k, v, q_offset=6, score_mods=(fa.Selective(),), return_aux=request, backend="cpu")
    with pytest.raises(fa.UnsupportedError, match="Selective together with empty_rows='softmax'"):
        fa.attention(q, k, v, q_offset=6, score_mods=(fa.Selective(),), empty_rows="softmax", backend="cpu")


def test_uniform_empty_rows(backend):
    q, k, v = tensors()
    options = {"mask": fa.Causal(), "q_offset": -4, "score_mods": (fa.Selective(),), "empty_rows": "uniform"}
    got, right = (fa.attention(q, k, v, **options, backend=name) for name in (backend, "eager"))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_explain_says_so():
    q, k, v = (t.repeat(1, 1, 30, 1) for t in tensors())
    assert "blocks of queries" in str(fa.explain(q, k, v, mask=fa.Causal(), q_offset=0, score_mods=(fa.Selective(),)))


_MEMORY = """
import resource, torch, fused_attn as fa
q, k, v = (torch.randn(1, 2, 4096, 16, requires_grad=True) for _ in range(3))
options = {"mask": fa.Causal(), "score_mods": (fa.Selective(),), "backend": "cpu"}
fa.attention(q[:, :, :300], k[:, :, :300], v[:, :, :300], **options).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fa.attention(q, k, v, **options).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_hold_the_scores():
    """Head 0's scores alone are 64 MiB, and the definition keeps ten times that."""
    # What is freed goes back at once, so that the peak is that of tensors and not of the allocator's spare room.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    used = int(subprocess.run([sys.executable, "-c", _MEMORY], check=True, capture_output=True, text=True, env=environment).stdout)
    assert used < 100


@pytest.mark.parametrize("what", ["q_offset", "mask", "seed", "k"])
def test_what_was_modified_before_backward_is_said(what):
    q, k, v = tensors()
    q.requires_grad_()
    held = {
        "q_offset": torch.tensor([6, 5]),
        "mask": torch.ones(37, 43, dtype=torch.bool).tril(6),
        "seed": torch.tensor(3),
        "k": k,
    }
    out = fa.attention(
        q, k, v, mask=fa.Dense(held["mask"]), q_offset=held["q_offset"], dropout=fa.Dropout(0.2, seed=held["seed"]),
        score_mods=(fa.Selective(),), backend="cpu",
    )  # fmt: skip
    torch.autograd.grad(out.sum(), q, retain_graph=True)
    held[what].sub_(1) if held[what].dtype != torch.bool else held[what].logical_not_()
    with pytest.raises(RuntimeError, match=r"must be the same in forward and backward|modified by an inplace operation"):
        torch.autograd.grad(out.sum(), q)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_offsets_of_any_integer_dtype(dtype):
    q, k, v = (torch.randn(1, 2, 300, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    options = {"mask": fa.Causal(), "q_offset": torch.tensor([3], dtype=dtype), "score_mods": (fa.Selective(),)}
    got, right = (fa.attention(q, k, v, **options, backend=name) for name in ("cpu", "eager"))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_softmax_rows_take_from_allowed_pairs_only():
    """The one combination that eager alone computes, against its formula."""
    q, k, v = (t[:, :2, :6].double().requires_grad_() for t in (tensors()[0], *(t for t in tensors()[1:])))
    keep = torch.ones(6, 6, dtype=torch.bool).tril()
    keep[[2, 5]] = False
    out = fa.attention(q, k, v, mask=keep, q_offset=0, score_mods=(fa.Selective(),), empty_rows="softmax")
    scores = q @ k.mT * 24**-0.5
    taking = keep & (torch.arange(6) > 0) & ~torch.eye(6, dtype=torch.bool)
    gate = scores[:, :1].masked_fill(~taking, 0.0).relu()
    taken = torch.stack([gate[:, :, :i].sum(2) for i in range(6)], 2)
    left = scores - taken
    rows = keep.any(-1, keepdim=True)
    probs = torch.where(rows, left.masked_fill(~keep & rows, -torch.inf).softmax(-1), (left - left.detach()).softmax(-1))
    want = probs @ v
    torch.testing.assert_close(out, want)
    arriving = torch.randn_like(out)
    for got, right in zip(*(torch.autograd.grad(t, (q, k, v), arriving) for t in (out, want)), strict=True):
        torch.testing.assert_close(got, right)


def test_a_trace_is_right_at_other_lengths():
    def attend(q, k, v):
        return fa.attention(q, k, v, mask=fa.Causal(), score_mods=(fa.Selective(),), backend="cpu")

    traced = torch.jit.trace(attend, tuple(torch.randn(1, 2, 20, 4) for _ in range(3)), check_trace=False)
    for length in (7, 45):
        q, k, v = (torch.randn(1, 2, length, 4) for _ in range(3))
        torch.testing.assert_close(traced(q, k, v), attend(q, k, v), rtol=1e-5, atol=1e-6)
