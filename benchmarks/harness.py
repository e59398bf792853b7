"""One case measured: every provider checked against float64, timed in turns with the others, and checked again."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from benchmarks import timers
from benchmarks.cases import Case, Problem
from benchmarks.environment import telemetry
from benchmarks.providers import Refusal, bind, observed
from benchmarks.results import Result
from benchmarks.roofs import Roofs
from benchmarks.timers import Sample
from fused_attn import UnsupportedError
from fused_attn.testing.measure import free_bytes, peak_bytes, repeats_for, turns
from fused_attn.testing.workload import Judge, Verdict

# Seconds that a provider runs before it is timed: clocks rise, allocators and caches fill.
WARM_UP = 0.05


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
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = 2.0
    rounds: int = 6
    sample: float = 0.005
    timer: str = "auto"
    cold: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.rounds % 2:
            raise ValueError(f"rounds must be even and at least 2, to make A B B A blocks; got {self.rounds}")


@dataclass(frozen=True)
class About:
    """What is known of a provider's answer before it is timed; ``outputs`` are the bytes that it gives out."""

    verdict: Verdict
    peak: int
    backend: str
    config: str
    outputs: int = 0


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
        with observed() as ran:
            self.call = bind(self.provider, self.problem)
            self.call()
        results, peak = peak_bytes(self.call, self.setup.device)
        end = time.perf_counter() + WARM_UP
        once = [self.timer(self.call, 1).seconds]
        while time.perf_counter() < end:
            once.append(self.timer(self.call, 1).seconds)
        self.repeats = repeats_for(self.setup.sample, min(once))
        return About(self.judge(results), peak, *_ran(ran), sum(t.nbytes for t in results.values()))

    def sample(self) -> Sample:
        return self.timer(self.call, self.repeats)._replace(telemetry=telemetry(self.setup.device))

    def check(self) -> Verdict:
        return self.judge(self.call())


def _ran(observed: Sequence[str]) -> tuple[str, str]:
    backends = [name for name in observed if "=" not in name]
    return " ".join(dict.fromkeys(backends)), " ".join(dict.fromkeys(name for name in observed if "=" in name))


def judge(problem: Problem) -> Judge:
    """Holds results to the error rule: twice the error of plain torch at the same dtype, and rounding."""
    return Judge(problem.reference(torch.float64), problem.reference(getattr(torch, problem.case.dtype)), sum(problem.case.shape[2:]))


def measure(case: Case, providers: Sequence[str], setup: Setup, roofs: Roofs | None = None) -> list[Result]:
    """One result per provider, in their order."""
    try:
        problem = Problem(case, setup.device)
        lacking = shortage(problem)
        judged = None if lacking else judge(problem)
    except RuntimeError as error:
        lacking, judged = _first_line(error), None
    if judged is None:
        return [Result(case.name, name, "failed", lacking) for name in providers]
    makers = {name: lambda name=name: Local(name, problem, judged, setup) for name in providers}
    results = contest(case, makers, setup)
    return [replace(result, flops=problem.flops, bytes=problem.bytes, roofs=roofs or ()) for result in results]


def contest(case: Case, makers: Mapping[str, Callable[[], Contestant]], setup: Setup) -> list[Result]:
    """Contestants against each other: only those that are right are timed, and only those that are right afterwards keep their times."""
    results: dict[str, Result] = {}
    running: dict[str, Contestant] = {}
    for name, make in makers.items():
        try:
            contestant = make()
            about = contestant.prepare()
        except (Refusal, UnsupportedError) as refusal:
            results[name] = Result(case.name, name, "refused", str(refusal))
            continue
        except (RuntimeError, NotImplementedError) as error:
            results[name] = Result(case.name, name, "failed", _first_line(error))
            continue
        verdict = about.verdict
        known = Result(
            case.name, name, "ok", "", about.backend, about.config, verdict.error, verdict.plain_error, about.peak, about.outputs
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
        results[name] = _judged(timed, contestant.check(), "after timing")
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
        except RuntimeError as error:
            failed[name] = _first_line(error)
            raise _Stopped from error

    while True:
        samplers = {name: functools.partial(guarded, name) for name in running if name not in failed}
        try:
            return turns(samplers, setup.seconds, setup.rounds), failed
        except _Stopped:
            continue


def _judged(result: Result, verdict: Verdict, when: str) -> Result:
    """A wrong result has no speed."""
    if not verdict.broken:
        return result
    reason = f"{when}: error {verdict.error:.1e} breaks the error rule in {', '.join(verdict.broken)}"
    return replace(result, status="wrong", reason=reason, error=verdict.error, samples=(), host=(), telemetry=())


def _unthrottled(taken: dict[str, list[Sample]], floor: int) -> tuple[dict[str, list[Sample]], str]:
    """Whole A B B A blocks without a throttled sample; all of them, and a note, where fewer than ``floor`` rounds would be left."""
    rounds = min(map(len, taken.values()), default=0)
    blocks = [range(i, i + 2) for i in range(0, rounds - 1, 2)]
    good = [i for b in blocks if not any(s[i].telemetry.get("throttled") for i in b for s in taken.values()) for i in b]
    every = [i for b in blocks for i in b]
    note = "" if len(good) >= min(floor, len(every)) else "the GPU throttled through most of the run"
    return {name: [s[i] for i in (every if note else good)] for name, s in taken.items()}, note


def shortage(problem: Problem) -> str:
    """Why the exact result cannot be computed here: one head's scores in float64, or what a variant holds instead, six at a time; empty when they fit."""
    _, _, q_len, kv_len = problem.grid.shape
    held = sum(t.numel() for t in problem.leaves.values()) + len(problem.output_shapes) * q_len * kv_len
    needed, free = 8 * (6 * problem.held * q_len * kv_len + 4 * held), free_bytes(problem.device)
    return "" if needed < 0.8 * free else f"the check needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
