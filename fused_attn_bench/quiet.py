"""Whether a measurement was left alone: what else the machine did meanwhile, and what that shows in the samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fused_attn_bench.results import Result

# Half of the interquartile range over the median: beyond it a median of some tens of samples is no fact to two digits.
MOST_SPREAD = 0.20
# Cores that other processes may use: the system's own housekeeping stays below it.
MOST_OTHERS = 0.25
# Part of the time that a hypervisor may give to other guests.
MOST_STOLEN = 0.05
# Range of a GPU's clock over its middle: locked clocks stay within one step of about 1 %.
MOST_CLOCK_RANGE = 0.03
# A clock of 10 ms ticks says nothing of less.
SHORTEST = 0.2


class Activity(NamedTuple):
    """Of everybody else, as averages over a time: cores that other processes used, and the part that the hypervisor took."""

    cores: float = 0.0
    stolen: float = 0.0

    @property
    def marks(self) -> tuple[str, ...]:
        """What is beyond the limits, in words.

        Example:
            >>> Activity(1.3, 0.0).marks, Activity(0.1, 0.2).marks
            (('other processes used 1.3 cores',), ('the hypervisor took 20% of the time',))
        """
        found = [f"other processes used {self.cores:.1f} cores"] if self.cores > MOST_OTHERS else []
        return (*found, *[f"the hypervisor took {100 * self.stolen:.0f}% of the time"] * (self.stolen > MOST_STOLEN))


class Watch:
    """From its making on: processor time of this process with its children, and of the whole system.

    Busy processes that a run starts for itself are its children, and no disturbance.
    """

    def __init__(self) -> None:
        self.start, self.before = time.perf_counter(), _processor_times()

    def activity(self) -> Activity:
        """Of the others since then; nothing where too little time has passed or nobody counts."""
        seconds, after = time.perf_counter() - self.start, _processor_times()
        if self.before is None or after is None or seconds < SHORTEST:
            return Activity()
        system, own, stolen = (now - then for now, then in zip(after, self.before, strict=True))
        return Activity(max(0.0, system - own) / seconds, stolen / seconds / _cores())


def _processor_times() -> tuple[float, float, float] | None:
    """Seconds of all cores together: busy, busy for this process and its children, taken by the hypervisor."""
    try:
        import psutil
    except ImportError:  # a machine where nothing can be installed: nothing is known then, and nothing marked
        return None
    times, me = psutil.cpu_times(), psutil.Process()
    stolen = getattr(times, "steal", 0.0)
    # A guest's time is part of user's; waiting for a disk is idle.
    idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    mine = me.cpu_times()
    own = mine.user + mine.system + getattr(mine, "children_user", 0.0) + getattr(mine, "children_system", 0.0)
    for child in me.children(recursive=True):
        try:
            used = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        own += used.user + used.system
    return sum(times) - idle - stolen, own, stolen


def _cores() -> int:
    import psutil

    return psutil.cpu_count() or 1


def marked(results: Sequence[Result], activity: Activity) -> list[Result]:
    """Results that were measured together, with what the others did meanwhile; those without times have no marks."""
    return [replace(r, marks=activity.marks) if r.samples else r for r in results]


def disturbed(results: Sequence[Result]) -> int:
    """How much there is to say against results: repeating stops at none and keeps the fewest."""
    return sum(len(doubts(r)) for r in results)


def doubts(result: Result) -> list[str]:
    """Why a result's times are no plain facts: what the samples show, what the others did, and a roof that is passed."""
    if not result.samples:
        return []
    found = []
    if result.spread is not None and result.spread > MOST_SPREAD:
        found.append(f"times spread by more than ± {100 * MOST_SPREAD:.0f}%")
    clocks = [float(t["sm_mhz"]) for t in result.telemetry if isinstance(t.get("sm_mhz"), int | float)]
    if clocks and max(clocks) - min(clocks) > MOST_CLOCK_RANGE * sorted(clocks)[len(clocks) // 2]:
        found.append(f"the clock was not locked: it moved by more than {100 * MOST_CLOCK_RANGE:.0f}%")
    throttled = sorted({str(reason) for t in result.telemetry for reason in t.get("throttled") or ()})
    if throttled:
        found.append(f"the GPU throttled ({', '.join(throttled)})")
    if result.limit and result.median and result.limit > result.median:
        found.append("faster than the measured roofs allow")
    return [*found, *result.marks]
