"""The one layout rule: ``out`` in q's order, gradients in their input's, everything else contiguous; ops' fakes promise exactly that."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn import layout
from fused_attn.backends.cpu import blocked
from fused_attn.problem import AttentionProblem, SoftmaxProblem
from fused_attn.testing import EVERYTHING

BATCH, HEADS, LENGTH, DIM = 2, 3, 20, 16


def strided(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same values, dimensions in memory in this order."""
    return tensor.permute(order).contiguous().permute([order.index(d) for d in range(tensor.dim())])


# Of [batch, heads, length, dim]: what models hand over.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "BLHD": lambda t: strided(t, (0, 2, 1, 3)),
    "LBHD": lambda t: strided(t, (2, 0, 1, 3)),
    "BHDL": lambda t: strided(t, (0, 1, 3, 2)),
    "packed": lambda t: torch.stack([t.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2),
    "expanded": lambda t: t[:1, :1].expand(t.shape),
    "sliced": lambda t: torch.cat([t, t], -1)[..., 1 : 1 + t.shape[-1]],
}
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "causal": lambda: {"mask": fa.Causal()},
    "lengths": lambda: {"mask": fa.ValidLengths(torch.tensor([20, 7]))},
    "bias": lambda: {"score_mods": (fa.Bias(torch.randn(HEADS, LENGTH, LENGTH).mT.requires_grad_()),)},
    "shared-bias": lambda: {"score_mods": (fa.Bias(strided(torch.randn(BATCH, 1, LENGTH, LENGTH), (3, 0, 1, 2)).requires_grad_()),)},
    "sinks-dropout": lambda: {"sinks": torch.randn(2 * HEADS)[::2].requires_grad_(), "dropout": fa.Dropout(0.3, seed=5)},
}
DTYPES = (torch.float32, torch.bfloat16)


def significant(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def follows(result: Tensor, like: Tensor) -> bool:
    return significant(result) == significant(torch.empty_like(like))


def qkv(how: str, dtype: torch.dtype, value_dim: int = DIM) -> list[Tensor]:
    sizes = (DIM, DIM, value_dim)
    return [LAYOUTS[how](torch.randn(BATCH, HEADS, LENGTH, size).to(dtype)).requires_grad_() for size in sizes]


@pytest.fixture(autouse=True)
def boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()


@pytest.mark.quick
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_follow_their_input(how: str, dtype: torch.dtype, backend: str) -> None:
    # Interpreted and simulated kernels take a second for each, and share the callers that allocate.
    names = FEATURES if backend in ("cpu", "eager") else ("causal", "shared-bias") if dtype == torch.float32 else ("bias", "sinks-dropout")
    for options in (FEATURES[name]() for name in names):
        q, k, v = qkv(how, dtype)
        out, aux = fa.attention(q, k, v, backend=backend, return_aux=EVERYTHING, **options)
        assert follows(out, q)
        assert all(t.is_contiguous() for t in vars(aux).values() if isinstance(t, Tensor))
        leaves = [q, k, v, *(m.bias for m in options.get("score_mods", ())), *([options["sinks"]] if "sinks" in options else [])]
        for grads in (
            torch.autograd.grad(out, leaves, torch.randn(out.shape).to(dtype), retain_graph=True),
            torch.autograd.grad(aux.probs.float().square().sum() + aux.lse.sum(), leaves, allow_unused=True),
        ):
            assert all(g is None or follows(g, t) for g, t in zip(grads, leaves, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize("how", LAYOUTS)
def test_another_value_dim_keeps_the_order(how: str, backend: str) -> None:
    q, k, v = qkv(how, torch.float32, value_dim=8)
    out = fa.attention(q, k, v, backend=backend)
    order = sorted(range(4), key=torch.empty_like(q).stride().__getitem__)
    assert sorted(range(4), key=out.stride().__getitem__) == order
    assert out.permute(order[::-1]).is_contiguous()


@pytest.mark.quick
@pytest.mark.parametrize("rank", range(1, 6))
def test_softmax_follows_its_scores(rank: int, backend: str) -> None:
    for order, dim, kind in itertools.product(
        ((0, 1, 2, 3, 4), (2, 0, 1, 3, 4), (4, 3, 2, 1, 0), (1, 3, 0, 2, 4)), (-1, 0), ("plain", "log", "dropout", "bias", "mask")
    ):
        mine = tuple(d for d in order if d < rank)
        scores, bias = (strided(torch.randn((2, 3, 4, 5, 6)[:rank]), mine).requires_grad_() for _ in range(2))
        options = {"log": {"log": True}, "dropout": {"dropout": fa.Dropout(0.2, seed=3)}, "bias": {"bias": bias}}.get(kind, {})
        options |= {"mask": torch.rand(scores.shape) < 0.7} if kind == "mask" else {}
        out = fa.masked_softmax(scores, dim=dim, backend=backend, **options)
        assert follows(out, scores)
        leaves = [scores, bias] if kind == "bias" else [scores]
        assert all(follows(g, t) for g, t in zip(torch.autograd.grad(out, leaves, torch.randn(out.shape)), leaves, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize("size", [16, 700])
def test_auto_follows_at_every_size(size: int) -> None:
    """Small problems run on eager, large ones on cpu; the caller cannot see it."""
    q, k, v = (strided(torch.randn(2, 2, size, 8), (0, 2, 1, 3)).requires_grad_() for _ in range(3))
    out = fa.attention(q, k, v, score_mods=(fa.SoftCap(3.0),))
    assert follows(out, q) and out.transpose(1, 2).is_contiguous()
    assert all(follows(g, t) for g, t in zip(torch.autograd.grad(out, (q, k, v), torch.randn(out.shape)), (q, k, v), strict=True))


# The ops' fakes

OPTIONS = dict.fromkeys(("scale", "q_offset", "sinks", "dropout", "return_aux", "mask")) | {"score_mods": ()}
SOFTMAX_OPTIONS = {
    "mask": None,
    "scale": 1.5,
    "bias": None,
    "dim": -1,
    "log": False,
    "dropout": None,
    "empty_rows": "zero",
    "q_offset": None,
}


def opcheck(name: str, arguments: tuple[Any, ...], backend: str) -> None:
    """The fake's sizes, dtypes and strides are the kernel's. Autograd is registered, and tests/test_compile.py holds it to the Functions'."""
    tests = ("test_schema", "test_faketensor") if backend != "cpu" else ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.fused_attn, name), arguments, test_utils=tests)


@pytest.mark.parametrize("how", LAYOUTS)
def test_attention_fakes(how: str, kernel_backend: str) -> None:
    backend = kernel_backend
    # Interpreted and simulated kernels take a second for each.
    cases = itertools.product(FEATURES, DTYPES) if backend == "cpu" else zip(("causal", "shared-bias"), DTYPES, strict=True)
    for feature, dtype in cases:
        q, k, v = (t.detach() for t in qkv(how, dtype))
        call = AttentionProblem.check(q, k, v, OPTIONS | FEATURES[feature]()).lower()
        inputs = (q, k, v, *(x.detach() if isinstance(x, Tensor) else x for x in call.terms.flatten()))
        opcheck("attention_fwd", (*inputs, backend), backend)
        forward = torch.ops.fused_attn.attention_fwd(*inputs, backend)
        request, needs = list(EVERYTHING.flags), [True, True, True, call.terms.sinks is not None, *[True] * len(inputs[9])]
        opcheck("attention_aux", (*inputs, *forward, request, backend), backend)
        probs = torch.ops.fused_attn.attention_aux(*inputs, *forward, request, backend)[0]
        dout = LAYOUTS["LBHD"](torch.randn(q.shape)).to(dtype)
        statistics = (torch.randn(q.shape[:3]), torch.randn(*q.shape[:2], k.shape[2]), torch.randn(q.shape[:3]))
        arriving = (dout, torch.randn(q.shape[:3]), torch.randn(probs.shape).to(dtype), None, probs, *statistics)
        opcheck("attention_bwd", (*inputs, *forward, *arriving, needs, backend), backend)
        opcheck("attention_bwd", (*inputs, *forward, dout, *[None] * 7, needs, backend), backend)


@pytest.mark.parametrize("how", LAYOUTS)
def test_softmax_fakes(how: str, kernel_backend: str) -> None:
    backend = kernel_backend
    for options in ({}, {"log": True, "mask": fa.Causal()}, {"bias": torch.randn(DIM, 1).mT}, {"dropout": fa.Dropout(0.3, seed=7)}):
        fits = options if how != "expanded" and "mask" in options else {k: v for k, v in options.items() if k != "mask"}
        scores = LAYOUTS[how](torch.randn(BATCH, HEADS, DIM, DIM))
        call = SoftmaxProblem.check(scores, SOFTMAX_OPTIONS | fits).lower()
        inputs, switches = (call.scores, *call.terms.flatten()), [call.log, call.uniform_empty]
        opcheck("softmax_fwd", (*inputs, switches, backend), backend)
        out, probs = torch.ops.fused_attn.softmax_fwd(*inputs, switches, backend)
        needs = [True] * (1 + len(call.terms.parameters[1:]))
        result = probs if call.terms.dropout else out
        opcheck("softmax_bwd", (*inputs, result, torch.randn_like(out), switches, needs, backend), backend)


# inductor asserts strides that fakes promised


def several(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """Many features in one graph, because a graph takes inductor seconds."""
    wide = (q, k, v)
    narrow = tuple(t.bfloat16() for t in wide)
    out, aux = fa.attention(
        *wide, mask=fa.Causal(), score_mods=(fa.SoftCap(5.0), fa.Bias(bias)), return_aux=fa.AuxRequest(probs=True, lse=True)
    )
    batch, heads, length, dim = q.shape
    return (
        fa.attention(*wide) * 1.0,
        fa.attention(*wide, mask=fa.Causal() & fa.ValidLengths(lengths)).transpose(1, 2).reshape(batch, length, heads * dim),
        fa.attention(*narrow, mask=fa.SlidingWindow(3, 0), dropout=fa.Dropout(0.2, seed=4)).float(),
        fa.scaled_dot_product_attention(q, k, k, is_causal=True),
        fa.masked_softmax(aux.probs, bias=bias, scale=2.0),
        out,
        aux.lse,
    )


def evaluated(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], dout: list[Tensor]) -> list[Tensor]:
    outputs = function(*inputs)
    leaves = [t for t in inputs if t.requires_grad]
    if not leaves:
        return list(outputs)
    total = sum((t * d).sum() for t, d in zip(outputs, dout, strict=True))
    return [*(t.detach() for t in outputs), *torch.autograd.grad(total, leaves)]


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "dynamic"),
    [*((how, False) for how in LAYOUTS), ("BLHD", True), ("packed", True)],
    ids=lambda x: {True: "dynamic", False: "static"}.get(x, x),
)
def test_the_default_compiler_runs_every_layout(how: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in [name for name in vars(blocked) if name.startswith("EAGER_")]:
        monkeypatch.setattr(blocked, limit, 0)  # uncompiled calls this small would run on eager, with other bits
    compiled = torch.compile(several, fullgraph=True, dynamic=dynamic)
    bias, lengths = torch.randn(HEADS, LENGTH, LENGTH).mT.requires_grad_(), torch.tensor([20, 7])
    q, k, v = qkv(how, torch.float32)
    sizes = [t.shape for t in several(q, k, v, bias, lengths)]
    dout = [torch.randn(size) for size in sizes]
    for gradients in (True, False) if how in ("contiguous", "BLHD") else (True,):
        inputs = tuple(t if gradients else t.detach() for t in (q, k, v, bias, lengths))
        got, want = evaluated(compiled, inputs, dout), evaluated(several, inputs, dout)
        for a, b in zip(got, want, strict=True):
            assert significant(a) == significant(b)
            # Rounding of elementwise parts that inductor fuses; 20 terms a row, 3 roundings of each.
            assert (a - b).abs().max() <= 64 * torch.finfo(torch.float32).eps * (1 + b.abs().max())


DYNAMIC = {
    "softmax": lambda x: fa.masked_softmax(x),
    "eager": lambda x: fa.attention(x, x, x, backend="eager"),
    "cpu, another value_dim": lambda x: fa.attention(x, x, x[..., :4], backend="cpu"),
    "5-D": lambda x: fa.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
    "vmap": lambda x: torch.vmap(lambda t: fa.attention(t[None], t[None], t[None]))(x),
}


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("name", DYNAMIC)
def test_lengths_may_change_whatever_the_layout(name: str, dynamic: bool | None) -> None:
    """Finding the order of symbolic strides must not stop the compiler."""
    compiled = torch.compile(DYNAMIC[name], backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (5, 9, 12):
        x = LAYOUTS["BLHD"](torch.randn(2, 3, length, 8)).requires_grad_()
        got, want = compiled(x), DYNAMIC[name](x)
        assert significant(got) == significant(want)
        for a, b in zip((got, *torch.autograd.grad(got.sin().sum(), x)), (want, *torch.autograd.grad(want.sin().sum(), x)), strict=True):
            assert (a - b).abs().max() <= 64 * torch.finfo(torch.float32).eps * (1 + b.abs().max())


@pytest.mark.quick
def test_the_rule_itself() -> None:
    q = strided(torch.randn(2, 3, 5, 8), (2, 0, 1, 3))
    assert layout.empty_out(q, 8).stride() == q.stride()
    assert layout.empty_out(q, 4).stride() == (12, 4, 24, 1)
    assert layout.laid_out_like(q, q).data_ptr() == q.data_ptr()
    assert layout.laid_out_like(torch.zeros(2, 3, 5, 8), q).stride() == q.stride()
    assert layout.empty_out(torch.zeros(2, 1, 5, 8).expand(2, 3, 5, 8), 4).is_contiguous()
