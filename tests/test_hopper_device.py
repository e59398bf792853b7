"""What only a chip of compute capability 9.0 shows of its kernels: many CTAs at once, graphs, streams, both orders of dq, no hang."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator

import pytest
import torch

import fused_attn as fa
from fused_attn.testing import DIFFERENTIABLE, check_inputs, inputs_of

pytestmark = pytest.mark.cuda("the kernels need compute capability 9.0")
# Seconds after which a test's process is ended with a listing of where it waits: a barrier nobody arrives at waits for ever.
WATCHDOG = 120
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the device is not of compute capability 9.0")
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    yield
    torch.cuda.synchronize()
    faulthandler.cancel_dump_traceback_later()


def tensors(shape: tuple[int, ...], kv_heads: int, dtype: torch.dtype, count: int = 4) -> list[torch.Tensor]:
    """q, k, v and what arrives at the output, reproducible."""
    generator = torch.Generator("cuda").manual_seed(0)
    batch, heads, length, dim = shape
    sizes = [(batch, h, length, dim) for h in (heads, kv_heads, kv_heads, heads)][:count]
    return [torch.randn(size, device="cuda", generator=generator).to(dtype) for size in sizes]


def results(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arriving: torch.Tensor, **options: object) -> tuple[torch.Tensor, ...]:
    """The output and the three gradients."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = fa.attention(*leaves, backend="triton", **options)
    return out.detach(), *torch.autograd.grad(out, leaves, arriving)


MASKS = {
    "full": lambda length: {},
    "causal": lambda length: {"mask": fa.Causal()},
    "window": lambda length: {"mask": fa.SlidingWindow(200, 30)},
    "documents": lambda length: {"mask": fa.Documents(torch.arange(length, device="cuda") // 300)},
    "dense": lambda length: {"mask": fa.Dense(torch.rand(length, length, device="cuda") < 0.3)},
}
EXTRAS = {
    "plain": lambda length: {},
    "bias": lambda length: {"score_mods": (fa.Bias(torch.randn(1, 4, length, length, device="cuda", dtype=torch.bfloat16)),)},
    "softcap": lambda length: {"score_mods": (fa.SoftCap(3.0),)},
    "dropout": lambda length: {"dropout": fa.Dropout(0.2, seed=3)},
    "sinks": lambda length: {"sinks": torch.randn(4, device="cuda")},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_parity(head_dim: int, mask: str, extra: str) -> None:
    """1000 rows: more CTAs than a simulator bears, and a ragged end; grouped heads; the dtype alternates."""
    dtype = DTYPES[(head_dim // 64 + list(MASKS).index(mask) + list(EXTRAS).index(extra)) % 2]
    q, k, v, _ = tensors((2, 4, 1000, head_dim), 2, dtype)
    inputs = inputs_of(q, k, v, **MASKS[mask](1000), **EXTRAS[extra](1000))
    check_inputs(inputs, "triton", DIFFERENTIABLE, title=f"{head_dim} {mask} {extra}")


@pytest.mark.parametrize("length", [997, 1002])
def test_rows_whose_length_is_not_for_tma(length: int) -> None:
    q, k, v, _ = tensors((1, 4, length, 64), 2, torch.bfloat16)
    check_inputs(inputs_of(q, k, v, mask=fa.Causal()), "triton", DIFFERENTIABLE, title=f"rows of {length}")


@pytest.mark.parametrize("length", [997, 1000])
def test_chosen_rows_and_heads_are_those_of_all(length: int) -> None:
    """Up to a rounding, for the base of a row is another one: its lse."""
    q, k, v, _ = tensors((2, 4, length, 128), 2, torch.bfloat16)
    heads, rows = torch.tensor([3, 0], device="cuda"), torch.tensor([5, -1, 700, 5], device="cuda")
    asked = {"probs": True, "scores": True}
    every = fa.attention(q, k, v, mask=fa.Causal(), return_aux=fa.AuxRequest(**asked), backend="triton")[1]
    some = fa.attention(q, k, v, mask=fa.Causal(), return_aux=fa.AuxRequest(**asked, heads=heads, rows=rows), backend="triton")[1]
    for name in asked:
        right = getattr(every, name)[:, heads][:, :, rows]
        torch.testing.assert_close(getattr(some, name), right, rtol=torch.finfo(q.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["full", "causal", "documents"])
def test_the_same_bits_twice(mask: str, head_dim: int) -> None:
    """out, dk and dv always; dq where torch asks for determinism."""
    given, options = tensors((2, 8, 2000, head_dim), 8, torch.bfloat16), MASKS[mask](2000)
    first, second = (results(*given, **options) for _ in range(2))
    assert [torch.equal(first[i], second[i]) for i in (0, 2, 3)] == [True] * 3
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (results(*given, **options) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [True] * 4


def test_a_slice_of_the_batch_is_a_batch_of_one() -> None:
    given = tensors((5, 8, 700, 128), 8, torch.bfloat16)
    whole, alone = results(*given, mask=fa.Causal()), results(*(t[3:4] for t in given), mask=fa.Causal())
    assert [torch.equal(whole[i][3:4], alone[i]) for i in (0, 2, 3)] == [True] * 3


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_captured_graph_computes_anew(backward: bool) -> None:
    """With new values in the same memory: descriptors hold addresses, not data."""
    given = tensors((2, 4, 500, 128), 4, torch.bfloat16)

    def run() -> tuple[torch.Tensor, ...]:
        return results(*given, mask=fa.Causal()) if backward else (fa.attention(*given[:3], mask=fa.Causal(), backend="triton"),)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in given:
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for i, (got, want) in enumerate(zip(captured, run(), strict=True)):
        if i == 1:  # dq is added up as it comes
            torch.testing.assert_close(got, want, rtol=1.6e-2, atol=1e-2)
        else:
            assert torch.equal(got, want)


def test_two_streams_at_once() -> None:
    """Each with work of its own that is late: nothing runs on another's stream."""
    base = tensors((2, 8, 1024, 64), 8, torch.bfloat16)
    want = [results(base[0] + i, *base[1:])[0] for i in range(2)]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in range(2)], []
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            got.append(results(base[0] + i, *base[1:])[0])
    torch.cuda.synchronize()
    assert [torch.equal(a, b) for a, b in zip(got, want, strict=True)] == [True, True]


def test_broken_values_stay_where_they_belong() -> None:
    """The plain kernels mend what the fast ones flag, on the same stream."""
    given, mask = tensors((1, 4, 900, 128), 4, torch.bfloat16), fa.Documents(torch.arange(900, device="cuda") // 300)
    clean = results(*given, mask=mask)
    for row, tensor in zip((10, 20, 30, 40), given, strict=True):
        tensor[:, :, row, 5] = torch.nan
    for got, want in zip(results(*given, mask=mask), clean, strict=True):
        assert got[:, :, :300].isnan().any()
        torch.testing.assert_close(got[:, :, 300:], want[:, :, 300:], rtol=1.6e-2, atol=2e-2)


def test_new_shapes_do_not_compile_anew() -> None:
    """Lengths and strides are arguments: only kinds of numbers are compiled for."""
    from fused_attn.backends.triton.hopper import launch

    q, k, v, _ = tensors((1, 4, 640, 128), 4, torch.bfloat16)
    fa.attention(q, k, v, mask=fa.Causal(), backend="triton")
    known = len(launch._compiled)
    for length in (128, 256, 384, 512):
        fa.attention(*(t[:, :, :length] for t in (q, k, v)), mask=fa.Causal(), backend="triton")
    assert len(launch._compiled) == known
