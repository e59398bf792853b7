"""Measuring: a wrong result gets no speed, a failure is told, throttled samples are dropped, and what is done is kept."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import providers
from fused_attn_bench import compare, harness, planted, roofs, tables, timers
from fused_attn_bench.case import Case
from fused_attn_bench.commands import run, selection
from fused_attn_bench.harness import About, Setup, contest, measure
from fused_attn_bench.history import History
from fused_attn_bench.judge import Results, Verdict
from fused_attn_bench.operation import OPERATIONS, Provider
from fused_attn_bench.problem import Problem, Refusal
from fused_attn_bench.results import Result, load
from fused_attn_bench.timers import Sample, WallTimer

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[1]
CASE = Case.parse("attention/causal/fwd+bwd/float32/1x2x16x8")
SOON = Setup(seconds=0.0, rounds=2, sample=0.0)
RIGHT, WRONG = Verdict(1e-7, 1e-7, ()), Verdict(0.5, 1e-7, ("out", "dq"))


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how fast anything is."""
    monkeypatch.setattr("fused_attn_bench.harness.WARM_UP", 0.0)


@pytest.fixture
def extra(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, providers.Maker], None]:
    """Adds a provider for one test."""

    def add(name: str, maker: providers.Maker) -> None:
        for op in OPERATIONS.values():
            monkeypatch.setitem(op.providers, name, Provider(maker, lambda device: True))

    return add


def test_a_case_is_measured() -> None:
    results = {r.provider: r for r in measure(CASE, ["fused_attn", "eager", "sdpa:cudnn"], SOON, roofs.Roofs(1e10, 1e11))}
    ours = results["fused_attn"]
    assert ours.status == "ok" and len(ours.samples) == 2 and len(ours.telemetry) == 2 and "load" in ours.telemetry[0]
    assert ours.backend == "cpu" and ours.peak and ours.error is not None and ours.plain_error is not None
    assert ours.limit == max(ours.bytes / 1e10, ours.flops / 1e11)
    assert results["sdpa:cudnn"].status == "refused" and not results["sdpa:cudnn"].samples


def test_a_wrong_result_gets_no_speed(extra: Callable[[str, providers.Maker], None]) -> None:
    extra("wrong", lambda problem: lambda *leaves: tuple(t * 1.01 for t in problem.plain(*leaves)))
    wrong, eager = measure(CASE, ["wrong", "eager"], SOON)
    assert wrong.status == "wrong" and not wrong.samples and wrong.median is None
    assert wrong.reason.startswith("before timing: error ") and "breaks the error rule in out" in wrong.reason
    assert eager.status == "ok" and eager.samples


def test_a_result_that_goes_wrong_while_timed_gets_no_speed(extra: Callable[[str, providers.Maker], None]) -> None:
    """What a kernel does that keeps state between calls; a check before timing alone would pass it."""
    calls = itertools.count()

    def maker(problem: Problem) -> providers.Forward:
        return lambda *leaves: tuple(t + (1e-2 if next(calls) > 4 else 0.0) for t in problem.plain(*leaves))

    extra("fading", maker)
    fading, _ = measure(CASE, ["fading", "eager"], replace(SOON, rounds=8))
    assert fading.status == "wrong" and fading.reason.startswith("after timing") and fading.median is None and not fading.samples


def test_nan_is_wrong(extra: Callable[[str, providers.Maker], None]) -> None:
    extra("nan", lambda problem: lambda *leaves: tuple(t * torch.nan for t in problem.plain(*leaves)))
    assert measure(CASE, ["nan"], SOON)[0].status == "wrong"


def test_a_failure_is_told_and_the_others_go_on(extra: Callable[[str, providers.Maker], None]) -> None:
    def fail(problem: Problem) -> providers.Forward:
        raise RuntimeError("out of memory\nlong trace")

    extra("failing", fail)
    failing, eager = measure(CASE, ["failing", "eager"], SOON)
    assert (failing.status, failing.reason) == ("failed", "RuntimeError: out of memory")
    assert eager.status == "ok"


def test_what_cannot_be_checked_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "free_bytes", lambda device: 1000)
    results = measure(CASE, ["fused_attn", "eager"], SOON)
    assert [r.status for r in results] == ["failed", "failed"]
    assert "the check needs about" in results[0].reason


def test_a_refusal_without_a_word_is_shown(extra: Callable[[str, providers.Maker], None]) -> None:
    def refuse(problem: Problem) -> providers.Forward:
        raise Refusal

    extra("silent", refuse)
    (silent,) = measure(CASE, ["silent"], SOON)
    assert "silent refused" in (shown := tables.results([silent])) and shown.endswith(": no reason given")
    assert tables.results([replace(silent, reason="")]) == shown, "as an earlier version kept it"
    assert compare.Comparison(CASE.name, silent, silent).words == "refused: silent: no reason given; silent: no reason given"


class Scripted:
    """A contestant whose samples are written down."""

    def __init__(self, samples: Iterator[Sample], log: list[str], name: str, after: Verdict = RIGHT) -> None:
        self.samples, self.log, self.name, self.after = samples, log, name, after

    def prepare(self) -> About:
        self.log.append(f"prepare {self.name}")
        return About(RIGHT, 0, "", "")

    def sample(self) -> Sample:
        self.log.append(self.name)
        return next(self.samples)

    def check(self) -> Verdict:
        self.log.append(f"check {self.name}")
        return self.after


def test_samples_are_taken_in_turns_between_two_checks() -> None:
    log: list[str] = []
    makers = {name: lambda name=name: Scripted(iter([Sample(1.0)] * 4), log, name) for name in "AB"}
    results = contest(CASE, makers, replace(SOON, rounds=4))
    assert log == ["prepare A", "prepare B", *"ABBAABBA", "check A", "check B"]
    assert [len(r.samples) for r in results] == [4, 4]


def test_a_failure_while_timed_leaves_the_others(extra: Callable[[str, providers.Maker], None]) -> None:
    log: list[str] = []

    def failing() -> Iterator[Sample]:
        yield Sample(1.0)
        raise RuntimeError("out of memory")

    makers = {"A": lambda: Scripted(failing(), log, "A"), "B": lambda: Scripted(iter([Sample(1.0)] * 9), log, "B")}
    first, second = contest(CASE, makers, replace(SOON, rounds=4))
    assert (first.status, first.reason, first.samples) == ("failed", "while timed: RuntimeError: out of memory", ())
    assert second.status == "ok" and len(second.samples) == 4 and "check A" not in log


def test_blocks_with_a_throttled_sample_are_dropped_on_both_sides() -> None:
    hot = {"throttled": ["SwThermalSlowdown"]}
    a = [Sample(t, None, hot if t in (3.0,) else {}) for t in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]
    b = [Sample(t + 10) for t in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]
    makers = {"A": lambda: Scripted(iter(a), [], "A"), "B": lambda: Scripted(iter(b), [], "B")}
    first, second = contest(CASE, makers, replace(SOON, rounds=6))
    assert first.samples == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0) and "throttled through most" in first.reason, (
        "four good ones are fewer than the rounds asked for"
    )
    makers = {"A": lambda: Scripted(iter(a), [], "A"), "B": lambda: Scripted(iter(b), [], "B")}
    taken, note = harness._unthrottled({"A": a, "B": b}, 4)
    assert not note
    assert [s.seconds for s in taken["A"]] == [1.0, 2.0, 5.0, 6.0] and [s.seconds for s in taken["B"]] == [11.0, 12.0, 15.0, 16.0]
    assert second.samples[0] == 11.0


def test_rounds_make_blocks() -> None:
    for rounds in (0, 1, 3):
        with pytest.raises(ValueError, match="rounds must be even"):
            Setup(rounds=rounds)


def test_a_planted_slowdown_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves by a step with each look: a call that takes 100 steps is followed by waiting for 25."""
    clock = itertools.count()
    monkeypatch.setattr(planted.time, "perf_counter", lambda: next(clock))

    def call() -> Results:
        for _ in range(99):
            next(clock)
        return {}

    start = next(clock)
    planted._slower(call, lambda seconds: 0.25 * seconds)()
    assert next(clock) - start == pytest.approx(1 + 100 + 25, abs=3)


def test_the_wall_timer_divides_by_the_repeats() -> None:
    calls = []
    sample = WallTimer()(lambda: calls.append(0), 50)
    assert len(calls) == 50 and sample.host is None and sample.seconds > 0


def test_roofs_are_rates() -> None:
    found = roofs.measure(torch.device("cpu"), torch.float32, WallTimer(), 0.0)
    assert found.copy > 1e8 and found.matmul > 1e8


def arguments(*given: str) -> list[str]:
    return ["run", "--device", "cpu", "--seconds", "0", "--rounds", "2", *given]


def test_run_keeps_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db, lines = tmp_path / "sub" / "h.sqlite", tmp_path / "run.jsonl"
    chosen = (
        "--case",
        CASE.name,
        "softmax/masked/bwd/float32/1x1x4x8",
        "--provider",
        "fused_attn",
        "eager",
        "sdpa",
        "--db",
        str(db),
        "--json",
        str(lines),
    )
    assert cli.main(arguments(*chosen)) == 0
    printed = capsys.readouterr()
    assert str(db) in printed.err
    assert CASE.name in printed.out and "sdpa refused (softmax/masked/bwd" in printed.out
    kept = History(db).results()
    assert len(kept) == 6 and kept == load(lines)
    assert {r.run for r in kept} == {kept[0].run} and kept[0].run in printed.out
    environment = kept[0].environment
    assert environment["torch"] == torch.__version__ and environment["device"] and len(environment["commit"]) >= 7
    assert kept[0].roofs and kept[0].timer == "wall"


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done = run.measure

    def interrupted(case: Case, *rest: object) -> list[Result]:
        if case.mode == "bwd":
            raise KeyboardInterrupt
        return done(case, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "measure", interrupted)
    names = [CASE.name, CASE.name.replace("fwd+bwd", "bwd"), CASE.name.replace("causal", "plain")]
    assert cli.main(arguments("--case", *names, "--provider", "eager", "--db", str(tmp_path / "h.sqlite"))) == 130
    assert "interrupted after 1 of 3 cases" in capsys.readouterr().out
    assert [r.case for r in History(tmp_path / "h.sqlite").results()] == [CASE.name]


def test_ctrl_c_is_answered_before_torch_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Importing torch takes seconds; the command line stands before it, and an import that is interrupted is no traceback."""
    code = "import sys, benchmarks.__main__, fused_attn_bench.__main__; print('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert loaded.strip() == "False"

    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert cli.main(["cases"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_provider_that_changes_folders_moves_no_output(
    tmp_path: Path, extra: Callable[[str, providers.Maker], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def make(problem: Problem) -> Callable[..., Any]:
        os.chdir(tmp_path / "elsewhere")
        return problem.plain

    extra("restless", make)
    assert cli.main(arguments("--case", CASE.name, "--provider", "restless", "--db", "h.sqlite", "--json", "run.jsonl")) == 0
    assert len(load(tmp_path / "run.jsonl")) == len(History(tmp_path / "h.sqlite").results()) == 1


def test_a_wrong_result_sets_the_exit_code(
    tmp_path: Path, extra: Callable[[str, providers.Maker], None], capsys: pytest.CaptureFixture[str]
) -> None:
    extra("wrong", lambda problem: lambda *leaves: tuple(t * 1.01 for t in problem.plain(*leaves)))
    assert cli.main(arguments("--case", CASE.name, "--provider", "wrong", "eager", "--db", str(tmp_path / "h.sqlite"))) == 1
    assert "wrong wrong" in capsys.readouterr().out


def test_providers_of_your_own_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(OPERATIONS["attention"], "providers", dict(OPERATIONS["attention"].providers))
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from benchmarks.providers import provider\n\n@provider('mine', 'attention')\ndef mine(problem):\n    return lambda *leaves: problem.plain(*leaves)\n"
    )
    assert cli.main(arguments("--load", str(mine), "--case", CASE.name, "--provider", "mine", "--db", str(tmp_path / "h.sqlite"))) == 0
    assert "mine" in capsys.readouterr().out
    assert cli.main(arguments("--load", str(tmp_path / "absent.py"), "--db", str(tmp_path / "h.sqlite"))) == 2
    assert "operations and providers are declared in Python files" in capsys.readouterr().err


def chosen(capsys: pytest.CaptureFixture[str], *given: str) -> list[str]:
    assert cli.main(["cases", "--device", "cpu", *given]) == 0
    return capsys.readouterr().out.split()


def test_cases_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    every = chosen(capsys)
    assert chosen(capsys, "--case", "softmax/*") == [n for n in every if n.startswith("softmax")]
    assert chosen(capsys, "--op", "attention", "--mode", "fwd") == [n for n in every if n.startswith("attention") and "/fwd/" in n]
    assert chosen(
        capsys, "--variant", "causal", "--op", "attention", "--dtype", "bfloat16", "--mode", "bwd", "--shape", "1x1x8x8", "1x1x16x8"
    ) == [
        "attention/causal/bwd/bfloat16/1x1x8x8",
        "attention/causal/bwd/bfloat16/1x1x16x8",
    ]
    assert cli.main(["cases", "--device", "cpu", "--case", "nothing/*"]) == 2
    assert "must choose at least one case" in capsys.readouterr().err


BARE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("scipy", "ruptures", "jinja2", "matplotlib", "platformdirs", "plotly", "pydantic", "pynvml"):
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_run_needs_little(tmp_path: Path) -> None:
    """On a machine where nothing can be installed, with --db, only a progress bar is wanted beyond torch."""
    command = [sys.executable, "-c", BARE, *arguments("--case", CASE.name, "--provider", "eager", "--db", str(tmp_path / "h.sqlite"))]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_percentages() -> None:
    assert selection.percentage("2.5%") == 0.025
    for bad in ("3", "x%", "-1%", "inf%", "nan%"):
        with pytest.raises(selection.argparse.ArgumentTypeError, match="a percentage like 3%"):
            selection.percentage(bad)


def test_tables_show_dashes_for_what_is_not_there() -> None:
    results = [Result(CASE.name, "a", samples=(0.002, 0.002), bytes=10**6, peak=2048), Result(CASE.name, "b", "failed", "RuntimeError: no")]
    lines = tables.results(results).splitlines()
    assert lines[2].split() == [CASE.name, "a", "-", "2.00", "ms", "-", "-", "-", "-", "0.5", "-", "-", "2.00", "KiB", "-"]
    assert lines[3] == f"  b failed ({CASE.name}): RuntimeError: no"


def test_results_are_json(tmp_path: Path) -> None:
    result = measure(CASE, ["eager"], SOON)[0]
    assert Result.from_json(result.to_json()) == result
    assert json.loads(result.to_json())["samples"] == list(result.samples)


def test_a_device_waits_until_the_host_has_started_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock for both: the host takes 1 ms for a call, the device 0.2 ms, from when it has nothing older to do."""
    clock = {"host": 0.0, "device": 0.0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            clock["device"] = self.at = max(clock["device"], clock["host"])

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    def call() -> None:
        clock["host"] += 1e-3
        clock["device"] = max(clock["device"], clock["host"]) + 2e-4

    def sleep(cycles: int) -> None:
        clock["device"] = max(clock["device"], clock["host"]) + cycles / timers.CYCLES

    for name, stand_in in {"Event": Event, "_sleep": sleep, "synchronize": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(timers.time, "perf_counter", lambda: clock["host"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: None)
    timer = timers.EventTimer(torch.device("cuda"), cold=False)
    assert timer(call, 1).seconds == pytest.approx(1.2e-3)
    assert timer(call, 4) == Sample(pytest.approx(2e-4), pytest.approx(1e-3))
