"""Measuring beside busy processes, which always end, and counting the pages that a call has mapped."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from fused_attn_bench import report, tables
from fused_attn_bench.busy import most, neighbours
from fused_attn_bench.changes import series
from fused_attn_bench.compare import with_history
from fused_attn_bench.history import History
from fused_attn_bench.page import rows
from fused_attn_bench.results import Result
from fused_attn_bench.significance import SLOWER
from fused_attn_bench.timers import WallTimer

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[1]


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie, which some containers never collect."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def busy_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 20
    while any(map(runs, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(runs, pids))


def test_they_work_inside_the_block_and_are_gone_after_it() -> None:
    with neighbours(2) as pids:
        assert len(set(pids)) == 2 and all(map(runs, pids))
        before = [busy_seconds(pid) for pid in pids]
        time.sleep(0.3)
        assert all(busy_seconds(pid) > start for pid, start in zip(pids, before, strict=True))
    assert not any(map(runs, pids))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_they_end_with_a_block_that_fails(error: type[BaseException]) -> None:
    with pytest.raises(error), neighbours(1) as pids:
        raise error
    assert not any(map(runs, pids))


@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM], ids=lambda s: s.name)
def test_they_end_with_a_process_that_is_killed(fatal: signal.Signals) -> None:
    code = f"import os, time\nfrom fused_attn_bench.busy import neighbours\nwith neighbours(2) as pids:\n  print(*pids, flush=True)\n  os.kill(os.getpid(), {int(fatal)})\n  time.sleep(60)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -fatal
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2
    wait_until_gone(pids)


def test_one_that_does_not_begin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than results that are called busy and are not."""
    monkeypatch.setattr("fused_attn_bench.busy._LOOP", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="one ended with 3"), neighbours(2):
        pass


@pytest.mark.parametrize("count", [-1, 10**6])
def test_an_impossible_number_is_refused(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--busy", str(count), "--db", str(tmp_path / "h.sqlite")]) == 2
    assert f"must be in [0, {most()}]" in capsys.readouterr().err


def test_a_busy_run_says_so_and_is_compared_with_no_quiet_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fused_attn_bench.harness.WARM_UP", 0.0)
    options = ["--case", "attention/plain/fwd/float32/1x2x16x8", "--provider", "eager", "--seconds", "0", "--rounds", "2"]
    path = tmp_path / "h.sqlite"
    for extra in ([], ["--busy", "1"]):
        assert cli.main(["run", "--device", "cpu", *options, "--db", str(path), *extra]) == 0
        assert ("Measured beside 1 busy process:" in capsys.readouterr().out) == bool(extra)
    quiet, busy = History(path).results()
    assert (quiet.environment["busy"], busy.environment["busy"]) == ("", "1 busy process")
    assert quiet.machine[:-1] == busy.machine[:-1] and quiet.machine != busy.machine
    said = "Measured beside 1 busy process;"
    assert said in report.build([quiet, busy], busy.run) and said not in report.build([quiet], quiet.run)


@pytest.mark.parametrize("beside", ["", "2 busy processes"])
def test_history_judges_a_busy_run_by_busy_ones_only(beside: str, tmp_path: Path) -> None:
    """Nine quiet runs and a tenth that took ten times as long: a slowdown, unless it was busy on purpose."""
    one = Result(
        "attention/plain/fwd/float32/1x2x16x8", "eager", samples=(0.1,), timer="wall", environment={"device": "a chip", "busy": ""}
    )
    history = History(tmp_path / "h.sqlite")
    history.add([replace(one, run=f"r{i}", time=f"2026-01-0{i}", samples=(0.1 + 0.001 * (i % 3),)) for i in range(1, 10)])
    history.add([replace(one, run="last", time="2026-01-10", samples=(1.0,), environment=dict(one.environment, busy=beside))])
    (found,) = with_history(history, "last")
    assert (found.verdict == SLOWER) == (not beside)
    assert len(series(history.results())) == 1 + bool(beside)


def test_fresh_pages_are_counted() -> None:
    pages = 256

    def fresh() -> None:
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
            memory[:: mmap.PAGESIZE] = b"x" * pages

    with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
        memory[:: mmap.PAGESIZE] = b"x" * pages

        def reused() -> None:
            memory[:: mmap.PAGESIZE] = b"y" * pages

        timer = WallTimer()
        for function in (fresh, reused):
            timer(function, 1)
        new, old = timer(fresh, 10).faults, timer(reused, 10).faults
    assert new is not None and old is not None
    assert new >= pages > 10 * old


def test_a_result_says_whether_its_memory_was_fresh() -> None:
    size = 100 * mmap.PAGESIZE
    result = Result("attention/plain/fwd/float32/1x2x16x8", "eager", samples=(0.1,), outputs=size, bytes=size)
    assert [replace(result, faults=n).memory for n in (None, 0.0, 49.0, 50.0, 101.0)] == ["", "reused", "reused", "fresh", "fresh"]
    assert replace(result, outputs=0, faults=3.0).memory == ""
    known = replace(result, faults=101.0)
    assert Result.from_json(known.to_json()) == known
    assert "101 fresh" in tables.results([known]) and "101 fresh" in [cell.text for cell in rows.cells(known, [known])]
    assert Result.from_json('{"case": "a/b/fwd/float32/8", "provider": "b"}').memory == "", "a line from before faults were counted"
