"""Normalisers other than the softmax: the sigmoid on the kernels, the others on the dense path."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import fused_attn as fa
from fused_attn.lowering import Grid
from fused_attn.normalizers import Gumbel, Hard, Normalizer, TalkingHeads, TopK
from fused_attn.testing import check_inputs, inputs_of, vocabulary

pytestmark = pytest.mark.quick

# What belongs to a softmax is not asked of another normaliser.
REQUEST = fa.AuxRequest(probs=True, scores=True, max_scores=True, column_sums=True)
OPTIONS = {
    "plain": {},
    "causal": {"mask": fa.Causal(), "q_offset": 6, "score_mods": (fa.SoftCap(2.0),)},
    "empty": {"mask": fa.ValidLengths(torch.tensor([41, 0])), "dropout": fa.Dropout(0.3, seed=4)},
    "dense": {"mask": fa.Dense(torch.arange(37 * 43).view(37, 43) % 3 != 0), "score_mods": (fa.Bias(torch.randn(1, 4, 37, 43)),)},
    "l2": {"mask": fa.SlidingWindow(9, 3), "q_offset": 0, "scoring": fa.NegativeL2(0.25)},
}


def tensors(dtype=torch.float32, device="cpu"):
    made = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 37, 24), (2, 2, 43, 24), (2, 2, 43, 20))
    return [torch.randn(shape, generator=made).to(device, dtype) for shape in shapes]


def refuses(backend, match):
    if backend in ("eager", "auto"):
        return False
    q, k, v = tensors()
    with pytest.raises(fa.UnsupportedError, match=match):
        fa.attention(q, k, v, normalizer=fa.Sigmoid(), backend=backend)
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "l2"])
def test_sigmoid_holds_the_error_rule(name, dtype, backend):
    if backend == "cuda":
        refuses(backend, "Sigmoid is no softmax")
        return
    inputs = inputs_of(*tensors(dtype), **OPTIONS[name], normalizer=fa.Sigmoid(-1.25), return_aux=REQUEST)
    check_inputs(inputs, backend, ("out", "probs", "scores", "column_sums", "max_scores"), name)


@pytest.mark.parametrize("name", OPTIONS)
def test_sigmoid_is_its_formula(name, backend):
    if backend == "cuda":
        return
    q, k, v = (t.requires_grad_() for t in tensors())
    out = fa.attention(q, k, v, **OPTIONS[name], normalizer=fa.Sigmoid(0.5), backend=backend)
    _, aux = fa.attention(q, k, v, **OPTIONS[name], return_aux=fa.AuxRequest(scores=True), backend="eager")
    weights = torch.sigmoid(aux.scores + 0.5)
    if "dropout" in OPTIONS[name]:
        identity = torch.eye(43).expand(2, 2, 43, 43)
        kept = fa.attention(q, k, identity, **OPTIONS[name], normalizer=fa.Sigmoid(0.5), backend="eager").detach()
        torch.testing.assert_close(kept, weights.masked_fill(kept == 0, 0.0).detach() / 0.7, rtol=1e-4, atol=1e-5)
        weights = weights.masked_fill(kept == 0, 0.0) / 0.7
    want = weights @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=2e-5)
    grads, wanted = (torch.autograd.grad(t.sin().sum(), (q, k, v)) for t in (out, want))
    for got, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_sigmoid_keeps_broken_pairs_apart(masked, backend):
    if backend == "cuda":
        return
    documents = fa.Documents(torch.arange(43) // 20, torch.arange(37) // 20)
    q, k, v = tensors()
    clean = fa.attention(q, k, v, mask=documents, normalizer=fa.Sigmoid(), backend=backend)
    for tensor in (q, k, v)[: 3 if masked else 1]:
        tensor[:, :, 3, 5] = torch.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    got = fa.attention(*leaves, mask=documents, normalizer=fa.Sigmoid(), backend=backend)
    torch.testing.assert_close(got[:, :, 20:], clean[:, :, 20:], rtol=1e-5, atol=1e-5)
    assert bool(got[:, :, 3].isnan().all())
    grads = torch.autograd.grad(got, leaves, torch.ones_like(got))
    assert all(bool(g[:, :, 20:].isfinite().all()) for g in grads)


def test_sigmoid_is_differentiable_twice(backend):
    if backend == "cuda":
        return
    q, k, v = (t[:1, :2, :5].clone().requires_grad_() for t in tensors())
    results = []
    for name in (backend, "eager"):
        out = fa.attention(q, k, v, mask=fa.Causal(), normalizer=fa.Sigmoid(), backend=name)
        first = torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v)))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_sigmoid_in_a_compiled_graph():
    torch._dynamo.reset()
    q, k, v = (t.requires_grad_() for t in tensors())

    def attend(q, k, v):
        return fa.attention(
            q, k, v, mask=fa.Causal(), q_offset=6, normalizer=fa.Sigmoid(-1.0), score_mods=(fa.SoftCap(3.0),), backend="cpu"
        )

    plain, compiled = attend(q, k, v), torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v)
    assert compiled.equal(plain)
    pairs = (torch.autograd.grad(t.sum(), (q, k, v)) for t in (plain, compiled))
    assert all(a.equal(b) for a, b in zip(*pairs, strict=True))


def test_the_paper_s_bias_keeps_outputs_of_ordinary_size():
    q, k, v = tensors()
    ones = torch.ones_like(v)
    out = fa.attention(q * 0, k, ones, normalizer=fa.Sigmoid(-math.log(43)), backend="cpu")
    torch.testing.assert_close(out, torch.full_like(out, 43 / 44))


def dense(q, k, v, weights):
    scores = (q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5).masked_fill(~torch.ones(37, 43, dtype=torch.bool).tril(6), -torch.inf)
    return weights(scores) @ v.repeat_interleave(2, 1)


def top(scores, k):
    return scores.masked_fill(scores < scores.topk(k, -1).values[..., -1:], -torch.inf).softmax(-1)


MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
FORMULAS = {
    "topk": (TopK(3), lambda s: top(s, 3)),
    "topk-straight": (TopK(2, straight_through=True), lambda s: top(s, 2).detach() + s.softmax(-1) - s.softmax(-1).detach()),
    "hard": (Hard(), lambda s: (s == s.amax(-1, keepdim=True)).double() + s.softmax(-1) - s.softmax(-1).detach()),
    "talking": (TalkingHeads(MIX), lambda s: torch.einsum("hg,bgij->bhij", MIX, s.softmax(-1))),
    "talking-topk": (TalkingHeads(MIX, TopK(3)), lambda s: torch.einsum("hg,bgij->bhij", MIX, top(s, 3))),
}


@pytest.mark.parametrize("asked", ["auto", "eager"])
@pytest.mark.parametrize("name", FORMULAS)
def test_dense_normalizers_are_their_formulas(name, asked):
    normalizer, weights = FORMULAS[name]
    q, k, v = (t.double().requires_grad_() for t in tensors())
    out = fa.attention(q, k, v, mask=fa.Causal(), q_offset=6, normalizer=normalizer, backend=asked)
    want = dense(q, k, v, weights)
    torch.testing.assert_close(out, want)
    for got, right in zip(*(torch.autograd.grad(t.sin().sum(), (q, k, v)) for t in (out, want)), strict=True):
        torch.testing.assert_close(got, right)


def test_talking_heads_learn():
    q, k, v = (t.double() for t in tensors())
    weight = MIX.clone().requires_grad_()
    out = fa.attention(q, k, v, normalizer=TalkingHeads(weight))
    (grad,) = torch.autograd.grad(out.square().sum(), weight)
    probs = (q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5).softmax(-1)
    want = torch.einsum("hg,bgij->bhij", weight, probs) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(grad, torch.autograd.grad(want.square().sum(), weight)[0])


def test_gumbel_draws_from_torch_s_generator():
    q, k, v = tensors()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(fa.attention(q, k, v, mask=fa.ValidLengths(torch.tensor([43, 5])), normalizer=Gumbel(0.7)))
    assert outs[0].equal(outs[1])
    assert not outs[0].equal(outs[2])
    torch.manual_seed(0)
    _, aux = fa.attention(q, k, v, normalizer=Gumbel(hard=True), return_aux=fa.AuxRequest(probs=True))
    assert aux.probs.sum(-1).allclose(torch.ones(2, 4, 37))
    assert bool(((aux.probs == 0) | (aux.probs == 1)).all())
    # The largest of scores with Gumbel noise is a draw from their softmax.
    flat = torch.zeros(1, 1, 4000, 4)
    _, aux = fa.attention(
        flat, torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), normalizer=Gumbel(hard=True), return_aux=fa.AuxRequest(probs=True)
    )
    assert abs(float(aux.probs[..., 0].mean()) - 0.5) < 0.05


@pytest.mark.parametrize("name", vocabulary(Normalizer, Grid((2, 4, 37, 43), torch.device("cpu"))))
def test_rows_without_keys_are_zeros(name):
    normalizer = vocabulary(Normalizer, Grid((2, 4, 37, 43), torch.device("cpu")))[name]
    q, k, v = (t.requires_grad_() for t in tensors())
    out = fa.attention(q, k, v, mask=fa.ValidLengths(torch.tensor([43, 0])), normalizer=normalizer)
    assert out[1].equal(torch.zeros_like(out[1]))
    assert all(g[1].equal(torch.zeros_like(g[1])) for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_a_normalizer_of_one_s_own():
    @dataclass(frozen=True, eq=False)
    class Squared(Normalizer):
        def weights(self, scores, softmax):
            return scores.clamp(min=0.0).square()

    q, k, v = tensors()
    out = fa.attention(q, k, v, normalizer=Squared())
    scores = q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
    torch.testing.assert_close(out, scores.relu().square() @ v.repeat_interleave(2, 1), rtol=1e-4, atol=1e-4)
    assert "dense path" in str(fa.explain(q, k, v, normalizer=Squared()))


def test_dense_normalizers_are_refused_by_name(backend):
    if backend == "eager":
        return
    q, k, v = tensors()
    with pytest.raises(fa.UnsupportedError, match="TopK takes whole rows"):
        fa.attention(q, k, v, normalizer=TopK(2), backend=backend)


ERRORS = {
    "class": ({"normalizer": fa.Sigmoid}, TypeError, "normalizer must be a fused_attn normaliser; got the class Sigmoid itself"),
    "name": ({"normalizer": "sigmoid"}, TypeError, "normalizer must be"),
    "sinks": ({"normalizer": fa.Sigmoid(), "sinks": torch.zeros(4)}, ValueError, "sinks belongs"),
    "empty": ({"normalizer": fa.Sigmoid(), "empty_rows": "uniform"}, ValueError, "empty_rows belongs"),
    "lse": ({"normalizer": fa.Sigmoid(), "return_aux": fa.AuxRequest(lse=True)}, ValueError, "lse of a row"),
    "entropy": ({"normalizer": TopK(2), "return_aux": fa.AuxRequest(entropy=True)}, ValueError, "entropy of a row"),
    "k": ({"normalizer": TopK(44)}, ValueError, "at most kv_len = 43; got 44"),
    "talking": ({"normalizer": TalkingHeads(torch.eye(3))}, ValueError, r"\[heads, heads\] = \[4, 4\]; got \[3, 3\]"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    options, error, match = ERRORS[name]
    with pytest.raises(error, match=match):
        fa.attention(*tensors(), **options)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: fa.Sigmoid(torch.zeros(1)), TypeError),
        (lambda: fa.Sigmoid(torch.inf), ValueError),
        (lambda: TopK(0), ValueError),
        (lambda: TopK(2.5), TypeError),
        (lambda: Gumbel(0.0), ValueError),
        (lambda: TalkingHeads(torch.eye(2, dtype=torch.int64)), TypeError),
        (lambda: TalkingHeads(torch.eye(2), "topk"), TypeError),
    ],
)
def test_constructors(make, error):
    with pytest.raises(error):
        make()
