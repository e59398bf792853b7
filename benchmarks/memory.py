"""Peak memory of a long causal window: O(length) here, O(length^2) in plain torch."""

from __future__ import annotations

import torch

import fused_attn as fa
from benchmarks.bounds import Report, Row
from fused_attn.testing.comparison import EAGER, FUSED, SDPA, seeded, shortage
from fused_attn.testing.workload import Workload
from fused_attn_bench.measure import peak_bytes
from fused_attn_bench.text import size

SHAPE = (1, 1, 16384, 64)
BOUND = 2**30


def run(device: torch.device, budget: float) -> Report:
    """Each provider runs once, forward and backward; the budget is not needed."""
    return measure(SHAPE, device)


def measure(shape: tuple[int, int, int, int], device: torch.device) -> Report:
    """The report for one [batch, heads, L, D]."""
    work = Workload(seeded(device, shape, torch.float32), fa.Causal() & fa.SlidingWindow(255, 0), backward=True)
    judge, rows = work.judge(), []
    for name, function in ((FUSED, work.fused), (EAGER, work.eager()), (SDPA, work.sdpa())):
        lacking = "" if name == FUSED else shortage(work)
        if lacking or function is None:
            rows.append(Row((name, "-", lacking)))
            continue
        results, peak = peak_bytes(function, device)
        verdict = judge(results)
        kept = not verdict.broken and peak < BOUND
        rows.append(Row((name, f"{verdict.error:.1e}", size(peak)), kept if name == FUSED else None))
    note = (
        f"bound for fused_attn: {size(BOUND)} of tensors alive at once beyond the inputs. "
        "The others get a dense mask ready-made, not counted."
    )
    title = f"memory: fwd+bwd, Causal() & SlidingWindow(255, 0), {list(shape)}, float32, {device.type}"
    return Report(title, ("provider", "error", "peak"), rows, note)
