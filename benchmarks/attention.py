"""Attention against plain torch and torch's SDPA, forward and backward."""

from __future__ import annotations

import torch

import fused_attn as fa
from benchmarks.harness import Report, Row
from fused_attn.cli.text import ratio, seconds, size
from fused_attn.testing.comparison import EAGER, FUSED, SDPA, Comparison, compare, seeded
from fused_attn.testing.measure import Effort
from fused_attn.testing.workload import Workload

CPU_SHAPE, GPU_SHAPE = (1, 4, 2048, 64), (2, 16, 4096, 128)


def run(device: torch.device, budget: float) -> Report:
    """Each mask, forward and forward with backward, without and with probabilities."""
    shape, dtype = (GPU_SHAPE, torch.bfloat16) if device.type == "cuda" else (CPU_SHAPE, torch.float32)
    inputs = seeded(device, shape, dtype)
    masks = {
        "no mask": None,
        "Causal()": fa.Causal(),
        "Causal() & SlidingWindow(255, 0)": fa.Causal() & fa.SlidingWindow(255, 0),
        "Documents, 4 equal": fa.Documents(torch.arange(shape[2], device=device) * 4 // shape[2]),
    }
    plans = [
        (name, mask, probs, backward)
        for name, mask in masks.items()
        for backward in (False, True)
        for probs in (False, True)
        if not (probs and mask)
    ]
    rows = []
    for name, mask, probs, backward in plans:
        title = f"{'fwd+bwd' if backward else 'fwd'}, {name}{', probabilities' if probs else ''}"
        rows.append(row(title, compare(Workload(inputs, mask, probs, backward), Effort(budget / len(plans), rounds=3))))
    note = "vs: the other's median over fused_attn's, calls in turns; holds: errors <= 2 x eager's + rounding."
    title = f"attention: [batch, heads, L, D] = {list(shape)}, {str(dtype).removeprefix('torch.')}, {device.type}"
    return Report(title, ("case", "backend", "error", "time", "vs eager", "vs SDPA", "peak", "of eager", "of SDPA"), rows, note)


def row(title: str, comparison: Comparison) -> Row:
    """One line; what was not measured is a dash."""
    ours = comparison.entries[FUSED]
    error = "-" if ours.verdict is None else f"{ours.verdict.error:.1e}"
    time = seconds(ours.timing.median) if ours.timing else "-"
    speeds = ("-" if (r := comparison.ratio(name)) is None else ratio(r) for name in (EAGER, SDPA))
    peaks = ("-" if (p := comparison.entries[name].peak) is None else size(p) for name in (FUSED, EAGER, SDPA))
    return Row((title, comparison.explanation.chosen, error, time, *speeds, *peaks), not ours.reason)
