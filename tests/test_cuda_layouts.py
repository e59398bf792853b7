"""The native kernels write what the caller allocated: any layout, the same bits, and nothing outside (the simulator watches the bounds)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_attn.backends.base import Incoming
from fused_attn.layout import empty_out
from fused_attn.lowering import KernelMask, KernelScore, LoweredAttention, LoweredSoftmax, Terms
from tests import simulated_cuda

pytestmark = pytest.mark.skipif(bool(simulated_cuda.missing()), reason=simulated_cuda.missing() or "never")

BATCH, HEADS, LENGTH = 2, 3, 37


def ordered(*order: int) -> Callable[[Tensor], Tensor]:
    """The values with their dimensions in this order in memory."""
    back = [order.index(i) for i in range(len(order))]
    return lambda t: t.permute(order).contiguous().permute(back)


def packed(place: int) -> Callable[[Tensor], Tensor]:
    """One of q, k, v in a projection's [batch, length, 3, heads, dim]."""

    def slot(t: Tensor) -> Tensor:
        room = t.new_full((t.shape[0], t.shape[2], 3, t.shape[1], t.shape[3]), torch.nan)
        room[:, :, place] = t.transpose(1, 2)
        return room[:, :, place].transpose(1, 2)

    return slot


def shifted(t: Tensor) -> Tensor:
    """[batch, length, heads, dim] that begins at half of 16 bytes: with a dim of 12, every second head begins at a multiple of 16."""
    room, (batch, heads, length, dim) = t.new_full((t.numel() + 8,), torch.nan), t.shape
    start = 8 // t.itemsize
    inner = room[start : start + t.numel()].view(batch, length, heads, dim).transpose(1, 2)
    return inner.copy_(t)


def expanded(t: Tensor) -> Tensor:
    return t[:, :1].expand(t.shape)


def transposed(t: Tensor) -> Tensor:
    return ordered(0, 1, 3, 2)(t)


LAYOUTS = {
    "BLHD": [ordered(0, 2, 1, 3)] * 3,
    "LBHD": [ordered(2, 0, 1, 3)] * 3,
    "BHDL": [transposed] * 3,
    "packed": [packed(0), packed(1), packed(2)],
    "shifted": [shifted] * 3,
    "k and v of one head": [ordered(0, 1, 2, 3), expanded, expanded],
    "each its own": [ordered(2, 0, 1, 3), transposed, packed(2)],
}


def strides(t: Tensor) -> list[int]:
    """Strides that say something: of dimensions with more than one element."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 24), (torch.bfloat16, 12), (torch.float32, 12)], ids=str)
def test_attention(layout: str, dtype: torch.dtype, dim: int) -> None:
    backend, terms = simulated_cuda.SimulatedCuda(), Terms(KernelMask(left=20), dim**-0.5)
    inputs = [lay(torch.randn(BATCH, HEADS, LENGTH, dim).to(dtype)) for lay in LAYOUTS[layout]]
    dout = LAYOUTS[layout][0](torch.randn(BATCH, HEADS, LENGTH, dim).to(dtype))

    def results(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        lowered = LoweredAttention(q, k, v, terms)
        forward = backend.attention_fwd(lowered)
        grads = backend.attention_bwd(lowered, forward, Incoming(dout), (True, True, True, False))
        return [forward.out, *(g for g in grads[:3] if g is not None)]

    got = results(*inputs, dout)
    want = results(*(t.clone(memory_format=torch.contiguous_format) for t in (*inputs, dout)))
    for one, other in zip(got, want, strict=True):
        same(one, other)
    assert strides(got[0]) == strides(empty_out(inputs[0], dim))
    assert [strides(g) for g in got[1:]] == [strides(torch.empty_like(t)) for t in inputs]


BIASES = {
    "full, [q, batch, head, kv] in memory": ordered(2, 0, 1, 3)(torch.randn(BATCH, HEADS, LENGTH, LENGTH)),
    "transposed, for all batches": transposed(torch.randn(1, HEADS, LENGTH, LENGTH)),
    "a number per row": ordered(2, 0, 1, 3)(torch.randn(BATCH, HEADS, LENGTH, 1)),
    "a number per column, for all batches": transposed(torch.randn(1, HEADS, 1, LENGTH)),
    "expanded": torch.randn(1, 1, LENGTH, LENGTH).expand(BATCH, HEADS, LENGTH, LENGTH),
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_the_gradient_of_a_bias(dtype: torch.dtype, bias: Tensor) -> None:
    """Alone, and between two others of which one wants none; a float64 bias beside narrower inputs gets a float64 gradient."""
    backend, (q, k, v, dout) = simulated_cuda.SimulatedCuda(), torch.randn(4, BATCH, HEADS, LENGTH, 16).half().unbind()
    other = torch.randn(1, HEADS, 1, 1)

    def gradient(bias: Tensor, *around: Tensor) -> Tensor:
        tensors = [*around[:1], bias, *around[1:]]
        lowered = LoweredAttention(q, k, v, Terms(KernelMask(), 0.25, mods=tuple(KernelScore("bias", (), (t,)) for t in tensors)))
        needs = (False,) * 4 + tuple(t is bias or t is around[1] for t in tensors)
        grads = backend.attention_bwd(lowered, backend.attention_fwd(lowered), Incoming(dout), needs)
        assert grads[:4] == (None,) * 4 and [g is not None for g in grads[4:]] == list(needs[4:])
        return grads[4 + bool(around)]

    bias = bias.to(dtype)
    got = gradient(bias)
    same(got, gradient(bias.clone(memory_format=torch.contiguous_format)))
    assert got.dtype == dtype and strides(got) == strides(torch.empty_like(bias))
    assert strides(gradient(bias, other, other)) == strides(got)


@pytest.mark.parametrize("lay", [ordered(2, 0, 1, 3), transposed, shifted, expanded], ids=["LBHK", "BHKL", "shifted", "expanded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_softmax(lay: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    backend = simulated_cuda.SimulatedCuda()
    scores, dout = (lay(torch.randn(BATCH, HEADS, LENGTH, 40).to(dtype)) for _ in range(2))
    bias = ordered(3, 0, 1, 2)(torch.randn(1, HEADS, LENGTH, 40))

    def results(scores: Tensor, bias: Tensor, dout: Tensor) -> list[Tensor]:
        lowered = LoweredSoftmax(scores, Terms(KernelMask(right=5), 0.5, mods=(KernelScore("bias", (), (bias,)),)), False, False)
        result, _ = backend.softmax_fwd(lowered)
        dscores, dbias = backend.softmax_bwd(lowered, result, dout, (True, True))
        assert dscores is not None and dbias is not None
        return [result, dscores, dbias]

    got = results(scores, bias, dout)
    for one, other in zip(got, results(*(t.clone(memory_format=torch.contiguous_format) for t in (scores, bias, dout))), strict=True):
        same(one, other)
    assert [strides(t) for t in got] == [strides(torch.empty_like(t)) for t in (scores, scores, bias)]
