"""What rows without keys give: zeros, even weights that a fill leaves, and the same with the softmax's gradient."""

from __future__ import annotations

import pytest
import torch

import fused_attn as fa
from fused_attn.testing import DIFFERENTIABLE, EVERYTHING, STATISTICS, check_inputs, inputs_of

pytestmark = pytest.mark.quick

POLICIES = ("uniform", "softmax")
MASKS = {
    "lengths": {"mask": fa.ValidLengths(torch.tensor([43, 0]))},
    "causal": {"mask": fa.Causal(), "q_offset": -9},
    "both": {"mask": fa.Causal() & fa.ValidLengths(torch.tensor([43, 0])), "q_offset": torch.tensor([-4, 6])},
    "heads": {"mask": fa.Dense(torch.rand(2, 2, 37, 1, generator=torch.Generator().manual_seed(1)) < 0.6)},
}
MODS = {
    "none": {},
    "mods": {"score_mods": (fa.SoftCap(2.0), fa.Bias(torch.randn(1, 2, 37, 43, generator=torch.Generator().manual_seed(3))))},
    "dropout": {"dropout": fa.Dropout(0.3, seed=9)},
    "l2": {"scoring": fa.NegativeL2(0.2)},
}


def tensors(dtype=torch.float32):
    made = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=made).to(dtype) for shape in ((2, 2, 37, 24), (2, 1, 43, 24), (2, 1, 43, 20))]


@pytest.mark.parametrize("empty_rows", POLICIES)
@pytest.mark.parametrize("mods", [n for n in MODS if n != "l2"])
@pytest.mark.parametrize("mask", MASKS)
def test_error_rule(mask, mods, empty_rows, backend):
    dtype = torch.bfloat16 if mask == "both" else torch.float32
    inputs = inputs_of(*tensors(dtype), **MASKS[mask], **MODS[mods], empty_rows=empty_rows)
    check_inputs(inputs, backend, (*DIFFERENTIABLE, *STATISTICS) if mask == "lengths" else DIFFERENTIABLE, f"{mask}, {mods}")


def filled(q, k, v, allowed, fill):
    """What a finite fill makes of a call: D2L replaces masked scores by one, Keras adds one."""
    scores = q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
    probs = fill(scores, allowed).softmax(-1)
    return probs @ v.repeat_interleave(2, 1), probs


@pytest.mark.parametrize("mask", [n for n in MASKS if n != "both"])
@pytest.mark.parametrize("empty_rows", POLICIES)
def test_a_fill_gives_the_same(empty_rows, mask, backend):
    """float32 and a fill next to which scores vanish; float64 would keep them."""
    fills = {
        "uniform": lambda s, allowed: s.masked_fill(~allowed, -3e38),
        "softmax": lambda s, allowed: s + torch.where(allowed, 0.0, -3e38),
    }
    q, k, v = (t.requires_grad_() for t in tensors())
    options = MASKS[mask]
    position = torch.arange(37)[:, None] + options.get("q_offset", 0)
    allowed = {
        "lengths": (torch.arange(2) == 0)[:, None, None, None].expand(2, 2, 37, 43),
        "causal": (torch.arange(43) <= position).expand(2, 2, 37, 43),
        "heads": getattr(options["mask"], "keep_pairs", torch.ones(1, dtype=torch.bool)).expand(2, 2, 37, 43),
    }[mask]
    want, probs = filled(q, k, v, allowed, fills[empty_rows])
    out, aux = fa.attention(q, k, v, **options, empty_rows=empty_rows, return_aux=EVERYTHING, backend=backend)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aux.probs, probs, rtol=1e-5, atol=1e-6)
    assert bool((aux.lse == -torch.inf).eq(~allowed.any(-1)).all())
    arriving = torch.randn_like(out), torch.randn_like(probs)
    grads, wanted = (torch.autograd.grad(pair, (q, k, v), arriving) for pair in ((out, aux.probs), (want, probs)))
    for got, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_uniform_rows_give_scores_no_gradient(backend):
    q, k, v = (t.requires_grad_() for t in tensors())
    out = fa.attention(q, k, v, mask=fa.ValidLengths(torch.tensor([0, 0])), empty_rows="uniform", backend=backend)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(out))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert dq.equal(torch.zeros_like(dq))
    assert dk.equal(torch.zeros_like(dk))
    torch.testing.assert_close(dv, torch.full_like(dv, 2 * 37 / 43))


@pytest.mark.parametrize("empty_rows", POLICIES)
def test_a_sink_leaves_no_row_empty(empty_rows, backend):
    q, k, v = tensors()
    options = {"mask": fa.ValidLengths(torch.tensor([43, 0])), "sinks": torch.tensor([0.5, -torch.inf]), "backend": backend}
    zero, even = fa.attention(q, k, v, **options), fa.attention(q, k, v, **options, empty_rows=empty_rows)
    torch.testing.assert_close(even[:, 0], zero[:, 0], rtol=0, atol=0)  # a head with a sink
    torch.testing.assert_close(even[1, 1], v[1, 0].mean(0).expand(37, 20))


@pytest.mark.parametrize("empty_rows", POLICIES)
def test_rows_of_minus_infinity_are_empty_too(empty_rows, backend):
    q, k, v = tensors()
    bias = torch.zeros(1, 1, 37, 1).index_fill(2, torch.tensor([3]), -torch.inf)
    out = fa.attention(q, k, v, score_mods=(fa.Bias(bias),), empty_rows=empty_rows, backend=backend)
    torch.testing.assert_close(out[:, :, 3], v.mean(2).repeat_interleave(2, 1))


@pytest.mark.parametrize("empty_rows", POLICIES)
def test_asking_for_more_does_not_change_the_output(empty_rows, backend):
    options = {**MASKS["causal"], **MODS["dropout"], "empty_rows": empty_rows, "backend": backend}
    q, k, v = tensors()
    plain = fa.attention(q, k, v, **options)
    assert plain.equal(fa.attention(q, k, v, **options, return_aux=EVERYTHING)[0])
    assert plain.is_contiguous() == q.is_contiguous()
    permuted = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert fa.attention(*permuted, **options).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("empty_rows", POLICIES)
def test_drawn_seeds_are_drawn_once(empty_rows):
    q, k, v = tensors()
    options = {"mask": fa.ValidLengths(torch.tensor([43, 0])), "empty_rows": empty_rows, "backend": "cpu"}
    torch.manual_seed(5)
    out = fa.attention(q, k, v, **options, dropout=fa.Dropout(0.4))
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, ())
    assert out.equal(fa.attention(q, k, v, **options, dropout=fa.Dropout(0.4, seed=seed)))


def test_twice_differentiable():
    q, k, v = (t[:, :2, :4].double().requires_grad_() for t in tensors())

    def attend(q, k, v):
        return fa.attention(q, k, v, mask=fa.Causal(), q_offset=-2, empty_rows="uniform", backend="cpu")

    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, (q, k, v), fast_mode=True)


def test_twice_differentiable_where_a_gradient_is_no_derivative(backend):
    """A fill that is added leaves equal weights whatever the scores are, and yet their gradient."""
    q, k, v = (t[:, :2, :4].clone().requires_grad_() for t in tensors())
    results = []
    for name in (backend, "eager"):
        out = fa.attention(q, k, v, mask=fa.Causal(), q_offset=-2, empty_rows="softmax", backend=name)
        first = torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v)))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("empty_rows", POLICIES)
def test_in_a_compiled_graph_and_under_transforms(empty_rows):
    torch._dynamo.reset()
    q, k, v = tensors()
    mask = fa.ValidLengths(torch.tensor([43, 0]))

    def attend(q, k, v):
        return fa.attention(q, k, v, mask=mask, empty_rows=empty_rows)

    plain = attend(q, k, v)
    torch.testing.assert_close(torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v), plain, rtol=0, atol=1e-6)
    grad = torch.func.grad(lambda q: attend(q, k, v).sum())(q)
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(attend(leaf, k, v).sum(), leaf)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", ["mean", None, 1, ("zero",)], ids=str)
def test_errors(wrong):
    with pytest.raises(ValueError, match="empty_rows must be 'zero', 'uniform' or 'softmax'"):
        fa.attention(*tensors(), empty_rows=wrong)


def test_explain_says_so():
    q, k, v = (t.repeat(1, 1, 30, 1) for t in tensors())
    assert "second pass" in str(fa.explain(q, k, v, mask=fa.Causal(), q_offset=0, empty_rows="uniform"))
