"""The gate for CI: each exit code, from the outcome that it stands for."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as cli
from fused_attn_bench import baseline, compare
from fused_attn_bench.case import Case
from fused_attn_bench.harness import Setup
from fused_attn_bench.operation import OPERATIONS
from fused_attn_bench.quiet import Activity
from fused_attn_bench.results import Result, ResultsError
from fused_attn_bench.sides import Separate

CASES = ("attention/plain/fwd/float32/1x1x8x8", "softmax/masked/fwd+bwd/float32/1x1x4x8")
QUICK = ("--device", "cpu", "--seconds", "0", "--launches", "3", "--most-launches", "3")


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how fast anything is."""
    monkeypatch.setattr("fused_attn_bench.harness.WARM_UP", 0.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("baseline") / "baseline.jsonl"
    assert cli.main(["check", str(path), "--update", "--case", *CASES, *QUICK]) == 0
    return path


@pytest.fixture
def stored(written: Path, tmp_path: Path) -> Path:
    """A copy, to be changed, as of a machine that did nothing else."""
    path = Path(shutil.copy(written, tmp_path))
    edited(path, marks=())
    return path


def edited(path: Path, **changes: object) -> None:
    entries = [dataclasses.replace(entry, **changes) for entry in baseline.read(path)]
    baseline.write(entries, path)


def check(path: Path, *more: str) -> int:
    return cli.main(["check", str(path), *QUICK, *more])


def test_a_baseline_is_written_and_read(stored: Path) -> None:
    entries = baseline.read(stored)
    assert tuple(e.case for e in entries) == CASES
    assert all((e.provider, e.reference, len(e.ratios)) == ("fused_attn", "eager", 3) and e.environment["torch"] for e in entries)


def test_it_really_measures(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such small cases are noise: nothing is said of the verdict."""
    code = check(stored, "--fail-on", "900%", "--json", str(tmp_path / "c.json"))
    content = json.loads((tmp_path / "c.json").read_text())
    assert code in (0, 3) and content["code"] == code and content["unit"] == "multiples of eager's time"
    assert [row["case"] for row in content["cases"]] == list(CASES) and all(row["launches"] >= 3 for row in content["cases"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in CASES)


def measures(monkeypatch: pytest.MonkeyPatch, change: float = 0.0, noise: float = 0.01, **worse: float) -> list[int]:
    """From here on the reference takes 1 ms and the provider half of that, times e^change; returns the launches of each case.

    Drawn times: how much real ones of such small cases scatter depends on what else the machine does.
    """
    chance, launches = random.Random(0), []

    def contest(case: Case, makers: Mapping[str, object], setup: Setup) -> list[Result]:
        launches.append(1)
        place, host = math.exp(chance.gauss(0, noise)), chance.gauss(0, 1e-6)
        a = Result(case.name, "0", samples=(1e-3,) * 6, host=(3e-5,) * 6, peak=2**20, error=1e-7, plain_error=1e-7)
        late = 2e-5 + host + worse.get("host", 0.0)
        b = replace(a, samples=(5e-4 * math.exp(change) * place,) * 6, host=(late,) * 6, peak=2**20 + int(worse.get("bytes", 0)))
        b = replace(b, error=1e-7 * worse.get("error", 1.0))
        return [{"0": a, "1": b}[name] for name in makers]

    @contextmanager
    def launch(self: Separate) -> Iterator[object]:
        yield lambda case, side: None

    monkeypatch.setattr("fused_attn_bench.compare.contest", contest)
    monkeypatch.setattr(Separate, "launch", launch)
    return launches


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A baseline of drawn times."""
    measures(monkeypatch)
    path = tmp_path / "drawn.jsonl"
    assert cli.main(["check", str(path), "--update", "--case", *CASES, "--device", "cpu"]) == 0
    return path


def checked(path: Path, *more: str) -> int:
    return cli.main(["check", str(path), "--device", "cpu", *more])


def test_same(drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    launches = measures(monkeypatch)
    assert checked(drawn) == 0 and len(launches) == 8 * len(CASES), "decided at the first look"
    assert capsys.readouterr().out.count("no change") == 2


def test_slower(drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measures(monkeypatch, change=0.08)
    assert checked(drawn) == 1
    shown = capsys.readouterr().out
    assert shown.count("  slower") == 2 and shown.count("regression: ") == 2 and "0.50x" in shown and "0.54x" in shown
    assert checked(drawn, "--fail-on", "15%") == 0, "slower by less than what fails"


def test_faster_passes(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measures(monkeypatch, change=-0.2)
    assert checked(drawn) == 0


def test_undecided_is_no_pass(drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Launches that differ by 30 %: three times as many as planned do not tell."""
    launches = measures(monkeypatch, noise=0.3)
    assert checked(drawn) == 3 and len(launches) == 24 * len(CASES)
    assert capsys.readouterr().out.count("undecided (± ") == 2
    launches.clear()
    assert checked(drawn, "--most-launches", "8") == 3 and len(launches) == 8 * len(CASES)


@pytest.mark.parametrize(
    ("worse", "word"),
    [({"bytes": 2**25}, "heavier"), ({"host": 20e-6}, "later"), ({"error": 2.0}, "less exact")],
    ids=["32 MiB", "20 µs", "error"],
)
def test_what_is_worse_beside_the_time(
    worse: dict[str, float], word: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measures(monkeypatch, **worse)
    assert checked(drawn) == 1
    assert capsys.readouterr().out.count(f"no change, {word}\n") == 2 + 2, "in the table, and as regressions"
    (tmp_path / "limits.toml").write_text('["*"]\nmemory = "64 MiB"\nhost = "30 us"\nerror = 3.0\n')
    assert checked(drawn, "--limits", str(tmp_path / "limits.toml")) == 0
    (tmp_path / "limits.toml").write_text('["*"]\nmemory = "64 MB"\n')
    assert checked(drawn, "--limits", str(tmp_path / "limits.toml")) == 2
    assert 'limits.toml, ["*"], memory must be a number with one of B, KiB, MiB, GiB' in capsys.readouterr().err


def test_an_older_baseline_has_times_only(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.loads(line) for line in drawn.read_text().splitlines()]
    old = ("case", "provider", "reference", "ratios", "timer", "environment")
    drawn.write_text("".join(json.dumps({name: line[name] for name in old}) + "\n" for line in lines))
    measures(monkeypatch, host=1e-3, bytes=2**30, error=9.0)
    assert checked(drawn) == 0


def test_interrupting_keeps_what_is_decided(drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    launches = measures(monkeypatch, change=0.2)
    draw, before = compare.contest, drawn.read_text()

    def contest(*arguments: Any) -> list[Result]:
        if len(launches) == 9:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr("fused_attn_bench.compare.contest", contest)
    assert checked(drawn) == 130
    shown = capsys.readouterr().out
    assert "  slower" in shown and "interrupted" in shown
    launches.clear()
    assert cli.main(["check", str(drawn), "--update", "--case", *CASES, "--device", "cpu"]) == 130 and drawn.read_text() == before


WRONG = """
from fused_attn_bench.operation import OPERATIONS, Provider

wrong = Provider(lambda problem: lambda *leaves: tuple(t * 1.01 for t in problem.plain(*leaves)), lambda device: True)
OPERATIONS["softmax"].providers["fused_attn"] = wrong
"""


def test_wrong(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong outweighs slow, and a baseline is not written over with it."""
    monkeypatch.setattr(OPERATIONS["softmax"], "providers", dict(OPERATIONS["softmax"].providers))
    (tmp_path / "wrong.py").write_text(WRONG)
    load, before = ("--load", str(tmp_path / "wrong.py")), stored.read_text()
    assert check(stored, *load) == 1
    assert "breaks the error rule in out" in capsys.readouterr().out
    assert check(stored, *load, "--update", "--case", *CASES, "--json", str(tmp_path / "u.json")) == 1 and stored.read_text() == before
    assert json.loads((tmp_path / "u.json").read_text())["code"] == 1


def test_another_machine(drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    launches = measures(monkeypatch)
    edited(drawn, environment={**baseline.read(drawn)[0].environment, "device": "another chip"})
    assert checked(drawn) == 3 and len(launches) == len(CASES), "one launch says whether results are right"
    assert "device was 'another chip'" in capsys.readouterr().out


GOOD = {"case": CASES[0], "provider": "p", "reference": "r", "ratios": [0.1, 0.2], "timer": "wall", "environment": {}}
BAD = {
    "empty": "",
    "not json": "{",
    "a list": "[1]",
    "no ratios": json.dumps({k: v for k, v in GOOD.items() if k != "ratios"}),
    "text for a ratio": json.dumps({**GOOD, "ratios": ["x", "y"]}),
    "infinite": json.dumps({**GOOD, "ratios": [0.1, 1e999]}),
    "one ratio": json.dumps({**GOOD, "ratios": [0.1]}),
    "text for memory": json.dumps({**GOOD, "peak": "1 MB"}),
    "text for host time": json.dumps({**GOOD, "hosts": ["x"]}),
    "many ratios": json.dumps({**GOOD, "ratios": "12"}),
    "a ratio that overflows": json.dumps({**GOOD, "ratios": [1e308, 1e308]}),
    "a ratio that no float holds": json.dumps(GOOD).replace("0.1", "1" + 400 * "0"),
    "a list for the environment": json.dumps({**GOOD, "environment": []}),
    "text for the environment": json.dumps({**GOOD, "environment": "x"}),
    "numbers in the environment": json.dumps({**GOOD, "environment": {"device": 1}}),
    "a number for the reference": json.dumps({**GOOD, "reference": 5}),
    "a list for the provider": json.dumps({**GOOD, "provider": ["p"]}),
    "a number for the timer": json.dumps({**GOOD, "timer": 1}),
    "numbers for marks": json.dumps({**GOOD, "marks": [1, 2]}),
    "text for marks": json.dumps({**GOOD, "marks": "busy"}),
    "NaN for memory": json.dumps({**GOOD, "peak": math.nan}),
    "negative memory": json.dumps({**GOOD, "peak": -1}),
    "infinite error": json.dumps({**GOOD, "error": math.inf}),
    "too deep": "[" * 100_000,
    "an unknown operation": json.dumps({**GOOD, "case": "nothing/plain/fwd/float32/8"}),
    "another shape": json.dumps({**GOOD, "case": "softmax/masked/fwd/float32/8"}),
    "bad case": json.dumps({**GOOD, "case": "nonsense"}),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_unreadable_baseline(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({**GOOD, "case": CASES[1]}) + "\n" + BAD[kind] if BAD[kind] else "")
    with pytest.raises(ResultsError):
        baseline.read(path)
    assert check(path) == 2
    said = capsys.readouterr().err
    assert (f"{path}, line 2 must hold one entry" if BAD[kind] else str(path)) in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"provider": "q"}, "line 2 must be of p as a multiple of r, as line 1 is; got q as a multiple of r"),
        ({"reference": "q"}, "line 2 must be of p as a multiple of r, as line 1 is; got p as a multiple of q"),
        ({"case": CASES[0]}, f"line 2 must be of another case than the lines before; got {CASES[0]} again"),
    ],
)
def test_a_baseline_s_lines_are_of_one_pair_and_different_cases(
    changed: dict[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in (GOOD, {**GOOD, "case": CASES[1], **changed})))
    assert check(path) == 2
    assert f"{path}, {says}" in capsys.readouterr().err


def test_bad_arguments(tmp_path: Path, stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path / "absent.jsonl") == 2
    assert "Write one with --update" in capsys.readouterr().err
    assert check(stored, "--launches", "2") == 2
    edited(stored, provider="unknown")
    assert check(stored) == 2
    assert "a provider must be one of" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["baseline", "now"])
def test_no_change_is_believed_of_a_machine_that_was_not_quiet(
    when: str, stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Work beside slows two providers by different factors: 20 % slower beyond any doubt, and still nothing is said."""
    busy = Activity(1.3, 0.0)
    measures(monkeypatch, 0.2)
    edited(stored, ratios=tuple(math.log(0.5) + x for x in (0.0, 0.01, -0.01, 0.005, -0.005)), error=1e-7, plain_error=1e-7, peak=2**20)
    if when == "baseline":
        edited(stored, marks=busy.marks)
    else:
        monkeypatch.setattr("fused_attn_bench.compare.Watch.activity", lambda self: busy)
    assert check(stored) == 3
    out = capsys.readouterr().out
    assert out.count("undecided") == 2 and out.count("not quiet, so that no change is believed: other processes used 1.3 cores") == 2


def test_a_baseline_of_a_busy_machine_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measures(monkeypatch)
    monkeypatch.setattr("fused_attn_bench.compare.Watch.activity", lambda self: Activity(1.3, 0.0))
    path = tmp_path / "b.jsonl"
    assert cli.main(["check", str(path), "--update", "--case", *CASES, *QUICK]) == 0
    assert "The machine was not quiet: write the baseline again" in capsys.readouterr().out
    assert all(entry.marks == ("other processes used 1.3 cores",) for entry in baseline.read(path))


def test_a_baseline_without_room_stays_the_old_one(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = drawn.read_text()
    measures(monkeypatch, change=0.5)
    monkeypatch.setattr("fused_attn_bench.files.os.fsync", full)
    assert cli.main(["check", str(drawn), "--update", "--case", *CASES, "--device", "cpu"]) == 4 and drawn.read_text() == before
    assert CASES[0] in capsys.readouterr().out


def test_a_baseline_is_of_one_provider(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(stored, "--of", "eager") == 2
    assert "is of fused_attn, got eager. Leave it out, or add --update" in capsys.readouterr().err
