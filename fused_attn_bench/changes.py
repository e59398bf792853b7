"""Where a history of times changed: steps by a kept change-point library, slow drift by a robust slope."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fused_attn_bench.results import Result
from fused_attn_bench.significance import ALPHA, MIN_EFFECT, holm

# Fewer runs than this on a side of a step cannot be told from an outlier or two.
SEGMENT = 4
# Difference of the Bayesian information criterion that Kass and Raftery (1995) call very strong evidence.
VERY_STRONG = 10.0
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


def find(histories: Mapping[Series, Sequence[Point]]) -> dict[Series, list[Change]]:
    """The changes of every series that has any; Holm's correction over all of them."""
    candidates = [(key, change) for key, points in histories.items() for change in candidate_changes([p.median for p in points])]
    kept: dict[Series, list[Change]] = {}
    for (key, change), p in zip(candidates, holm([c.p for _, c in candidates], len(histories) + len(candidates)), strict=True):
        if p < ALPHA:
            kept.setdefault(key, []).append(replace(change, p=p))
    return {key: sorted(changes, key=lambda c: c.index) for key, changes in kept.items()}


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
    from scipy import stats

    # Noise from neighbouring differences, which a step or a drift hardly touches; 0.6745 turns a median deviation into a standard one.
    neighbours = [abs(b - a) for a, b in itertools.pairwise(logs)]
    noise = max(statistics.median(neighbours) / 0.6745 / math.sqrt(2), 1e-6)
    signal = np.asarray(logs)[:, None] / noise
    # Absolute deviations, so that single outliers make no step; a new segment must pay for its two parameters (BIC).
    ends = ruptures.Pelt(model="l1", min_size=SEGMENT, jump=1).fit(signal).predict(pen=2 * math.log(len(logs)))
    bounds = [0, *ends]
    found = []
    for start, middle, end in zip(bounds, bounds[1:], bounds[2:], strict=False):
        before, after = logs[start:middle], logs[middle:end]
        effect = statistics.median(after) - statistics.median(before)
        # Yuen's test: a fifth is trimmed at each end, for single outliers; ranks could not be small enough with few runs and many series.
        p = float(stats.ttest_ind(before, after, equal_var=False, trim=0.2).pvalue)
        if abs(effect) > MIN_EFFECT and p < ALPHA:
            found.append(Change(STEP, middle, effect, p))
    return found


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
