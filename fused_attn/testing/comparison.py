"""fused_attn beside plain torch and torch's SDPA on one workload: correctness first, then memory, then time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fused_attn.backends import Explanation
from fused_attn.testing.workload import Workload
from fused_attn_bench.judge import Results
from fused_attn_bench.measure import Effort, free_bytes
from fused_attn_bench.quick import Entry, compared

FUSED, EAGER, SDPA = "fused_attn", "eager", "SDPA"


@dataclass(frozen=True)
class Comparison:
    """All providers on one workload."""

    explanation: Explanation
    entries: Mapping[str, Entry]

    def ratio(self, provider: str) -> float | None:
        """How many times faster fused_attn is: the ratio of interleaved medians."""
        ours, theirs = self.entries[FUSED].timing, self.entries[provider].timing
        return None if ours is None or theirs is None else theirs.median / ours.median


def compare(work: Workload, effort: Effort | None = None) -> Comparison:
    """Runs every provider once for errors and peak memory, then those that hold the error rule in turns for time."""
    functions: dict[str, Callable[[], Results]] = {FUSED: work.fused}
    skipped = {EAGER: Entry(reason=shortage(work)), SDPA: Entry(reason="cannot return probabilities")}
    if not skipped[EAGER].reason:
        functions[EAGER] = work.eager()
    sdpa = work.sdpa()
    if sdpa is not None:
        functions[SDPA] = sdpa
    return Comparison(work.explain(), skipped | compared(functions, work.judge(), work.device, effort))


def shortage(work: Workload) -> str:
    """Why plain torch cannot run here: it holds up to six tensors of the scores' size at once; empty when they fit."""
    needed, free = 6 * work.score_bytes, free_bytes(work.device)
    return "" if needed < 0.8 * free else f"not run: needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def seeded(device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal q, k and v of one shape, the same every time."""
    made = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=made, dtype=dtype, device=device) for _ in range(3))
    return q, k, v
