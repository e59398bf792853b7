"""Host cost of one ``fused_attn.attention`` call: a problem so small that nothing else counts."""

from __future__ import annotations

import time

import torch

import fused_attn as fa
from benchmarks.bounds import Report, Row
from fused_attn.cli.text import ratio, seconds
from fused_attn.testing.comparison import seeded
from fused_attn.testing.measure import Effort, interleaved
from fused_attn.testing.workload import Judge, Workload

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
    rows = [_row(place, causal, grad, budget / len(kinds) / len(places)) for place in places for grad, causal in kinds]
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


def _row(place: tuple[torch.device, str], causal: bool, grad: bool, budget: float) -> Row:
    device, backend = place
    mask = fa.Causal() if causal else None
    work = Workload(seeded(device, SHAPE, torch.float32), mask)
    right = not Judge.of(work)(work.fused()).broken
    q, k, v = (t.detach().requires_grad_(grad) for t in work.inputs)
    times = interleaved(
        {
            "ours": lambda: fa.attention(q, k, v, mask=mask, backend=backend),
            "theirs": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal),
        },
        CPU,  # nobody waits for a GPU, whose queue never fills: its kernels are shorter than the calls
        Effort(budget, rounds=5, sample=0.01, clock=time.thread_time),
    )
    ours, theirs = times["ours"].median, times["theirs"].median
    bound = BOUND if backend == "auto" else None if grad else CUDA_BOUND
    title = f"{'causal' if causal else 'no mask'}, {'requires_grad' if grad else 'no grad'}"
    cells = (title, f"{backend}, {device.type}", seconds(ours), seconds(theirs), ratio(ours / theirs), ratio(bound) if bound else "-")
    return Row(cells, right and ours <= bound * theirs if bound else right)
