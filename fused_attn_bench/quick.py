"""Functions that do the same work beside each other, in a few seconds: correctness first, then memory, then time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fused_attn_bench.judge import Judge, Results, Verdict
from fused_attn_bench.measure import Effort, Timing, interleaved, peak_bytes


@dataclass(frozen=True)
class Entry:
    """What one provider did.

    Args:
        verdict: its error, or None where it did not run.
        peak: bytes beyond the inputs.
        timing: None where it did not run or broke the error rule: a wrong result has no speed.
        reason: why there is no timing.
    """

    verdict: Verdict | None = None
    peak: int | None = None
    timing: Timing | None = None
    reason: str = ""


def compared(
    functions: Mapping[str, Callable[[], Results]], judge: Judge, device: torch.device, effort: Effort | None = None
) -> dict[str, Entry]:
    """Runs every function once for errors and peak memory, then those that hold the error rule in turns for time.

    Example:
        >>> x = torch.ones(8)
        >>> judge = Judge({"out": 2 * x.double()}, {"out": 2 * x})
        >>> functions = {"good": lambda: {"out": x + x}, "bad": lambda: {"out": x}}
        >>> found = compared(functions, judge, torch.device("cpu"), Effort(0.0, rounds=1))
        >>> found["good"].timing is None, found["bad"].reason
        (False, 'breaks the error rule in out')
    """
    entries = {}
    for name, function in functions.items():
        results, peak = peak_bytes(function, device)
        verdict = judge(results)
        entries[name] = Entry(verdict, peak, reason=f"breaks the error rule in {', '.join(verdict.broken)}" if verdict.broken else "")
        del results
    valid: dict[str, Callable[[], object]] = {n: f for n, f in functions.items() if not entries[n].reason}
    for name, timing in interleaved(valid, device, effort).items():
        entries[name] = Entry(entries[name].verdict, entries[name].peak, timing)
    return entries
