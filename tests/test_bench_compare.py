"""Verdicts: identical code is "no change", planted changes are found, and commits are measured by one and the same code."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.power import EXPERIMENTS, Tally
from fused_attn_bench import codes, compare, tables
from fused_attn_bench.case import Case
from fused_attn_bench.compare import Comparison, Plan
from fused_attn_bench.harness import About, Contestant, Setup
from fused_attn_bench.judge import Verdict
from fused_attn_bench.limits import Limits, Rules
from fused_attn_bench.results import Result
from fused_attn_bench.sides import Providers
from fused_attn_bench.significance import FASTER, SAME, SLOWER, UNDECIDED, Difference
from fused_attn_bench.timers import Sample

CASES = [Case.parse(f"attention/plain/fwd/float32/1x1x{n}x8") for n in (8, 16, 32)]
SOON = Setup(seconds=0.0, rounds=6, sample=0.0)


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how fast anything is."""
    monkeypatch.setattr("fused_attn_bench.harness.WARM_UP", 0.0)


@dataclass(frozen=True)
class Planted:
    """What B is worse in: a fraction of the time, bytes, seconds of host time (None: no host time), the factor of its error."""

    slower: float = 0.0
    bytes: int = 0
    host: float | None = None
    error: float = 1.0


class Noisy:
    """A contestant on a machine that drifts, has a place in memory per launch, and is disturbed now and then."""

    def __init__(self, random: random.Random, clock: list[float], planted: Planted, place: float) -> None:
        self.random, self.clock, self.planted = random, clock, planted
        self.factor, self.start = (1 + planted.slower) * math.exp(random.gauss(0, place)), random.gauss(0, 1e-6)
        self.verdict = Verdict(1e-7 * planted.error, 1e-7, ())

    def prepare(self) -> About:
        return About(self.verdict, 2**20 + self.planted.bytes, "", "")

    def check(self) -> Verdict:
        return self.verdict

    def sample(self) -> Sample:
        self.clock[0] += self.random.gauss(0, 0.02)
        disturbed = 1.5 if self.random.random() < 0.05 else 1.0
        host = None if self.planted.host is None else 3e-5 + self.start + self.planted.host + self.random.gauss(0, 1e-6)
        return Sample(1e-3 * self.factor * math.exp(self.clock[0] + self.random.gauss(0, 0.01)) * disturbed, host)


class Machine:
    """Sides on a simulated machine: the times are drawn, everything else is the real thing."""

    labels = calibrations = ("A", "B")

    def __init__(self, seed: int, planted: Planted, place: float = 0.004) -> None:
        self.random, self.place, self.launches = random.Random(seed), place, 0
        self.sides = (Planted(host=None if planted.host is None else 0.0), planted)

    @contextmanager
    def launch(self) -> Iterator[Callable[[Case, int], Contestant]]:
        clock, self.launches = [0.0], self.launches + 1
        yield lambda case, side: Noisy(self.random, clock, self.sides[side], self.place)


PLAN = Plan(8, 8)


def compared(planted: Planted, times: int, place: float = 0.004, plan: Plan = PLAN) -> list[Comparison]:
    return [c for seed in range(times) for c in compare.compare(Machine(seed, planted, place), CASES, replace(SOON, rounds=30), plan)]


def verdicts(slower: float, times: int, place: float = 0.004) -> list[str]:
    return [c.verdict for c in compared(Planted(slower), times, place)]


@pytest.mark.quick
@pytest.mark.parametrize("place", [0.0, 0.004, 0.03], ids=["calm", "usual", "placed"])
def test_identical_code_is_no_change(place: float) -> None:
    """Also where launches differ by more than what the spread within one shows: that spread would be the wrong error bar."""
    found = verdicts(0.0, 120, place)
    runs = [set(found[i : i + len(CASES)]) for i in range(0, len(found), len(CASES))]
    assert sum(bool(run & {SLOWER, FASTER}) for run in runs) <= 4, "one run in a hundred; five of 120 are a chance of 1 %"
    assert found.count(SAME) >= (0.99 if place < 0.01 else 0.0) * len(found)


@pytest.mark.quick
@pytest.mark.parametrize(("slower", "least"), [(0.03, 0.7), (0.05, 0.95), (0.10, 1.0)])
def test_planted_changes_are_found(slower: float, least: float) -> None:
    found = verdicts(slower, 30)
    assert found.count(SLOWER) >= least * len(found) and FASTER not in found


@pytest.mark.quick
def test_a_speed_up_is_reported_as_one() -> None:
    found = verdicts(-0.10, 20)
    assert found.count(FASTER) == len(found)


@pytest.mark.quick
def test_who_begins_alternates_and_launches_are_shared_out() -> None:
    order: list[str] = []

    class Logged(Machine):
        @contextmanager
        def launch(self) -> Iterator[Callable[[Case, int], Contestant]]:
            with super().launch() as make:

                def logged(case: Case, side: int) -> Contestant:
                    order.append("AB"[side])
                    return make(case, side)

                yield logged

    told: list[str] = []
    done = compare.compare(Logged(0, Planted()), CASES[:1], SOON, Plan(4, 4), told.append)
    assert "".join(order) == "ABBAABBA" and len(told) == 4 and "launch 4 of 4" in told[-1]
    assert done[0].a.provider == "A" and done[0].b.provider == "B" and done[0].difference is not None and done[0].difference.launches == 4
    with pytest.raises(ValueError, match="at least one launch"):
        Plan(0, 8)
    with pytest.raises(ValueError, match="no more than the most launches; got 8 and 4"):
        Plan(8, 4)


@pytest.mark.quick
def test_undecided_cases_get_more_launches() -> None:
    """Launches that differ by 6 %: eight of them cannot tell, more can; on a calm machine none is added."""
    calm, placed = Machine(0, Planted(), 0.002), Machine(1, Planted(), 0.06)
    compare.compare(calm, CASES, replace(SOON, rounds=30), Plan(8, 64))
    first = compare.compare(Machine(1, Planted(), 0.06), CASES, replace(SOON, rounds=30), Plan(8, 8))
    rules = Rules(Limits(time=0.08), ((CASES[0].name, {"time": 0.5}),))
    last = compare.compare(placed, CASES, replace(SOON, rounds=6), Plan(8, 64, rules))
    assert calm.launches == 8 and placed.launches > 8
    assert {c.verdict for c in first} == {UNDECIDED} and {c.verdict for c in last} == {SAME}
    assert [c.difference.launches > 8 for c in last if c.difference is not None] == [False, True, True], (
        "only those that are undecided get them"
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    ("planted", "word", "text"),
    [
        (Planted(bytes=32 * 2**20), "heavier", "peak memory 33.0 MiB, was 1.00 MiB: more than 4.00 MiB above"),
        (Planted(host=20e-6), "later", "µs more per call: more than 10.0 µs above"),
        (Planted(error=2.0), "less exact", "error 2.0e-07, was 1.0e-07: more than 1.5 times"),
    ],
    ids=["32 MiB", "20 µs", "error"],
)
def test_what_is_worse_beside_the_time(planted: Planted, word: str, text: str) -> None:
    found = compared(planted, 2)
    assert all(list(c.worse) == [word] and text in c.worse[word] for c in found)
    assert {c.words for c in found} == {f"no change, {word}"} and compare.code(found) == codes.WORSE
    table = tables.comparisons(found[:1])
    assert f"no change, {word}" in table and f"{CASES[0].name}: {word}: " in table.splitlines()[-1]
    generous = Rules(Limits(memory=2.0**26, host=30e-6, error=3.0))
    spared = compared(planted, 2, plan=replace(PLAN, rules=generous))
    assert {c.words for c in spared} == {SAME} and compare.code(spared) == codes.GOOD


@pytest.mark.quick
def test_nothing_is_worse_where_nothing_is_planted() -> None:
    assert all(not c.worse for c in compared(Planted(host=0.0), 60))
    assert all(not c.worse for c in compared(Planted(bytes=2**20, host=5e-6, error=1.2), 10)), "below the limits"


@pytest.mark.quick
def test_the_times_shown_are_what_was_tested() -> None:
    for c in compared(Planted(0.05), 5):
        assert c.difference is not None and c.times[0] is not None and c.times[1] is not None
        assert math.log(c.times[1] / c.times[0]) == pytest.approx(c.difference.effect)
        assert 0.8e-3 < c.times[0] < 1.3e-3


@pytest.mark.quick
def test_interrupting_keeps_what_was_measured() -> None:
    """In the fifth launch of the second case."""
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        if len(told) == 3 * 4 + 2:
            raise KeyboardInterrupt

    with pytest.raises(compare.Interrupted) as stop:
        compare.compare(Machine(0, Planted(0.2)), CASES, replace(SOON, rounds=30), PLAN, tell)
    assert [c.difference and c.difference.launches for c in stop.value.comparisons] == [5, 4, 4]
    assert {c.verdict for c in stop.value.comparisons} == {SLOWER}


OK, SLOW = Result("c", "p"), Difference(math.log(1.04), 0.03, 0.05, 1e-6, 8)
BESIDE = (Result("c", "p", peak=2**20), Result("c", "p", peak=2**26))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("code", "case"),
    [
        (codes.WORSE, Comparison("c", OK, OK, SLOW)),
        (codes.GOOD, Comparison("c", OK, OK, replace(SLOW, limit=0.05))),
        (codes.GOOD, Comparison("c", OK, OK, Difference(-0.04, -0.05, -0.03, 1e-6, 8))),
        (codes.GOOD, Comparison("c", OK, OK, Difference(0.0, -0.01, 0.01, 0.5, 8))),
        (codes.UNDECIDED, Comparison("c", OK, OK, Difference(0.0, -0.05, 0.05, 0.5, 8))),
        (codes.WORSE, Comparison("c", *BESIDE, Difference(0.0, -0.05, 0.05, 0.5, 8))),
        (codes.WORSE, Comparison("c", OK, Result("c", "p", "wrong", "error"))),
        (codes.WORSE, Comparison("c", Result("c", "p", "wrong"), Result("c", "p", "wrong"))),
        (codes.WORSE, Comparison("c", Result("c", "p", "wrong"), OK)),
        (codes.CRASHED, Comparison("c", OK, Result("c", "p", "failed", "no"))),
        (codes.CRASHED, Comparison("c", Result("c", "p@a", "failed"), Result("c", "p@b"))),
        (codes.WORSE, Comparison("c", Result("c", "p@a"), Result("c", "p@b", "refused", "no longer"))),
        (codes.GOOD, Comparison("c", Result("c", "p"), Result("c", "q", "refused", "never could"))),
    ],
    ids=lambda value: value.words if isinstance(value, Comparison) else None,
)
def test_each_case_asks_for_an_exit_code(code: int, case: Comparison) -> None:
    same = Comparison("c", OK, OK, Difference(0.0, -0.01, 0.01, 0.5, 8))
    assert case.code == code and compare.code([same, case]) == code


@pytest.mark.quick
def test_the_worst_case_gives_the_exit_code() -> None:
    undecided = Comparison("c", OK, OK, Difference(0.0, -0.05, 0.05, 0.5, 8))
    failed, slow = Comparison("c", OK, Result("c", "p", "failed")), Comparison("c", OK, OK, SLOW)
    assert compare.code([undecided, failed]) == codes.CRASHED and compare.code([undecided, failed, slow]) == codes.WORSE
    assert compare.code([Comparison("c", OK, Result("c", "q", "refused"))]) == compare.code([]) == codes.UNDECIDED, "nothing was compared"


@pytest.mark.quick
def test_markdown_keeps_text_from_files_apart() -> None:
    evil = Comparison("a|b<img src=x>", Result("c", "p", "failed", "x\ny|z"), Result("c", "<b>", "failed", "no"))
    text = tables.markdown("A <b> | B", {"device": "chip <1>"}, [evil])
    assert "<img" not in text and "<b>" not in text and "a\\|b&lt;img src=x>" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


@pytest.mark.quick
def test_different_backends_are_remarked_on() -> None:
    """As when only one of two commits has its library built: the comparison is one of backends then."""
    same = Comparison("c", Result("c", "p@a", backend="cuda"), Result("c", "p@b", backend="cuda"), Difference(0.0, 0.0, 0.0, 0.5, 8))
    other = replace(same, b=Result("c", "p@b", backend="triton"))
    assert not replace(other, a=Result("c", "eager")).remarks, "two providers are not expected to"
    (remark,) = other.remarks
    assert not same.remarks and remark == "c: p@a ran cuda, p@b triton"
    assert remark in tables.comparisons([same, other]) and remark in tables.markdown("t", {}, [same, other])


@pytest.mark.quick
def test_the_providers_of_a_launch_share_their_tensors() -> None:
    sides = Providers(("eager", "fused_attn"), SOON)
    with sides.launch() as make:
        first, second = make(CASES[0], 0), make(CASES[0], 1)
        assert first.problem is second.problem and first.judge is second.judge  # type: ignore[attr-defined]
    with sides.launch() as make:
        assert make(CASES[0], 0).problem is not first.problem  # type: ignore[attr-defined]


@pytest.mark.quick
def test_power_counts_what_is_right() -> None:
    tally = Tally("t", SLOWER, [SLOWER] * 9 + [SAME], [3.0] * 10)
    assert tally.row() == ("t", "slower", "9 of 10", "90.0%", "55.5 … 99.7%", "+3.0% … +3.0%")
    assert {e.truth for e in EXPERIMENTS} == {SLOWER, FASTER, SAME}
    assert torch.get_num_threads() >= 1
