"""Historical bugs of other libraries, parts D to H: layouts, the autograd contract, dropout, races, edges."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_attn as fa
from fused_attn import backends
from fused_attn.dropout import keep_factor
from fused_attn.lowering import Grid
from fused_attn.testing import DIFFERENTIABLE, EVERYTHING, Case, check, check_inputs, evaluate, inputs_of, laid_out, make_inputs
from fused_attn.testing import call as call_problem

quick = pytest.mark.quick


def leaves_of(device: torch.device, *shape: int, count: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(*shape, device=device, dtype=dtype, requires_grad=True) for _ in range(count)]


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def same_gradients(out: Tensor, want: Tensor, leaves: list[Tensor], incoming: Tensor) -> None:
    torch.testing.assert_close(out, want)
    grads = (torch.autograd.grad(o, leaves, incoming, retain_graph=True) for o in (out, want))
    for i, (got, expected) in enumerate(zip(*grads, strict=True)):
        torch.testing.assert_close(got, expected, msg=lambda m, n=i: f"gradient {n}: {m}")


# D. Strides and layout


@quick
@pytest.mark.parametrize("kind", ["sum", "permuted", "transposed", "sliced", "stride0", "heads_merged", "every_other"])
def test_36_incoming_gradients_of_any_layout(kind: str, backend: str, device: torch.device) -> None:
    """FlashAttention#355, xformers PR#282, TransformerEngine#623, cuEquivariance#177: stride-0 or non-contiguous grad_out was misread."""
    leaves = leaves_of(device, 2, 3, 20, 8)
    out, want = fa.attention(*leaves, backend=backend), reference(*leaves)
    if kind == "sum":
        for got, expected in zip(*(torch.autograd.grad(o.sum(), leaves) for o in (out, want)), strict=True):
            torch.testing.assert_close(got, expected)
        return
    values = torch.randn(2, 3, 20, 8, device=device)
    if kind == "heads_merged":
        incoming = torch.randn(2, 20, 24, device=device).view(2, 20, 3, 8).transpose(1, 2)
    elif kind == "every_other":
        incoming = torch.randn(2, 3, 40, 8, device=device)[:, :, ::2]
    else:
        incoming = laid_out(values, kind)
    same_gradients(out, want, leaves, incoming)


@quick
@pytest.mark.parametrize("layout", ["permuted", "transposed", "sliced"])
@pytest.mark.parametrize("length", [31, 32, 33, 64, 65])
def test_37_layouts_with_a_mask(length: int, layout: str, backend: str, device: torch.device) -> None:
    """pytorch#112577: non-contiguous q, k, v with a mask gave garbage."""
    check(Case((2, 2, 1), (length, length), (16, 8), masks=("Dense1",), layout=layout), backend, device)


@quick
@pytest.mark.parametrize("kv_len", [31, 32, 33, 63, 64, 65, 97])
def test_38_stride_0_keys(kv_len: int, backend: str, device: torch.device) -> None:
    """pytorch#191937: expanded k and v with kv_len % 32 == 1. Expanded along heads, batch and length."""
    for dim in (0, 1, 2):
        k, v = (
            torch.randn([1 if d == dim else n for d, n in enumerate((2, 2, kv_len, 16))], device=device).expand(2, 2, kv_len, 16)
            for _ in range(2)
        )
        check_inputs(inputs_of(torch.randn(2, 2, 9, 16, device=device), k, v), backend)


@quick
def test_39_gradient_of_a_slice(backend: str, device: torch.device) -> None:
    """pytorch#146377: k sliced out of a packed projection got garbage gradients."""
    packed = torch.randn(2, 33, 3, 2, 16, device=device, requires_grad=True)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    out, want = fa.attention(q, k, v[:, :, :, 3:11], backend=backend), reference(q, k, v[:, :, :, 3:11])
    same_gradients(out, want, [packed], torch.randn_like(want))


@quick
def test_40_all_sizes_different(backend: str, device: torch.device) -> None:
    """diffusers#14338: saved tensors were transposed twice in the backward; equal sizes hid it. Here every size is another prime."""
    check(Case((2, 3, 3), (5, 13), (7, 11)), backend, device, DIFFERENTIABLE)


@quick
def test_41_gradients_have_their_inputs_layout_or_any(backend: str, device: torch.device) -> None:
    """xformers#535, diffusers#1261: an assertion on the strides of a gradient. Accumulating into existing gradients of another layout works."""
    q, k, v = leaves_of(device, 2, 3, 10, 8)
    for leaf in (q, k, v):
        leaf.grad = torch.ones(2, 10, 3, 8, device=device).transpose(1, 2)
    fa.attention(q, k, v, backend=backend).sum().backward()
    want = torch.autograd.grad(reference(q, k, v).sum(), (q, k, v))
    for leaf, grad in zip((q, k, v), want, strict=True):
        torch.testing.assert_close(leaf.grad, grad + 1)


@quick
@pytest.mark.parametrize("start", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_42_bias_rows_at_odd_offsets(start: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """xformers#813, #683: bias rows that are not aligned to 8 elements failed or were misread."""
    q, k, v = (torch.randn(1, 2, n, 16, device=device, dtype=dtype) for n in (9, 21, 21))
    bias = torch.randn(1, 2, 9, 29, device=device, dtype=dtype)[..., start : start + 21]
    check_inputs(inputs_of(q, k, v, score_mods=(fa.Bias(bias),)), backend)


# E. Autograd contract


@quick
@pytest.mark.parametrize("wanted", [s for n in range(1, 5) for s in itertools.combinations("qkvb", n)], ids="".join)
def test_43_every_subset_wants_gradients(wanted: tuple[str, ...], backend: str, device: torch.device) -> None:
    """pytorch#148476 (PR#188302): when only the mask required a gradient, lse was missing: an illegal access."""
    tensors = {n: torch.randn(1, 2, 9, 8, device=device) for n in "qkv"} | {"b": torch.randn(1, 2, 9, 9, device=device)}
    for name in wanted:
        tensors[name].requires_grad_()
    q, k, v, b = (tensors[n] for n in "qkvb")
    out = fa.attention(q, k, v, score_mods=(fa.Bias(b),), backend=backend)
    want = (q @ k.mT * 8**-0.5 + b).softmax(-1) @ v
    same_gradients(out, want, [tensors[n] for n in wanted], torch.randn_like(want))


@quick
def test_44_modification_without_score_gradient(backend: str, device: torch.device) -> None:
    """pytorch PR#185991: a score_mod whose result does not depend on the score broke the backward. A saturated cap: gradients are 0."""
    q, k, v = leaves_of(device, 1, 2, 9, 8)
    out = fa.attention(q * 1e4, k * 1e4, v, score_mods=(fa.SoftCap(1e-3),), backend=backend)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dq == 0).all() and (dk == 0).all() and (dv != 0).all()


@quick
def test_45_nothing_is_overwritten(backend: str, device: torch.device) -> None:
    """apex#1430, #1587: grad_output was overwritten in place, which broke whoever used it afterwards."""
    q, k, v = leaves_of(device, 1, 2, 33, 8)
    scores = torch.randn(2, 3, 33, device=device, requires_grad=True)
    for out, inputs in ((fa.attention(q, k, v, backend=backend), (q, k, v)), (fa.masked_softmax(scores, backend=backend), (scores,))):
        incoming = torch.randn_like(out)
        held = [t.detach().clone() for t in (incoming, out, *inputs)]
        torch.autograd.grad(out, inputs, incoming)
        assert all(torch.equal(a, b.detach()) for a, b in zip(held, (incoming, out, *inputs), strict=True))


@quick
def test_46_every_public_option_runs_backward(backend: str, device: torch.device) -> None:
    """diffusers#12761, long-context-attention#149, FlashAttention#78: wrong number of gradients, or NameError, in rarely used variants."""
    values: dict[str, Any] = {
        "mask": fa.Causal(), "scale": 0.3, "q_offset": 0, "score_mods": (fa.SoftCap(3.0),), "sinks": torch.zeros(2, device=device, requires_grad=True),
        "dropout": fa.Dropout(0.1, 1), "return_aux": EVERYTHING, "scoring": fa.NegativeL2(torch.full((2, 1, 1), 0.1, device=device, requires_grad=True)),
        "normalizer": fa.Sigmoid(-1.0), "empty_rows": "softmax",
    }  # fmt: skip
    options = [n for n, p in inspect.signature(fa.attention).parameters.items() if p.kind is p.KEYWORD_ONLY and n != "backend"]
    assert set(options) == set(values), "a new option needs a value here"
    for chosen in (*((n,) for n in options), *zip(options, options[1:] + options[:1], strict=True), options):
        if {"scale", "scoring"} <= set(chosen):
            chosen = [n for n in chosen if n != "scale"]  # refused: a scoring has a scale of its own
        refused = {"normalizer"} if backend == "cuda" else {"sinks", "empty_rows", "return_aux"} if "normalizer" in chosen else set()
        chosen = [n for n in chosen if n not in refused]  # what belongs to a softmax, beside another normaliser
        q, k, v = leaves_of(device, 1, 2, 5, 8)
        result = fa.attention(q, k, v, backend=backend, **{n: values[n] for n in chosen})
        out = result if isinstance(result, Tensor) else result[0]
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    soft: dict[str, Any] = {
        "scale": 0.3, "bias": torch.zeros(5, device=device, requires_grad=True), "dim": 1, "log": True, "dropout": fa.Dropout(0.1, 1), "empty_rows": "uniform", "q_offset": 0,
    }  # fmt: skip
    options = [n for n, p in inspect.signature(fa.masked_softmax).parameters.items() if p.kind is p.KEYWORD_ONLY and n != "backend"]
    assert set(options) == set(soft), "a new option needs a value here"
    for chosen in itertools.chain(((n,) for n in options), itertools.combinations(options, 2)):
        if set(chosen) == {"log", "dropout"}:
            continue  # refused: the logarithm of a removed probability is -inf
        scores = torch.randn(2, 5, 5, device=device, requires_grad=True)
        fa.masked_softmax(scores, backend=backend, **{n: soft[n] for n in chosen}).square().sum().backward()
        assert scores.grad.isfinite().all()


@pytest.mark.parametrize(
    "shape", [(2, 1, 33, 65), (1, 2, 33, 65), (1, 1, 33, 65), (2, 2, 33, 65), (1, 1, 1, 65), (1, 2, 33, 1), (2, 2, 1, 1), (65,)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_47_bias_gradients_of_broadcast_shapes(shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """TransformerEngine PR#2537, jax#23701: dbias for b1ss, 1hss, 11ss, bhss, 111s was missing or wrong."""
    q, k, v = (torch.randn(2, 2, n, 16, device=device, dtype=dtype) for n in (33, 65, 65))
    results = check_inputs(inputs_of(q, k, v, score_mods=(fa.Bias(torch.randn(shape, device=device)),)), backend)
    assert results["dbias[0]"].shape == shape


def test_48_backward_from_512_on(backend: str, device: torch.device) -> None:
    """TransformerEngine PR#311: the backward was wrong for lengths of 512 and more."""
    check(Case((1, 1, 1), (513, 520), (16, 16), masks=("Causal0",), offset="bottom"), backend, device)


@quick
@pytest.mark.parametrize("value_dim", [1, 3, 9, 17, 20, 33, 72])
def test_49_value_sizes_off_the_grid(value_dim: int, backend: str, device: torch.device) -> None:
    """FlashAttention#2552: dV was wrong where value_dim is no multiple of the tile."""
    check(Case((1, 2, 1), (20, 35), (16, value_dim), torch.float16), backend, device)


# F. Dropout


@quick
def test_50_causal_dropout_beyond_64_keys(backend: str, device: torch.device) -> None:
    """xformers#755, #724, pytorch PR#102038: the backward's random index was relative to the tile. The mask is recovered, then differentiated through."""
    shape, p = (1, 2, 100, 100), 0.3
    q, k, v = leaves_of(device, 1, 2, 100, 8)
    dropout = fa.Dropout(p, 21)
    recovered = fa.attention(torch.zeros_like(q), k, torch.eye(100, device=device).expand(shape), dropout=dropout, backend=backend)
    factor = (recovered.detach() != 0) / (1 - p)
    torch.testing.assert_close(factor, keep_factor(dropout.lower(device), Grid(shape, device), torch.float32))
    future = torch.ones(100, 100, device=device).triu(1).bool()
    want = ((q @ k.mT * 8**-0.5).masked_fill(future, -torch.inf).softmax(-1) * factor) @ v
    out = fa.attention(q, k, v, mask=fa.Causal(), dropout=dropout, backend=backend)
    same_gradients(out, want, [q, k, v], torch.randn_like(want))


@quick
def test_51_random_state_advances(backend: str, device: torch.device) -> None:
    """FlashAttention#314: the generator's state was not advanced, so every layer drew the same mask."""
    q = torch.randn(1, 2, 33, 8, device=device)
    draws = [fa.attention(q, q, q, dropout=fa.Dropout(0.5), backend=backend) for _ in range(3)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


@quick
def test_52_no_dropout_means_none(backend: str, device: torch.device) -> None:
    """pytorch#124464, Megatron-LM#411: dropout in evaluation. p = 0 and None are the same function and draw no random number."""
    q = torch.randn(1, 2, 33, 8, device=device)
    state = torch.get_rng_state()
    outs = [fa.attention(q, q, q, dropout=d, backend=backend) for d in (None, fa.Dropout(0.0), fa.Dropout(0.0, 5))]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert device.type != "cpu" or torch.equal(state, torch.get_rng_state())


@quick
@pytest.mark.parametrize("reentrant", [False, True])
def test_53_checkpoint_recomputes_the_same_mask(reentrant: bool, backend: str, device: torch.device) -> None:
    """pytorch#198333, OLMo-core#828: the recomputation drew another mask, so gradients belonged to another function."""
    base = [torch.randn(1, 2, 40, 8, device=device) for _ in range(3)]
    grads = []
    for wrapped in (False, True):
        torch.manual_seed(1)
        leaves = [t.clone().requires_grad_() for t in base]

        def layer(*tensors: Tensor) -> Tensor:
            return fa.attention(*tensors, dropout=fa.Dropout(0.5), backend=backend)

        hidden = checkpoint(layer, *leaves, use_reentrant=reentrant) if wrapped else layer(*leaves)
        torch.rand(7)  # something else uses the generator before the backward
        grads.append(
            torch.autograd.grad(hidden.sin().sum(), leaves)
            if not (wrapped and reentrant)
            else (hidden.sin().sum().backward(), [t.grad for t in leaves])[1]
        )
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# G. Races, compiler, configurations


@pytest.mark.parametrize("repeats", [pytest.param(5, marks=quick), 50])
def test_54_55_repeating_under_load(repeats: int, backend: str, device: torch.device) -> None:
    """FlashAttention#359, xformers#479, FlashAttention#2481: races seen only at times. Same bits each time, right after a producer kernel."""
    if repeats > 5 and device.type == "cpu" and backend == "triton":
        pytest.skip("one thread runs the interpreter: 5 repeats say as much as 50; runs with --device cuda")
    sizes = (8, 16, 512, 64) if device.type == "cuda" else (1, 2, 70, 16)
    base = [torch.randn(*sizes, device=device) for _ in range(3)]
    first: list[Tensor] = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(repeats):
            leaves = [(t * 2).mul(0.5).requires_grad_() for t in base]
            out = fa.attention(*leaves, mask=fa.Causal(), backend=backend)
            results = [out.detach(), *torch.autograd.grad(out, leaves, (base[0] * 2).mul(0.5))]
            first = first or results
            assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


CONFIGURATIONS = [(d, t) for d in (16, 40, 64, 96, 128, 192, 256) for t in (torch.float32, torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("dim", "dtype"), CONFIGURATIONS, ids=lambda x: str(x))
def test_56_57_every_configuration_is_right(dim: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """fla PR#988 (num_warps=4 miscompiled on Hopper), triton-dejavu#1: each (head size, dtype) runs its own table row, over more than one tile."""
    check(Case((1, 1, 1), (150, 140), (dim, dim), dtype, ("Causal0",)), backend, device)


@pytest.mark.parametrize("content", ["outliers", "repeated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_58_structured_inputs(dtype: torch.dtype, content: str, backend: str, device: torch.device) -> None:
    """TransformerEngine#3216: Gaussian inputs did not trigger it; real activations and batch >= 2 did. Slices equal batches of one."""
    case = Case((2, 2, 1), (65, 70), (24, 24), dtype, ("ValidLengths0",), content=content)
    check(case, backend, device)
    if backend == "eager":
        return  # torch's batched products are free to sum in another order; the kernels are not
    inputs = make_inputs(case, device)
    mask = inputs.problem.modifiers.mask
    whole = evaluate(lambda p: call_problem(p, backend), inputs, ("out",))
    for b in range(2):
        problem = inputs.problem.with_inputs(tuple(t[b : b + 1] for t in inputs.problem.inputs))
        problem = replace(problem, modifiers=replace(problem.modifiers, mask=fa.ValidLengths(mask.lens[b : b + 1])))
        one = evaluate(
            lambda p: call_problem(p, backend),
            inputs._replace(problem=problem, incoming={n: t[b : b + 1] for n, t in inputs.incoming.items()}),
            ("out",),
        )
        assert all(torch.equal(one[n], whole[n][b : b + 1]) for n in one)


# H. Edges and contract


@quick
@pytest.mark.parametrize(
    "shape",
    [(0, 2, 3, 4, 8), (2, 0, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8), (2, 2, 3, 4, 0)],
    ids=["batch", "heads", "q_len", "kv_len", "head_dim"],
)
def test_59_empty_tensors(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    """FlashAttention#1159, PR#2568, pytorch#165944, #174939 (PR#175063): hang, division by zero or illegal access at size 0."""
    batch, heads, q_len, kv_len, dim = shape
    q, k, v = (torch.randn(batch, heads, n, d, device=device, requires_grad=True) for n, d in ((q_len, dim), (kv_len, dim), (kv_len, 8)))
    if dim == 0 and backend in ("triton", "cuda"):
        with pytest.raises(fa.UnsupportedError, match="head_dim"):
            fa.attention(q, k, v, backend=backend)
        backend = "auto"  # which must run it
    out = fa.attention(q, k, v, backend=backend)
    assert out.shape == (batch, heads, q_len, 8)
    grads = torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True)
    assert all(g is None or g.shape == t.shape for g, t in zip(grads, (q, k, v), strict=True))
    if kv_len == 0:
        assert (out == 0).all() and (grads[0] is None or (grads[0] == 0).all())


@quick
@pytest.mark.parametrize(("offset", "first_row"), [(0, 1), (3, 4), (-2, 0)])
def test_60_causal_alignment(offset: int, first_row: int, backend: str, device: torch.device) -> None:
    """FlashAttention#1778, #951, cutlass#2336: kernel and reference shared an alignment bug. Counted by hand: rows see 1, 2, 3 more keys."""
    q, k = torch.randn(1, 1, 4, 8, device=device), torch.randn(1, 1, 7, 8, device=device)
    _, aux = fa.attention(q, k, k, mask=fa.Causal(), q_offset=offset, return_aux=EVERYTHING, backend=backend)
    seen = [max(0, first_row + i) for i in range(4)] if offset >= 0 else [0, 0, 1, 2]
    assert (aux.probs > 0).sum(-1).flatten().tolist() == seen
    with pytest.raises(ValueError, match="q_offset"):
        fa.attention(q, k, k, mask=fa.Causal(), backend=backend)
    square = fa.scaled_dot_product_attention(q, k, k, is_causal=True)
    torch.testing.assert_close(square, torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True))


@pytest.mark.cuda("streams exist on GPUs only")
def test_61_side_streams(kernel_backend: str, device: torch.device) -> None:
    """SageAttention#371, #380, candle#3596, pytorch PR#22470: a kernel on the legacy stream ran before its inputs were ready."""
    stream = torch.cuda.Stream()
    base = torch.randn(4, 8, 1024, 64, device=device)
    want = fa.attention(base + 1, base, base, backend=kernel_backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        q = base + 1
        out = fa.attention(q, base, base, backend=kernel_backend)
    stream.synchronize()
    assert torch.equal(out, want)


@pytest.mark.cuda("graphs are captured on GPUs only")
def test_61_graph_replay_is_not_stale(kernel_backend: str, device: torch.device) -> None:
    """The same threads: a replayed CUDA graph was silently stale (and looked 2.3 times faster)."""
    q = torch.randn(2, 4, 256, 64, device=device)
    for _ in range(3):
        fa.attention(q, q, q, mask=fa.Causal(), backend=kernel_backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fa.attention(q, q, q, mask=fa.Causal(), backend=kernel_backend)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, fa.attention(q, q, q, mask=fa.Causal(), backend=kernel_backend))


@pytest.mark.cuda("the device guard matters with two GPUs")
def test_61_second_device(kernel_backend: str) -> None:
    """triton#2441, jvp_flash_attention#1: tensors on cuda:1 were handed to a kernel on cuda:0."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    q = torch.randn(1, 2, 64, 64, device="cuda:1")
    assert torch.equal(
        fa.attention(q, q, q, backend=kernel_backend).cpu(), fa.attention(*(q.to("cuda:0"),) * 3, backend=kernel_backend).cpu()
    )


@quick
def test_62_deterministic_flag(backend: str, device: torch.device) -> None:
    """pytorch#197771, FlashAttention#746: the flag was ignored silently. It runs bit for bit, or raises."""
    inputs = make_inputs(Case((1, 4, 1), (70, 130), (16, 16), masks=("Causal0",), mods=("Bias4",), sinks=True, offset="bottom"), device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (evaluate(lambda p: call_problem(p, backend), inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[n].nan_to_num(3.0), second[n].nan_to_num(3.0)) for n in first)


@quick
def test_62_autocast_and_dtypes_of_masks(backend: str, device: torch.device) -> None:
    """pytorch#99012: under autocast the mask's dtype no longer matched. Bool and float masks of any dtype work beside 16-bit products."""
    q, k, v = leaves_of(device, 1, 2, 9, 16)
    keep = torch.ones(9, 9, dtype=torch.bool, device=device).tril()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        bias = torch.randn(9, 9, device=device, dtype=dtype, requires_grad=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = fa.attention(q, k, v, mask=keep, score_mods=(fa.Bias(bias),), backend=backend)
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().sum(), (q, k, v, bias))
        assert grads[3].dtype == dtype and all(g.isfinite().all() for g in grads) and grads[0].dtype == torch.float32


def test_backends_are_the_known_ones() -> None:
    """The tests above ran on every backend there is."""
    assert backends.names()[-1] == backends.EAGER and {"triton", "cpu"} <= set(backends.names())
