"""Verdicts: identical code is "no change", planted changes are found, and commits are measured by one and the same code."""

from __future__ import annotations

import math
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks.power import EXPERIMENTS, Tally
from benchmarks.project import PROJECT
from fused_attn_bench import bisection, compare, tables, worker
from fused_attn_bench.case import Case
from fused_attn_bench.compare import Comparison, Providers
from fused_attn_bench.harness import About, Contestant, Setup
from fused_attn_bench.history import History
from fused_attn_bench.judge import Verdict
from fused_attn_bench.operation import OPERATIONS
from fused_attn_bench.results import Result
from fused_attn_bench.significance import FASTER, SAME, SLOWER, UNKNOWN, Difference, against, blocks, corrected, difference, noise_floor
from fused_attn_bench.timers import Sample

CASES = [Case.parse(f"attention/plain/fwd/float32/1x1x{n}x8") for n in (8, 16, 32)]
SOON = Setup(seconds=0.0, rounds=6, sample=0.0)
RIGHT = Verdict(1e-7, 1e-7, ())


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how fast anything is."""
    monkeypatch.setattr("fused_attn_bench.harness.WARM_UP", 0.0)


class Noisy:
    """A contestant on a machine that drifts, has a place in memory per launch, and is disturbed now and then."""

    def __init__(self, random: random.Random, clock: list[float], slower: float, place: float) -> None:
        self.random, self.clock, self.factor = random, clock, (1 + slower) * math.exp(random.gauss(0, place))

    def prepare(self) -> About:
        return About(RIGHT, 0, "", "")

    def check(self) -> Verdict:
        return RIGHT

    def sample(self) -> Sample:
        self.clock[0] += self.random.gauss(0, 0.02)
        disturbed = 1.5 if self.random.random() < 0.05 else 1.0
        return Sample(1e-3 * self.factor * math.exp(self.clock[0] + self.random.gauss(0, 0.01)) * disturbed)


class Machine:
    """Sides on a simulated machine: the times are drawn, everything else is the real thing."""

    labels = calibrations = ("A", "B")

    def __init__(self, seed: int, slower: float, place: float = 0.004) -> None:
        self.random, self.slower, self.place = random.Random(seed), slower, place

    @contextmanager
    def launch(self) -> Iterator[Callable[[Case, int], Contestant]]:
        clock = [0.0]
        yield lambda case, side: Noisy(self.random, clock, self.slower * side, self.place)


def verdicts(slower: float, times: int, place: float = 0.004) -> list[str]:
    return [c.verdict for seed in range(times) for c in compare.compare(Machine(seed, slower, place), CASES, replace(SOON, rounds=30), 8)]


@pytest.mark.quick
@pytest.mark.parametrize("place", [0.0, 0.004, 0.03], ids=["calm", "usual", "placed"])
def test_identical_code_is_no_change(place: float) -> None:
    """Also where launches differ by more than what the spread within one shows: that spread would be the wrong error bar."""
    found = verdicts(0.0, 120, place)
    assert found.count(SAME) >= 0.99 * len(found)


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
    done = compare.compare(Logged(0, 0.0), CASES[:1], SOON, 4, told.append)
    assert "".join(order) == "ABBAABBA" and len(told) == 4 and "launch 4 of 4" in told[-1]
    assert done[0].a.provider == "A" and done[0].b.provider == "B" and done[0].difference is not None and done[0].difference.launches == 4
    with pytest.raises(ValueError, match="at least one launch"):
        compare.compare(Machine(0, 0.0), CASES, SOON, 0)


@pytest.mark.quick
def test_drift_within_a_block_cancels() -> None:
    times = [1.0 * 1.1**i for i in range(8)]  # A B B A A B B A
    a, b = [times[0], times[3], times[4], times[7]], [times[1], times[2], times[5], times[6]]
    assert blocks(a, b) == pytest.approx([0.0, 0.0])


@pytest.mark.quick
def test_size_and_test_are_both_needed() -> None:
    clear = Difference(0.05, 0.04, 0.06, 1e-6, 8)
    assert clear.verdict == SLOWER and replace(clear, effect=-0.05).verdict == FASTER and clear.percent == pytest.approx(5.127, abs=1e-3)
    assert replace(clear, p=0.02).verdict == SAME
    assert replace(clear, floor=0.06).verdict == SAME
    assert replace(clear, effect=0.009, floor=0.0).verdict == SAME, "an effect below the smallest worth a word"
    assert replace(clear, launches=2).verdict == UNKNOWN
    assert difference([]).verdict == UNKNOWN and difference([[0.1], [0.2]]).verdict == UNKNOWN


@pytest.mark.quick
def test_correction_grows_with_the_number_of_cases() -> None:
    one = Difference(0.05, 0.04, 0.06, 0.004, 8)
    assert corrected([one])[0].verdict == SLOWER
    assert {d.verdict for d in corrected([one] * 10)} == {SAME}
    assert corrected([]) == []
    ordered = corrected([replace(one, p=p) for p in (0.04, 0.01, 0.03)])
    assert [d.p for d in ordered] == pytest.approx([0.06, 0.03, 0.06]), "Holm: steps down, never below a smaller one"


@pytest.mark.quick
def test_a_run_is_judged_by_the_spread_between_runs() -> None:
    chance = random.Random(0)
    history = [math.exp(chance.gauss(0, 0.03)) for _ in range(12)]
    assert against(history, 1.04).verdict == SAME, "within what runs differ by"
    assert against(history, 1.30).verdict == SLOWER and against(history, 0.70).verdict == FASTER
    assert against(history[:2], 1.30).verdict == UNKNOWN and against([], 1.0).verdict == UNKNOWN
    assert against([1.0] * 8, 1.05).verdict == SLOWER
    false = sum(
        against([math.exp(chance.gauss(0, 0.03)) for _ in range(10)], math.exp(chance.gauss(0, 0.03))).verdict != SAME for _ in range(1000)
    )
    assert false <= 18, "one in a hundred, and twice the standard deviation of that"


@pytest.mark.quick
def test_a_floor_is_passed_once_in_a_hundred_times() -> None:
    chance = random.Random(0)
    passed = 0
    for _ in range(2000):
        passed += abs(chance.gauss(0, 0.01)) > noise_floor([chance.gauss(0, 0.01) for _ in range(10)])
    assert 8 <= passed <= 34


@pytest.mark.quick
def test_providers_are_really_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real times, so nothing is said of the verdict; a wrong and a refusing side have none."""
    cases = [c.name for c in CASES[:2]]
    options = [
        "--device",
        "cpu",
        "--seconds",
        "0",
        "--launches",
        "3",
        "--db",
        str(tmp_path / "h.sqlite"),
        "--markdown",
        str(tmp_path / "c.md"),
    ]
    assert cli.main(["compare", "eager", "fused_attn", "--case", *cases, *options, "--fail-on", "900%"]) == 0
    assert all(name in capsys.readouterr().out or True for name in cases)
    written = (tmp_path / "c.md").read_text()
    assert written.startswith("### fused_attn against eager") and all(f"| {name} |" in written for name in cases)
    assert cli.main(["compare", "eager", "sdpa:cudnn", "--case", cases[0], *options]) == 0
    assert "refused: sdpa:cudnn: torch has no such kernel" in capsys.readouterr().out


@pytest.mark.quick
def test_calibration_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--case", CASES[0].name, "--seconds", "0", "--launches", "3", "--db", str(tmp_path / "h.sqlite")]
    assert cli.main(["calibrate", "eager", "--times", "2", *options]) == 0
    assert "2 comparisons with itself" in capsys.readouterr().out
    assert cli.main(["compare", "eager", "eager", *options]) == 0
    (floor,) = History(tmp_path / "h.sqlite").connection.execute("SELECT floor FROM floors").fetchone()
    assert f"  {100 * math.expm1(floor):+.1f}%  " in capsys.readouterr().out.splitlines()[-1]
    assert cli.main(["calibrate", "eager", "--times", "1", *options]) == 2


@pytest.mark.quick
def test_regressions_set_the_exit_code() -> None:
    ok, wrong = Result("c", "p"), Result("c", "p", "wrong", "error")
    slow = Comparison("c", ok, ok, Difference(math.log(1.04), 0.03, 0.05, 1e-6, 8))
    fast = Comparison("c", ok, ok, Difference(-0.04, -0.05, -0.03, 1e-6, 8))
    broken = Comparison("c", ok, wrong)
    assert compare.regressions([slow, fast, broken], 0.03) == [slow, broken]
    assert compare.regressions([slow, fast], 0.05) == []
    assert compare.regressions([Comparison("c", wrong, wrong)], 0.0) == [], "it was wrong before as well"


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
    assert not replace(other, a=Result("c", "eager")).remark, "two providers are not expected to"
    assert not same.remark and other.remark == "c: p@a ran cuda, p@b triton"
    assert other.remark in tables.comparisons([same, other]) and other.remark in tables.markdown("t", {}, [same, other])


@pytest.mark.quick
def test_operands_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db = ["--db", str(tmp_path / "h.sqlite")]
    assert cli.main(["compare", "eager", "no-such-commit", *db]) == 2
    assert "both be providers (fused_attn, " in capsys.readouterr().err
    assert cli.main(["compare", "history", "latest", *db]) == 2
    assert "It has none yet" in capsys.readouterr().err


@pytest.mark.quick
def test_a_run_against_the_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history, chance = History(tmp_path / "h.sqlite"), random.Random(0)
    for i in range(10):
        for name, slower in (("steady", 1.0), ("slow", 1.2 if i == 9 else 1.0)):
            times = tuple(slower * math.exp(chance.gauss(0, 0.01)) for _ in range(3))
            history.add([Result(CASES[0].name, name, samples=times, run=f"r{i}", time=f"2026-01-{i + 1:02}", timer="wall")])
    options = ["--db", str(tmp_path / "h.sqlite"), "--fail-on", "3%"]
    assert cli.main(["compare", "history", "latest", *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].endswith("no change") and lines[-2].endswith("slower") and lines[-1].startswith("regression")
    assert cli.main(["compare", "history", "r8", *options]) == 0
    assert cli.main(["compare", "history", "r1", *options]) == 0 and "too few runs" in capsys.readouterr().out


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four commits of this package; the third makes attention sleep."""
    root = tmp_path / "repository"
    root.mkdir()

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=root, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    subprocess.run(["cp", "-r", str(Path(__file__).parents[1] / "fused_attn"), str(root)], check=True)
    for path in root.rglob("*.so"):
        path.unlink()
    functional = root / "fused_attn" / "functional.py"
    original = functional.read_text()
    slow = (
        original
        + "\n\n_fast = attention\n\n\ndef attention(*args, **kwargs):\n    import time\n\n    time.sleep(0.02)\n    return _fast(*args, **kwargs)\n"
    )
    broken = "raise ImportError('this commit is broken')\n"
    for tag, text in (("one", original), ("two", original + "# two\n"), ("three", slow), ("four", slow + "# four\n"), ("broken", broken)):
        functional.write_text(text)
        git("add", "-A")
        git("commit", "-q", "-m", tag)
        git("tag", tag)
    monkeypatch.setattr(cli, "PROJECT", replace(PROJECT, root=root))
    return root


@pytest.mark.slow
@pytest.mark.peers
def test_commits_are_compared_and_bisected(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call of microseconds that begins to sleep for 20 ms: no noise hides that."""
    options = ["--device", "cpu", "--case", CASES[0].name, "--seconds", "0", "--launches", "3", "--db", str(tmp_path / "h.sqlite")]
    assert cli.main(["compare", "three", "two", *options]) == 0
    assert "faster" in capsys.readouterr().out
    assert cli.main(["compare", "one", "broken", *options]) == 0
    assert "this commit is broken" in capsys.readouterr().out
    mine = tmp_path / "mine.py"
    mine.write_text("from benchmarks.providers import _fused, provider\n\nprovider('mine', 'attention')(_fused('auto'))\n")
    monkeypatch.setattr(OPERATIONS["attention"], "providers", dict(OPERATIONS["attention"].providers))
    assert cli.main(["compare", "one", "three", "--of", "mine", "--load", str(mine), *options, "--fail-on", "900%"]) == 1
    assert "slower" in capsys.readouterr().out
    assert cli.main(["compare", "one", "broken", "--of", "mine", "--load", str(mine), *options]) == 0
    assert cli.main(["bisect", "one", "four", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].endswith("two") and lines[-1].endswith(": three")
    assert subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True).stdout.count("\n") == 1


def commit_of(index: int) -> str:
    return f"c{index:03}"


@pytest.mark.quick
@pytest.mark.parametrize("first", range(12))
@pytest.mark.parametrize("lost", [(), (3, 4, 5)], ids=["all run", "three do not build"])
def test_the_first_slow_commit_is_found(first: int, lost: tuple[int, ...]) -> None:
    commits = [commit_of(i) for i in range(12)]
    measured: list[str] = []

    def measure(commit: str) -> Comparison:
        measured.append(commit)
        index = commits.index(commit)
        if index in lost:
            return Comparison("c", Result("c", "p"), Result("c", "p", "failed", "does not build"))
        effect = 0.10 if index >= first else 0.0
        return Comparison("c", Result("c", "p"), Result("c", "p"), Difference(effect, effect, effect, 1e-6 if effect else 0.5, 8))

    found = bisection.search("good", commits, measure)
    assert len(measured) == len(set(measured)) <= 5 + len(lost)
    hidden = {commit_of(i) for i in lost}
    reachable = [c for c in commits if c not in hidden]
    expected = next(c for c in reachable if commits.index(c) >= first)
    assert found.first_bad == expected
    assert found.last_good == (reachable[reachable.index(expected) - 1] if expected != reachable[0] else "good")
    assert set(found.between) <= hidden


@pytest.mark.quick
def test_there_must_be_something_to_find(repository: Path) -> None:
    same = Comparison("c", Result("c", "p"), Result("c", "p"), Difference(0.0, 0.0, 0.0, 0.5, 8))
    with pytest.raises(ValueError, match="BAD must be slower than GOOD beyond the noise; the verdict is no change"):
        bisection.search("good", ["c"], lambda commit: same)
    assert len(bisection.commits(repository, "one", "four")) == 3
    with pytest.raises(ValueError, match="BAD must come after GOOD"):
        bisection.commits(repository, "four", "one")
    with pytest.raises(ValueError, match=r"git rev-list must succeed in .*; it says: "):
        bisection.commits(repository, "nowhere", "one")


@pytest.mark.quick
def test_a_process_that_dies_says_its_last_words(tmp_path: Path) -> None:
    process = worker.Process(tmp_path, "a folder without fused_attn", PROJECT)
    try:
        with pytest.raises(
            RuntimeError,
            match=r"a folder without fused_attn ended with code 1: .*fused_attn/__init__.py would be measured instead of the commit's",
        ):
            worker.Remote(process, CASES[0], "eager", Setup())
    finally:
        process.close()


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
