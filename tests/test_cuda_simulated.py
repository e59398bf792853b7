"""What the simulator of CUDA checks beyond results: any legal order of copies and warps, bank conflicts, wasted memory traffic."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.auxiliary import AuxRequest
from fused_attn.backends.base import Incoming
from fused_attn.lowering import KernelMask, KernelScore, LoweredAttention, LoweredSoftmax, Terms
from fused_attn.testing.budget import DIFFERENTIABLE, call, evaluate
from fused_attn.testing.cases import inputs_of
from fused_attn.testing.softmax import SoftmaxCase, evaluate_softmax, make_softmax
from tests import simulated_cuda
from tests.problems import problems

pytestmark = pytest.mark.skipif(bool(simulated_cuda.missing()), reason=simulated_cuda.missing() or "never")

# Copies take effect as late as allowed, at once, or at random points, with warps in random order.
ORDERS: dict[str, dict[str, Any]] = {
    "late": {},
    "early": {"async_mode": "early"},
    "late, warps shuffled": {"sched": "random", "seed": 1},
    **{f"random {seed}": {"async_mode": "random", "sched": "random", "seed": seed} for seed in range(2, 6)},
}


@pytest.fixture
def options() -> Iterator[dict[str, Any]]:
    """The simulator's options; as they were, afterwards."""
    before = dict(simulated_cuda.options)
    yield simulated_cuda.options
    simulated_cuda.options.clear()
    simulated_cuda.options.update(before)


def the_same_in_every_order(
    options: dict[str, Any], compute: Callable[[], Mapping[str, Tensor]], names: Sequence[str] = tuple(ORDERS)
) -> None:
    results = {}
    for name in names:
        options.update({"async_mode": "late", "sched": "rr", "seed": 1} | ORDERS[name])
        results[name] = compute()
    for name, result in results.items():
        for key, tensor in result.items():
            torch.testing.assert_close(tensor, results["late"][key], rtol=0, atol=0, equal_nan=True, msg=f"{key}, order {name}")


HEAD_DIMS, DTYPES = (64, 128, 256), (torch.bfloat16, torch.float16, torch.float32)


def orders_of(dtype: torch.dtype, head_dim: int) -> list[str]:
    """The plain order and two of the other six: every pair of order and dtype, and of order and head size, in one of the nine problems."""
    first, *others = ORDERS
    return [first, *others[(DTYPES.index(dtype) + HEAD_DIMS.index(head_dim)) % 3 :: 3]]


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_in_every_order(dtype: torch.dtype, head_dim: int, options: dict[str, Any]) -> None:
    """Every kernel, bit by bit: no order of copies and warps that the hardware may choose shows in a result."""
    cases = problems(dtype, head_dim)
    q, k, v = (t.clone() for t in cases["plain"].problem.inputs)
    k[:, :, 100:], v[:, :, 100:] = torch.nan, torch.inf
    cases["broken"] = inputs_of(q, k, v, mask=fa.ValidLengths(torch.tensor([100])))
    run = functools.partial(call, backend="cuda")
    for inputs in cases.values():
        through = [n for n in DIFFERENTIABLE if n in inputs.incoming]
        compute = functools.partial(evaluate, run, inputs, through)
        the_same_in_every_order(options, compute, orders_of(dtype, head_dim))


@pytest.mark.parametrize("length", [40, 200, 1000, 3000, 9000, 20_000])
def test_softmax_in_every_order(length: int, options: dict[str, Any]) -> None:
    """One length for each way of spreading a row."""
    for case in (
        SoftmaxCase((3, 5, length), mask="bool", full=(1, 2), bias=True, dropout=0.3),
        SoftmaxCase((2, 3, length), dtype=torch.float16, log=True, mask="ValidLengths1"),
    ):
        inputs = make_softmax(case)
        the_same_in_every_order(options, lambda inputs=inputs: evaluate_softmax(inputs, "cuda"))


def kernels_of_attention(dtype: torch.dtype, head_dim: int) -> Iterator[str]:
    """Runs one kernel after another, full tiles, and names the one that ran last."""
    backend = simulated_cuda.SimulatedCuda()
    q, k, v = (torch.randn(1, 2, 256, head_dim).to(dtype) for _ in range(3))
    lowered = LoweredAttention(q, k, v, Terms(KernelMask(), head_dim**-0.5))
    forward = backend.attention_fwd(lowered)
    yield "attention_fwd"
    backend.attention_aux(lowered, forward, AuxRequest(probs=True))
    yield "attention_rows (probabilities)"
    backend.attention_aux(lowered, forward, AuxRequest(column_sums=True))
    yield "attention_columns"
    incoming = Incoming(torch.randn_like(forward.out))
    for name, needs in (("delta", (0, 0, 0, 0)), ("dq", (1, 0, 0, 0)), ("dkdv", (0, 1, 1, 0))):
        backend.attention_bwd(lowered, forward, incoming, tuple(map(bool, needs)))
        yield f"attention_bwd_{name}"
    bias = torch.randn(1, 2, 256, 256, dtype=dtype)
    lowered = LoweredAttention(q, k, v, Terms(KernelMask(), head_dim**-0.5, mods=(KernelScore("bias", (), (bias,)),)))
    forward = backend.attention_fwd(lowered)
    yield "attention_fwd with a bias"
    backend.attention_bwd(lowered, forward, incoming, (False, False, False, False, True))
    yield "attention_bwd_bias"


def kernels_of_softmax(dtype: torch.dtype, length: int) -> Iterator[str]:
    backend = simulated_cuda.SimulatedCuda()
    scores, keep = torch.randn(1, 1, 16, length).to(dtype), torch.ones(1, 1, 16, length, dtype=torch.uint8)
    lowered = LoweredSoftmax(scores, Terms(KernelMask(keep=keep), 1.0), False, False)
    result, _ = backend.softmax_fwd(lowered)
    yield "softmax_fwd"
    backend.softmax_bwd(lowered, result, torch.randn_like(result), (True,))
    yield "softmax_bwd"


def report(kernels: Iterator[str], options: dict[str, Any]) -> list[str]:
    """Prints the counters of each kernel; those that waste more than a fiftieth of shared memory's cycles or of the sectors moved."""
    options["counters"] = True
    wasteful = []
    for name in kernels:
        stats = simulated_cuda.simulator().last_stats()
        conflicts = stats["smem_wavefronts"] / max(1, stats["smem_ideal_wavefronts"])
        sectors = stats["gmem_sectors"] / max(1, stats["gmem_ideal_sectors"])
        line = f"{name}: {conflicts:.3f} x the fewest wavefronts of shared memory, {sectors:.3f} x the fewest sectors of global memory"
        print(line)
        if max(conflicts, sectors) > 1.025:
            wasteful.append(line)
    return wasteful


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_attention_wastes_no_memory_traffic(dtype: torch.dtype, head_dim: int, options: dict[str, Any]) -> None:
    assert report(kernels_of_attention(dtype, head_dim), options) == []


@pytest.mark.parametrize("length", [64, 208, 1008, 4096, 16_384, 40_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_softmax_wastes_no_memory_traffic(dtype: torch.dtype, length: int, options: dict[str, Any]) -> None:
    """Multiples of 16: where rows begin inside a sector of 32 bytes, two rows move it."""
    assert report(kernels_of_softmax(dtype, length), options) == []
