"""Host cost of one ``fused_attn.attention`` call: a problem so small that nothing else counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import fused_attn as fa
from benchmarks.bounds import Report, Row
from fused_attn.testing.comparison import seeded
from fused_attn.testing.workload import Workload
from fused_attn_bench.measure import Effort, interleaved
from fused_attn_bench.text import ratio, seconds

# Most that a call may cost, in calls of SDPA: chosen by auto on the CPU; by the cuda backend, without a gradient, on a GPU.
BOUND, CUDA_BOUND = 5.0, 2.0
SHAPE = (1, 4, 32, 32)
CPU = torch.device("cpu")


def run(device: torch.device, budget: float) -> Report:
    """Four rows, bare and causal, without and with a gradient wanted; on a GPU with the native library four more for the cuda backend."""
    places = [(CPU, "auto")]
    refusal = _refusal(device)
    if not refusal:
        places.append((device, "cuda"))
    kinds = [(grad, causal) for grad in (False, True) for causal in (False, True)]
    calls = [(where, Call(grad, causal=causal, backend=backend)) for where, backend in places for grad, causal in kinds]
    rows = [_row(where, call, budget / len(calls)) for where, call in calls]
    note = f"bound: {BOUND:.0f} x SDPA on the CPU, {CUDA_BOUND:.0f} x with backend cuda; the calling thread's own time, medians of forward calls in turns."
    if refusal:
        note += f"\n  Backend cuda is not measured: {refusal}."
    return Report(
        f"overhead: one call on [batch, heads, L, D] = {list(SHAPE)}, float32",
        ("call", "backend", "fused_attn", "SDPA", "ratio", "bound"),
        rows,
        note,
    )


def _refusal(device: torch.device) -> str:
    """Why the cuda backend cannot be measured here, or an empty string."""
    rows = Workload(seeded(device, SHAPE, torch.float32)).explain().rows
    return next(row.reason for row in rows if row.backend == "cuda")


@dataclass(frozen=True)
class Call:
    """What is called: whether inputs want a gradient, whether it is computed too, whether the mask is causal, and on which backend."""

    grad: bool = False
    backward: bool = False
    causal: bool = False
    backend: str = "auto"

    @property
    def title(self) -> str:
        wants = "fwd+bwd" if self.backward else "requires_grad" if self.grad else "no grad"
        return f"{'causal' if self.causal else 'no mask'}, {wants}"


def costs(call: Call, device: torch.device, effort: Effort) -> tuple[bool, float, float]:
    """Whether our result is right, and medians of the calling thread's own seconds: ours and SDPA's."""
    mask = fa.Causal() if call.causal else None
    work = Workload(seeded(device, SHAPE, torch.float32), mask)
    right = not work.judge()(work.fused()).broken
    q, k, v = (t.detach().requires_grad_(call.grad) for t in work.inputs)
    incoming = torch.ones_like(q)

    def mode(forward: Callable[[], Any]) -> Callable[[], Any]:
        return (lambda: torch.autograd.grad(forward(), (q, k, v), incoming)) if call.backward else forward

    times = interleaved(
        {
            "ours": mode(lambda: fa.attention(q, k, v, mask=mask, backend=call.backend)),
            "theirs": mode(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=call.causal)),
        },
        CPU,  # nobody waits for a GPU, whose queue never fills: its kernels are shorter than the calls
        replace(effort, clock=time.thread_time),
    )
    return right, times["ours"].median, times["theirs"].median


def _row(device: torch.device, call: Call, budget: float) -> Row:
    right, ours, theirs = costs(call, device, Effort(budget, rounds=5, sample=0.01))
    bound = BOUND if call.backend == "auto" else None if call.grad else CUDA_BOUND
    cells = (
        call.title,
        f"{call.backend}, {device.type}",
        seconds(ours),
        seconds(theirs),
        ratio(ours / theirs),
        ratio(bound) if bound else "-",
    )
    return Row(cells, right and ours <= bound * theirs if bound else right)
