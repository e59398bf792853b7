"""When a difference is one: an effect larger than the noise of identical code, that a paired test over fresh starts confirms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Chance of calling any of the compared cases changed when none is.
ALPHA = 0.01
# Smallest effect worth a word.
MIN_EFFECT = 0.01
# Comparisons of identical code differ by up to this on a machine that nobody has calibrated; docs/benchmarking.md has the measurement.
UNCALIBRATED = 0.02
# Fewer launches than this have no spread to speak of.
ENOUGH = 3
# Part of the launches that is left out at each end.
TRIM = 1 / 8

SLOWER, FASTER, SAME, UNKNOWN = "slower", "faster", "no change", "too few runs"


@dataclass(frozen=True)
class Difference:
    """How much longer B takes than A.

    The unit is the launch, a fresh start of both sides: where the system puts their memory moves a whole launch by more than what
    happens within it, so that the spread within one is the wrong error bar.

    Args:
        effect: log of the ratio of times B / A, the trimmed mean over launches of the median over A B B A blocks.
        low, high: 95 % confidence interval of it.
        p: two-sided p-value of the paired t-test over launches; after ``corrected`` it allows for the other cases.
        launches: how many.
        floor: effects below it are noise on this machine; a log ratio too.
    """

    effect: float
    low: float
    high: float
    p: float
    launches: int
    floor: float = UNCALIBRATED

    @property
    def percent(self) -> float:
        """B takes so many percent longer; negative when it is faster."""
        return 100 * math.expm1(self.effect)

    @property
    def verdict(self) -> str:
        """A change needs both the size and the test."""
        if self.launches < ENOUGH:
            return UNKNOWN
        changed = abs(self.effect) > max(self.floor, MIN_EFFECT) and self.p < ALPHA
        return (SLOWER if self.effect > 0 else FASTER) if changed else SAME


def blocks(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Log of the ratio of times in each A B B A block: what drifts evenly through a block cancels.

    Example:
        >>> [round(x, 3) for x in blocks([1.0, 1.1, 1.2, 1.3], [2.0, 2.2, 2.4, 2.6])]
        [0.693, 0.693]
    """
    logs = [math.log(y / x) for x, y in zip(a, b, strict=True)]
    return [(x + y) / 2 for x, y in zip(logs[::2], logs[1::2], strict=False)]


def difference(launches: Sequence[Sequence[float]], floor: float = UNCALIBRATED) -> Difference:
    """What the blocks of several launches say together.

    The mean over launches is trimmed, since other work on the machine spoils one launch now and then: an eighth at each end is left
    out, and the test is Student's with winsorised variance (Tukey and McLaughlin, 1963). Fewer than eight launches are not trimmed.

    Example:
        >>> found = difference([[0.10, 0.11, 0.09], [0.12, 0.11, 0.12], [0.09, 0.10, 0.30]])
        >>> round(found.percent), found.verdict
        (11, 'slower')
    """
    medians = sorted(statistics.median(blocks) for blocks in launches if blocks)
    cut, count = int(len(medians) * TRIM), len(medians)
    kept = medians[cut : count - cut]
    if count < ENOUGH:
        return Difference(statistics.fmean(medians or [0.0]), -math.inf, math.inf, 1.0, count, floor)
    winsorised = [kept[0]] * cut + kept + [kept[-1]] * cut
    error = statistics.stdev(winsorised) / (1 - 2 * cut / count) / math.sqrt(count)
    return _student(statistics.fmean(kept), error, len(kept) - 1, (count, floor))


def _student(effect: float, error: float, freedom: int, about: tuple[int, float]) -> Difference:
    """An effect with its standard error; ``about`` is the number of launches and the floor."""
    from scipy import stats

    # Real times are never exactly equal; without a spread any difference would be infinitely significant.
    error = max(error, 1e-6)
    half = float(stats.t.ppf(0.975, freedom)) * error
    p = 2 * float(stats.t.sf(abs(effect) / error, freedom))
    return Difference(effect, effect - half, effect + half, p, *about)


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The same with Holm's correction: with hundreds of cases, one of them has a small p-value by chance.

    Example:
        >>> one = Difference(0.1, 0.05, 0.15, 0.004, 8)
        >>> [round(d.p, 3) for d in corrected([one, one, replace(one, p=0.5)])]
        [0.012, 0.012, 0.5]
    """
    return [replace(d, p=p) for d, p in zip(differences, holm([d.p for d in differences], len(differences)), strict=True)]


def holm(values: Sequence[float], tested: int) -> list[float]:
    """p-values corrected for how many hypotheses were tested, of which those not given had larger ones (Holm, 1979).

    Example:
        >>> holm([0.02, 0.01], 2), holm([0.01], 3)
        ([0.02, 0.02], [0.03])
    """
    adjusted, worst = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        worst = max(worst, min(1.0, (tested - rank) * values[i]))
        adjusted[i] = worst
    return adjusted


def noise_floor(effects: Sequence[float]) -> float:
    """What the effect of one more comparison of identical code exceeds once in a hundred times, from those seen; their mean is known: zero.

    Example:
        >>> round(noise_floor([0.01, -0.01, 0.01, -0.01]), 3)
        0.046
    """
    from scipy import stats

    root_mean_square = math.sqrt(statistics.fmean(x * x for x in effects))
    return float(stats.t.ppf(1 - ALPHA / 2, len(effects))) * root_mean_square


def against(history: Sequence[float], latest: float, floor: float = UNCALIBRATED) -> Difference:
    """One run's time among those of earlier runs.

    The error bar is the spread between runs, not within one: a prediction interval for a single new value.

    Args:
        history: one median per earlier run, in seconds.
        latest: the median to judge.
        floor: effects below it are noise.
    """
    logs = [math.log(x) for x in history]
    if len(logs) < ENOUGH:
        return Difference(math.log(latest) - statistics.fmean(logs) if logs else 0.0, -math.inf, math.inf, 1.0, len(logs), floor)
    error = statistics.stdev(logs) * math.sqrt(1 + 1 / len(logs))
    return _student(math.log(latest) - statistics.fmean(logs), error, len(logs) - 1, (len(logs), floor))
