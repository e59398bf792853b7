"""The history: nothing that was added is lost, and a file that is not one is left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from fused_attn_bench.database import FORMAT, default_path
from fused_attn_bench.history import History
from fused_attn_bench.results import Compared, Floor, Result, ResultsError, load, to_line

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"device": "a chip", "driver": "1", "cuda": "13", "torch": "2", "triton": "3", "threads": "2", "commit": "abc"}
RESULT = Result(
    "attention/causal/fwd/float32/1x2x16x8", "eager", samples=(0.1, 0.2, 0.4), telemetry=({"load": 1.0},) * 3, roofs=(1e9, 1e10), flops=10, bytes=20,
    run="r1", time="2026-01-01T00:00:00+00:00", timer="wall", environment=ENVIRONMENT, error=1e-7, peak=100,
)  # fmt: skip


def test_what_is_added_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a" / "h.sqlite"
    history = History(path)
    later = replace(RESULT, run="r2", time="2026-01-02T00:00:00+00:00")
    assert history.add([later, RESULT]) == 2
    assert history.add([RESULT]) == 0, "the same again is not added again"
    history.close()
    again = History(path)
    assert again.results() == [RESULT, later] and again.results("r1") == [RESULT] and again.runs() == ["r1", "r2"]


def test_columns_can_be_queried(tmp_path: Path) -> None:
    History(tmp_path / "h.sqlite").add([RESULT])
    row = sqlite3.connect(tmp_path / "h.sqlite").execute(
        'SELECT device, driver, cuda, torch, triton, "commit", "case", backend, config, median FROM results'
    )
    assert row.fetchone() == ("a chip", "1", "13", "2", "3", "abc", RESULT.case, "", "", 0.2)


def test_floors(tmp_path: Path) -> None:
    history = History(tmp_path / "h.sqlite")
    assert history.floor(RESULT.machine, RESULT.case, "eager") is None
    history.set_floor(RESULT.machine, RESULT.case, "eager", 0.01, 10)
    history.set_floor(RESULT.machine, RESULT.case, "eager", 0.02, 20)
    assert history.floor(RESULT.machine, RESULT.case, "eager") == 0.02
    assert history.floor((*RESULT.machine[:-1], "graph"), RESULT.case, "eager") is None


def damaged(path: Path) -> None:
    history = History(path)
    history.add([replace(RESULT, run=f"r{i}", samples=(0.1,) * 200) for i in range(50)])
    history.close()
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8192] = b"\xa5" * 8192
    path.write_bytes(data)


def newer(path: Path) -> None:
    History(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT + 1}")


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE photos (id)")


BAD = {
    "text": (lambda path: path.write_text("not a database, and longer than a header is " * 50), "file is not a database"),
    "damaged": (damaged, "must be undamaged|malformed"),
    "newer": (newer, f"must have format {FORMAT} or older; it has {FORMAT + 1}"),
    "another program's": (foreign, "another program's SQLite file"),
    "a folder": (lambda path: path.mkdir(), "unable to open"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_gives_a_clear_error_and_is_left_alone(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h.sqlite"
    make, complaint = BAD[kind]
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ResultsError, match=complaint) as raised:
        History(path)
    assert str(path) in str(raised.value) and "--db" in str(raised.value)
    assert cli.main(["report", "--db", str(path), "--out", str(tmp_path / "x.html")]) == 2
    assert str(path) in capsys.readouterr().err
    assert (path.read_bytes() if path.is_file() else None) == before


def _write(path: Path, name: str, count: int) -> None:
    history = History(path)
    for i in range(count):
        history.add([replace(RESULT, run=f"{name}-{i}", samples=(0.1 + i,))])


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    path, context = tmp_path / "h.sqlite", multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, name, 40)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert sorted(History(path).runs()) == sorted(f"{name}-{i}" for name in "ab" for i in range(40))


KILLED = """
import sys
from dataclasses import replace
from pathlib import Path
from fused_attn_bench.history import History
from tests.test_bench_results import RESULT
history = History(Path(sys.argv[1]))
history.add([RESULT])
print("one is in", flush=True)
with history.writing():
    history.connection.execute("UPDATE results SET run = 'half'")
    print("another is under way", flush=True)
    import time
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_kill_loses_at_most_what_is_under_way(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "one is in\n" and writer.stdout.readline() == "another is under way\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    history = History(path)
    assert history.results() == [RESULT]
    assert history.add([replace(RESULT, run="r2")]) == 1, "and the file can be written to at once"


def test_a_second_writer_waits(tmp_path: Path) -> None:
    first, second = History(tmp_path / "h.sqlite"), History(tmp_path / "h.sqlite")
    second.connection.execute("PRAGMA busy_timeout = 50")
    with first.writing():
        start = time.monotonic()
        with pytest.raises(ResultsError, match="must be free within 60 s; another process is writing to it"):
            second.add([RESULT])
        assert time.monotonic() - start > 0.04
    assert second.add([RESULT]) == 1


def test_export_says_what_it_wrote_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    History(tmp_path / "a.sqlite").add([RESULT])
    options = ["--db", str(tmp_path / "a.sqlite"), "--json", "-"]
    assert cli.main(["export", str(tmp_path / "out.jsonl"), *options]) == 0
    shown = {"file": str(tmp_path / "out.jsonl"), "results": 1, "comparisons": 0, "noise floors": 0}
    assert json.loads(capsys.readouterr().out) == shown
    assert cli.main(["export", "-", *options]) == 2 and "both are -" in capsys.readouterr().err


def test_export_and_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    History(tmp_path / "a.sqlite").add([RESULT, replace(RESULT, run="r2")])
    lines = tmp_path / "out.jsonl"
    assert cli.main(["export", str(lines), "--db", str(tmp_path / "a.sqlite")]) == 0
    for expected in ("2 records added, 0 were there already", "0 records added, 2 were there already"):
        assert cli.main(["import", str(lines), "--db", str(tmp_path / "b.sqlite")]) == 0
        assert expected in capsys.readouterr().out
    assert History(tmp_path / "b.sqlite").results() == History(tmp_path / "a.sqlite").results()
    assert cli.main(["export", str(lines), "--run", "r9", "--db", str(tmp_path / "a.sqlite")]) == 2
    assert "must hold results of run r9" in capsys.readouterr().err


def line(**changed: object) -> str:
    return json.dumps(json.loads(RESULT.to_json()) | changed)


FLOOR = Floor(RESULT.machine, RESULT.case, "eager", 0.01, 10)
COMPARED = Compared(
    RESULT.case, "eager@a", "eager@b", "slower", medians=(0.1, 0.2), effect=0.7, low=0.6, high=0.8, p=1e-5, launches=8,
    run="c1", time="2026-01-03T00:00:00+00:00", timer="wall", environment=ENVIRONMENT,
)  # fmt: skip
# The line, and what the refusal names.
BAD_LINES = {
    "{": "Expecting property name",
    "[]": "should be an object",
    "null": "should be an object",
    "[" * 100_000: "recursion",
    '{"case": "x"}': "case",
    line(status="fine"): "status",
    line(samples=["fast"]): "samples.0: Input should be a valid number",
    line(samples=[0.1, -0.1]): "samples.1: a time must lie between 1e-12 and 1e9 seconds",
    line(samples=[1e300, 1e300]): "samples.0: a time must lie between",
    line(samples=[float("nan")]): "NaN is no number",
    line(samples=[True]): "samples.0",
    line(time=5): "time: Input should be a valid string",
    line(time=None): "time",
    line(time="yesterday"): "time: Invalid isoformat",
    line(time="2026-01-01T00:00:00+02:00"): "time: a time must be in UTC",
    line(time=""): "its run and its time",
    line(run=""): "its run and its time",
    line(environment=None): "environment",
    line(environment={"device": 1}): "environment.device: Input should be a valid string",
    line(case=7): "case",
    line(case="attention/tree/fwd/float32/1x-1"): "case: a case is named op/variant/mode/dtype",
    line(provider=""): "provider",
    line(host=["a"]): "host.0",
    line(roofs=[0.0, 0.0]): "roofs.0: it must be greater than 0",
    line(roofs=[1.0]): "roofs: there must be two roofs",
    line(peak="1 MB"): "peak: Input should be a valid integer",
    line(flops=-1): "flops",
    line(metrics={"flops": "many"}): "metrics.flops",
    line(telemetry=[float("inf")]): "Infinity is no number",
    line(warp=1): "warp: this field is unknown; a newer version may have written it",
    to_line(FLOOR).replace("0.01", "-0.01"): "floor: it must not be negative",
    to_line(COMPARED).replace('"c1"', "1"): "run",
    to_line(COMPARED).replace("0.7", "800.0"): "effect: a log ratio must lie between",
    to_line(COMPARED).replace("[0.1, 0.2]", "[0.1]"): "medians.1",
    to_line(COMPARED).replace('"comparison"', '"opinion"'): "opinion: this field is unknown",
}


@pytest.mark.parametrize("text", BAD_LINES, ids=[f"{i} {named}" for i, named in enumerate(BAD_LINES.values())])
def test_a_bad_line_adds_nothing(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(RESULT.to_json() + "\n" + text + "\n")
    with pytest.raises(ResultsError, match="line 2: a line must hold one result as JSON") as raised:
        load(path)
    assert BAD_LINES[text] in str(raised.value) and len(str(raised.value)) < 400
    assert cli.main(["import", str(path), "--db", str(tmp_path / "h.sqlite")]) == 2
    assert f"{path}, line 2" in capsys.readouterr().err
    assert not (tmp_path / "h.sqlite").exists()


def test_lines_come_back_as_what_they_were(tmp_path: Path) -> None:
    """Also those that older versions wrote, with fewer fields and nothing but results."""
    path = tmp_path / "all.jsonl"
    records = [RESULT, COMPARED, FLOOR]
    path.write_text("".join(f"{to_line(r)}\n" for r in records) + "\n")
    assert load(path) == records
    old = {"case": RESULT.case, "provider": "eager", "samples": [0.1], "run": "r0", "time": "2025-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(old))
    (read,) = load(path)
    assert isinstance(read, Result) and read.samples == (0.1,) and read.roofs == () and read.environment == {}


def test_comparisons_and_floors_travel_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, lines = History(tmp_path / "a.sqlite"), tmp_path / "out.jsonl"
    first.add([RESULT, COMPARED, FLOOR])
    assert cli.main(["export", str(lines), "--db", str(tmp_path / "a.sqlite")]) == 0
    assert "1 results, 1 comparisons, 1 noise floors written" in capsys.readouterr().out
    second = History(tmp_path / "b.sqlite")
    second.set_floor(FLOOR.machine, FLOOR.case, "eager", 0.05, 2)
    for added in (3, 0):
        assert cli.main(["import", str(lines), "--db", str(tmp_path / "b.sqlite")]) == 0
        assert f"{added} records added, {3 - added} were there already" in capsys.readouterr().out
    assert (second.results(), second.comparisons(), second.floors()) == ([RESULT], [COMPARED], [FLOOR])
    assert second.add([replace(FLOOR, floor=0.5, comparisons=9)]) == 0, "the floor that rests on more comparisons stays"
    assert second.floor(FLOOR.machine, FLOOR.case, "eager") == 0.01


def test_unreadable_lines(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="must be a text file"):
        load(tmp_path / "absent.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultsError, match="must be a text file"):
        load(tmp_path / "binary")


def test_where_the_history_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSED_ATTN_BENCHMARKS", str(tmp_path / "mine"))
    assert default_path() == tmp_path / "mine"
    monkeypatch.delenv("FUSED_ATTN_BENCHMARKS")
    assert ROOT not in default_path().parents, "a history in the source tree would be lost with it, or be committed"


def test_median_and_spread() -> None:
    assert Result("c", "p").median is None and Result("c", "p").spread is None and Result("c", "p").limit is None
    even = Result("c", "p", samples=(1.0, 2.0, 3.0, 4.0, 5.0))
    assert even.median == 3.0 and even.spread == pytest.approx(0.5)
