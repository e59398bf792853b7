"""Time and peak memory of additive attention: what plain torch takes, who holds head_dim values for every pair."""

from __future__ import annotations

import torch

import benchmarks.providers  # noqa: F401  (declares the operations)
from benchmarks.bounds import Report, Row
from fused_attn_bench.case import Case
from fused_attn_bench.harness import Setup, measure
from fused_attn_bench.text import ratio, seconds, size

SHAPE = (2, 4, 512, 64)
# Least speed in plain torch's, and most memory.
SPEED, MEMORY = 3.0, 0.1


def run(device: torch.device, budget: float) -> Report:
    """Forward, and forward with backward."""
    rows = [_row(Case("attention", "additive", mode, "float32", SHAPE), Setup(device, budget / 2)) for mode in ("fwd", "fwd+bwd")]
    note = f"bound: {SPEED:.0f} x the speed of plain torch, {MEMORY:.0%} of its memory; medians of calls in turns, tensors alive beyond the inputs."
    title = f"additive: Additive(weight [heads, D]), {list(SHAPE)}, float32, {device.type}"
    return Report(title, ("mode", "fused_attn", "eager", "speed", "fused_attn's peak", "eager's", "part"), rows, note)


def _row(case: Case, setup: Setup) -> Row:
    ours, plain = measure(case, ["fused_attn", "eager"], setup)
    if ours.median is None or plain.median is None or ours.peak is None or plain.peak is None:
        return Row((case.mode, *["-"] * 5, f"{ours.status}, {plain.status}: {ours.reason or plain.reason}"), ours.status == "refused")
    speed, part = plain.median / ours.median, ours.peak / plain.peak
    cells = (seconds(ours.median), seconds(plain.median), ratio(speed), size(ours.peak), size(plain.peak), f"{part:.1%}")
    return Row((case.mode, *cells), speed >= SPEED and part <= MEMORY)
