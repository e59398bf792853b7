"""The commands compare and calibrate from the outside: what they print, write and keep, and what they exit with."""

from __future__ import annotations

import errno
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as cli
from fused_attn_bench import compare
from fused_attn_bench.case import Case
from fused_attn_bench.commands import outputs
from fused_attn_bench.history import History
from fused_attn_bench.results import Result, ResultsError

CASES = [Case.parse(f"attention/plain/fwd/float32/1x1x{n}x8") for n in (8, 16, 32)]


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how fast anything is."""
    monkeypatch.setattr("fused_attn_bench.harness.WARM_UP", 0.0)


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
    code = cli.main(["compare", "eager", "fused_attn", "--case", *cases, *options, "--fail-on", "900%", "--json", str(tmp_path / "c.json")])
    shown = capsys.readouterr().out
    assert all(name in shown for name in cases)
    written = (tmp_path / "c.md").read_text()
    assert written.startswith("### fused_attn against eager") and all(f"| {name} |" in written for name in cases)
    content, kept = json.loads((tmp_path / "c.json").read_text()), History(tmp_path / "h.sqlite").comparisons()
    assert code in (0, 3) and content["code"] == code and content["environment"]["torch"] == torch.__version__
    assert [(row["case"], row["verdict"], row["effect"]) for row in content["cases"]] == [(c.case, c.verdict, c.effect) for c in kept]
    assert [c.case for c in kept] == cases and all(
        c.launches >= 3 and c.run and c.environment["torch"] and None not in c.medians for c in kept
    )
    assert cli.main(["compare", "eager", "sdpa:cudnn", "--case", cases[0], *options]) == 3
    assert "refused: sdpa:cudnn: torch has no such kernel" in capsys.readouterr().out


@pytest.mark.quick
def test_calibration_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--case", CASES[0].name, "--seconds", "0", "--launches", "3", "--db", str(tmp_path / "h.sqlite")]
    assert cli.main(["calibrate", "eager", "--times", "2", *options]) == 0
    assert "2 comparisons with itself" in capsys.readouterr().out
    assert cli.main(["compare", "eager", "eager", "--fail-on", "900%", *options]) in (0, 3)
    (floor,) = History(tmp_path / "h.sqlite").connection.execute("SELECT floor FROM floors").fetchone()
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(CASES[0].name))
    assert f"  {100 * math.expm1(floor):+.1f}%  " in shown
    assert cli.main(["calibrate", "eager", "--times", "1", *options]) == 2


@pytest.mark.quick
def test_commands_keep_what_ctrl_c_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the sixth launch of a comparison, and in the third comparison of a calibration."""
    measure, calls = compare.contest, 0

    def contest(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(compare, "contest", contest)
    options = [
        "--device",
        "cpu",
        "--case",
        CASES[0].name,
        "--seconds",
        "0",
        "--db",
        str(tmp_path / "h.sqlite"),
        "--json",
        str(tmp_path / "c.json"),
    ]
    assert cli.main(["compare", "eager", "eager+900%", "--launches", "8", *options]) == 130
    assert "interrupted; 1 of the cases have been measured" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text())["cases"][0]["launches"] == 5
    assert History(tmp_path / "h.sqlite").comparisons()[0].launches == 5
    calls = -1
    assert cli.main(["calibrate", "eager", "--launches", "3", *options]) == 130
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["cases"][0]["comparisons"] == 2 and "2 comparisons with itself" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_outputs_are_tried_before_anything_is_measured(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "contest", lambda *arguments: pytest.fail("measured in vain"))
    command = ["compare", "eager", "eager", "--device", "cpu", "--db", str(tmp_path / "h.sqlite"), option]
    assert cli.main([*command, str(tmp_path / "no" / "c")]) == 2
    assert "c must be a file that can be written; got: " in capsys.readouterr().err
    for path in (tmp_path / "new", None, Path("-")):
        outputs.writable(path)
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").write_text("kept")
    outputs.writable(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "kept"


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
    options = ["--db", str(tmp_path / "h.sqlite"), "--fail-on", "5%"]
    assert cli.main(["compare", "history", "latest", *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].endswith("no change") and lines[-2].endswith("slower") and lines[-1].startswith("regression")
    assert cli.main(["compare", "history", "r8", *options]) == 0
    assert cli.main(["compare", "history", "r1", *options]) == 3 and "too few runs" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ResultsError("h must be free within 60 s")])
def test_verdicts_that_cannot_be_kept_are_shown(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(History, "add", full)
    monkeypatch.setattr(History, "set_floor", full)
    made, old = tmp_path / "c.json", tmp_path / "c.md"
    options = ["--device", "cpu", "--case", CASES[0].name, "--seconds", "0", "--launches", "3", "--db", str(tmp_path / "h.sqlite")]
    assert cli.main(["compare", "eager", "eager+900%", *options, "--json", str(made), "--markdown", str(old)]) == 4
    shown = capsys.readouterr().out
    assert f"{CASES[0].name}: slower" in shown and shown.endswith(f"results could not be kept ({error})\n")
    content = json.loads(made.read_text())
    assert content["code"] == 4 and content["cases"][0]["verdict"] == "slower" and CASES[0].name in old.read_text()
    assert cli.main(["calibrate", "eager", "--times", "2", *options, "--json", str(made)]) == 4
    shown, content = capsys.readouterr().out, json.loads(made.read_text())
    assert "2 comparisons with itself" in shown and f"results could not be kept ({error})" in shown
    assert content["code"] == 4 and content["cases"][0]["comparisons"] == 2


@pytest.mark.quick
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_json_without_room_takes_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--case", CASES[0].name, "--seconds", "0", "--launches", "3", "--db", str(tmp_path / "h.sqlite")]
    made = tmp_path / "c.md"
    assert cli.main(["compare", "eager", "eager+900%", *options, "--json", "/dev/full", "--markdown", str(made)]) == 4
    assert f"regression: {CASES[0].name}" in capsys.readouterr().out and CASES[0].name in made.read_text()
