"""One case measured: every provider checked against float64, timed in turns with the others, and checked again."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from fused_attn_bench import planted, timers
from fused_attn_bench.case import Case
from fused_attn_bench.environment import telemetry
from fused_attn_bench.judge import Judge, Verdict
from fused_attn_bench.measure import free_bytes, peak_bytes, repeats_for, turns
from fused_attn_bench.operation import operation, problem_of
from fused_attn_bench.problem import DeclarationError, Problem, Refusal
from fused_attn_bench.quiet import Watch, disturbed, marked
from fused_attn_bench.results import Result
from fused_attn_bench.roofs import Roofs
from fused_attn_bench.text import first_line, line_of
from fused_attn_bench.timers import Sample

# Seconds that a provider runs before it is timed: clocks rise, allocators and caches fill.
WARM_UP = 0.05
# Samples before their quartiles say how precise the median is.
ENOUGH = 10


@dataclass(frozen=True)
class Setup:
    """How to measure.

    Args:
        device: where.
        seconds: of timing per case, for all providers together.
        rounds: at least so many samples of each; even, since two rounds make one A B B A block.
        sample: seconds that one sample should last; short calls are repeated within it.
        timer: a name in ``timers.TIMERS``.
        cold: whether a GPU's L2 cache is flushed before each call.
        precision: timing ends early once the standard error of every median is below this fraction of it; 0 for never.
        again: so many times a case is measured anew while its times are disturbed; the least disturbed ones are kept.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = 2.0
    rounds: int = 6
    sample: float = 0.005
    timer: str = "auto"
    cold: bool = True
    precision: float = 0.0
    again: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.rounds % 2:
            raise ValueError(f"rounds must be even and at least 2, to make A B B A blocks; got {self.rounds}")
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds must be a time that is not negative; got {self.seconds}")


@dataclass(frozen=True)
class About:
    """What is known of a provider's answer before it is timed.

    Args:
        verdict: whether it is right.
        peak: bytes of tensors alive at once beyond the inputs.
        backend, config: what ran, where the operation can observe it.
        outputs: bytes that it gives out.
        metrics: the operation's own figures.
    """

    verdict: Verdict
    peak: int
    backend: str = ""
    config: str = ""
    outputs: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


class Contestant(Protocol):
    """One provider on one case, in this process or in another."""

    def prepare(self) -> About:
        """The first calls: what ran, whether it is right, its memory, and warm-up."""

    def sample(self) -> Sample:
        """One sample of its time."""

    def check(self) -> Verdict:
        """Whether it is still right."""


@dataclass(eq=False)
class Local:
    """A provider in this process.

    Raises:
        Refusal: it cannot compute the case.
    """

    provider: str
    problem: Problem
    judge: Judge
    setup: Setup
    repeats: int = 1

    def __post_init__(self) -> None:
        self.timer = timers.make(self.setup.timer, self.setup.device, self.setup.cold)

    def prepare(self) -> About:
        with self.problem.kept() as written:
            with self.problem.operation.observe() as ran:
                self.call = planted.bind(self.provider, self.problem)
                self.call()
            results, peak = peak_bytes(self.call, self.setup.device)
            verdict = self.judge(results)
            # A result of the wrong kind may have no metrics.
            metrics = {} if verdict.broken else self.problem.metrics(results)
            outputs = sum(t.nbytes for t in results.values())
            del results
            end = time.perf_counter() + WARM_UP
            once = [self.timer(self.call, 1).seconds]
            while time.perf_counter() < end:
                once.append(self.timer(self.call, 1).seconds)
        self.repeats = repeats_for(self.setup.sample, min(once))
        backends = [name for name in ran if "=" not in name]
        configs = [name for name in ran if "=" in name]
        return About(_untouched(verdict, written), peak, _once(backends), _once(configs), outputs, metrics)

    def sample(self) -> Sample:
        before = self.problem.versions
        taken = self.timer(self.call, self.repeats)._replace(telemetry=telemetry(self.setup.device))
        if self.problem.versions != before:
            raise RuntimeError("it wrote into its inputs")
        return taken

    def check(self) -> Verdict:
        self.problem.restore()
        with self.problem.kept() as written:
            verdict = self.judge(self.call())
        return _untouched(verdict, written)


def _once(names: Sequence[str]) -> str:
    return " ".join(dict.fromkeys(names))


def _untouched(verdict: Verdict, written: Sequence[str]) -> Verdict:
    """Who writes into what others are given is wrong, whatever it returns."""
    return replace(verdict, broken=tuple(written), reason=f"writes into its inputs: {', '.join(written)}") if written else verdict


def measure(case: Case, providers: Sequence[str], setup: Setup, roofs: Roofs | None = None) -> list[Result]:
    """One result per provider, in their order.

    Raises:
        DeclarationError: the operation is not declared as it must be.
    """
    try:
        problem = problem_of(case, setup.device)
        lacking = shortage(problem)
        judged = None if lacking else problem.judge()
    except (DeclarationError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a reference raises, the other cases are measured
        lacking, judged = first_line(error), None
    if judged is None:
        return [Result(case.name, name, "failed", lacking) for name in providers]
    makers = {name: lambda name=name: Local(name, problem, judged, setup) for name in providers}
    tries: list[list[Result]] = []
    while not tries or (len(tries) <= setup.again and disturbed(tries[-1])):
        watch = Watch()
        tries.append(marked(contest(case, makers, setup), watch.activity()))
    results = min(tries, key=disturbed)
    return [replace(r, flops=problem.flops, bytes=problem.bytes, roofs=roofs or ()) for r in results]


def contest(case: Case, makers: Mapping[str, Callable[[], Contestant]], setup: Setup) -> list[Result]:
    """Contestants against each other: only those that are right are timed, and only those that are right afterwards keep their times."""
    results: dict[str, Result] = {}
    running: dict[str, Contestant] = {}
    refusals: tuple[type[BaseException], ...] = (Refusal, *operation(case.op).refusals)
    for name, make in makers.items():
        try:
            contestant = make()
            about = contestant.prepare()
        except (DeclarationError, KeyboardInterrupt):
            raise
        except refusals as refusal:
            results[name] = Result(case.name, name, "refused", line_of(refusal) or "no reason given")
            continue
        except BaseException as error:  # a provider may raise anything; the others are measured
            results[name] = Result(case.name, name, "failed", first_line(error))
            continue
        verdict = about.verdict
        known = Result(
            case.name,
            name,
            backend=about.backend,
            config=about.config,
            plain_error=_number(verdict.plain_error),
            peak=about.peak,
            outputs=about.outputs,
            metrics=dict(about.metrics),
        )
        results[name] = _judged(known, verdict, "before timing")
        if results[name].status == "ok":
            running[name] = contestant
    taken, failed = _take_turns(running, setup)
    for name, reason in failed.items():
        results[name] = replace(results[name], status="failed", reason=f"while timed: {reason}")
        del running[name]
    taken, note = _unthrottled(taken, setup.rounds)
    for name, contestant in running.items():
        samples = taken[name]
        timed = replace(
            results[name],
            reason=note,
            samples=tuple(s.seconds for s in samples),
            host=tuple(s.host for s in samples if s.host is not None),
            telemetry=tuple(s.telemetry for s in samples),
            faults=_middle([s.faults for s in samples if s.faults is not None]),
        )
        try:
            results[name] = _judged(timed, contestant.check(), "after timing")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            results[name] = _untimed(timed, "failed", f"after timing: {first_line(error)}")
    return [results[name] for name in makers]


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


class _Stopped(Exception):
    """A contestant failed while it was timed."""


def _take_turns(running: Mapping[str, Contestant], setup: Setup) -> tuple[dict[str, list[Sample]], dict[str, str]]:
    """The samples of those that did not fail, and why the others did; after a failure the rest begin anew, so that all have the same rounds."""
    failed: dict[str, str] = {}

    def guarded(name: str) -> Sample:
        try:
            return running[name].sample()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failed[name] = first_line(error)
            raise _Stopped from error

    while True:
        samplers = {name: functools.partial(guarded, name) for name in running if name not in failed}
        try:
            return turns(samplers, setup.seconds, setup.rounds, functools.partial(_precise, precision=setup.precision)), failed
        except _Stopped:
            continue


def _precise(taken: Mapping[str, Sequence[Sample]], precision: float) -> bool:
    """Whether every median is known to that fraction of it, as far as the spread of its samples says."""
    return precision > 0 and all(_error([s.seconds for s in samples]) < precision for samples in taken.values())


def _error(samples: Sequence[float]) -> float:
    """Standard error of the median over the median, from the quartiles: 1.2533 sigma / sqrt(n), where sigma is their distance / 1.349."""
    if len(samples) < ENOUGH:
        return math.inf
    low, middle, high = statistics.quantiles(samples, n=4)
    return 1.2533 * (high - low) / 1.349 / math.sqrt(len(samples)) / middle


def _judged(result: Result, verdict: Verdict, when: str) -> Result:
    """A wrong result has no speed."""
    if not verdict.broken:
        return replace(result, error=_number(verdict.error), reason="; ".join(filter(None, (result.reason, verdict.reason))))
    reason = verdict.reason or f"error {verdict.error:.1e} breaks the error rule in {', '.join(verdict.broken)}"
    return _untimed(replace(result, error=_number(verdict.error)), "wrong", f"{when}: {reason}")


def _untimed(result: Result, status: str, reason: str) -> Result:
    return replace(result, status=status, reason=reason, samples=(), host=(), telemetry=())


def _number(value: float) -> float | None:
    """None for what is no number, which JSON has no word for."""
    return value if math.isfinite(value) else None


def _unthrottled(taken: dict[str, list[Sample]], floor: int) -> tuple[dict[str, list[Sample]], str]:
    """Whole A B B A blocks without a throttled sample; all of them, and a note, where fewer than ``floor`` rounds would be left."""
    rounds = min(map(len, taken.values()), default=0)
    blocks = [range(i, i + 2) for i in range(0, rounds - 1, 2)]
    good = [i for b in blocks if not any(s[i].telemetry.get("throttled") for i in b for s in taken.values()) for i in b]
    every = [i for b in blocks for i in b]
    note = "" if len(good) >= min(floor, len(every)) else "the GPU throttled through most of the run"
    return {name: [s[i] for i in (every if note else good)] for name, s in taken.items()}, note


def shortage(problem: Problem) -> str:
    """Why the exact result cannot be computed here; empty when it fits."""
    needed, free = problem.needed, free_bytes(problem.device)
    return "" if needed < 0.8 * free else f"the check needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
