"""A against B: launch after launch until every case is decided, or a run against earlier ones."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fused_attn_bench import codes
from fused_attn_bench.case import Case
from fused_attn_bench.changes import Series
from fused_attn_bench.harness import Setup, contest
from fused_attn_bench.history import Filter, History
from fused_attn_bench.limits import Limits, Rules
from fused_attn_bench.quiet import Watch, marked
from fused_attn_bench.results import Compared, Result
from fused_attn_bench.sides import Sides
from fused_attn_bench.significance import (
    SLOWER,
    UNCALIBRATED,
    UNDECIDED,
    Difference,
    blocks,
    differences,
    kept,
    looks,
    of_latest,
    of_mean,
    until_decided,
)

Progress = Callable[[str], None]
Pair = tuple[Result, Result]
Launches = dict[Case, list[Pair]]


@dataclass(frozen=True)
class Comparison:
    """B measured against A on one case.

    Args:
        case: its name.
        a, b: the last result of each side; peak memory and error are medians over the launches.
        difference: None where a side has no time.
        times: what was tested, so that their ratio is the effect.
        host: how many seconds later B's calls return; None where that is the time itself.
        limits: what is too much.
    """

    case: str
    a: Result
    b: Result
    difference: Difference | None = None
    times: tuple[float | None, float | None] = (None, None)
    host: Difference | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def verdict(self) -> str:
        """On the time; the status of a side that has none; "right" where only that is known."""
        if self.difference is not None:
            return self.difference.verdict
        return next((r.status for r in (self.b, self.a) if r.status != "ok"), "right")

    @property
    def worse(self) -> dict[str, str]:
        """In what B is worse than A beside its time, and by how much: "heavier", "later", "less exact"."""
        if self.difference is None:
            return {}
        found = {
            "heavier": self.limits.heavier(self.a.peak, self.b.peak),
            "later": self.limits.later(self.host.effect) if self.host is not None and self.host.confirmed else "",
            "less exact": self.limits.less_exact(self.a.error, self.b.error, self.b.plain_error),
        }
        return {word: text for word, text in found.items() if text}

    @property
    def words(self) -> str:
        """The whole verdict."""
        if self.difference is None:
            return f"{self.verdict}: {self.reason}" if self.reason else self.verdict
        return ", ".join((self.difference.text, *self.worse))

    @property
    def reason(self) -> str:
        """Why there is no difference, side by side."""
        return "; ".join(f"{r.provider}: {r.reason}" for r in (self.a, self.b) if r.status != "ok")

    @property
    def remarks(self) -> list[str]:
        """What else is to be known: what B is worse in, what is said of right results, what disturbed, and different backends of one provider, as when only one of two commits has its library built."""
        found = [f"{self.case}: {word}: {text}" for word, text in self.worse.items()]
        found += [f"{self.case}: {reason}" for reason in dict.fromkeys(r.reason for r in (self.a, self.b) if r.status == "ok" and r.reason)]
        marks = dict.fromkeys((*self.a.marks, *self.b.marks))
        if marks:
            said = "not quiet" if self.difference is None or self.difference.trusted else "not quiet, so that no change is believed"
            found.append(f"{self.case}: {said}: {', '.join(marks)}")
        if self._one_provider and self.a.backend != self.b.backend and self.difference is not None:
            found.append(f"{self.case}: {self.a.provider} ran {self.a.backend}, {self.b.provider} {self.b.backend}")
        return found

    @property
    def _one_provider(self) -> bool:
        return self.a.provider.partition("@")[0] == self.b.provider.partition("@")[0]

    @property
    def code(self) -> int:
        """The exit code that it asks for; see ``codes``."""
        statuses = (self.a.status, self.b.status)
        if "failed" in statuses:
            return codes.CRASHED
        if "wrong" in statuses:  # undecided would promise that results were right
            return codes.WORSE
        if self.b.status == "refused":
            return codes.WORSE if self._one_provider and self.a.status == "ok" else codes.GOOD
        if self.difference is None:
            return codes.GOOD if self.a.status == "refused" else codes.UNDECIDED
        if self.worse or (self.verdict == SLOWER and self.difference.effect >= self.difference.limit):
            return codes.WORSE
        return codes.UNDECIDED if self.verdict == UNDECIDED else codes.GOOD

    def kept(self, **stamp: Any) -> Compared:
        """As the history keeps it; ``stamp`` has run, time, timer and environment."""
        d = self.difference
        known: dict[str, Any] = {} if d is None else {"effect": d.effect, "launches": d.launches}
        if d is not None and math.isfinite(d.smallest):
            known |= {"low": d.low, "high": d.high, "p": d.p, "smallest": d.smallest}
        text = "; ".join(filter(None, (self.reason, *self.remarks)))
        return Compared(self.case, self.a.provider, self.b.provider, self.verdict, text, self.times, **known, **stamp)


def code(comparisons: Sequence[Comparison]) -> int:
    """The exit code of a run: the worst of its cases; undecided where nothing could be compared."""
    found = {c.code for c in comparisons}
    if not any(c.difference is not None for c in comparisons):
        found.add(codes.UNDECIDED)
    return next((code for code in (codes.WORSE, codes.CRASHED, codes.UNDECIDED) if code in found), codes.GOOD)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what was measured until then."""

    def __init__(self, comparisons: list[Comparison]) -> None:
        super().__init__()
        self.comparisons = comparisons


@dataclass(frozen=True)
class Plan:
    """How long to measure, and what to hold it to.

    Args:
        launches: fresh starts of both sides, after which is looked for the first time.
        most: launches of a case that stays undecided.
        rules: the limits of each case.
        floor: the noise floor of each case, a log ratio.
    """

    launches: int = 8
    most: int = 24
    rules: Rules = field(default_factory=Rules)
    floor: Callable[[str], float] = lambda case: UNCALIBRATED

    def __post_init__(self) -> None:
        if not 1 <= self.launches <= self.most:
            raise ValueError(f"there must be at least one launch, and no more than the most launches; got {self.launches} and {self.most}")

    @property
    def looks(self) -> list[int]:
        return looks(self.launches, self.most)

    def bounds(self, case: str) -> dict[str, float]:
        """Of an effect on the case: floor and limit, log ratios."""
        return {"floor": self.floor(case), "limit": math.log1p(self.rules(case).time)}


def compare(sides: Sides, cases: Sequence[Case], setup: Setup, plan: Plan, progress: Progress = lambda text: None) -> list[Comparison]:
    """Every case in every launch; who begins alternates. Cases that are undecided after the planned launches get more.

    Args:
        sides: what is compared.
        cases: on what.
        setup: how; its seconds are shared by the planned launches.
        plan: how often, and what to hold it to.
        progress: told of every case before it is measured.

    Raises:
        Interrupted: Ctrl-C; it has what was measured until then.
    """
    return decide(sides, cases, setup, plan, lambda found: judged(found, plan), progress)


def decide(
    sides: Sides, cases: Sequence[Case], setup: Setup, plan: Plan, judge: Callable[[Launches], list[Comparison]], progress: Progress
) -> list[Comparison]:
    """As ``compare``, with another judge of what the launches say."""
    each, found, by_name = replace(setup, seconds=setup.seconds / plan.launches), Launches(), {case.name: case for case in cases}

    def measure(pending: list[str], until: int) -> None:
        for launch in range(until):
            waiting = [c for name in pending if len(found.get(c := by_name[name], ())) <= launch and all(map(timed, found.get(c, ())))]
            if not waiting:
                continue
            with sides.launch() as make:
                for case in waiting:
                    progress(f"{case.name}, launch {launch + 1} of {until}")
                    order = (0, 1) if launch % 2 == 0 else (1, 0)
                    watch = Watch()
                    results = contest(case, {str(side): functools.partial(make, case, side) for side in order}, each)
                    results = marked(results, watch.activity())
                    a, b = (replace(results[order.index(side)], provider=sides.labels[side]) for side in (0, 1))
                    found.setdefault(case, []).append((a, b))

    try:
        until_decided(list(by_name), plan.looks, measure, lambda: {c.case: c.verdict for c in judge(found)})
    except KeyboardInterrupt:
        raise Interrupted(judge(found)) from None
    return judge(found)


def timed(pair: Pair) -> bool:
    """Whether both sides have times."""
    return all(r.status == "ok" for r in pair)


def judged(found: Launches, plan: Plan) -> list[Comparison]:
    """Both sides of each launch against each other."""
    complete = {case: pairs for case, pairs in found.items() if all(map(timed, pairs))}
    ratios = {case: [ratio(pair) for pair in pairs] for case, pairs in complete.items()}
    hosts = {case: [later(pair) for pair in pairs] for case, pairs in complete.items() if all(r.host for pair in pairs for r in pair)}
    times, starts = differences(
        [[of_mean(values, **plan.bounds(case.name)) for case, values in ratios.items()], [of_mean(values) for values in hosts.values()]],
        len(plan.looks),
    )
    by_case, host = dict(zip(ratios, times, strict=True)), dict(zip(hosts, starts, strict=True))
    comparisons = []
    for case, pairs in found.items():
        if case not in by_case:
            comparisons.append(Comparison(case.name, *pairs[-1]))
            continue
        a, b = (typical([pair[side] for pair in pairs]) for side in (0, 1))
        shown = levels(pairs, ratios[case])
        comparisons.append(Comparison(case.name, a, b, by_case[case], shown, host.get(case), plan.rules(case.name)))
    return comparisons


def ratio(pair: Pair) -> float:
    """Log of the ratio of times B / A in one launch."""
    return statistics.median(blocks(pair[0].samples, pair[1].samples))


def later(pair: Pair) -> float:
    """Seconds that B's calls need more until they return."""
    return statistics.median(pair[1].host) - statistics.median(pair[0].host)


def levels(pairs: Sequence[Pair], ratios: Sequence[float]) -> tuple[float, float]:
    """Times of A and B over the launches that the test takes; half of a launch's ratio on each side of its middle."""
    used = kept(ratios)
    middles = [statistics.median([math.log(x * y) / 2 for x, y in zip(a.samples, b.samples, strict=True)]) for a, b in pairs]
    middle, half = (statistics.fmean(values[i] for i in used) for values in (middles, [r / 2 for r in ratios]))
    return math.exp(middle - half), math.exp(middle + half)


def typical(results: Sequence[Result]) -> Result:
    """The last of several, with the medians of peak memory and error; it is marked where more than half are."""
    noticed = [r.marks for r in results if r.marks]
    peaks, errors = [r.peak for r in results if r.peak is not None], [r.error for r in results if r.error is not None]
    return replace(
        results[-1],
        peak=int(statistics.median(peaks)) if peaks else None,
        error=statistics.median(errors) if errors else None,
        marks=noticed[-1] if 2 * len(noticed) > len(results) else (),
    )


def floors(sides: Sides, history: History, machine: tuple[str, ...]) -> Callable[[str], float]:
    """The noise floors that ``calibrate`` found, case by case; the larger of the two sides' counts."""

    def floor(case: str) -> float:
        known = (history.floor(machine, case, name) for name in set(sides.calibrations))
        return max((f for f in known if f is not None), default=UNCALIBRATED)

    return floor


def described(comparisons: Sequence[Comparison], environment: Mapping[str, str]) -> list[Comparison]:
    """The same, with the environment that both sides ran in."""
    return [replace(c, a=replace(c.a, environment=environment), b=replace(c.b, environment=environment)) for c in comparisons]


def with_history(history: History, run: str, rules: Rules | None = None) -> list[Comparison]:
    """A run against those before it on the same machine, case by case and provider by provider."""
    rules, run_results = rules or Rules(), history.results(run)
    first = min((r.time for r in run_results), default="")
    earlier_ones: dict[Series, list[Result]] = {}
    for r in history.results(only=Filter(cases=tuple(dict.fromkeys(r.case for r in run_results)))):
        if r.time < first and r.median is not None:
            earlier_ones.setdefault((r.machine, r.case, r.provider), []).append(r)
    found: list[tuple[Comparison, list[float]]] = []
    for latest in run_results:
        before = earlier_ones.get((latest.machine, latest.case, latest.provider), [])
        if latest.status == "refused" or (latest.median is None and not before):
            continue
        medians = [r.median for r in before if r.median]
        earlier = replace(typical(before) if before else latest, provider=f"{len(before)} earlier runs")
        found.append((Comparison(latest.case, earlier, latest, limits=rules(latest.case)), medians))
    contrasts = {}
    for i, (c, medians) in enumerate(found):
        if c.b.median is not None:
            floor = history.floor(c.b.machine, c.case, c.b.provider)
            bounds = {"floor": UNCALIBRATED if floor is None else floor, "limit": math.log1p(c.limits.time)}
            contrasts[i] = of_latest(medians, c.b.median, **bounds)
    (tested,) = differences([list(contrasts.values())])
    by_place = dict(zip(contrasts, tested, strict=True))
    return [replace(c, difference=by_place.get(i), times=_around(c, by_place.get(i))) for i, (c, _) in enumerate(found)]


def _around(c: Comparison, difference: Difference | None) -> tuple[float | None, float | None]:
    latest = c.b.median
    return (None if latest is None or difference is None else latest / math.exp(difference.effect), latest)
