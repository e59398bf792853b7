"""Where a history of times changed: steps by a kept change-point library, slow drift by a robust slope."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fused_attn_bench.results import Result
from fused_attn_bench.significance import ALPHA, MIN_EFFECT, holm

# Fewer runs than this on a side of a step cannot be told from an outlier or two.
SEGMENT = 4
# Difference of the Bayesian information criterion that Kass and Raftery (1995) call very strong evidence.
VERY_STRONG = 10.0
# Times log(n), what a new segment pays: 2 for its place and level (BIC), and more for choosing the best place. Of 300 steady histories of 30 runs
# with outliers 13 had a change with 2, and 4 with 5; a step of 5 % was found in 59 and 60 of 60.
PENALTY = 5.0
STEP, DRIFT = "step", "drift"


@dataclass(frozen=True)
class Point:
    """One run's median in a series."""

    run: str
    time: str
    commit: str
    median: float


@dataclass(frozen=True)
class Change:
    """A change in a series.

    Args:
        kind: "step" or "drift".
        index: of the first point after a step; 0 for drift, which has no place.
        effect: log of the ratio of times, after / before.
        p: of Yuen's test on both sides, or of Kendall's tau; corrected for all series together by ``find``.
    """

    kind: str
    index: int
    effect: float
    p: float

    @property
    def percent(self) -> float:
        return 100 * math.expm1(self.effect)


Series = tuple[tuple[str, ...], str, str]


def series(results: Iterable[Result]) -> dict[Series, list[Point]]:
    """Points in the order of time for each machine, case and provider."""
    found: dict[Series, list[Point]] = {}
    for r in sorted(results, key=lambda r: r.time):
        if r.median is not None:
            point = Point(r.run, r.time, r.environment.get("commit", ""), r.median)
            found.setdefault((r.machine, r.case, r.provider), []).append(point)
    return found


@dataclass(frozen=True)
class Standing:
    """Where a series that changed stands now.

    Args:
        level: the newest one, in seconds.
        best: the fastest of the earlier ones that the newest is surely slower than, or the fastest of all.
        since: the index of the first point of the newest level.
        effect: log of the ratio level / best; over a drift, of its ends.
        p: of Yuen's test of both, corrected for the earlier levels that were tried and for all series; of a drift, its own.
    """

    level: float
    best: float
    since: int
    effect: float
    p: float

    @property
    def percent(self) -> float:
        """The newest level takes so many percent longer than the best one."""
        return 100 * math.expm1(self.effect)

    def is_slower(self, limit: float) -> bool:
        """Whether it is, by at least the limit, a fraction, and beyond chance."""
        return self.p < ALPHA and self.percent >= 100 * limit


def find(histories: Mapping[Series, Sequence[Point]], progress: Callable[[], object] = lambda: None) -> dict[Series, list[Change]]:
    """The changes of every series that has any; Holm's correction over all of them; ``progress`` is told of every series."""
    candidates = []
    for key, points in histories.items():
        candidates += [(key, change) for change in candidate_changes([p.median for p in points])]
        progress()
    kept: dict[Series, list[Change]] = {}
    for (key, change), p in zip(candidates, holm([c.p for _, c in candidates], len(histories) + len(candidates)), strict=True):
        if p < ALPHA:
            kept.setdefault(key, []).append(replace(change, p=p))
    return {key: sorted(changes, key=lambda c: c.index) for key, changes in kept.items()}


def standing(points: Sequence[Point], steps: Sequence[Change], tested: int) -> Standing:
    """The newest level of a series among its earlier ones.

    A fast level counts however long ago it was, so that a small recovery does not hide a slowdown. The more levels there were, the faster the
    fastest of them is by luck alone: the test of the newest against each allows for their number.

    Args:
        points: of the series.
        steps: its changes, at least one.
        tested: how many series were looked at.
    """
    logs = [math.log(p.median) for p in points]
    if steps[0].kind == DRIFT:
        end = statistics.median(logs[-SEGMENT:])
        return Standing(math.exp(end), math.exp(end - steps[0].effect), 0, steps[0].effect, steps[0].p)
    bounds = [0, *(s.index for s in steps), len(logs)]
    *earlier, newest = (logs[a:b] for a, b in itertools.pairwise(bounds))
    level = statistics.median(newest)
    found = []
    for segment in earlier:
        p = min(1.0, _yuen(segment, newest) * len(earlier) * tested)
        best = statistics.median(segment)
        found.append(Standing(math.exp(level), math.exp(best), bounds[-2], level - best, p))
    return max(found, key=lambda s: (s.p < ALPHA and s.effect > 0, s.effect))


def superseded(histories: Mapping[Series, Sequence[Point]]) -> set[Series]:
    """Series of a machine that another configuration of the same device followed, as after an update of its driver: they will not go on."""
    spans: dict[tuple[str, ...], tuple[str, str]] = {}
    for (machine, *_), points in histories.items():
        first, last = spans.get(machine, (points[0].time, points[-1].time))
        spans[machine] = (min(first, points[0].time), max(last, points[-1].time))

    def followed(machine: tuple[str, ...]) -> bool:
        device, timer = machine[0], machine[-1]
        return any((m[0], m[-1]) == (device, timer) and first > spans[machine][1] for m, (first, _) in spans.items())

    return {key for key in histories if followed(key[0])}


def candidate_changes(medians: Sequence[float]) -> list[Change]:
    """Steps, or one drift where a line fits better than the steps; uncorrected, but larger than ``MIN_EFFECT``."""
    if len(medians) < 2 * SEGMENT:
        return []
    logs = [math.log(m) for m in medians]
    steps, drift = _steps(logs), _drift(logs)
    # A staircase is what a slope looks like to a search for steps: only very strong evidence makes it one.
    staircase = len(steps) > 1 and len({s.effect > 0 for s in steps}) == 1
    evidence = _of_line(logs) - _of_steps(logs, [s.index for s in steps])
    return [drift] if drift is not None and evidence < (VERY_STRONG if staircase else 0.0) else steps


def _steps(logs: Sequence[float]) -> list[Change]:
    import numpy as np
    import ruptures
    from scipy import ndimage

    # Noise from neighbouring differences, which a step or a drift hardly touches; 0.6745 turns a median deviation into a standard one.
    neighbours = [abs(b - a) for a, b in itertools.pairwise(logs)]
    noise = max(statistics.median(neighbours) / 0.6745 / math.sqrt(2), 1e-6)
    signal = np.asarray(logs) / noise
    # Single outliers make no step: two deviations from the running median are as far as a run may lie.
    middle = ndimage.median_filter(signal, 2 * SEGMENT - 1, mode="nearest")
    signal = np.clip(signal, middle - 2, middle + 2)[:, None]
    # The linear kernel is the sum of squares, in C: a millisecond for 500 runs, where ruptures' search over absolute deviations takes a second.
    ends = ruptures.KernelCPD(kernel="linear", min_size=SEGMENT).fit(signal).predict(pen=PENALTY * math.log(len(logs)))
    bounds = [0, *map(int, ends)]
    found = []
    for start, place, end in zip(bounds, bounds[1:], bounds[2:], strict=False):
        before, after = logs[start:place], logs[place:end]
        effect, p = statistics.median(after) - statistics.median(before), _yuen(before, after)
        if abs(effect) > MIN_EFFECT and p < ALPHA:
            found.append(Change(STEP, place, effect, p))
    return found


def _yuen(before: Sequence[float], after: Sequence[float]) -> float:
    """Yuen's test: a fifth is trimmed at each end, for single outliers; ranks could not be small enough with few runs and many series."""
    from scipy import stats

    return float(stats.ttest_ind(before, after, equal_var=False, trim=0.2).pvalue)


def _drift(logs: Sequence[float]) -> Change | None:
    from scipy import stats

    slope = stats.theilslopes(logs).slope
    p = float(stats.kendalltau(range(len(logs)), logs).pvalue)
    effect = float(slope) * (len(logs) - 1)
    return Change(DRIFT, 0, effect, p) if abs(effect) > MIN_EFFECT and p < ALPHA else None


def _of_line(logs: Sequence[float]) -> float:
    """The criterion of the robust line: a slope and a height."""
    from scipy import stats

    line = stats.theilslopes(logs)
    return _criterion([y - line.intercept - line.slope * x for x, y in enumerate(logs)], 2)


def _of_steps(logs: Sequence[float], places: Sequence[int]) -> float:
    """The criterion of the medians between steps: a height, then a place and a height for each step."""
    segments = [logs[a:b] for a, b in itertools.pairwise([0, *places, len(logs)])]
    return _criterion([y - statistics.median(s) for s in segments for y in s], 1 + 2 * len(places))


def _criterion(residuals: Sequence[float], parameters: int) -> float:
    """Bayesian information criterion for noise with a Laplace distribution, whose likelihood counts absolute distances."""
    mean = max(statistics.fmean(map(abs, residuals)), 1e-9)
    return 2 * len(residuals) * math.log(mean) + parameters * math.log(len(residuals))
