"""Host cost of one ``fused_attn.attention`` call: a problem so small that nothing else counts, on the CPU."""

from __future__ import annotations

import time

import torch

import fused_attn as fa
from benchmarks.harness import Report, Row
from fused_attn.cli.text import ratio, seconds
from fused_attn.testing.comparison import seeded
from fused_attn.testing.measure import Effort, interleaved
from fused_attn.testing.workload import Judge, Workload

BOUND = 5.0
SHAPE = (1, 4, 32, 32)


def run(device: torch.device, budget: float) -> Report:
    """Four rows: bare and causal, without and with a gradient wanted."""
    cpu = torch.device("cpu")
    rows = [_row(causal, grad, cpu, budget / 4) for grad in (False, True) for causal in (False, True)]
    note = f"bound: {BOUND:.0f} x SDPA; the calling thread's own time, medians of forward calls in turns."
    return Report(
        f"overhead: one call on [batch, heads, L, D] = {list(SHAPE)}, float32, cpu",
        ("call", "fused_attn", "SDPA", "ratio", "bound"),
        rows,
        note,
    )


def _row(causal: bool, grad: bool, device: torch.device, budget: float) -> Row:
    mask = fa.Causal() if causal else None
    work = Workload(seeded(device, SHAPE, torch.float32), mask)
    right = not Judge.of(work)(work.fused()).broken
    q, k, v = (t.detach().requires_grad_(grad) for t in work.inputs)
    times = interleaved(
        {
            "ours": lambda: fa.attention(q, k, v, mask=mask),
            "theirs": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal),
        },
        device,
        Effort(budget, rounds=5, sample=0.01, clock=time.thread_time),
    )
    ours, theirs = times["ours"].median, times["theirs"].median
    title = f"{'causal' if causal else 'no mask'}, {'requires_grad' if grad else 'no grad'}"
    return Row((title, seconds(ours), seconds(theirs), ratio(ours / theirs), ratio(BOUND)), right and ours <= BOUND * theirs)
