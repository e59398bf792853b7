"""vmap, batched gradients, FLOP counting: what torch offers around its own attention works around ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._vmap_internals import _vmap
from torch.autograd.functional import hessian, jacobian
from torch.utils.flop_counter import FlopCounterMode

import fused_attn as fa
from fused_attn.integrations.sdpa import patched

BATCH, HEADS, LENGTH, DIM, SLICES = 2, 2, 9, 8, 3


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [leaf(BATCH, HEADS, LENGTH, DIM, dtype=dtype) for _ in range(3)]


def close(got: Any, want: Any, scale: int = 1) -> None:
    """The same sums in another order: ``scale`` times LENGTH terms of a few roundings."""
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert (a - b).abs().max() <= scale * 8 * LENGTH * torch.finfo(a.dtype).eps * (1 + b.abs().max())


# Batched gradients

ATTENTION = {
    "plain": dict,
    "causal": lambda: {"mask": fa.Causal()},
    "lengths": lambda: {"mask": fa.ValidLengths(torch.tensor([5, 9]))},
    "documents": lambda: {"mask": fa.Documents(torch.arange(LENGTH) // 4)},
    "dense": lambda: {"mask": torch.rand(HEADS, LENGTH, LENGTH) < 0.6},
    "offsets": lambda: {"mask": fa.Causal(), "q_offset": torch.tensor([0, 1])},
    "dropout": lambda: {"dropout": fa.Dropout(0.3, seed=1)},
    "softcap": lambda: {"score_mods": (fa.SoftCap(2.0),)},
    "bias": lambda: {"score_mods": (fa.Bias(leaf(HEADS, LENGTH, LENGTH)),)},
    "bias-of-batches": lambda: {"score_mods": (fa.Bias(torch.randn(BATCH, 1, 1, LENGTH)),), "mask": fa.Causal()},
    "sinks": lambda: {"sinks": leaf(HEADS)},
}


def one_by_one(outputs: list[Tensor], inputs: list[Tensor], arriving: list[Tensor]) -> list[Tensor]:
    each = [torch.autograd.grad(outputs, inputs, [u[i] for u in arriving], retain_graph=True) for i in range(SLICES)]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


@pytest.mark.quick
@pytest.mark.parametrize("feature", ATTENTION)
@pytest.mark.parametrize("chosen", ["cpu", "eager"])
def test_batched_gradients_of_attention(feature: str, chosen: str) -> None:
    hold(feature, chosen)


@pytest.mark.quick
@pytest.mark.parametrize("feature", ["causal", "dropout", "sinks"])
def test_batched_gradients_of_every_kernel(feature: str, kernel_backend: str) -> None:
    """Folded, and once per slice: what is shared by the batch, and what a kernel keeps per row."""
    hold(feature, kernel_backend)


def hold(feature: str, backend: str) -> None:
    """The older vmap behind ``is_grads_batched``, and ``torch.vmap`` over the same backward."""
    options = ATTENTION[feature]()
    inputs = qkv()
    out, aux = fa.attention(*inputs, backend=backend, return_aux=fa.AuxRequest(probs=True, lse=True), **options)
    inputs += [m.bias for m in options.get("score_mods", ()) if isinstance(m, fa.Bias) and m.bias.requires_grad]
    inputs += [options["sinks"]] if "sinks" in options else []
    outputs = [out, aux.probs, aux.lse]
    arriving = [torch.randn(SLICES, *t.shape) for t in outputs]
    want = one_by_one(outputs, inputs, arriving)
    close(torch.autograd.grad(outputs, inputs, arriving, is_grads_batched=True, retain_graph=True), want)
    close(torch.vmap(lambda *u: torch.autograd.grad(outputs, inputs, u, retain_graph=True))(*arriving), want)
    last = [u.movedim(0, -1) for u in arriving]
    close(torch.vmap(lambda *u: torch.autograd.grad(outputs, inputs, u, retain_graph=True), in_dims=-1)(*last), want)


SOFTMAX = {
    "plain": dict,
    "log": lambda: {"log": True},
    "causal": lambda: {"mask": fa.Causal()},
    "dropout": lambda: {"dropout": fa.Dropout(0.3, seed=2)},
    "bias": lambda: {"bias": leaf(LENGTH, LENGTH)},
    "uniform": lambda: {"empty_rows": "uniform", "mask": fa.ValidLengths(torch.tensor([0, 3]))},
}


@pytest.mark.quick
@pytest.mark.parametrize("feature", SOFTMAX)
def test_batched_gradients_of_softmax(feature: str, backend: str) -> None:
    options, scores = SOFTMAX[feature](), leaf(BATCH, HEADS, LENGTH, LENGTH)
    out, inputs = fa.masked_softmax(scores, backend=backend, **options), [scores, *([options["bias"]] if "bias" in options else [])]
    arriving = [torch.randn(SLICES, *out.shape)]
    close(torch.autograd.grad(out, inputs, arriving, is_grads_batched=True, retain_graph=True), one_by_one([out], inputs, arriving))


def test_batched_gradients_of_the_patched_function() -> None:
    with patched():
        inputs = qkv()
        out = F.scaled_dot_product_attention(*inputs, is_causal=True)
    arriving = [torch.randn(SLICES, *out.shape)]
    close(torch.autograd.grad(out, inputs, arriving, is_grads_batched=True, retain_graph=True), one_by_one([out], inputs, arriving))


@pytest.mark.quick
@pytest.mark.parametrize("chosen", ["cpu", "eager"])
def test_gradcheck_with_its_defaults_and_batched(chosen: str) -> None:
    inputs = [leaf(2, 2, 3, 3, dtype=torch.float64) for _ in range(3)]

    def attention(*tensors: Tensor) -> Tensor:
        return fa.attention(*tensors, mask=fa.Causal(), backend=chosen)

    def softmax(scores: Tensor) -> Tensor:
        return fa.masked_softmax(scores, fa.Causal(), backend=chosen)

    for function, tensors in ((attention, inputs), (softmax, inputs[:1])):
        assert torch.autograd.gradcheck(function, tensors, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, tensors, check_batched_grad=True)
    with patched(chosen):
        assert torch.autograd.gradcheck(F.scaled_dot_product_attention, inputs, check_batched_grad=True)


@pytest.mark.parametrize("derivative", [jacobian, hessian], ids=["jacobian", "hessian"])
def test_vectorised_derivatives(derivative: Any) -> None:
    def function(q: Tensor) -> Tensor:
        out = fa.attention(q, q, q, mask=fa.Causal(), backend="cpu")
        return out if derivative is jacobian else out.sin().sum()

    q = torch.randn(1, 1, 4, 3, dtype=torch.float64)
    close([derivative(function, q, vectorize=True)], [derivative(function, q)])


# torch's newer vmap does not run inside its older one.
@pytest.mark.parametrize(
    ("inner", "outer"), [(torch.vmap, torch.vmap), (_vmap, torch.vmap), (_vmap, _vmap)], ids=["vmap", "mixed", "older"]
)
@pytest.mark.parametrize("feature", ["causal", "dropout"])
def test_nested_maps_over_a_backward(feature: str, inner: Any, outer: Any) -> None:
    inputs = qkv()
    out = fa.attention(*inputs, backend="cpu", **ATTENTION[feature]())
    arriving = torch.randn(2, SLICES, *out.shape)

    def pull(u: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, u, retain_graph=True)

    close(
        outer(inner(pull))(arriving),
        [torch.stack(parts) for parts in zip(*(one_by_one([out], inputs, [u]) for u in arriving), strict=True)],
    )


# Forward under vmap


@pytest.mark.quick
def test_masks_from_mapped_tensors() -> None:
    q, ids, lens = torch.randn(4, 2, 2, 9, 8), torch.randint(0, 2, (4, 9)).cumsum(1), torch.randint(0, 10, (4, 2))
    cu = torch.tensor([[0, 3, 9], [0, 5, 9], [0, 0, 9], [0, 9, 9]])
    cases = {
        "documents": (lambda x, t: fa.attention(x, x, x, mask=fa.Documents(t)), ids),
        "cu_seqlens": (lambda x, t: fa.attention(x, x, x, mask=fa.Documents.from_cu_seqlens(t, total=9)), cu),
        "lengths": (lambda x, t: fa.attention(x, x, x, mask=fa.ValidLengths(t)), lens),
        "bias": (lambda x, t: fa.attention(x, x, x, score_mods=(fa.Bias(t),)), torch.randn(4, 9, 9)),
    }
    for function, mapped in cases.values():
        close([torch.vmap(function)(q, mapped)], [torch.stack([function(x, t) for x, t in zip(q, mapped, strict=True)])])
    # Not mapped themselves, so that their values can be looked at.
    for mask in (fa.Documents(ids[0]), fa.Documents.from_cu_seqlens(cu[1])):
        close(
            [torch.vmap(lambda x, m=mask: fa.attention(x, x, x, mask=m))(q)], [torch.stack([fa.attention(x, x, x, mask=mask) for x in q])]
        )


MAPPED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "bias": (lambda x, b: fa.attention(x, x, x, score_mods=(fa.Bias(b),)), (9, 9)),
    "bias, masked and capped": (lambda x, b: fa.attention(x, x, x, mask=fa.Causal(), score_mods=(fa.Bias(b), fa.SoftCap(3.0))), (9, 9)),
    "float mask of the drop-in": (lambda x, b: fa.scaled_dot_product_attention(x, x, x, b), (9, 9)),
    "slopes": (lambda x, s: fa.attention(x, x, x, score_mods=(fa.ALiBi(s),), mask=fa.Causal()), (2,)),
    "decay": (lambda x, d: fa.attention(x, x, x, score_mods=(fa.DecayBias(d),), mask=fa.Causal()), (2, 2, 9)),
    "probabilities": (
        lambda x, b: fa.attention(x, x, x, score_mods=(fa.Bias(b),), return_aux=fa.AuxRequest(probs=True))[1].probs,
        (9, 9),
    ),
    "picked probabilities": (
        lambda x, b: fa.attention(
            x, x, x, score_mods=(fa.Bias(b),), return_aux=fa.AuxRequest(probs=True, rows=torch.tensor([1]))
        )[1].probs,
        (9, 9),
    ),
    "entropy": (lambda x, b: fa.attention(x, x, x, score_mods=(fa.Bias(b),), return_aux=fa.AuxRequest(entropy=True))[1].entropy, (9, 9)),
    "sigmoid": (lambda x, b: fa.attention(x, x, x, score_mods=(fa.Bias(b),), normalizer=fa.Sigmoid()), (9, 9)),
    "sinks": (lambda x, s: fa.attention(x, x, x, sinks=s), (2,)),
    "values and bias": (lambda x, b: fa.attention(x, x, b[:, :, :, :8], score_mods=(fa.Bias(b[..., 8:]),)), (2, 2, 9, 17)),
    "softmax": (lambda x, b: fa.masked_softmax(x @ x.mT, fa.Causal(), bias=b), (9, 9)),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", MAPPED)
def test_modifications_alone_are_mapped(name: str) -> None:
    """q and k are those of all slices, so that nothing of theirs says that values cannot be looked at."""
    (function, shape), x = MAPPED[name], torch.randn(BATCH, HEADS, LENGTH, DIM)
    mapped = torch.randn(SLICES, *shape)
    close([torch.vmap(lambda t: function(x, t))(mapped)], [torch.stack([function(x, t) for t in mapped])])
    derivative = torch.func.grad(lambda t: function(x, t).sin().sum())
    close([torch.vmap(derivative)(mapped)], [torch.stack([derivative(t) for t in mapped])])


@pytest.mark.quick
def test_what_cannot_hold_under_vmap_is_said() -> None:
    scattered = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="one run of equal ids"):
        torch.vmap(fa.Documents)(scattered)
    with pytest.raises(ValueError, match="total must be given"):
        torch.vmap(lambda c: fa.Documents.from_cu_seqlens(c).ids)(torch.tensor([[0, 4]]))
    with pytest.raises(fa.UnsupportedError, match="transform"):
        torch.vmap(lambda q: fa.attention(q, q, q, backend="cpu"))(torch.randn(2, 1, 1, 4, 8))


def test_vmap_of_documents_compiles() -> None:
    q, ids = torch.randn(4, 2, 2, 9, 8), torch.randint(0, 2, (4, 9)).cumsum(1)

    def run(q: Tensor, ids: Tensor) -> Tensor:
        return torch.vmap(lambda x, i: fa.attention(x, x, x, mask=fa.Documents(i)))(q, ids)

    close([torch.compile(run, backend="aot_eager", fullgraph=True)(q, ids)], [run(q, ids)])


# One tensor in several places


@pytest.mark.quick
@pytest.mark.parametrize("chosen", ["cpu", "eager"])
def test_one_tensor_in_several_places_compiles(chosen: str) -> None:
    torch._dynamo.reset()
    q, k, b, s = leaf(2, 2, 9, 8), leaf(2, 2, 9, 8), leaf(9, 9), leaf(2)
    functions = {
        "k is v": lambda q, k, b, s: fa.attention(q, k, k, mask=fa.Causal(), backend=chosen),
        "all": lambda q, k, b, s: fa.attention(q, q, q, backend=chosen),
        "bias twice": lambda q, k, b, s: fa.attention(q, k, k, score_mods=(fa.Bias(b), fa.SoftCap(3.0), fa.Bias(b)), backend=chosen),
        "sinks are slopes": lambda q, k, b, s: fa.attention(q, k, q, score_mods=(fa.ALiBi(s),), sinks=s, backend=chosen),
        "softmax": lambda q, k, b, s: fa.masked_softmax(b, bias=b, backend=chosen),
        "drop-in": lambda q, k, b, s: fa.scaled_dot_product_attention(q, q, q, is_causal=True),
    }
    for function in functions.values():
        results = []
        for run in (torch.compile(function, backend="aot_eager", fullgraph=True), function):
            out = run(q, k, b, s)
            results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, b, s), allow_unused=True)])
        close(*results)


# FLOPs


def flops(function: Any, *inputs: Tensor) -> tuple[int, int]:
    """Of the forward, and of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        out = function(*inputs)
        forward = counter.get_total_flops()
        if out.requires_grad:
            out.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.quick
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
def test_flops_are_counted_as_torch_counts_its_own(kv_heads: int, gradients: bool, kernel_backend: str) -> None:
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    q, k, v = (torch.randn(2, h, 7, d).requires_grad_(gradients) for h, d in ((4, 8), (kv_heads, 8), (kv_heads, 6)))
    wide = [(2, 4, 7, 8), (2, 4, 7, 8), (2, 4, 7, 6)]
    want = sdpa_flop_count(*wide)
    both = want + (sdpa_backward_flop_count((2, 4, 7, 6), *wide) if gradients else 0)
    assert flops(lambda *t: fa.attention(*t, mask=fa.Causal(), backend=kernel_backend), q, k, v) == (want, both)
    with patched(kernel_backend):
        assert flops(lambda *t: F.scaled_dot_product_attention(*t, enable_gqa=True), q, k, v) == (want, both)


@pytest.mark.quick
def test_flops_of_what_comes_besides() -> None:
    q = torch.randn(2, 4, 7, 8)
    only = flops(lambda q: fa.attention(q, q, q, backend="cpu"), q)[0]
    with_probs = flops(lambda q: fa.attention(q, q, q, backend="cpu", return_aux=fa.AuxRequest(probs=True))[0], q)[0]
    assert with_probs == only + only // 2  # the products q k^T once more
    assert flops(lambda q: fa.attention(q, q, q, backend="eager"), q)[0] == only
