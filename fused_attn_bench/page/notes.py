"""What to know before a run's numbers are believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fused_attn_bench.results import Result

# A clock that moves by more than this between samples was not locked.
CLOCK = 0.02
# A spread beyond this says little of a time.
WIDE = 0.2


def warnings(results: Sequence[Result]) -> list[str]:
    """Sentences on one run: busy neighbours, a chip held back, clocks that moved, spreads that are wide, times that no roof allows."""
    timed = [r for r in results if r.samples]
    if not timed:
        return []
    found = []
    environment = timed[0].environment
    if environment.get("busy"):
        found.append(f"Measured beside {environment['busy']}; compared with such runs only.")
    held = Counter(reason for r in timed for sample in r.telemetry for reason in sample.get("throttled") or ())
    if held:
        kept = sum(bool(sample.get("throttled")) for r in timed for sample in r.telemetry)
        found.append(f"The chip was held back in {_count(kept, 'sample')} ({', '.join(sorted(held))}).")
    clocks = _values(timed, "sm_mhz")
    if clocks and max(clocks) > (1 + CLOCK) * min(clocks):
        found.append(f"The clock was not locked: it moved between {min(clocks):g} and {max(clocks):g} MHz.")
    loads, threads = _values(timed, "load"), environment.get("threads", "")
    if loads and threads.isdigit() and max(loads) > int(threads) + 1:
        found.append(f"The machine was not quiet: up to {max(loads):.1f} processes wanted to run, the measured one has {threads} threads.")
    wide = sum((r.spread or 0.0) > WIDE for r in timed)
    if wide:
        found.append(f"{_count(wide, 'time')} varied by more than ± {WIDE:.0%}.")
    above = sum((r.limit or 0.0) > (r.median or 0.0) for r in timed)
    if above:
        found.append(
            f"{_count(above, 'time')} {'are' if above > 1 else 'is'} below what the measured roofs allow: the roofs were measured too low."
        )
    reasons = Counter(r.reason for r in timed if r.reason)
    found += [f"{_count(number, 'result')}: {reason}." for reason, number in reasons.items()]
    return found


def _values(results: Sequence[Result], name: str) -> list[float]:
    values: list[Any] = [sample.get(name) for r in results for sample in r.telemetry]
    return [float(v) for v in values if isinstance(v, (int, float))]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
