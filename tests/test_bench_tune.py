"""``python -m benchmarks tune`` with a machine that answers what a test says, and the tables that it writes."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks.commands import tune
from benchmarks.tuning import calls, machine, record, worker
from benchmarks.tuning.candidates import Entry, candidates, entries, shown
from benchmarks.tuning.machine import Held, Local, Piece, Times
from fused_attn import testing
from fused_attn.backends.triton.hopper import tiles
from fused_attn.backends.triton.hopper.tiles import BackwardConfig, ForwardTiles, RowTiles
from tests import hopper_counts

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[1]
FORWARD, BACKWARD = Entry("forward", 64, "plain"), Entry("backward", 64, "plain")
TODAY = ForwardTiles(3, 128, 2, 160, 2, True)
OTHER, THIRD = ForwardTiles(2, 128, 2, 240, 2, True), ForwardTiles(2, 128, 3, 240, 2, True)


class Scripted:
    """Relative times and reasons by tiles; everything else is right, and as fast as the present ones.

    Args:
        speeds: factors of a candidate's times.
        reasons: why candidates may not be chosen.
        again: the factor of the present tiles when they are timed again.
        spread: of every second round.
    """

    def __init__(self, speeds: dict[Any, float], reasons: dict[Any, str] | None = None, again: float = 1.0, spread: float = 0.0) -> None:
        self.speeds, self.reasons, self.again, self.spread = speeds, reasons or {}, again, spread
        self.timed: list[Any] = []
        self.allowed: list[Any] = []
        self.local = 0

    def hold(self, pieces: Sequence[Piece], tell: Callable[[Piece, Held], None]) -> None:
        self.allowed += [(piece.tiles, piece.most) for piece in pieces]
        for piece in pieces:
            tell(piece, Held(self.reasons.get(piece.tiles, ""), self.local))

    def time(self, entry: Entry, chosen: Sequence[Any], seconds: float) -> dict[str, Times]:
        self.timed += chosen
        factors = [self.speeds.get(t, 1.0) for t in chosen[:-1]] + [self.again]
        rounds = [1 + self.spread * (round // 2 % 2) for round in range(20)]
        return {call.name: [[0.002 * f * (r if i else 1.0) for r in rounds] for i, f in enumerate(factors)] for call in calls.timed(entry)}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tables, which the command writes."""
    copy = tmp_path / "tiles.json"
    copy.write_text(tiles.PATH.read_text())
    monkeypatch.setattr(tiles, "PATH", copy)
    return copy


def run(scripted: Scripted, *options: str) -> int:
    parser = tune.argparse.ArgumentParser()
    tune.add_arguments(parser)
    return tune.run(parser.parse_args(["--device", "cpu", *options]), scripted)


def chosen_by(scripted: Scripted, entry: Entry = FORWARD) -> Any:
    found = tune.hold(scripted, [entry], "right")[entry]
    best = tune.judged(scripted, entry, found, 1.0).best
    return best and best.tiles


def test_the_fastest_is_chosen_where_it_is_faster_by_more_than_the_noise() -> None:
    assert chosen_by(Scripted({OTHER: 0.95, THIRD: 0.93})) == THIRD
    assert chosen_by(Scripted({OTHER: 0.992, THIRD: 1.2})) == TODAY  # less than 1 %
    assert chosen_by(Scripted({OTHER: 0.95}, again=0.97)) == TODAY  # the present tiles differ from themselves by 3 %
    assert chosen_by(Scripted({OTHER: 0.95}, again=0.99)) == OTHER
    assert chosen_by(Scripted({OTHER: 0.95}, spread=0.3)) == TODAY  # rounds that differ by 30 %


def test_what_is_wrong_does_not_compile_or_spills_is_never_timed(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    scripted = Scripted({OTHER: 0.5, THIRD: 0.6}, {OTHER: "wrong: out", THIRD: "spills: 9 accesses"})
    before = file.read_text()
    assert run(scripted, "--table", "forward", "--entry", "64 plain", "--write") == 0
    assert not {OTHER, THIRD} & set(scripted.timed)
    printed = capsys.readouterr().out
    assert f"refused: {shown(OTHER)}: wrong: out" in printed and f"refused: {shown(THIRD)}: spills: 9 accesses" in printed
    assert tiles.read(file.read_text()) == tiles.read(before)


def test_what_spills_no_more_than_the_present_tiles_may_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    scripted = Scripted({})
    scripted.local = 2
    tune.hold(scripted, [FORWARD], "right")
    assert scripted.allowed == [(TODAY, None), *((t, 2) for t in candidates(FORWARD)[1:])]
    assert f"{shown(TODAY)}: right, 2 accesses to local memory in a trip" in capsys.readouterr().out


def test_nothing_is_timed_against_present_tiles_that_are_wrong(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    scripted, before = Scripted({OTHER: 0.5}, {TODAY: "wrong: out"}), file.read_text()
    assert run(scripted, "--table", "forward", "--entry", "64 plain", "--write") == tune.WRONG
    assert scripted.timed == [] and file.read_text() == before
    assert "tiles of forward 64 plain: wrong: out" in capsys.readouterr().out


def test_an_entry_that_fails_while_it_is_timed_ends_no_other(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    class Failing(Scripted):
        def time(self, entry: Entry, chosen: Sequence[Any], seconds: float) -> dict[str, Times]:
            if entry == FORWARD:
                raise RuntimeError("out of memory\nand so on")
            return super().time(entry, chosen, seconds)

    before = file.read_text()
    assert run(Failing({}), "--entry", "64 plain", "--write") == tune.WRONG
    assert (
        "tiles of forward 64 plain: stopped while candidates were timed: RuntimeError: out of memory ... and so on\n"
        in capsys.readouterr().out
    )
    written = json.loads(file.read_text())
    assert written["forward"] == json.loads(before)["forward"] and "measured" in written["backward"]["64 plain"]


def test_what_is_chosen_is_written_with_what_it_showed(file: Path, tmp_path: Path) -> None:
    faster = BackwardConfig(64, 3, 240, True, False)
    report = tmp_path / "all.json"
    assert run(Scripted({OTHER: 0.9, faster: 0.8}), "--entry", "64 plain", "--write", "--json", str(report)) == 0
    written = tiles.read(file.read_text())
    assert written == tiles.TABLES | {
        "forward": tiles.FORWARD | {FORWARD.key: OTHER},
        "backward": tiles.BACKWARD | {BACKWARD.key: faster},
    }
    entry = json.loads(file.read_text())["backward"]["64 plain"]
    assert entry["measured"]["ratio"] == 0.8 and entry["measured"]["torch"] == torch.__version__
    assert set(entry["measured"]["milliseconds"]) == {call.name for call in calls.timed(BACKWARD)}
    assert shown(BACKWARD.present) in entry["why"]
    kept = json.loads(file.read_text())["rows"]["64 plain"]
    assert (
        kept["why"] == json.loads(record.text(json.loads(file.read_text())))["rows"]["64 plain"]["why"] and kept["measured"]["ratio"] == 1.0
    )
    assert [e["chosen"] for e in json.loads(report.read_text())["entries"]][:2] == [OTHER._asdict(), faster._asdict()]


def test_the_file_is_in_the_writers_form() -> None:
    assert record.text(json.loads(tiles.PATH.read_text())) == tiles.PATH.read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("rows"), "the tables must be forward, backward, rows; got forward, backward"),
        (lambda t: t["forward"].pop("64 heavy"), "forward must have entries of 64 heavy as well"),
        (lambda t: t["forward"].update({"96 plain": {}}), "forward must have entries of .*; got '96 plain'"),
        (lambda t: t["rows"]["64 plain"].pop("why"), "rows 64 plain must have tiles, a reason"),
        (lambda t: t["rows"]["64 plain"].update(speed=1), "rows 64 plain must have tiles, a reason"),
        (lambda t: t["forward"]["64 plain"]["tiles"].pop("stages"), "must have consumers, keys, stages, registers, ahead, own_out; got"),
        (lambda t: t["forward"]["64 plain"]["tiles"].update(warps=4), "must have consumers, keys, stages, registers, ahead, own_out; got"),
        (lambda t: t["forward"]["64 plain"]["tiles"].update(consumers=4), "consumers must be one of 2, 3; got 4"),
        (lambda t: t["forward"]["64 plain"]["tiles"].update(registers=168), "registers must be one of 24, .*, 160; got 168"),
        (lambda t: t["forward"]["64 plain"]["tiles"].update(own_out=1), "own_out must be one of False, True; got 1"),
        (lambda t: t["backward"]["64 plain"]["tiles"].update(stages=1, early=True), "stages must be at least 2 with early; got 1"),
        (lambda t: t["forward"]["128 bias"]["tiles"].update(ahead=2), "ahead must be 1 without own_out; got 2"),
        (lambda t: t["rows"]["64 plain"].update(tiles=None), "must have consumers, keys, stages, registers; got None"),
        (lambda t: t.update(rows=[]), "must hold tables of entries by name"),
        (lambda t: t["backward"]["128 plain"]["tiles"].update(block_q=128), "232448 bytes of shared memory; these take 300032"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "changed",
)
def test_wrong_data_is_refused(change: Callable[[dict[str, Any]], object], said: str) -> None:
    data = json.loads(tiles.PATH.read_text())
    change(data)
    with pytest.raises(ValueError, match=said):
        tiles.read(json.dumps(data))


def test_a_file_that_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tiles\.json: it must hold JSON; got Expecting"):
        tiles.read("{")


def test_a_worker_sees_launches_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything that ``launch.start`` and ``launch.compile_for`` may be given, and what they return."""
    from fused_attn.backends.triton.hopper import launch

    given: list[Any] = []
    for name in ("start", "compile_for"):
        arguments = inspect.signature(getattr(launch, name)).parameters
        monkeypatch.setattr(launch, name, lambda *args, name=name: given.append((name, len(args))) or name)
        watched = worker.Watched("forward")
        kernel = SimpleNamespace(fn=SimpleNamespace(__name__="another"))
        seen = {"start": watched.started, "compile_for": watched.compile_for}[name]
        assert seen(kernel, *range(len(arguments) - 1)) == name
        assert given.pop() == (name, len(arguments))


def kind_of(configuration: hopper_counts.Configuration) -> str:
    """What kind of call of its table a counted configuration is."""
    what, plain = configuration.what, configuration.what in (*hopper_counts.MASKS, "in order", "sinks")
    if configuration.direction == "backward":
        return "plain" if plain else "modified"
    return "bias" if what == "bias" else "heavy" if what in ("dense", "dropout") else "plain"


def test_shared_memory_is_what_the_compiler_takes() -> None:
    """Of every counted configuration, never more than the rule says; and by the rule's parts, not much less."""
    taken: dict[Entry, dict[str, int]] = {}
    for name, counts in hopper_counts.recorded()["3.7"].items():
        c = hopper_counts.CONFIGURATIONS[name]
        taken.setdefault(Entry(c.direction, max(c.padded), kind_of(c)), {})[c.what] = counts["shared"]
    assert set(taken) == set(entries("forward") + entries("backward"))
    for entry, found in taken.items():
        rule, most = entry.present.shared(entry.key), max(found.values())
        if entry.kind == "modified":  # a bias and dropout together, which no configuration has
            most = found["bias"] + found["dropout"] - found["softcap"]
        assert 0 <= rule - most <= 3072, (entry, rule, found)


def test_candidates_are_those_that_fit() -> None:
    for entry in entries():
        found = candidates(entry)
        assert found[0] == entry.present and len(set(found)) == len(found)
        assert not [t for t in found if tiles.complaint(entry.table, entry.key, t)]
    wide = candidates(Entry("forward", 128, "plain"))
    assert ForwardTiles(2, 128, 3, 240, 1, False) in wide and ForwardTiles(2, 128, 3, 240, 1, True) not in wide
    assert not [t for t in wide if (t.keys, t.stages) == (128, 4)]
    assert candidates(Entry("rows", 256, "plain")) == [RowTiles(2, 64, 2, 240), RowTiles(2, 64, 3, 240)]


def test_entries_by_name() -> None:
    assert entries("backward", ["64 plain"]) == [BACKWARD]
    assert len(entries(None, ["64 plain"])) == 3
    with pytest.raises(ValueError, match=r"an entry must be one of 64 plain, .*; got 65 plain"):
        entries("forward", ["65 plain"])


def test_without_a_gpu_of_hoppers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--device", "cpu"]) == 2
    assert "timed on a GPU of compute capability 9.0" in capsys.readouterr().err


def test_a_planted_fault_is_found_by_the_error_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever computes with the candidate's tiles in force is held to float64; here the cpu backend, with an output 5 % too large for one candidate."""
    monkeypatch.setattr(calls, "BACKEND", "cpu")
    attend = testing.call

    def planted(problem: Any, backend: str) -> Any:
        out, aux = attend(problem, backend)
        return out * (1.05 if tiles.FORWARD[FORWARD.key] == OTHER else 1.0), aux

    monkeypatch.setattr(testing, "call", planted)
    monkeypatch.setattr(
        calls, "_normal", lambda size, device, seed: torch.randn(size, generator=torch.Generator().manual_seed(seed)).bfloat16()
    )
    call = replace(calls.checked(FORWARD)[1], batch=1, heads=2, kv_heads=2, lengths=(33, 57))
    with calls.using(FORWARD, THIRD):
        assert calls.wrong(FORWARD, call, torch.device("cpu")) == ""
    with calls.using(FORWARD, OTHER):
        assert calls.wrong(FORWARD, call, torch.device("cpu")).startswith("out: error ")
    assert FORWARD.present == TODAY


# Stands for a worker: two consumers end it, four stages make it answer and end, everything else is right.
WORKER = f"""
import json, os, sys
for line in sys.stdin:
    *_, (consumers, keys, stages, *_), most = json.loads(line)
    if consumers == 2:
        print("CUDA error: an illegal access", file=sys.stderr, flush=True)
        os._exit(9)
    print(json.dumps([{machine.LAST!r} + "no room" if stages == 4 else "", most]), flush=True)
    if stages == 4:
        break
"""


def test_a_candidate_that_ends_its_process_ends_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROGRAM", ("-c", WORKER))
    found: list[Held] = []
    pieces = [Piece(FORWARD, t, 3) for t in (TODAY, OTHER, TODAY._replace(stages=4), TODAY._replace(stages=3), THIRD)]
    Local(torch.device("cpu"), jobs=1).hold(pieces, lambda piece, held: found.append(held))
    ended = "its process ended with 9: CUDA error: an illegal access"
    assert found == [Held("", 3), Held(ended, 0), Held("no room", 3), Held("", 3), Held(ended, 0)]


def test_times_are_taken_in_turns_with_the_tiles_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every call, as many rounds of each, and the last ones are the present tiles again."""
    seen: list[Any] = []
    monkeypatch.setattr(calls, "function", lambda entry, call, device: lambda: seen.append(tiles.FORWARD[entry.key]))
    monkeypatch.setattr(machine, "SAMPLE", 0.0)
    taken = Local(torch.device("cpu"), jobs=1).time(FORWARD, [TODAY, OTHER, TODAY], 0.0)
    assert list(taken) == [call.name for call in calls.timed(FORWARD)]
    assert {len(samples) for times in taken.values() for samples in times} == {machine.ROUNDS}
    last = seen[-3 * machine.ROUNDS :]
    assert last == [TODAY, OTHER, TODAY] * machine.ROUNDS
    assert FORWARD.present == TODAY
    assert math.isfinite(sum(taken["full 2048"][0]))


def test_an_error_says_what_it_stems_from() -> None:
    error = RuntimeError("at 34:8:\n  the source")
    error.__cause__ = AttributeError("a layout has no such thing")
    assert worker.said(error) == "AttributeError: a layout has no such thing"
    assert worker.said(ValueError("at 3:4:\nthe source\ntoo large")) == "ValueError: at 3:4: ... too large"


# Every call of every entry, small and large ones made small, with nothing compiled; prints what was launched with other tiles than the entry's.
REACH = """
from dataclasses import replace
from unittest import mock
import torch
from benchmarks.tuning import calls, worker
from benchmarks.tuning.candidates import entries
from fused_attn.backends import triton
from fused_attn.backends.triton.hopper import launch
from tests import hopper_counts
hopper_counts.prepare()
triton._interpreted = lambda: True
count = 0
for entry in entries():
    watched, planted = worker.Watched(entry.table), entry.present._replace(stages=7)
    watched.start = lambda *args: None
    for call in [*calls.checked(entry), *calls.timed(entry)]:
        small = replace(call, batch=1, lengths=tuple(min(n, 264) for n in call.lengths))
        watched.launched.clear()
        with calls.using(entry, planted), mock.patch.object(launch, "start", watched.started):
            calls.function(entry, small, torch.device("cpu"))()
        count += 1
        if watched.launched != {planted}:
            print(entry.table, entry.name, call.name, watched.launched)
print(count)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_call_reaches_its_entry() -> None:
    """In a process that compiles Hopper's kernels, where launches are looked at instead."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", REACH], capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    every = sum(len(calls.checked(entry)) + len(calls.timed(entry)) for entry in entries())
    assert done.stdout.splitlines() == [str(every)], done.stdout + done.stderr[-2000:]
