"""When a difference is one: larger than the noise of identical code, and confirmed by a test over fresh starts; and when there is none."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Chance of calling any of the compared cases changed when none is.
ALPHA = 0.01
# Smallest effect worth a word.
MIN_EFFECT = 0.01
# Comparisons of identical code differ by up to this on a machine that nobody has calibrated; docs/benchmarking.md has the measurement.
UNCALIBRATED = 0.02
# Changes up to this need not be told from none, unless the user says otherwise; log of the ratio of times.
LIMIT = math.log1p(0.03)
# Fewer launches than this have no spread to speak of.
ENOUGH = 3
# Part of the launches that is left out at each end.
TRIM = 1 / 8
# A standard deviation of 1e-6: real times are never exactly equal, and without a spread any difference would be infinitely significant.
LEAST_VARIANCE = 1e-12
# Half of an interval, or a change that could have been found, beyond 100 % tells only that there were too few launches.
TELLING = math.log(2)
# A change of the size that is said to be findable is found so often.
POWER = 0.95

SLOWER, FASTER, SAME, UNDECIDED = "slower", "faster", "no change", "undecided"


@dataclass(frozen=True)
class Difference:
    """How much longer B takes than A.

    The unit is the launch, a fresh start of both sides: where the system puts their memory moves a whole launch by more than what
    happens within it, so that the spread within one is the wrong error bar.

    Args:
        effect: log of the ratio of times B / A, the trimmed mean over launches of the median over A B B A blocks.
        low, high: 95 % confidence interval of it, which allows for several looks at the growing data.
        p: two-sided p-value over launches; allows for the other cases and for several looks.
        launches: how many.
        floor: effects below it are noise on this machine; a log ratio too.
        limit: effects below it are as good as none; a log ratio too.
        smallest: the smallest effect that would have been found 95 times in a hundred.
        trusted: whether both sides were measured under the same conditions; else no change is believed, however sure the test.

    Example:
        >>> (
        ...     Difference(0.10, 0.09, 0.11, 1e-6, 8).text,
        ...     Difference(0.0, -0.01, 0.01, 0.9, 8).text,
        ...     Difference(0.01, -0.04, 0.06, 0.5, 8).text,
        ... )
        ('slower', 'no change', 'undecided (± 5.1%)')
    """

    effect: float
    low: float
    high: float
    p: float
    launches: int
    floor: float = UNCALIBRATED
    limit: float = LIMIT
    smallest: float = math.inf
    trusted: bool = True

    @property
    def percent(self) -> float:
        """B takes so many percent longer; negative when it is faster."""
        return 100 * math.expm1(self.effect)

    @property
    def confirmed(self) -> bool:
        """Whether the test says that there is an effect, of whatever size."""
        return self.launches >= ENOUGH and self.p < ALPHA

    @property
    def verdict(self) -> str:
        """A change needs both the size and the test; "no change" needs the whole interval within the limit, or the floor where that is larger."""
        if self.confirmed and abs(self.effect) > max(self.floor, MIN_EFFECT):
            return UNDECIDED if not self.trusted else SLOWER if self.effect > 0 else FASTER
        near = max(self.limit, self.floor)
        return SAME if -near <= self.low and self.high <= near else UNDECIDED

    @property
    def text(self) -> str:
        """The verdict; where nothing is decided, with half of the interval."""
        if self.verdict != UNDECIDED:
            return self.verdict
        return f"{UNDECIDED} (± {100 * math.expm1(self.half):.1f}%)" if self.half <= TELLING else f"{UNDECIDED} (too few runs)"

    @property
    def half(self) -> float:
        """Half of the interval, a log ratio."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Group:
    """Launches of one kind.

    Args:
        mean: of them, trimmed.
        variance: of one launch.
        freedom: degrees of freedom of the variance.
        weight: the variance of what the group tells is so many times that of a launch.
        count: how many launches.
    """

    mean: float
    variance: float
    freedom: int
    weight: float
    count: int


@dataclass(frozen=True)
class Contrast:
    """An effect, and the launches whose spread is its error bar: of both sides together, of each side, or of earlier runs."""

    effect: float
    groups: tuple[Group, ...]
    floor: float = UNCALIBRATED
    limit: float = LIMIT

    @property
    def launches(self) -> int:
        """Of the newest group."""
        return self.groups[0].count


def blocks(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Log of the ratio of times in each A B B A block: what drifts evenly through a block cancels.

    Example:
        >>> [round(x, 3) for x in blocks([1.0, 1.1, 1.2, 1.3], [2.0, 2.2, 2.4, 2.6])]
        [0.693, 0.693]
    """
    logs = [math.log(y / x) for x, y in zip(a, b, strict=True)]
    return [(x + y) / 2 for x, y in zip(logs[::2], logs[1::2], strict=False)]


def kept(values: Sequence[float]) -> list[int]:
    """Places of the values that a trimmed mean takes: an eighth at each end is left out, of fewer than eight none.

    Other work on the machine spoils one launch now and then.

    Example:
        >>> kept([5.0, 1.0, 1.1, 1.2, 0.1, 1.3, 1.4, 1.5])
        [1, 2, 3, 5, 6, 7]
    """
    cut, order = int(len(values) * TRIM), sorted(range(len(values)), key=values.__getitem__)
    return sorted(order[cut : len(values) - cut])


def group(values: Sequence[float], predicts: bool = False) -> Group:
    """What launches say together: trimmed mean and winsorised variance (Tukey and McLaughlin, 1963).

    Args:
        values: one of each launch, or of each earlier run.
        predicts: whether one more value is held to them, rather than their mean to something else.

    Example:
        >>> found = group([0.10, 0.12, 0.11])
        >>> round(found.mean, 2), round(found.variance, 6), found.freedom
        (0.11, 0.0001, 2)
    """
    count, cut = len(values), int(len(values) * TRIM)
    middle = sorted(values[i] for i in kept(values))
    if count < 2:
        return Group(statistics.fmean(middle or [0.0]), math.inf, 0, 1.0, count)
    winsorised = [middle[0]] * cut + middle + [middle[-1]] * cut
    variance = statistics.variance(winsorised) / (1 - 2 * cut / count) ** 2
    # One degree of freedom fewer than Tukey and McLaughlin give: theirs raise 1.4 false alarms instead of one with eight launches.
    return Group(statistics.fmean(middle), max(variance, LEAST_VARIANCE), len(middle) - 1 - (cut > 0), 1 / count + predicts, count)


def of_mean(launches: Sequence[float], **bounds: float) -> Contrast:
    """Whether the mean of log ratios over launches is zero; ``bounds`` are floor and limit."""
    found = group(launches)
    return Contrast(found.mean, (found,), **bounds)


def of_change(old: Sequence[float], new: Sequence[float], **bounds: float) -> Contrast:
    """Whether two sets of launches, measured at different times, have the same mean."""
    before, now = group(old), group(new)
    return Contrast(now.mean - before.mean, (now, before), **bounds)


def of_latest(history: Sequence[float], latest: float, **bounds: float) -> Contrast:
    """Whether one run's time in seconds is one of those of earlier runs: the error bar is the spread between runs, not within one."""
    runs = group([math.log(x) for x in history], predicts=True)
    return Contrast(math.log(latest) - runs.mean if history else 0.0, (runs,), **bounds)


def differences(families: Sequence[Sequence[Contrast]], looks: int = 1) -> list[list[Difference]]:
    """Everything that was compared in one run, tested together.

    Each family is one quantity over many cases; its variances are moderated over the cases (``moderated``), the p-values of all families
    are corrected for how many there are (Benjamini and Hochberg, 1995: where nothing has changed, any is called changed once in a hundred
    runs) and for how often the growing data is looked at (Bonferroni).

    Example:
        >>> ((slower, same),) = differences([[of_mean([0.10, 0.11, 0.09]), of_mean([0.001, -0.001, 0.0])]])
        >>> slower.text, round(slower.percent), same.text
        ('slower', 11, 'no change')
    """
    import numpy as np
    from scipy import stats

    tested = [[c for c in family if min(g.count for g in c.groups) >= ENOUGH] for family in families]
    hypotheses = sum(map(len, tested))
    errors = [_errors(family) for family in tested]
    raw = [2 * stats.t.sf([abs(c.effect) for c in family] / e, f) for family, (e, f) in zip(tested, errors, strict=True) if family]
    adjusted = iter(np.minimum(1.0, looks * stats.false_discovery_control(np.concatenate(raw))) if hypotheses else ())
    found = []
    for family, (error, freedom) in zip(families, errors, strict=True):
        half = iter(stats.t.isf(0.025 / looks, freedom) * error)
        needed = iter(stats.t.isf(ALPHA / looks / max(hypotheses, 1) / 2, freedom) * error)
        beyond = iter(stats.t.isf(1 - POWER, freedom) * error)
        row = []
        for c in family:
            if min(g.count for g in c.groups) < ENOUGH:
                row.append(Difference(c.effect, -math.inf, math.inf, 1.0, c.launches, c.floor, c.limit))
                continue
            h, smallest = float(next(half)), max(float(next(needed)), c.floor, MIN_EFFECT) + float(next(beyond))
            row.append(Difference(c.effect, c.effect - h, c.effect + h, float(next(adjusted)), c.launches, c.floor, c.limit, smallest))
        found.append(row)
    return found


def _errors(family: Sequence[Contrast]) -> tuple[Any, Any]:
    """Standard errors and degrees of freedom, those of several groups after Welch and Satterthwaite."""
    import numpy as np

    total = spread = np.zeros(len(family))
    for groups in zip(*(c.groups for c in family), strict=True):
        variance, freedom = moderated([g.variance for g in groups], [g.freedom for g in groups])
        part = variance * np.array([g.weight for g in groups])
        total, spread = total + part, spread + part**2 / freedom
    with np.errstate(divide="ignore"):
        return np.sqrt(total), total**2 / spread


def moderated(variances: Sequence[float], freedoms: Sequence[float]) -> tuple[Any, Any]:
    """Variances of many cases that tell about each other: a few launches of one case say little about its own.

    Empirical Bayes as in limma (Smyth, 2004): the variances are taken as drawn from a scaled inverse chi-squared distribution, whose
    degrees of freedom, found from how much they differ, are added to each one's own, up to those of all together. Unlike there a variance is
    only ever raised, and one that is larger than the others make likely stands alone: lowering one that is large because of a single spoiled
    launch would make a change of it. Fewer than three variances stay as they are.

    Example:
        >>> variance, freedom = moderated([1.0, 1.1, 0.9, 1.0], [7, 7, 7, 7])
        >>> [round(float(x), 2) for x in variance], float(freedom[0])
        ([1.16, 1.16, 1.16, 1.16], 28.0)
    """
    import numpy as np
    from scipy import optimize, special

    own, freedom = np.asarray(variances, float), np.asarray(freedoms, float)
    if len(own) < 3:
        return own, freedom
    logs = np.log(own) - special.digamma(freedom / 2) + np.log(freedom / 2)
    excess = float(logs.var(ddof=1) - special.polygamma(1, freedom / 2).mean())
    if excess <= 1e-6:  # they differ by no more than chance
        shared, together = np.full(len(own), np.exp(logs.mean())), np.full(len(own), freedom.sum())
    else:
        prior = 2 * optimize.brentq(lambda x: float(special.polygamma(1, x)) - excess, 1e-4, 1e7)
        center = np.exp(logs.mean() + special.digamma(prior / 2) - np.log(prior / 2))
        shared, together = (prior * center + freedom * own) / (prior + freedom), np.minimum(prior + freedom, freedom.sum())
    return np.maximum(own, shared), np.where(own > shared, freedom, together)


def looks(launches: int, most: int) -> list[int]:
    """After how many launches the data is looked at: doubled until the budget is spent.

    Example:
        >>> looks(8, 24), looks(8, 8)
        ([8, 16, 24], [8])
    """
    doubled = itertools.takewhile(lambda n: n < most, (launches * 2**i for i in itertools.count()))
    return [*doubled, most]


def until_decided(
    names: Sequence[str], numbers: Sequence[int], measure: Callable[[list[str], int], None], judge: Callable[[], Mapping[str, str]]
) -> None:
    """Measures everything up to the first number of launches, and to each later one only what is still undecided.

    Args:
        names: of the cases.
        numbers: see ``looks``; the p-values must allow for how many there are.
        measure: takes cases to a number of launches.
        judge: the verdict on each case so far.
    """
    pending = list(names)
    for number in numbers:
        measure(pending, number)
        verdicts = judge()
        pending = [name for name in names if verdicts.get(name) == UNDECIDED]
        if not pending:
            return


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
