"""What a history is asked for: parts of it, by who may only read it, in an older format, with rows that are broken, on a disk that is full."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from benchmarks import large_history
from fused_attn_bench import changes
from fused_attn_bench.commands import outputs
from fused_attn_bench.database import FORMAT
from fused_attn_bench.history import Filter, History
from fused_attn_bench.results import Result, load
from tests.test_bench_results import COMPARED, FLOOR, RESULT, ROOT

SOFTMAX = "softmax/masked/fwd/float32/1x1x4x8"


def month(path: Path) -> History:
    """Ten runs of two cases, a day each, the last two by another commit, and a comparison."""
    history = History(path)
    for day in range(1, 11):
        environment = dict(RESULT.environment, commit="new" if day > 8 else "old")
        one = replace(RESULT, run=f"r{day}", time=f"2026-01-{day:02}T12:00:00+00:00", environment=environment)
        history.add([one, replace(one, case=SOFTMAX)])
    history.add([COMPARED, FLOOR])
    return history


@pytest.fixture
def path(tmp_path: Path) -> Path:
    month(tmp_path / "h.sqlite").close()
    return tmp_path / "h.sqlite"


FILTERS = {
    "nothing": (Filter(), 20),
    "runs": (Filter(runs=("r1", "r3", "r99")), 4),
    "a case": (Filter(cases=(SOFTMAX,)), 10),
    "patterns": (Filter(cases=("attention/*/fwd/*", "nothing*")), 10),
    "a pattern that leaves out": (Filter(cases=("[!s]*",)), 10),
    "since a day": (Filter(since="2026-01-04"), 14),
    "since an hour": (Filter(since="2026-01-04T12:00:01"), 12),
    "before": (Filter(before="2026-01-04T12:00:00"), 6),
    "the last": (Filter(last=3), 6),
    "the last of what is left": (Filter(last=3, before="2026-01-04", cases=(SOFTMAX,)), 3),
    "more than there are": (Filter(last=99), 20),
}


@pytest.mark.parametrize("kind", FILTERS)
def test_filters(kind: str, path: Path) -> None:
    only, count = FILTERS[kind]
    history = History(path)
    found = history.results(only=only)
    assert len(found) == count
    assert sum(len(points) for points in history.points(only).values()) == count
    assert sum(r.results for r in history.overview(only)) == count
    if only.last == 3 and not only.before:
        assert {r.run for r in found} == {"r8", "r9", "r10"}


def test_the_arguments_that_choose_a_part(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "x.jsonl"
    part = ["--since", "2026-01-09T12:00", "--case", "soft*", "none", "--last", "1"]
    assert cli.main(["export", str(lines), "--db", str(path), *part]) == 0
    assert "1 results, 0 comparisons, 0 noise floors" in capsys.readouterr().out
    assert [(r.run, r.case) for r in load(lines) if isinstance(r, Result)] == [("r10", SOFTMAX)]
    assert cli.main(["track", "--db", str(path), *part]) == 0 and "1 series, 0 of them" in capsys.readouterr().out
    assert cli.main(["export", str(lines), "--db", str(path), "--since", "2027-01-01"]) == 2
    assert "must hold results that the arguments choose; it holds none" in capsys.readouterr().err
    for wrong in (["--since", "soon"], ["--last", "0"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["runs", "--db", str(path), *wrong])


def test_the_large_history_is_one_that_can_be_read(tmp_path: Path) -> None:
    """What ``benchmarks.large_history`` times is what a run keeps, with changes to find in it."""
    history, chance = History(tmp_path / "h.sqlite"), random.Random(0)
    for number in range(40):
        history.add(large_history.run_of(number, 40, 10, chance))
    series = history.points()
    assert len(series) == 10 and sum(map(len, series.values())) == len(history.results()) == 400
    made = {key: i for i, key in enumerate((r.machine, r.case, r.provider) for r in history.results("run0000"))}
    changed = {made[key] for key in changes.find(series)}
    assert changed <= {0, 1, 5, 6} and len(changed) >= 3, "two became slower, two drift; one of them does so after five runs"


def test_points_are_those_of_the_results(path: Path) -> None:
    history = History(path)
    history.add([replace(RESULT, run="busy", environment=dict(RESULT.environment, busy="1 busy process"))])
    series = history.points()
    assert set(series) == {(r.machine, r.case, r.provider) for r in history.results()} and len(series) == 3
    points = series[RESULT.machine, SOFTMAX, "eager"]
    assert [p.run for p in points] == [f"r{day}" for day in range(1, 11)]
    assert {p.median for p in points} == {0.2} and points[-1].commit == "new"


def test_runs_show_and_their_json(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "--last", "2", "--db", str(path), "--json", str(tmp_path / "runs.jsonl")]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert (
        [row.split()[0] for row in rows] == ["c1", "r9", "r10"]
        and rows[0].split()[-2:] == ["0", "1"]
        and rows[2].split()[-2:] == ["2", "0"]
    )
    kept = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["id"] for run in kept] == ["c1", "r9", "r10"] and kept[2]["commit"] == "new" and kept[2]["device"] == "a chip"
    assert cli.main(["show", "latest", "--db", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "run r10, 2026-01-10" in shown and SOFTMAX in shown and "device a chip" in shown and "200 ms" in shown
    assert cli.main(["show", "c1", "--db", str(path), "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["comparison"]["verdict"] == "slower", "standard output is JSON and nothing else"
    assert "+101.4%" in printed.err and "+82.2% … +122.6%" in printed.err
    assert cli.main(["show", "r99", "--db", str(path)]) == 2
    assert "got 'r99'. It has" in capsys.readouterr().err


def test_delete(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["delete", "r1", "r99", "--db", str(path)]) == 2
    assert "r1" in History(path).runs(), "an unknown run removes nothing"
    assert cli.main(["delete", "r1", "r1", "c1", "--db", str(path)]) == 0
    assert capsys.readouterr().out == "run r1: 2 results and 0 comparisons removed\nrun c1: 0 results and 1 comparisons removed\n"
    history = History(path)
    assert history.runs() == [f"r{day}" for day in range(2, 11)] and not history.comparisons() and history.floors() == [FLOOR]


@pytest.mark.parametrize(
    ("arguments", "left"),
    [(["--keep", "3"], ["c1", "r8", "r9", "r10"]), (["--keep", "99"], None), (["--before", "2026-01-10"], ["r10"])],
)
def test_prune(arguments: list[str], left: list[str] | None, path: Path) -> None:
    everything = [r.id for r in History(path).overview()]
    assert cli.main(["prune", *arguments, "--db", str(path)]) == 0
    assert [r.id for r in History(path).overview()] == (left or everything)


def test_pruning_makes_the_file_smaller(tmp_path: Path) -> None:
    history = History(tmp_path / "h.sqlite")
    history.add([replace(RESULT, run=f"r{i}", reason="x" * 20_000) for i in range(50)])
    history.close()
    before = (tmp_path / "h.sqlite").stat().st_size
    assert cli.main(["prune", "--keep", "1", "--db", str(tmp_path / "h.sqlite")]) == 0
    assert (tmp_path / "h.sqlite").stat().st_size < before / 10


@pytest.mark.parametrize("arguments", [["--keep", "0"], ["--before", "soon"], [], ["--keep", "1", "--broken"]])
def test_prune_needs_to_know_what(arguments: list[str], path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["prune", *arguments, "--db", str(path)])


BROKEN = {
    "no JSON": {"data": "{"},
    "a time that is none": {"data": RESULT.to_json().replace(RESULT.time, "soon"), "time": "soon"},
    "roofs that are text": {"data": RESULT.to_json().replace("1000000000.0", '"fast"')},
    "a median that is text": {"data": RESULT.to_json().replace("0.1,", '"0.1",'), "median": "fast"},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_blocks_nothing(kind: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As older versions imported them."""
    with sqlite3.connect(path) as connection:
        for column, value in BROKEN[kind].items():
            connection.execute(f"UPDATE results SET {column} = ? WHERE id = 3", [value])
        connection.execute("UPDATE comparisons SET data = '[]'")
    connection.close()
    assert len(History(path).results()) == 19 and not History(path).comparisons()
    for command in (
        ["track"],
        ["report", "--out", str(tmp_path / "x.html")],
        ["export", str(tmp_path / "x.jsonl")],
        ["runs"],
        ["show", "r10"],
    ):
        assert cli.main([*command, "--db", str(path)]) == 0, command
        if command[0] in ("report", "export"):
            assert "1 rows of" in (said := capsys.readouterr().err) and "prune --broken" in said
    assert cli.main(["prune", "--broken", "--db", str(path)]) == 0
    assert capsys.readouterr().out.endswith("2 rows that cannot be read removed\n")
    assert cli.main(["export", str(tmp_path / "x.jsonl"), "--db", str(path)]) == 0
    assert "cannot be read" not in capsys.readouterr().err


# The schema of format 1, as it was written.
FORMAT_1 = """
CREATE TABLE results (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, time TEXT NOT NULL, "commit" TEXT NOT NULL, device TEXT NOT NULL, driver TEXT NOT NULL,
    cuda TEXT NOT NULL, torch TEXT NOT NULL, triton TEXT NOT NULL, threads TEXT NOT NULL,
    timer TEXT NOT NULL, "case" TEXT NOT NULL, provider TEXT NOT NULL, backend TEXT NOT NULL, config TEXT NOT NULL, status TEXT NOT NULL,
    median REAL, data TEXT NOT NULL
);
CREATE INDEX by_case ON results ("case", provider, time);
CREATE INDEX by_run ON results (run);
CREATE TABLE floors (
    machine TEXT NOT NULL, "case" TEXT NOT NULL, provider TEXT NOT NULL, floor REAL NOT NULL, comparisons INTEGER NOT NULL,
    PRIMARY KEY (machine, "case", provider)
);
PRAGMA application_id = 0x46754174;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
"""


def format_1(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(FORMAT_1)
    row = (None, "r1", RESULT.time, "abc", *RESULT.machine, RESULT.case, "eager", "", "", "ok", 0.2, RESULT.to_json())
    connection.execute(f"INSERT INTO results VALUES ({', '.join('?' * len(row))})", row)
    connection.execute("INSERT INTO floors VALUES (?, ?, ?, ?, ?)", (json.dumps(FLOOR.machine), FLOOR.case, "eager", 0.01, 10))
    connection.commit()
    connection.close()


def test_an_older_format_is_migrated(tmp_path: Path) -> None:
    format_1(tmp_path / "h.sqlite")
    history = History(tmp_path / "h.sqlite")
    assert (history.results(), history.floors(), history.comparisons()) == ([RESULT], [FLOOR], [])
    assert history.version == FORMAT
    history.add([COMPARED])
    assert History(tmp_path / "h.sqlite").comparisons() == [COMPARED]


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder that every user can reach; the tests' own cannot be."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
        Path(name).chmod(0o755)


def reading(folder: Path, function: Callable[[], object]) -> str:
    """What a function returns to somebody who may write neither the files in a folder nor new ones."""
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            answer = repr(function())
        except BaseException as error:  # whatever it is, it must not run on as a second test run
            answer = repr(error)
        os.write(start, answer.encode())
        os._exit(0)
    os.close(start)
    with os.fdopen(end) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


readers = pytest.mark.skipif(os.name != "posix", reason="there is no fork")


@readers
def test_a_history_that_can_only_be_read_is_read(locked: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = locked / "h.sqlite"
    month(path).close()
    commands = [["track"], ["export", "-"], ["runs"], ["show", "latest"], ["report", "--out", "/dev/null"]]
    for command in commands:  # what they import may lie where only the owner can read
        assert cli.main([*command, "--db", str(path)]) == 0
    for command in commands:
        assert reading(locked, lambda command=command: cli.main([*command, "--db", str(path)])) == "0", command  # type: ignore[misc]
    capfd.readouterr()
    writing = (
        ["delete", "r1"],
        ["prune", "--keep", "1"],
        ["run", "--device", "cpu", "--case", RESULT.case],
        ["calibrate", "eager", "--case", RESULT.case],
    )
    for command in writing:
        assert reading(locked, lambda command=command: cli.main([*command, "--db", str(path)])) == "2", command  # type: ignore[misc]
        assert "must be writable for this; they can only be read" in capfd.readouterr().err
    assert sorted(p.name for p in locked.iterdir()) == ["h.sqlite"], "nothing is left beside it"


@readers
def test_what_a_killed_run_left_is_read_too(locked: Path, tmp_path: Path) -> None:
    """The newest rows are in a file beside the history, which nobody can move into it."""
    history = month(tmp_path / "h.sqlite")
    for name in ("h.sqlite", "h.sqlite-wal"):
        shutil.copy(tmp_path / name, locked / name)
    assert (locked / "h.sqlite-wal").stat().st_size > 0
    history.close()
    assert reading(locked, lambda: History(locked / "h.sqlite").runs()[-1]) == "'r10'"


@readers
def test_a_reader_sees_what_a_writer_adds(locked: Path) -> None:
    history = month(locked / "h.sqlite")
    history.add([replace(RESULT, run="newest", time="2026-02-01")])
    assert reading(locked, lambda: History(locked / "h.sqlite").runs()[-1]) == "'newest'"
    history.close()


@readers
def test_an_older_format_that_can_only_be_read(locked: Path) -> None:
    format_1(locked / "h.sqlite")
    before = (locked / "h.sqlite").read_bytes()

    def read() -> object:
        history = History(locked / "h.sqlite")
        return history.version, len(history.results()), len(history.floors()), history.comparisons(), len(history.overview())

    assert reading(locked, read) == "(1, 1, 1, [], 1)"
    assert (locked / "h.sqlite").read_bytes() == before


FULL = """
import resource, sys
from pathlib import Path
from benchmarks import __main__ as cli
from benchmarks import large_history
from fused_attn_bench import changes
from fused_attn_bench.commands import run, selection
from fused_attn_bench.results import Result
run.measure = lambda case, *rest: [Result(case.name, "eager", samples=(0.1,), reason="x" * 30_000)]
if sys.argv[1] == "a file that may not grow":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
else:
    opened = selection.history
    def small(*args, **more):
        history = opened(*args, **more)
        history.connection.execute("PRAGMA max_page_count = 60")
        return history
    selection.history = small
cases = [f"softmax/masked/fwd/float32/1x1x4x{i}" for i in range(1, 21)]
sys.exit(cli.main(["run", "--device", "cpu", "--case", *cases, "--provider", "eager", *sys.argv[2:]]))
"""


def done(*command: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, text=True, stderr=subprocess.PIPE, check=False, **more)  # type: ignore[call-overload, no-any-return]


@pytest.mark.skipif(os.name != "posix", reason="there is no limit to a file's size")
@pytest.mark.parametrize(
    ("kind", "says"), [("a file that may not grow", os.strerror(errno.EIO)), ("a full disk", os.strerror(errno.ENOSPC))]
)
def test_a_full_disk_ends_a_run_as_ctrl_c_does(kind: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    ended = done("-c", FULL, kind, "--db", str(path), stdout=subprocess.PIPE)
    assert ended.returncode == 4 and "Traceback" not in ended.stderr, ended.stderr
    kept = History(path).results()
    assert 1 <= len(kept) < 20
    assert f"{says}: '{path}') after {len(kept)} of 20 cases; those are kept" in ended.stdout
    assert f"run {kept[0].run}" in ended.stdout
    assert History(path).add([replace(RESULT, run="r2")]) == 1


NARROW = """
import resource, sys
from benchmarks import __main__ as cli
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
sys.exit(cli.main(["run", "--device", "cpu", "--case", "softmax/masked/fwd/float32/1x1x4x8", *sys.argv[1:]]))
"""


@pytest.mark.skipif(os.name != "posix", reason="there is no limit to a file's size")
def test_a_disk_that_is_full_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = done("-c", NARROW, "--db", str(tmp_path / "h.sqlite"), stdout=subprocess.PIPE)
    assert ended.returncode == 4 and "Traceback" not in ended.stderr, ended.stderr
    assert f"all of the output must be written; got: [Errno {errno.EIO}]" in ended.stderr

    def full(*arguments: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("fused_attn_bench.database.Database._execute", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        History(tmp_path / "new.sqlite")


@pytest.mark.parametrize("command", ["report", "export", "runs"])
def test_what_cannot_be_written_leaves_the_old_file(
    command: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = tmp_path / "made" / "old"
    old.parent.mkdir()
    old.write_text("old")
    old.chmod(0o640)
    options = {"report": ["--out", str(old)], "export": [str(old)], "runs": ["--json", str(old)]}[command]
    with monkeypatch.context() as broken:
        broken.setattr("fused_attn_bench.files.os.fsync", full)
        assert cli.main([command, *options, "--db", str(path)]) == 4
    assert "all of the output must be written; got: [Errno 28]" in capsys.readouterr().err
    assert old.read_text() == "old" and list(old.parent.iterdir()) == [old]
    assert cli.main([command, *options, "--db", str(path)]) == 0
    assert old.read_text() != "old" and list(old.parent.iterdir()) == [old] and old.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.name != "posix", reason="there are no such files")
def test_what_is_no_plain_file_is_written_to(tmp_path: Path) -> None:
    """A pipe, a device and standard output stay what they are, and a link stays a link."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for place in (tmp_path / "pipe", Path("/dev/null"), tmp_path / "link"):
        outputs.write(place, ["x"])
    assert os.read(reader, 9) == b"x\n" and (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "x\n"
    os.close(reader)
    code = "from pathlib import Path; from fused_attn_bench.commands import outputs; outputs.write(Path('/dev/stdout'), ['x']); print('y')"
    with (tmp_path / "out").open("w") as out:
        assert done("-c", code, stdout=out).returncode == 0
    assert "y" in (tmp_path / "out").read_text(), "a new file would have left it behind"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("command", [["cases"], ["cases", "--json", "/dev/full"], ["export", "/dev/full"]])
def test_a_full_disk_under_any_output(command: list[str], path: Path) -> None:
    if "export" in command:
        command = [*command, "--db", str(path)]
    with Path("/dev/full").open("w") as full:
        ended = done("-m", "benchmarks", *command, stdout=full if "/dev/full" not in command else subprocess.PIPE)
    assert ended.returncode == 4
    assert "all of the output must be written; got: [Errno 28]" in ended.stderr and "Traceback" not in ended.stderr


def test_an_output_is_tried_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fused_attn_bench.commands.run.measure", lambda *rest: pytest.fail("measured"))
    nowhere = str(tmp_path / "no" / "x.jsonl")
    assert cli.main(["run", "--device", "cpu", "--case", SOFTMAX, "--json", nowhere, "--db", str(tmp_path / "h.sqlite")]) == 2
    assert f"{nowhere} must be a file that can be written; got: No such file or directory" in capsys.readouterr().err
    there, new = tmp_path / "there", tmp_path / "new"
    there.write_text("old")
    for place in (there, new, None, Path("-")):
        outputs.writable(place)
    assert there.read_text() == "old" and not new.exists()


def test_what_is_removed_added_and_drawn_is_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, lines = tmp_path / "h.sqlite", tmp_path / "h.jsonl"
    month(path).close()
    db = ("--db", str(path), "--json", "-")

    def said(*command: str) -> list[dict[str, object]]:
        assert cli.main([*command, *db]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert cli.main(["export", str(lines), "--db", str(path)]) == 0
    capsys.readouterr()
    newest, *_ = said("runs")[-1:]
    (page,) = said("report", "--out", str(tmp_path / "p.html"))
    assert page == {"page": str(tmp_path / "p.html"), "figures": []}
    (gone,) = said("delete", str(newest["id"]))
    assert gone["run"] == newest["id"] and gone["results"] == newest["results"]
    (back,) = said("import", str(lines))
    assert back["added"] == gone["results"] and back["there"]
    (pruned,) = said("prune", "--keep", "1")
    assert pruned["results"] == 18, "nine days of two cases"
    assert said("prune", "--broken") == [{"broken": 0}]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["runs"], 0),
        (["track"], 0),
        (["track", "--fail-on", "3%"], 3),
        (["export", "-"], 2),
        (["show", "latest"], 2),
        (["compare", "history", "latest"], 2),
    ],
)
def test_reading_makes_no_history(command: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "mistyped.sqlite"
    assert cli.main([*command, "--db", str(path)]) == code
    said = capsys.readouterr().err
    assert f"history: {path}" in said and "there is no such file yet; an empty history is read" in said and ":memory:" not in said
    assert not path.parent.exists()
