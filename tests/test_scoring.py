"""Scorings: what a query and a key score, built in and of the user's own, against float64 formulas that share no code with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.backends import eager
from fused_attn.backends.cpu import tiles
from fused_attn.kernel_score import KernelScore
from fused_attn.lowering import Terms
from fused_attn.problem import AttentionProblem
from fused_attn.scoring import SCORINGS, Product, Scoring

APPLYING = ("eager", "cpu")
HEADS, DIM = 4, 8


@dataclass(frozen=True, eq=False)
class Additive(Scoring):
    """Bahdanau's: w . tanh(q + k), weight [head_dim]."""

    weight: Tensor
    name: ClassVar[str] = "test_additive"

    def score(self, q, k):
        return (q[..., :, None, :] + k[..., None, :, :]).tanh() @ self.weight


@dataclass(frozen=True, eq=False)
class PerHeadL1(Scoring):
    """-factor_h * ||q - k||_1 with a factor per sequence and head, [batch, heads], and a shift."""

    factor: Tensor
    shift: float
    name: ClassVar[str] = "test_l1"

    def score(self, q, k):
        distance = (q[..., :, None, :] - k[..., None, :, :] + self.shift).square().add(0.1).sqrt().sum(-1)
        return -distance * self.factor[:, :, None, None]


@dataclass(frozen=True, eq=False)
class Bilinear(Scoring):
    """q W k^T with a matrix per head; lowers."""

    matrix: Tensor
    name: ClassVar[str] = "test_bilinear"

    def score(self, q, k):
        return q @ self.matrix.to(q.dtype) @ k.mT

    def lower(self, q, k):
        return Product(q @ self.matrix.to(q.dtype), k, 1.0)


def per_head():
    return torch.linspace(0.2, 0.6, HEADS)[:, None, None]


# Name: (the scoring on a list of its tensors, those tensors, the float64 formula of q, k [.., q, 1, d], [.., 1, k, d] and tensors).
SCORINGS_OF_TESTS = {
    "dot": (lambda: fa.DotProduct(), (), lambda q, k: (q * k).sum(-1) / DIM**0.5),
    "dot_number": (lambda: fa.DotProduct(0.3), (), lambda q, k: 0.3 * (q * k).sum(-1)),
    "dot_scalar": (fa.DotProduct, (torch.tensor(0.3),), lambda q, k, s: s * (q * k).sum(-1)),
    "dot_heads": (fa.DotProduct, (per_head(),), lambda q, k, s: s * (q * k).sum(-1)),
    "dot_batches": (fa.DotProduct, (torch.linspace(0.1, 0.5, 2 * HEADS).view(2, HEADS, 1, 1),), lambda q, k, s: s * (q * k).sum(-1)),
    "l2": (lambda: fa.NegativeL2(), (), lambda q, k: -(q - k).square().sum(-1)),
    "l2_number": (lambda: fa.NegativeL2(0.3), (), lambda q, k: -0.3 * (q - k).square().sum(-1)),
    "l2_scalar": (fa.NegativeL2, (torch.tensor(0.3),), lambda q, k, s: -s * (q - k).square().sum(-1)),
    "l2_heads": (fa.NegativeL2, (per_head(),), lambda q, k, s: -s * (q - k).square().sum(-1)),
    "additive": (Additive, (torch.linspace(-1, 1, DIM),), lambda q, k, w: ((q + k).tanh() * w).sum(-1)),
    "l1": (
        lambda factor: PerHeadL1(factor, 0.5),
        (torch.linspace(0.2, 1.0, 2 * HEADS).view(2, HEADS),),
        lambda q, k, f: -((q - k + 0.5).square() + 0.1).sqrt().sum(-1) * f[:, :, None, None],
    ),
    "bilinear": (
        Bilinear,
        (torch.sin(torch.arange(HEADS * DIM * DIM).float()).view(HEADS, DIM, DIM) / 3,),
        lambda q, k, m: ((q[..., 0, :] @ m)[..., None, :] * k).sum(-1),
    ),
}
LOWERING = [n for n in SCORINGS_OF_TESTS if n not in ("additive", "l1")]


def leaves(name, lengths=(5, 9), kv_heads=2, dtype=torch.float32, device="cpu", batch=2):
    q_len, kv_len = lengths
    sizes = ((batch, HEADS, q_len, DIM), (batch, kv_heads, kv_len, DIM), (batch, kv_heads, kv_len, DIM))
    own = [t.to(device, dtype if dtype == torch.float64 else torch.float32) for t in SCORINGS_OF_TESTS[name][1]]
    made = [torch.randn(size, device=device).to(dtype) for size in sizes]
    return [t.detach().clone().requires_grad_() for t in (*made, *own)]


def run(name, tensors, backend, **options):
    q, k, v, *own = tensors
    return fa.attention(q, k, v, scoring=SCORINGS_OF_TESTS[name][0](*own), backend=backend, **options)


def brute(name, tensors, causal=False, cap=None):
    """scores and output by the formula, in the tensors' dtype."""
    q, k, v, *own = tensors
    k, v = (t.repeat_interleave(HEADS // k.shape[1], 1) for t in (k, v))
    scores = SCORINGS_OF_TESTS[name][2](q[..., :, None, :], k[..., None, :, :], *own)
    scores = scores if cap is None else cap * (scores / cap).tanh()
    if causal:
        shift = k.shape[2] - q.shape[2]
        hidden = torch.arange(k.shape[2], device=q.device) > torch.arange(q.shape[2], device=q.device)[:, None] + shift
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores, scores.softmax(-1) @ v


def check(name, tensors, backend, tolerance=1e-5, causal=False, cap=None):
    wide = [t.detach().double().requires_grad_() for t in tensors]
    options = {"mask": fa.Causal() if causal else None, "q_offset": tensors[1].shape[2] - tensors[0].shape[2]}
    options["score_mods"] = () if cap is None else (fa.SoftCap(cap),)
    request = fa.AuxRequest(lse=True, scores=True)
    out, aux = run(name, tensors, backend, return_aux=request, **options)
    scores, expected = brute(name, wide, causal, cap)
    lse = scores.logsumexp(-1)
    weights = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64, device=out.device).view(expected.shape)
    grads = torch.autograd.grad((out, aux.lse), tensors, (weights.to(out.dtype), torch.ones_like(aux.lse)))
    exact = torch.autograd.grad((expected, lse), wide, (weights, torch.ones_like(lse)))
    for got, right in zip((out, aux.lse, *grads), (expected, lse, *exact), strict=True):
        assert got.shape == right.shape
        assert (got.double() - right).abs().max() <= tolerance * (1 + right.abs().max())
    assert torch.allclose(aux.scores.double().nan_to_num(neginf=0), scores.nan_to_num(neginf=0), atol=tolerance * 40)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", LOWERING)
def test_dot_products_on_every_backend(name, causal, backend, device):
    check(name, leaves(name, device=device), backend, causal=causal, cap=2.0 if causal else None)


@pytest.mark.quick
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("applying", APPLYING)
@pytest.mark.parametrize("name", SCORINGS_OF_TESTS)
def test_scorings(name, applying, kv_heads):
    check(name, leaves(name, kv_heads=kv_heads), applying, causal=kv_heads == 2, cap=3.0 if kv_heads == 1 else None)


@pytest.mark.quick
@pytest.mark.parametrize("name", SCORINGS_OF_TESTS)
def test_many_tiles(name, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 1 << 9)
    monkeypatch.setattr(tiles, "SCORED", 1 << 8)
    check(name, leaves(name, (37, 50)), "cpu", causal=True)


def test_long_rows_in_little_memory():
    """The largest tensor that a scoring's own code makes is a block's, not the score array's."""
    seen = []

    @dataclass(frozen=True, eq=False)
    class Watched(Scoring):
        name: ClassVar[str] = "test_watched"

        def score(self, q, k):
            seen.append(q.shape[2] * k.shape[2] * q.shape[1] * q.shape[0])
            return q @ k.mT

    q = torch.randn(2, HEADS, 400, DIM, requires_grad=True)
    fa.attention(q, q, q, scoring=Watched(), backend="cpu").sum().backward()
    SCORINGS.pop("test_watched")
    assert max(seen) <= tiles.SCORED


@pytest.mark.parametrize("name", SCORINGS_OF_TESTS)
def test_gradients_and_their_gradients(name):
    tensors = leaves(name, (3, 3), dtype=torch.float64)
    small = [t[:, :, :, :4] if i < 3 else t for i, t in enumerate(tensors)] if name.startswith(("dot", "l2", "l1")) else tensors
    small = [t.detach().requires_grad_() for t in small]
    for applying in APPLYING:
        call = lambda *tensors, backend=applying: run(name, tensors, backend)  # noqa: E731
        assert torch.autograd.gradcheck(call, small, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, small, fast_mode=True)


@pytest.mark.parametrize("name", SCORINGS_OF_TESTS)
def test_compiled_exported_and_traced(name):
    """Compiled with one backend, which take turns: each scoring with both is held to its formula and its gradients elsewhere."""
    torch._dynamo.reset()
    tensors = leaves(name)
    on_cpu = lambda *tensors: run(name, tensors, "cpu")  # noqa: E731
    expected = on_cpu(*tensors)
    grads = torch.autograd.grad(expected.sin().sum(), tensors)
    applying = APPLYING[list(SCORINGS_OF_TESTS).index(name) % len(APPLYING)]
    compiled = torch.compile(lambda *tensors: run(name, tensors, applying), backend="aot_eager", fullgraph=True)(*tensors)
    assert torch.allclose(compiled, expected, atol=1e-5)
    for got, right in zip(torch.autograd.grad(compiled.sin().sum(), tensors), grads, strict=True):
        assert torch.allclose(got, right, atol=1e-4)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return on_cpu(*tensors)

    exported = torch.export.export(Module(), tuple(tensors)).module()
    assert torch.allclose(exported(*tensors), expected, atol=1e-6)
    for got, right in zip(torch.autograd.grad(exported(*tensors).sin().sum(), tensors), grads, strict=True):
        assert torch.allclose(got, right, atol=1e-4)
    traced = torch.jit.trace(on_cpu, tuple(tensors), check_trace=False)
    assert torch.allclose(traced(*tensors), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["l2_heads", "dot_heads", "additive", "l1"])
def test_batched_gradients(name):
    tensors = leaves(name)
    out = run(name, tensors, "cpu")
    arriving = torch.randn(3, *out.shape)
    one_by_one = [torch.autograd.grad(out, tensors, g, retain_graph=True) for g in arriving]
    for batched in (
        torch.autograd.grad(out, tensors, arriving, is_grads_batched=True, retain_graph=True),
        torch.vmap(lambda g: torch.autograd.grad(out, tensors, g, retain_graph=True))(arriving),
    ):
        for got, parts in zip(batched, zip(*one_by_one, strict=True), strict=True):
            assert torch.allclose(got, torch.stack(parts), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0)], ids=str)
@pytest.mark.parametrize("applying", APPLYING)
@pytest.mark.parametrize("name", [n for n in SCORINGS_OF_TESTS if n not in ("l1", "dot_batches")])
def test_empty_arrays(name, applying, shape):
    tensors = leaves(name, shape[2:], batch=shape[0])
    out = run(name, tensors, applying)
    assert out.equal(torch.zeros(shape[0], HEADS, shape[2], DIM))
    grads = torch.autograd.grad(out.sum(), tensors, allow_unused=True)
    assert all(g is None or g.equal(torch.zeros_like(t)) for g, t in zip(grads, tensors, strict=True))


@pytest.mark.parametrize("name", ["l2", "l2_heads"])
def test_far_from_the_origin_it_loses_roundings_of_a_square(name, backend, device):
    tensors = leaves(name, device=device)
    shifted = [(t.detach() + 30.0).requires_grad_() if i < 2 else t for i, t in enumerate(tensors)]
    _, expected = brute(name, [t.detach().double() for t in shifted])
    error = (run(name, shifted, backend).double() - expected).abs().max()
    assert error <= 8 * torch.finfo(torch.float32).eps * float(shifted[1].detach().square().sum(-1).max())


@pytest.mark.parametrize("broken", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("name", ["l2", "l2_heads", "dot_heads"])
def test_a_broken_key_that_nobody_attends_to(name, broken, backend, device):
    tensors = leaves(name, (5, 9), device=device)
    with torch.no_grad():
        tensors[1][:, :, -2:] = broken
    mask = fa.KeyPadding(torch.arange(9, device=device).expand(2, 9) < 7)
    out = run(name, tensors, backend, mask=mask)
    grads = torch.autograd.grad(out.sin().sum(), tensors)
    _, expected = brute(name, [(t[:, :, :7] if i in (1, 2) else t).detach().double() for i, t in enumerate(tensors)])
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert all(g.isfinite().all() for g in grads)
    assert grads[1][:, :, -2:].equal(torch.zeros_like(grads[1][:, :, -2:]))


@pytest.mark.parametrize("applying", APPLYING)
def test_a_broken_key_and_the_users_own_code(applying):
    tensors = leaves("additive", (5, 9))
    with torch.no_grad():
        tensors[1][:, :, -2:] = torch.nan
    mask = fa.KeyPadding(torch.arange(9).expand(2, 9) < 7)
    out = run("additive", tensors, applying, mask=mask)
    _, expected = brute("additive", [(t[:, :, :7] if i in (1, 2) else t).detach().double() for i, t in enumerate(tensors)])
    assert torch.allclose(out.double(), expected, atol=1e-5)
    grads = torch.autograd.grad(out.sin().sum(), tensors)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("applying", APPLYING)
@pytest.mark.parametrize("name", ["l2", "additive"])
def test_an_attended_nan_shows(name, applying):
    tensors = leaves(name, (4, 4))
    with torch.no_grad():
        tensors[1][:, :, 2] = torch.nan
    out = run(name, tensors, applying, mask=fa.Causal())
    assert out[:, :, :2].isfinite().all()
    assert out[:, :, 2:].isnan().all()


@pytest.mark.parametrize("name", ["l2_heads", "dot_heads", "l2"])
def test_sixteen_bits(name, kernel_backend, device):
    """Distances of the rounded query: an error of half a bit of q, not of ||q||^2."""
    if kernel_backend == "cpu" and device.type == "cuda":
        pytest.skip("cpu tensors only")
    tensors = leaves(name, dtype=torch.bfloat16, device=device)
    _, expected = brute(name, [t.detach().double() for t in tensors])
    assert (run(name, tensors, kernel_backend).double() - expected).abs().max() <= 0.06


def test_sinks_aux_dropout_and_everything_together():
    tensors = leaves("additive", (6, 6))
    sinks = torch.randn(HEADS, requires_grad=True)
    request = fa.AuxRequest(probs=True, scores=True, lse=True, max_scores=True, column_sums=True, entropy=True)
    options = {"mask": fa.Causal(), "sinks": sinks, "dropout": fa.Dropout(0.3, seed=5), "return_aux": request}
    options["score_mods"] = (fa.SoftCap(3.0), fa.Bias(torch.randn(HEADS, 6, 6)))
    results = {}
    for applying in APPLYING:
        out, aux = run("additive", tensors, applying, **options)
        loss = out.sin().sum() + aux.probs.square().sum() + aux.lse.sum() + aux.scores.nan_to_num(neginf=0).cos().sum()
        parts = (out, aux.probs, aux.lse, aux.max_scores, aux.column_sums, aux.entropy)
        results[applying] = (*parts, *torch.autograd.grad(loss, (*tensors, sinks)))
    for a, b in zip(results["eager"], results["cpu"], strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_an_explicit_dot_product_is_the_plain_call(kernel_backend, device):
    q, k, v = leaves("dot", device=device)
    plain = fa.attention(q, k, v, backend=kernel_backend)
    assert fa.attention(q, k, v, scoring=fa.DotProduct(), backend=kernel_backend).equal(plain)
    scaled = fa.attention(q, k, v, scale=0.3, backend=kernel_backend)
    assert fa.attention(q, k, v, scoring=fa.DotProduct(0.3), backend=kernel_backend).equal(scaled)


def test_gradients_lie_as_their_inputs():
    q, k, v = (t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in leaves("l2", kv_heads=4))
    for scoring in (fa.NegativeL2(), Additive(torch.ones(DIM)), fa.DotProduct(torch.tensor(0.5))):
        for applying in APPLYING:
            out = fa.attention(q, k, v, scoring=scoring, backend=applying)
            assert out.stride() == torch.empty_like(q).stride()
            for grad, tensor in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
                assert grad.stride() == torch.empty_like(tensor).stride()


@pytest.mark.quick
def test_the_normal_form():
    tensors = leaves("l1")
    options = {"mask": None, "scale": None, "scoring": PerHeadL1(tensors[3], 0.5), "q_offset": None, "score_mods": (fa.SoftCap(2.0),)}
    options |= {"sinks": torch.zeros(HEADS, requires_grad=True), "dropout": None, "return_aux": None}
    problem = AttentionProblem.check(*tensors[:3], options)
    assert [id(t) for t in problem.inputs] == [id(t) for t in (*tensors[:3], options["sinks"], tensors[3])]
    terms = problem.lower().terms
    assert terms.scoring.layout == "tf"
    again = Terms.unflatten(terms.flatten())
    assert again.scoring == KernelScore("test_l1", (0.5,), terms.scoring.tensors, "tf")
    assert again.mods == (KernelScore("softcap", (2.0,)),)
    assert [id(t) for t in again.parameters] == [id(t) for t in terms.parameters]
    swapped = problem.with_inputs(tuple(t.detach() for t in problem.inputs))
    assert not swapped.requires_grad
    assert problem.requires_grad


@pytest.mark.quick
def test_explanations():
    q = torch.randn(1, HEADS, 600, DIM)
    lowered = fa.explain(q, q, q, scoring=fa.DotProduct(0.5))
    assert lowered.chosen == "cpu"
    own = fa.explain(q, q, q, scoring=Additive(torch.ones(DIM)))
    assert own.chosen == "cpu"
    text = str(own)
    assert "Additive has no Triton functions (fused_attn.backends.triton.scorings.register)" in text or "tensors are on the CPU" in text
    with pytest.raises(fa.UnsupportedError, match="Additive"):
        fa.attention(q[:, :, :4], q[:, :, :4], q[:, :, :4], scoring=Additive(torch.ones(DIM)), backend="triton")


@pytest.mark.quick
def test_cuda_takes_dot_products_alone():
    from fused_attn.backends.cuda import _mod_refusals

    q = torch.randn(1, HEADS, 6, DIM)
    options = {"mask": None, "scale": None, "q_offset": None, "score_mods": (), "sinks": None, "dropout": None, "return_aux": None}
    problem = AttentionProblem.check(q, q, q, {**options, "scoring": Additive(torch.ones(DIM))})
    assert _mod_refusals(problem) == ["Additive is no dot product (give it a lower), and the CUDA kernels compute nothing else"]
    assert _mod_refusals(AttentionProblem.check(q, q, q, {**options, "scoring": fa.NegativeL2()})) == []


@dataclass(frozen=True, eq=False)
class Narrow(Scoring):
    """Forgets the keys, and changes dtype when lowered."""

    name: ClassVar[str] = "test_narrow"

    def score(self, q, k):
        return q.sum(-1)

    def lower(self, q, k):
        return Product(q.double(), k, 1.0)


@dataclass(frozen=True, eq=False)
class Unnamed(Scoring):
    """Has no name."""

    def score(self, q, k):
        return q @ k.mT


@pytest.mark.quick
def test_errors():
    q = torch.randn(1, HEADS, 4, DIM)
    with pytest.raises(ValueError, match=r"scale and scoring must not be combined; got scale=0\.5"):
        fa.attention(q, q, q, scale=0.5, scoring=fa.DotProduct())
    with pytest.raises(TypeError, match="scoring must be a fused_attn scoring; got 'l2'"):
        fa.attention(q, q, q, scoring="l2")
    with pytest.raises(TypeError, match=r"Narrow\.score must return scores \[1, 4, 4, 4\]"):
        fa.attention(q, q, q, scoring=Narrow(), backend="eager")
    with pytest.raises(TypeError, match=r"Narrow\.lower must keep the shape and dtype of q"):
        fa.attention(q, q, q, scoring=Narrow(), backend="cpu")
    with pytest.raises(fa.UnsupportedError, match="Unnamed must have a name of its own"):
        fa.attention(q, q, q, scoring=Unnamed(), backend="cpu")
    for scoring in (fa.DotProduct, fa.NegativeL2):
        with pytest.raises(ValueError, match=r"scale must broadcast to \[batch, heads, 1, 1\]"):
            fa.attention(q, q, q, scoring=scoring(torch.ones(HEADS, 4, 1)))
        with pytest.raises(TypeError, match="scale must be a number or a floating-point tensor"):
            scoring(torch.ones(2, dtype=torch.int64))
        with pytest.raises(TypeError, match="scale must be a number"):
            scoring("1")


@pytest.mark.quick
def test_scorings_are_pytrees():
    from torch.utils import _pytree as pytree

    scoring = fa.NegativeL2(torch.ones(2, 1, 1))
    assert pytree.tree_map(lambda t: t * 2, scoring).scale.equal(torch.full((2, 1, 1), 2.0))
    assert pytree.tree_leaves(fa.DotProduct(0.5)) == []


@pytest.mark.quick
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("scoring", [fa.DotProduct, fa.NegativeL2], ids=lambda c: c.__name__)
def test_a_broken_query_without_keys_and_a_learned_scale(scoring, broken, backend, device):
    q, k, v = torch.randn(3, 1, 2, 3, 4, device=device).unbind(0)
    keep = torch.tensor([[True, True, False], [False, False, False], [True, True, False]], device=device)
    grads = []
    for fill in (broken, 0.0):
        scale = torch.full((2, 1, 1), 0.5, device=device, requires_grad=True)
        q[:, :, 1] = fill
        grads.append(torch.autograd.grad(fa.attention(q, k, v, mask=keep, scoring=scoring(scale), backend=backend).sin().sum(), scale)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.quick
def test_eager_asks_for_blocks_of_queries(monkeypatch):
    """A scoring that holds head_dim values per score must not hold them for the whole score array."""
    monkeypatch.setattr(eager, "BLOCK", 1 << 10)
    seen = []

    @dataclass(frozen=True, eq=False)
    class Watched(Scoring):
        name: ClassVar[str] = "test_watched"

        def score(self, q, k):
            seen.append(q.shape[2])
            return (q[..., :, None, :] - k[..., None, :, :]).abs().sum(-1)

    q = torch.randn(1, 2, 20, 4, requires_grad=True)
    out = fa.attention(q, q, q, scoring=Watched(), backend="eager")
    assert max(seen) == 6 and sum(seen) == 20
    torch.testing.assert_close(out, fa.attention(q, q, q, scoring=Watched(), backend="cpu"))
    SCORINGS.pop("test_watched")


def test_a_masked_key_that_is_nearly_infinite(backend):
    x, k = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    k[:, :, 1] = 3e38
    leaves = [t.requires_grad_() for t in (x, k)]
    out = fa.attention(*leaves, x, mask=torch.tensor([[True, False]]), scoring=fa.NegativeL2(), backend=backend)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), leaves))
