"""Changes in a history: steps where they are, slow drift, and nothing in noise."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from fused_attn_bench import changes
from fused_attn_bench.changes import DRIFT, STEP, Point
from fused_attn_bench.commands import track
from fused_attn_bench.history import History
from fused_attn_bench.results import Result


def series(seed: int, levels: list[float], noise: float = 0.01, outliers: float = 0.03) -> list[float]:
    chance = random.Random(seed)
    return [level * math.exp(chance.gauss(0, noise)) * (1.3 if chance.random() < outliers else 1.0) for level in levels]


def points(medians: list[float]) -> list[Point]:
    return [Point(f"r{i}", f"2026-01-{i:02}", f"c{i}", m) for i, m in enumerate(medians)]


def found(medians: list[float]) -> list[changes.Change]:
    return next(iter(changes.find({((), "c", "p"): points(medians)}).values()), [])


def test_noise_is_no_change() -> None:
    """Many histories, as a library with many cases has: corrected for all of them together, next to none may be named."""
    histories = {((), f"c{seed}", "p"): points(series(seed, [1.0] * 30)) for seed in range(150)}
    assert len(changes.find(histories)) <= 1
    single = sum(bool(found(series(1000 + seed, [1.0] * 30))) for seed in range(150))
    assert single <= 5


@pytest.mark.parametrize("effect", [0.05, -0.05, 0.20])
def test_a_step_is_found_where_it_is(effect: float) -> None:
    for seed in range(20):
        steps = found(series(seed, [1.0] * 14 + [1 + effect] * 14, outliers=0.0))
        assert [s.kind for s in steps] == [STEP], seed
        assert abs(steps[0].index - 14) <= 1 and steps[0].percent == pytest.approx(100 * effect, abs=1.5)


def test_a_step_among_outliers() -> None:
    """One run in thirty takes a third longer; next to the step one may move it by as many runs."""
    for seed in range(20):
        steps = found(series(seed, [1.0] * 14 + [1.1] * 14))
        assert [s.kind for s in steps] == [STEP] and abs(steps[0].index - 14) <= 2, seed


def test_two_steps() -> None:
    steps = found(series(1, [1.0] * 12 + [1.1] * 12 + [0.95] * 12))
    assert [s.index for s in steps] == [12, 24] and steps[0].effect > 0 > steps[1].effect


def test_slow_drift_is_drift() -> None:
    """A third of a percent from run to run, which no comparison of neighbours would notice."""
    for seed in range(20):
        drift = found(series(seed, [1.003**i for i in range(40)], outliers=0.0))
        assert [c.kind for c in drift] == [DRIFT], seed
        assert drift[0].percent == pytest.approx(100 * (1.003**39 - 1), abs=2)


def test_single_outliers_are_no_step() -> None:
    assert found([1.0, 1.001] * 7 + [3.0] + [1.0, 1.001] * 7) == []


def test_short_and_constant_histories() -> None:
    assert found([1.0] * 7) == [] and found([]) == []
    assert found([1.0] * 30) == []


def test_series_are_kept_apart_and_in_order() -> None:
    results = [
        Result("c", "p", samples=(2.0,), run="b", time="2", environment={"commit": "y"}),
        Result("c", "p", samples=(1.0,), run="a", time="1", environment={"commit": "x"}),
        Result("c", "p", samples=(1.0,), run="a", time="1", environment={"device": "other"}),
        Result("c", "q", samples=(1.0,), run="a", time="1"),
        Result("c", "p", "failed", run="c", time="3"),
    ]
    found = changes.series(results)
    assert sorted(len(p) for p in found.values()) == [1, 1, 2]
    assert [p.commit for p in max(found.values(), key=len)] == ["x", "y"]


def test_track_names_the_commits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = History(tmp_path / "h.sqlite")
    for i, level in enumerate(series(3, [1e-3] * 10 + [1.2e-3] * 10, outliers=0.0)):
        history.add(
            [
                Result(
                    "attention/plain/fwd/float32/1x1x8x8",
                    "eager",
                    samples=(level,),
                    run=f"r{i}",
                    time=f"2026-01-{i + 1:02}",
                    environment={"commit": f"commit{i:02}"},
                )
            ]
        )
    assert cli.main(["track", "--db", str(tmp_path / "h.sqlite"), "--fail-on", "3%"]) == 1
    shown = capsys.readouterr().out
    assert "1 series, 1 of them with the 8 runs that a change needs; 1 changes" in shown and "commit09 → commit10" in shown
    assert cli.main(["track", "--db", str(tmp_path / "h.sqlite"), "--fail-on", "50%"]) == 0
    for arguments, code in ((["--fail-on", "3%"], 3), ([], 0)):
        assert cli.main(["track", "--db", str(tmp_path / "empty.sqlite"), *arguments]) == code, "nothing is known yet"


def standing(medians: list[float]) -> changes.Standing | None:
    steps = found(medians)
    return changes.standing(points(medians), steps, 1) if steps else None


@pytest.mark.parametrize(
    ("levels", "percent"),
    [
        ([10, 20, 15], 50), ([10, 20, 19.5], 95), ([12, 10, 20, 15], 50), ([10, 10.2, 10.4, 10.6], 6),
        ([20, 10, 10], -50), ([20, 10, 10.5], 5), ([10, 20, 10], 0), ([10, 9.5, 10, 9.5], 0),
    ],
)  # fmt: skip
def test_the_newest_level_is_judged_by_the_best(levels: list[float], percent: float) -> None:
    """A recovery that is not whole hides nothing, and a slowdown that was taken back is none."""
    for seed in range(10):
        stands = standing(series(seed, [level for level in levels for _ in range(12)], noise=0.004, outliers=0.0))
        assert stands is not None and stands.percent == pytest.approx(percent, abs=1.2), seed
        assert stands.is_slower(0.03) == (percent > 3)


def test_slow_drift_is_slower_too() -> None:
    for rate, slower in ((1.003, True), (0.997, False)):
        stands = standing(series(1, [rate**i for i in range(40)], outliers=0.0))
        assert stands is not None and stands.is_slower(0.03) == slower


def test_luck_is_no_level_to_be_held_to() -> None:
    """Steady series: the fastest few runs of each are 3 % below its level by luck, and hardly any may fail for that."""
    failing = 0
    for seed in range(200):
        stands = standing(series(2000 + seed, [1.0] * 60, noise=0.02))
        failing += stands is not None and stands.is_slower(0.01)
    assert failing <= 2


def keep(history: History, runs: range, median: float, **environment: str) -> None:
    for i in runs:
        times = (median * (1 + 0.001 * (i % 3)),)
        about = {"device": "a chip", "commit": f"commit{i}"} | environment
        history.add(
            [Result("softmax/plain/fwd/float32/8x8", "p", samples=times, run=f"r{i}", time=f"2026-01-{i + 1:02}", environment=about)]
        )


def test_machines_are_judged_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A slow one beside a fast one is no slowdown; a series that an update ended fails no more, one that goes on in turns with another does."""

    def code(name: str) -> int:
        return cli.main(["track", "--db", str(tmp_path / name), "--fail-on", "3%"])

    two = History(tmp_path / "two")
    keep(two, range(10), 0.1, device="fast")
    keep(two, range(10, 20), 0.2, device="slow")
    assert code("two") == 0
    ended = History(tmp_path / "ended")
    keep(ended, range(6), 0.1, driver="1")
    keep(ended, range(6, 12), 0.2, driver="1")
    assert (
        code("ended") == 1
        and "slower: softmax/plain/fwd/float32/8x8, p: 200 ms, the best earlier level was 100 ms" in capsys.readouterr().out
    )
    keep(ended, range(12, 16), 0.1, driver="2")
    assert code("ended") == 3
    assert ", ended" in (said := capsys.readouterr().out) and "undecided: no series" in said
    keep(ended, range(16, 20), 0.1, driver="2")
    assert code("ended") == 0
    keep(ended, range(20, 21), 0.2, driver="1")
    assert code("ended") == 1


def test_track_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = History(tmp_path / "h")
    for runs, level in ((range(6), 0.1), (range(6, 12), 0.2), (range(12, 18), 0.15)):
        keep(history, runs, level)
    assert cli.main(["track", "--db", str(tmp_path / "h"), "--json", "-"]) == 0
    printed = capsys.readouterr()
    first, last = map(json.loads, printed.out.splitlines())
    assert first["change"] == pytest.approx(100, abs=1) and "against_best" not in first and first["last_before"] == "commit5"
    assert last["change"] == pytest.approx(-25, abs=1) and last["against_best"] == pytest.approx(50, abs=1) and last["run"] == "r12"
    assert "+50." in printed.err


@pytest.mark.parametrize("chance", [False, True])
def test_track_says_what_may_be_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chance: bool
) -> None:
    history = History(tmp_path / "h")
    for runs, level in ((range(6), 0.1), (range(6, 12), 0.2)):
        keep(history, runs, level)
    monkeypatch.setattr(track, "ALPHA", 0.0 if chance else 1.0)
    assert cli.main(["track", "--db", str(tmp_path / "h")]) == 0
    assert ("within chance" in capsys.readouterr().out) == chance
