"""torch.jit.trace records our ops, not their tiles: a trace is right at every length, with the guards against NaN alive, and has gradients."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.testing import EVERYTHING

LENGTHS = (30, 20, 70)

# Each is called with q, k, v and one tensor made for the length.
CALLS: dict[str, tuple[Callable[..., Any], Callable[[int], Tensor]]] = {
    "plain": (lambda q, k, v, t, **kw: fa.attention(q, k, v, **kw), torch.ones),
    "causal": (lambda q, k, v, t, **kw: fa.attention(q, k, v, mask=fa.Causal(), **kw), torch.ones),
    "window": (lambda q, k, v, t, **kw: fa.attention(q, k, v, mask=fa.SlidingWindow(3, 0) & fa.Band(4), **kw), torch.ones),
    "lengths": (lambda q, k, v, t, **kw: fa.attention(q, k, v, mask=fa.ValidLengths(t), **kw), lambda n: torch.tensor([n // 2, n])),
    "prefix": (
        lambda q, k, v, t, **kw: fa.attention(q, k, v, mask=fa.PrefixLM(4) & fa.PrefixLM(t), **kw),
        lambda n: torch.tensor([n // 2, 5]),
    ),
    "documents": (lambda q, k, v, t, **kw: fa.attention(q, k, v, mask=fa.Documents(t), **kw), lambda n: torch.arange(n) // 7),
    "padding": (lambda q, k, v, t, **kw: fa.attention(q, k, v, mask=fa.KeyPadding(t), **kw), lambda n: torch.rand(2, n) < 0.6),
    "dense": (lambda q, k, v, t, **kw: fa.attention(q, k, v, mask=t, **kw), lambda n: torch.rand(2, n, n) < 0.6),
    "softcap-bias": (
        lambda q, k, v, t, **kw: fa.attention(q, k, v, score_mods=(fa.SoftCap(3.0), fa.Bias(t)), **kw),
        lambda n: torch.randn(2, n, n),
    ),
    "alibi-sinks": (
        lambda q, k, v, t, **kw: fa.attention(q, k, v, score_mods=(fa.ALiBi(torch.tensor([0.1, 0.2])),), sinks=t, **kw),
        lambda n: torch.randn(2),
    ),
    "decay": (
        lambda q, k, v, t, **kw: fa.attention(q, k, v, mask=fa.Causal(), score_mods=(fa.DecayBias(t),), **kw),
        lambda n: torch.randn(2, n),
    ),
    "dropout": (lambda q, k, v, t, **kw: fa.attention(q, k, v, dropout=fa.Dropout(0.3, seed=2), **kw), torch.ones),
    "offset-of-lengths": (
        lambda q, k, v, t, **kw: fa.attention(q[:, :, :5], k, v, mask=fa.Causal(), q_offset=k.shape[2] - 5, **kw),
        torch.ones,
    ),
    "offset-tensor": (lambda q, k, v, t, **kw: fa.attention(q, k, v, mask=fa.Causal(), q_offset=t, **kw), lambda n: torch.tensor([1, 2])),
    "aux": (
        lambda q, k, v, t, **kw: tuple(vars(fa.attention(q, k, v, mask=fa.Causal(), return_aux=EVERYTHING, **kw)[1]).values()),
        torch.ones,
    ),
    "softmax": (lambda q, k, v, t, **kw: fa.masked_softmax(q @ k.mT, fa.Causal(), bias=t, **kw), lambda n: torch.randn(n, n)),
    "log-softmax": (lambda q, k, v, t, **kw: fa.masked_softmax(q @ k.mT, dim=-2, log=True, **kw), torch.ones),
}


def inputs(name: str, length: int, gradients: bool) -> list[Tensor]:
    tensors = [*(torch.randn(2, 2, length, 8) for _ in range(3)), CALLS[name][1](length)]
    return [t.requires_grad_(gradients and t.is_floating_point()) for t in tensors]


def trace(function: Callable[..., Any], example: list[Tensor]) -> Any:
    """Saved and loaded again: what a trace holds are operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it records values; whether they are harmless is the question here
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(function, example, check_trace=False), file)
        file.seek(0)
        return torch.jit.load(file)


def evaluated(function: Any, tensors: list[Tensor]) -> list[Tensor | None]:
    results = function(*tensors)
    results = list(results) if isinstance(results, tuple) else [results]
    leaves, through = [t for t in tensors if t.requires_grad], [t for t in results if t.requires_grad]
    total = sum(t.nan_to_num(0, 0, 0).sin().sum() for t in through)
    return results + (list(torch.autograd.grad(total, leaves, allow_unused=True)) if leaves and through else [])


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("chosen", ["cpu", "eager"])
def test_a_trace_is_right_at_every_length(name: str, chosen: str, gradients: bool) -> None:
    hold(name, chosen, gradients)


@pytest.mark.parametrize("name", ["aux", "softmax"])
def test_a_trace_runs_every_kernel(name: str, kernel_backend: str) -> None:
    """The ops are the same whichever kernels are behind them."""
    hold(name, kernel_backend, gradients=True)


def hold(name: str, backend: str, gradients: bool) -> None:
    def function(*tensors: Tensor) -> Any:
        return CALLS[name][0](*tensors, backend=backend)

    traced = trace(function, inputs(name, LENGTHS[0], gradients))
    for length in LENGTHS:
        tensors = inputs(name, length, gradients)
        for a, b in zip(evaluated(traced, tensors), evaluated(function, tensors), strict=True):
            assert (a is None) == (b is None)
            # The same kernels on the same values; eager's branches on values differ by a rounding.
            assert a is None or torch.allclose(
                a, b, rtol=0, atol=float(64 * torch.finfo(a.dtype).eps * (1 + b.nan_to_num(0, 0, 0).abs().max())), equal_nan=True
            )


@pytest.mark.quick
def test_a_trace_made_where_eager_is_faster_keeps_the_op() -> None:
    traced = trace(lambda q: fa.attention(q, q, q, score_mods=(fa.SoftCap(2.0),)), [torch.randn(1, 1, 4, 8)])
    assert "fused_attn::attention_fwd" in str(traced.graph)


@pytest.mark.quick
@pytest.mark.parametrize("mask", [fa.Causal(), fa.SlidingWindow(2, 0), fa.ValidLengths(torch.tensor([30]))], ids=str)
def test_nan_in_masked_keys_stays_out_of_a_trace(mask: Any, backend: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fa.attention(q, k, v, mask=mask, backend=backend)

    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    traced = trace(function, [q, k, v])
    k[:, :, 30:], v[:, :, 30:] = torch.nan, torch.inf
    assert not traced(q, k, v)[:, :, :30].isnan().any()
    assert traced(q, k, v).isnan().equal(function(q, k, v).isnan())


@pytest.mark.quick
def test_a_broken_promise_shows_when_the_trace_runs() -> None:
    traced = trace(lambda q, ids: fa.attention(q, q, q, mask=fa.Documents(ids)), [torch.randn(1, 1, 4, 8), torch.tensor([0, 0, 1, 1])])
    with pytest.raises(RuntimeError, match="one run of equal ids"):
        traced(torch.randn(1, 1, 4, 8), torch.tensor([0, 1, 0, 1]))
