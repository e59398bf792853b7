"""Additive attention on every backend that has it, against the error rule and against formulas that share no code with it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn as fa
from fused_attn.backends import get
from fused_attn.backends.base import Incoming
from fused_attn.backends.cpu import additive, tiles
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.problem import AttentionProblem
from fused_attn.testing import CPU, DIFFERENTIABLE, check_inputs, inputs_of, vocabulary

BACKENDS = ("eager", "cpu", "triton")
HEADS, DIM, VALUE_DIM = 2, 5, 3


@pytest.fixture(autouse=True)
def only_where_there_is_triton(request):
    if "triton" in request.node.name:
        pytest.importorskip("triton")


def tensors(q_len=9, kv_len=9, dtype=torch.float32, batch=1, kv_heads=1, dim=DIM):
    sizes = ((HEADS, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, VALUE_DIM))
    return [torch.randn(batch, *size).to(dtype).requires_grad_() for size in sizes]


def weight(kind, dim=DIM):
    shapes = {"scalar": (), "row": (dim,), "heads": (HEADS, dim)}
    return 0.7 if kind == "number" else torch.randn(shapes[kind]).requires_grad_()


def keep():
    """Rows 2 and 3 have no key."""
    allowed = torch.rand(9, 9) < 0.6
    allowed[2:4] = False
    return fa.Dense(allowed)


def bias(*shape):
    return fa.Bias(torch.randn(shape, requires_grad=True))


# Weight, scale, dtype and the call's other arguments.
CASES = {
    "plain": ("row", None, torch.float32, dict),
    "numbers": ("number", 0.5, torch.float32, lambda: {"mask": fa.ValidLengths(torch.tensor([7])), "score_mods": (fa.SoftCap(1.5),)}),
    "scalars": ("scalar", torch.tensor(0.6), torch.float32, lambda: {"mask": fa.Documents(torch.arange(9) // 4), "dropout": fa.Dropout(0.3, seed=5)}),
    "heads": ("heads", torch.tensor(-1.5), torch.float32, lambda: {"mask": keep(), "sinks": torch.randn(HEADS), "score_mods": (fa.SoftCap(2.0), bias(HEADS, 9, 9))}),
    "positions": ("row", 0.3, torch.float32, lambda: {"mask": fa.Causal(), "score_mods": (fa.ALiBi(torch.rand(HEADS)), bias(9, 1)), "sinks": torch.randn(HEADS)}),
    "bfloat16": ("heads", None, torch.bfloat16, lambda: {"mask": fa.SlidingWindow(3, 1), "score_mods": (bias(1, 9), fa.ALiBi(torch.rand(HEADS)))}),
    "float16": ("row", torch.tensor(0.8), torch.float16, lambda: {"mask": fa.PrefixLM(3), "score_mods": (fa.SoftCap(3.0), fa.ALiBi(torch.rand(HEADS)))}),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("applying", BACKENDS)
def test_error_rule(applying, name):
    kind, scale, dtype, options = CASES[name]
    inputs = inputs_of(*tensors(dtype=dtype), scoring=fa.Additive(weight(kind), scale), **options())
    check_inputs(inputs, applying, DIFFERENTIABLE, name)


@pytest.mark.parametrize("name", vocabulary(Mask, Grid((1, HEADS, 9, 9), CPU)))
def test_every_mask(name):
    mask = vocabulary(Mask, Grid((1, HEADS, 9, 9), CPU))[name]
    inputs = inputs_of(*tensors(), scoring=fa.Additive(weight("heads"), 0.5), mask=mask, score_mods=(bias(9, 9), fa.SoftCap(2.0)))
    check_inputs(inputs, "cpu", DIFFERENTIABLE, name)


@pytest.mark.quick
def test_several_tiles_of_odd_sizes():
    """Two tiles of queries and of keys, a head size that is padded, and queries that lie before, among and behind the keys."""
    q, k, v = tensors(66, 70, dim=3)
    inputs = inputs_of(q, k, v, scoring=fa.Additive(weight("heads", 3)), mask=fa.SlidingWindow(40, 5), q_offset=4)
    check_inputs(inputs, "triton", ("out",), "tiles")


@pytest.mark.quick
@pytest.mark.parametrize("block", [1, 40, 200, 1 << 18])
@pytest.mark.parametrize("size", [0.01, 1.0], ids=["tanh", "sigmoid"])
def test_blocks_of_the_cpu_backend(block, size, monkeypatch):
    monkeypatch.setattr(additive, "BLOCK", block)
    q, k, v = (t.detach() * size for t in tensors(batch=3))
    k[1] /= size  # another way to tanh in one sequence
    inputs = inputs_of(q, k, v, scoring=fa.Additive(weight("heads"), torch.tensor(0.9)))
    check_inputs(inputs, "cpu", DIFFERENTIABLE, "blocks")


@pytest.mark.quick
@pytest.mark.parametrize("applying", BACKENDS)
def test_pair_by_pair(applying):
    q, k, v = tensors(3, 4)
    w, a = weight("heads"), 0.8
    out, aux = fa.attention(q, k, v, scoring=fa.Additive(w, a), backend=applying, return_aux=fa.AuxRequest(scores=True))
    for h, i in itertools.product(range(HEADS), range(3)):
        scores = [
            sum(float(w[h, d].detach()) * math.tanh(a * float((q[0, h, i, d] + k[0, 0, j, d]).detach())) for d in range(DIM))
            for j in range(4)
        ]
        total = sum(map(math.exp, scores))
        assert aux.scores[0, h, i].tolist() == pytest.approx(scores, abs=1e-5)
        expected = [sum(math.exp(s) / total * float(v[0, 0, j, d].detach()) for j, s in enumerate(scores)) for d in range(VALUE_DIM)]
        assert out[0, h, i].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("applying", BACKENDS)
def test_the_layers_that_compute_it(applying):
    """D2L's w_v tanh(W_q q + W_k k), Keras' sum of scale * tanh(q + k), and Keras' concat mode c * sum tanh(scale * (q + k))."""
    queries, keys, values = torch.randn(2, 4, 6), torch.randn(2, 7, 5), torch.randn(2, 7, 3)
    w_q, w_k, w_v = (torch.nn.Linear(n, m, bias=False) for n, m in ((6, 8), (5, 8), (8, 1)))
    lens = torch.tensor([3, 7])
    hidden = torch.arange(7) >= lens[:, None, None]

    def ours(q, k, scoring, mask=None):
        return fa.attention(q[:, None], k[:, None], values[:, None], scoring=scoring, mask=mask, backend=applying)[:, 0]

    q, k = w_q(queries), w_k(keys)
    features = torch.tanh(q.unsqueeze(2) + k.unsqueeze(1))
    expected = torch.softmax(w_v(features).squeeze(-1).masked_fill(hidden, -1e6), -1) @ values
    torch.testing.assert_close(ours(q, k, fa.Additive(w_v.weight[0]), fa.ValidLengths(lens)), expected, rtol=0, atol=2e-6)
    scale = torch.randn(8)
    torch.testing.assert_close(ours(q, k, fa.Additive(scale)), torch.softmax((scale * features).sum(-1), -1) @ values, rtol=0, atol=2e-6)
    concat = torch.softmax(0.7 * torch.tanh(0.4 * (q.unsqueeze(2) + k.unsqueeze(1))).sum(-1), -1) @ values
    torch.testing.assert_close(ours(q, k, fa.Additive(0.7, torch.tensor(0.4))), concat, rtol=0, atol=2e-6)


@pytest.mark.quick
@pytest.mark.parametrize("broken", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("applying", BACKENDS)
def test_what_nobody_attends_to_never_shows(applying, broken):
    """Keys, values and whole rows of queries and gradients behind a mask, in a group of heads."""
    results = []
    base, w = tensors(), weight("heads")
    for fill in (broken, 0.0):
        q, k, v = (t.detach().clone() for t in base)
        dout = torch.ones(1, HEADS, 9, VALUE_DIM)
        k[:, :, 6:], v[:, :, 6:], q[:, :, 4], dout[:, :, 4] = fill, fill, fill, fill
        allowed = torch.ones(9, 9, dtype=torch.bool)
        allowed[:, 6:], allowed[4] = False, False
        leaves = [t.requires_grad_() for t in (q, k, v, w)]
        out, aux = fa.attention(*leaves[:3], mask=allowed, scoring=fa.Additive(w), backend=applying, return_aux=fa.AuxRequest(probs=True))
        results.append([out.detach(), aux.probs.detach(), *torch.autograd.grad(out, leaves, dout)])
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("applying", BACKENDS)
def test_what_is_attended_and_broken_shows_there_alone(applying, broken, where):
    leaves = tensors()
    documents = fa.Documents(torch.arange(9) // 5)
    with torch.no_grad():
        leaves[0 if where == "q" else 1][:, :, 2, 1] = broken
    out = fa.attention(*leaves, mask=documents, scoring=fa.Additive(weight("row")), backend=applying)
    grads = torch.autograd.grad(out.sum(), leaves)
    rows = [2] if where == "q" else list(range(5))
    assert out[:, :, rows].isnan().all()
    assert out[:, :, [i for i in range(9) if i not in rows]].isfinite().all()
    assert all(g[:, :, 5:].isfinite().all() for g in grads)
    assert grads[0][:, :, rows].isnan().any(-1).all()
    assert grads[1][:, :, :5].isnan().any(-1).all()


@pytest.mark.quick
@pytest.mark.parametrize("applying", ["cpu", "triton"])
def test_every_subset_of_gradients(applying):
    leaves = [*tensors(4, 4), weight("row"), torch.tensor(0.6)]
    b = torch.randn(4, 4)

    def grads(wanted):
        chosen = [t.detach().requires_grad_(w) for t, w in zip((*leaves, b), wanted, strict=True)]
        options = {"scoring": fa.Additive(*chosen[3:5]), "score_mods": (fa.Bias(chosen[5]),), "backend": applying}
        out = fa.attention(*chosen[:3], **options)
        return torch.autograd.grad(out.sin().sum(), [t for t in chosen if t.requires_grad])

    every = grads([True] * 6)
    subsets = itertools.product((False, True), repeat=6) if applying == "cpu" else [[i == j for j in range(6)] for i in (0, 3, 4, 5)]
    for wanted in subsets:
        if any(wanted):
            for got, right in zip(grads(wanted), itertools.compress(every, wanted), strict=True):
                assert torch.equal(got, right)


@pytest.mark.quick
@pytest.mark.parametrize("applying", ["eager", "cpu"])
def test_gradients_and_their_gradients(applying):
    leaves = [t.detach().double().requires_grad_() for t in (*tensors(3, 4, dim=2), weight("heads", 2), torch.tensor(0.6))]

    def call(q, k, v, w, a):
        return fa.attention(
            q, k, v, scoring=fa.Additive(w, a), mask=fa.Causal(), q_offset=0, score_mods=(fa.SoftCap(2.0),), backend=applying
        )

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.quick
def test_double_backward_on_triton():
    leaves = [*tensors(3, 4), weight("row"), torch.tensor(0.6, requires_grad=True)]
    results = []
    for applying in ("eager", "triton"):
        out = fa.attention(*leaves[:3], scoring=fa.Additive(*leaves[3:]), backend=applying)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("applying", ["eager", "cpu"])
def test_compiled(applying):
    torch._dynamo.reset()
    leaves = [*tensors(), weight("heads"), torch.tensor(0.6, requires_grad=True)]
    call = lambda q, k, v, w, a: fa.attention(q, k, v, scoring=fa.Additive(w, a), mask=fa.Causal(), backend=applying)  # noqa: E731
    expected = call(*leaves)
    got = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_mapped_gradients():
    leaves = [*tensors(), weight("heads")]
    out = fa.attention(*leaves[:3], scoring=fa.Additive(leaves[3]), backend="cpu")
    arriving = torch.randn(3, *out.shape)
    one_by_one = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in arriving]
    batched = torch.autograd.grad(out, leaves, arriving, is_grads_batched=True, retain_graph=True)
    for got, parts in zip(batched, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(parts), rtol=1e-5, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("length", [6, 40])
def test_sequences_do_not_depend_on_each_other(length):
    q, k, v = tensors(length, length, batch=4, dim=32)
    w = weight("heads", 32)

    def run(*parts):
        out = fa.attention(*parts, scoring=fa.Additive(w), backend="cpu")
        return out, *torch.autograd.grad(out.sin().sum(), parts)

    together = run(q, k, v)
    for b in range(4):
        alone = run(*(t[b : b + 1].detach().requires_grad_() for t in (q, k, v)))
        assert all(torch.equal(got[b : b + 1], right) for got, right in zip(together, alone, strict=True))


class Largest(TorchDispatchMode):
    """The largest result of any operation, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.quick
def test_memory():
    """No array of head_dim values per pair, and no array of all scores: a block is the largest thing there is."""
    q, k, v = (torch.randn(1, 8, 512, 64) for _ in range(3))
    options = {"mask": fa.Causal(), "scale": None, "q_offset": None, "score_mods": (), "sinks": None, "dropout": None, "return_aux": None}
    call = AttentionProblem.check(q, k, v, {**options, "scoring": fa.Additive(torch.ones(64, requires_grad=True))}).lower()
    largest = Largest()
    with torch.no_grad(), largest:
        forward = get("cpu").attention_fwd(call)
        get("cpu").attention_bwd(call, forward, Incoming(forward.out), (True, True, True, False, True))
    assert largest.elements <= max(additive.BLOCK, tiles.TILE) < q.shape[1] * 512 * 512


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(2, 4, 512, 64), (8, 1, 1024, 256), (1, 2, 256, 64)], ids=str)
def test_auto_on_the_cpu(shape):
    q = torch.randn(shape, requires_grad=True)
    assert fa.explain(q, q, q, scoring=fa.Additive(torch.ones(shape[-1], requires_grad=True))).chosen == "cpu"


@pytest.mark.quick
@pytest.mark.parametrize("scoring", [fa.Additive(0.5), fa.Additive(torch.ones(DIM), 0.3)], ids=["number", "row"])
def test_cuda_refuses_by_name(scoring):
    from fused_attn.backends.cuda import _mod_refusals

    inputs = inputs_of(*tensors(), scoring=scoring)
    assert [reason.split()[0] for reason in _mod_refusals(inputs.problem)] == ["Additive"]
    with pytest.raises(fa.UnsupportedError, match="Additive"):
        fa.attention(*tensors(), scoring=scoring, backend="cuda")


@pytest.mark.quick
@pytest.mark.parametrize("applying", BACKENDS)
def test_empty_arrays(applying):
    for batch, q_len, kv_len in ((0, 3, 5), (1, 0, 5), (1, 3, 0)):
        leaves = [*tensors(q_len, kv_len, batch=batch), weight("heads")]
        out = fa.attention(*leaves[:3], scoring=fa.Additive(leaves[3]), backend=applying)
        assert out.equal(torch.zeros(batch, HEADS, q_len, VALUE_DIM))
        assert all(g.equal(torch.zeros_like(t)) for g, t in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize("applying", ["eager", "cpu"])
def test_errors(applying):
    q, k, v = tensors()
    for wrong in (torch.ones(DIM + 1), torch.ones(HEADS, DIM + 1), torch.ones(HEADS + 1, DIM), torch.ones(1, HEADS, DIM)):
        with pytest.raises(ValueError, match=r"Additive weight must be a scalar, \[head_dim\] or \[heads, head_dim\] = \[2, .*; got \["):
            fa.attention(q, k, v, scoring=fa.Additive(wrong), backend=applying)
    with pytest.raises(ValueError, match="Additive scale must have shape"):
        fa.attention(q, k, v, scoring=fa.Additive(1.0, torch.ones(2)), backend=applying)
    with pytest.raises(TypeError, match="Additive weight must be a number"):
        fa.Additive("w")
    with pytest.raises(TypeError, match="Additive weight must be a number or a floating-point tensor"):
        fa.Additive(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="Additive scale must be finite"):
        fa.Additive(1.0, math.inf)
    with pytest.raises(ValueError, match="scale and scoring must not be combined"):
        fa.attention(q, k, v, scale=0.5, scoring=fa.Additive(1.0))


@pytest.mark.parametrize("head_dim", [40, 8])
def test_rows_of_no_query_weigh_nothing(head_dim, backend):
    """A row of zeros, which fills a tile, may score e^100 where a product scores 0."""
    if backend == "cuda":
        return
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, d, generator=made) for n, d in ((16, head_dim), (9, head_dim), (9, 4)))
    leaves = [t.requires_grad_() for t in (q, k + 1, v)]
    bias = torch.zeros(1, 1, 16, 1).index_fill(2, torch.tensor([3]), -torch.inf)
    results = []
    for name in (backend, "eager"):
        out = fa.attention(*leaves, scoring=fa.Additive(1280.0 / head_dim / 8), score_mods=(fa.Bias(bias),), backend=name)
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


def test_masked_keys_do_not_change_a_bit_on_cpu():
    made = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 33, 8, generator=made) * 0.1 for _ in range(3))
    results = []
    for last in (0.0, 50.0, 1e30):
        k[:, :, -1] = last
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = fa.attention(*leaves, mask=fa.Causal(), scoring=fa.Additive(1.0), backend="cpu")
        results.append([out[:, :, :-1], *(g[:, :, :-1] for g in torch.autograd.grad(out[:, :, :-1].sum(), leaves))])
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("scale", "outlier", "weight"), [(1e-4, ("k", 100.0), 1e4), (1e-3, ("channel", 50.0), 1e3), (1e-2, ("token", 200.0), 1.0)]
)
def test_small_arguments_keep_their_digits(scale, outlier, weight, backend):
    if backend == "cuda":
        return
    made = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 1, 16, 8, generator=made) for _ in range(3))
    q, k, weights = q * scale, k * scale, torch.full((8,), weight)
    if outlier[0] == "channel":
        q[..., 0], weights[0] = outlier[1], 1.0
    else:
        (k if outlier[0] == "k" else q)[:, :, -1] = outlier[1]
    check_inputs(inputs_of(q, k, v, scoring=fa.Additive(weights), mask=fa.ValidLengths(torch.tensor([15]))), backend, title=outlier[0])


def test_no_columns():
    q = torch.randn(2, 2, 3, 0, requires_grad=True)
    v = torch.randn(2, 2, 3, 4)
    out = fa.attention(q, q, v, scoring=fa.Additive(1.0), backend="cpu")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    out.sum().backward()
