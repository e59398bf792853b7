"""The gate for CI: each exit code, from the outcome that it stands for."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from fused_attn_bench import baseline
from fused_attn_bench.operation import OPERATIONS
from fused_attn_bench.results import Result, ResultsError

CASES = ("attention/plain/fwd/float32/1x1x8x8", "softmax/masked/fwd+bwd/float32/1x1x4x8")
QUICK = ("--device", "cpu", "--seconds", "0", "--launches", "3")


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
    """A copy, to be changed."""
    return Path(shutil.copy(written, tmp_path))


def edited(path: Path, **changes: object) -> None:
    entries = [dataclasses.replace(entry, **changes) for entry in baseline.read(path)]
    baseline.write(entries, path)


def check(path: Path, *more: str) -> int:
    return cli.main(["check", str(path), *QUICK, *more])


def test_a_baseline_is_written_and_read(stored: Path) -> None:
    entries = baseline.read(stored)
    assert tuple(e.case for e in entries) == CASES
    assert all((e.provider, e.reference, len(e.ratios)) == ("fused_attn", "eager", 3) and e.environment["torch"] for e in entries)


def test_all_right(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such small cases are noise; a factor of ten is beyond it."""
    assert check(stored, "--fail-on", "900%") == 0
    assert capsys.readouterr().out.count("right") == 2


def measures(path: Path, monkeypatch: pytest.MonkeyPatch, change: float) -> None:
    """From here on what is measured is what a baseline holds, times e^change.

    Written-down times: how much real ones of such small cases scatter depends on what else the machine does.
    """
    now = [(Result(e.case, e.provider), dataclasses.replace(e, ratios=tuple(x + change for x in e.ratios))) for e in baseline.read(path)]
    monkeypatch.setattr(baseline, "measure", lambda *arguments: now)


def test_slower(stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    edited(stored, ratios=tuple(math.log(0.5) + x for x in (0.0, 0.01, -0.01, 0.005, -0.005)))
    measures(stored, monkeypatch, 0.1)
    assert check(stored) == 1
    assert capsys.readouterr().out.count("SLOWER") == 2


def test_faster_passes(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited(stored, ratios=(math.log(1e3), math.log(1.1e3), math.log(1.2e3)))
    measures(stored, monkeypatch, -7.0)
    assert check(stored) == 0


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
    assert check(stored, *load) == 3
    assert "breaks the error rule in out" in capsys.readouterr().out
    assert check(stored, *load, "--update", "--case", *CASES) == 3 and stored.read_text() == before


def test_another_machine(stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measures(stored, monkeypatch, 0.0)
    edited(stored, environment={**baseline.read(stored)[0].environment, "device": "another chip"})
    assert check(stored) == 4
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
    "bad case": json.dumps({**GOOD, "case": "nonsense"}),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_unreadable_baseline(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(BAD[kind])
    with pytest.raises(ResultsError):
        baseline.read(path)
    assert check(path) == 2
    assert str(path) in capsys.readouterr().err


def test_bad_arguments(tmp_path: Path, stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path / "absent.jsonl") == 2
    assert "Write one with --update" in capsys.readouterr().err
    assert check(stored, "--launches", "2") == 2
    edited(stored, provider="unknown")
    assert check(stored) == 2
    assert "a provider must be one of" in capsys.readouterr().err


def test_the_spread_between_launches_is_the_error_bar() -> None:
    def entry(ratios: Sequence[float]) -> baseline.Entry:
        return baseline.Entry("c", "p", "r", tuple(ratios))

    def slower(old: baseline.Entry, new: baseline.Entry, limit: float) -> bool:
        return baseline.is_slower(baseline.difference(old, new), limit)

    steady, later = entry([0.0, 0.01, -0.01, 0.005, -0.005]), entry([0.10, 0.11, 0.09, 0.105, 0.095])
    assert slower(steady, later, 0.05)
    assert not slower(steady, later, 0.15), "below the limit"
    assert not slower(later, steady, 0.05), "faster"
    noisy = entry([0.4, -0.2, 0.3, -0.1, 0.15])
    assert not slower(steady, noisy, 0.05), "10 % more, but launches differ by more than that"
