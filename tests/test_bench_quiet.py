"""A machine that is not quiet: disturbed cases are measured again, and what stays disturbed is marked wherever it is shown."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from benchmarks import providers as _declared  # noqa: F401  (the operations that cases are of)
from fused_attn_bench import harness, measure, quiet, roofs, tables
from fused_attn_bench.busy import neighbours
from fused_attn_bench.case import Case
from fused_attn_bench.commands import run
from fused_attn_bench.harness import Setup
from fused_attn_bench.quiet import Activity, Watch, disturbed, doubts, marked
from fused_attn_bench.results import Result
from fused_attn_bench.roofs import Roofs
from fused_attn_bench.timers import Sample

CASE = Case.parse("softmax/plain/fwd/float32/1x1x4x8")
SOON = Setup(seconds=0.0, rounds=2, sample=0.0)
QUIET = Activity()


def result(times: tuple[float, ...] = (1.0, 1.01, 0.99, 1.0), **more: Any) -> Result:
    return Result(CASE.name, "eager", samples=times, **more)


def clocks(*values: int) -> tuple[dict[str, Any], ...]:
    return tuple({"sm_mhz": value} for value in values)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("given", "activity", "marks"),
    [
        (result(), QUIET, ()),
        (result(), Activity(0.2, 0.04), ()),
        (result((1.0, 2.0, 1.0, 2.0)), QUIET, ("times spread by more than ± 20%",)),
        (result(), Activity(1.26, 0.0), ("other processes used 1.3 cores",)),
        (result(), Activity(0.0, 0.3), ("the hypervisor took 30% of the time",)),
        (result(telemetry=clocks(1980, 1980, 1965, 1980)), QUIET, ()),
        (result(telemetry=clocks(1980, 1500, 1965, 1980)), QUIET, ("the clock was not locked: it moved by more than 3%",)),
        (result(telemetry=({"throttled": ["SwPowerCap"]}, {"throttled": []})), QUIET, ("the GPU throttled (SwPowerCap)",)),
        (Result(CASE.name, "x", "refused", "no"), Activity(2.0, 0.5), ()),
    ],
)
def test_marks(given: Result, activity: Activity, marks: tuple[str, ...]) -> None:
    assert tuple(doubts(marked([given], activity)[0])) == marks


@pytest.mark.quick
def test_a_roof_that_is_passed_is_a_doubt() -> None:
    below = result(bytes=10**9, roofs=(1.1e9, 1e12))
    assert doubts(below) == [] and doubts(result(bytes=10**9, roofs=(0.9e9, 1e12))) == ["faster than the measured roofs allow"]


@pytest.mark.quick
def test_doubtful_times_are_shown_as_such_and_said_why() -> None:
    quiet_one, loud = result(), marked([result((1.0, 2.0, 1.0, 2.0))], Activity(1.0, 0.0))[0]
    assert "?" not in tables.results([quiet_one])
    shown = tables.results([quiet_one, loud])
    assert "? 1.50 s" in shown and " 1.00 s" in shown
    assert f"? times spread by more than ± 20% ({CASE.name})" in shown and "? other processes used 1.0 cores" in shown
    assert "measure again when the machine is quiet" in shown


@pytest.fixture
def activities(monkeypatch: pytest.MonkeyPatch) -> list[Activity]:
    """What the machine does beside, measurement by measurement."""
    coming: list[Activity] = []
    monkeypatch.setattr(harness, "WARM_UP", 0.0)
    monkeypatch.setattr(Watch, "activity", lambda self: coming.pop(0))
    # Real times of such a small case are noise themselves.
    monkeypatch.setattr(quiet, "MOST_SPREAD", 1e9)
    return coming


@pytest.mark.quick
def test_a_disturbed_case_is_measured_again_and_the_best_kept(activities: list[Activity]) -> None:
    activities += [Activity(2.0, 0.5), Activity(1.0, 0.0), Activity(3.0, 0.2)]
    (kept,) = harness.measure(CASE, ["eager"], Setup(seconds=0.0, rounds=2, sample=0.0, again=2))
    assert kept.marks == ("other processes used 1.0 cores",) and activities == []


@pytest.mark.quick
def test_a_quiet_case_is_measured_once(activities: list[Activity]) -> None:
    activities += [QUIET, Activity(1.0, 0.0)]
    (kept,) = harness.measure(CASE, ["eager"], Setup(seconds=0.0, rounds=2, sample=0.0, again=5))
    assert kept.marks == () and len(activities) == 1 and disturbed([kept]) == 0


@pytest.mark.quick
def test_roofs_are_measured_again_when_something_passes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first roof was measured beside something else: nothing may stay above 100 % because of that."""
    monkeypatch.setattr(harness, "WARM_UP", 0.0)
    found: Iterator[Roofs] = iter([Roofs(1e-3, 1e-3), Roofs(1e30, 1e30)])
    monkeypatch.setattr(roofs, "measure", lambda *args, **more: next(found))
    ((kept,),) = run.measured([CASE], [["eager"]], SOON, {})
    assert kept.roofs == (1e30, 1e30) and "faster than the measured roofs allow" not in doubts(kept)


def test_what_a_run_starts_is_no_disturbance() -> None:
    """However little a loaded machine gives the child: what it uses is counted as the run's own."""
    pytest.importorskip("psutil")
    with neighbours(1):
        _, own, _ = quiet._processor_times()  # type: ignore[misc]
        end = time.perf_counter() + 20
        while quiet._processor_times()[1] - own < 0.2:  # type: ignore[index]
            assert time.perf_counter() < end, "a busy child's time is this process's own"
            time.sleep(0.05)


@pytest.mark.quick
def test_activity_is_the_system_s_without_one_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(10.0, 4.0, 1.0), (13.0, 5.0, 1.4)])
    monkeypatch.setattr(quiet, "_processor_times", lambda: next(times))
    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr(quiet.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(quiet, "_cores", lambda: 2)
    found = Watch().activity()
    assert found.cores == pytest.approx(1.0), "3 s of the system, 1 s of it ours, in 2 s"
    assert found.stolen == pytest.approx(0.1)


@pytest.mark.quick
def test_timing_ends_once_it_is_precise() -> None:
    chance = random.Random(0)

    def taken(spread: float, precision: float) -> int:
        samplers = {name: lambda: Sample(1.0 + chance.gauss(0, spread)) for name in "AB"}

        def enough(seen: Mapping[str, list[Sample]]) -> bool:
            return harness._precise(seen, precision)

        return len(measure.turns(samplers, 0.3, 6, enough)["A"])

    steady, noisy = taken(0.001, 0.005), taken(0.05, 0.005)
    assert steady == harness.ENOUGH and noisy > 100
    assert taken(0.0, 0.0) > 100, "0 is never"


@pytest.mark.quick
def test_the_error_of_a_median() -> None:
    """Against what medians of so many normal values really scatter by."""
    chance = random.Random(0)
    samples = [[1 + chance.gauss(0, 0.02) for _ in range(40)] for _ in range(400)]
    medians = [sorted(s)[20] for s in samples]
    real = torch.tensor(medians).std().item()
    said = sorted(harness._error(s) for s in samples)[200]
    assert 0.8 < said / real < 1.25
