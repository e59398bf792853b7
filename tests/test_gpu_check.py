"""The script for GPU machines, tried where there is none."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks import providers as _declared  # noqa: F401  (the operations that cases are of)
from benchmarks.commands import tune
from fused_attn_bench.commands import run, selection
from tests import sanitized, simulated_cuda

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_script_on_the_cpu(tmp_path: Path) -> None:
    """From another folder, with a step that cannot run and one that runs; whether its bounds hold is a matter of what else the machine does."""
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [ROOT / "benchmarks" / "gpu_check.sh", "out", "--device", "cpu", "--seconds", "0.1", "--only", "memcheck", "overhead"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    table = done.stdout.splitlines()
    assert [line.split()[0] for line in table[-2:]] == ["memcheck", "overhead"], done.stdout + done.stderr
    assert "it needs a GPU" in table[-2]
    kept = re.search(r"(\d) of 4 bounds hold", table[-1])
    assert kept is not None, table[-1]
    assert done.returncode == (0 if kept[1] == "4" else 1)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["environment"]["torch"] == torch.__version__
    assert [step["verdict"] for step in results["steps"]] == ["not run", "passed" if kept[1] == "4" else "failed"]
    assert len(results["benchmarks"]["overhead"][0]["rows"]) == 4


@pytest.mark.quick
def test_a_step_that_fails_or_hangs(tmp_path: Path) -> None:
    failing = gpu_check.Step("bad", (sys.executable, "-c", "print('x\\n= so it is ='); exit(3)"), 60, gpu_check._last_line)
    outcome = gpu_check.perform(failing, tmp_path)
    assert (outcome.verdict, outcome.detail) == ("failed", "so it is")
    hanging = gpu_check.Step("slow", (sys.executable, "-c", "import time; time.sleep(60)"), 0.2, gpu_check._last_line)
    outcome = gpu_check.perform(hanging, tmp_path)
    assert (outcome.verdict, outcome.detail) == ("failed", "stopped after 0 s")


@pytest.mark.quick
def test_summaries() -> None:
    log = "cuda float16 64 plain\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert gpu_check._sanitizer_line(log) == "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert gpu_check._sanitizer_line("Traceback\nValueError: no\n") == "ValueError: no"
    assert gpu_check._bounds("a  1.00x    yes\nb  2.00x     NO\nc  -\n") == "1 of 2 bounds hold"


@pytest.mark.quick
def test_every_step_is_planned(tmp_path: Path) -> None:
    planned = {step.name: step for step in gpu_check.steps(tmp_path, "cuda", 1.0)}
    assert set(planned) == {
        "parity",
        "hopper",
        "memcheck",
        "racecheck",
        "synccheck",
        *gpu_check.BOUNDS,
        "sweep",
        "first_call",
        "hopper_sweep",
        "tune",
    }
    for part in (*planned["parity"].command, *planned["hopper"].command):
        assert not part.startswith("tests/") or (ROOT / part).is_file()


@pytest.mark.quick
def test_the_sweep_parses(tmp_path: Path) -> None:
    """The command's arguments are ones that ``benchmarks run`` takes: 12 shapes, two masks, two directions."""
    sweep = next(step for step in gpu_check.steps(tmp_path, "cpu", 1.0) if step.name == "hopper_sweep")
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    args = parser.parse_args(sweep.command[4:])
    cases = selection.chosen_cases(args)
    assert len(cases) == 12 * 2 * 2
    assert {len(selection.chosen_providers(args, case)) for case in cases} == {6}
    assert "needs a GPU" in sweep.missing


@pytest.mark.quick
def test_the_step_that_tunes_parses_and_writes_nothing(tmp_path: Path) -> None:
    step = next(step for step in gpu_check.steps(tmp_path, "cpu", 1.0) if step.name == "tune")
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    args = parser.parse_args(step.command[4:])
    assert not args.write and args.json == tmp_path / "tune.json" and "needs a GPU" in step.missing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main([str(tmp_path)])
    assert "torch must see a GPU" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(bool(simulated_cuda.missing()), reason=simulated_cuda.missing() or "never")
def test_what_the_sanitizer_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At one head size here: test_cuda_simulated.py runs these problems at all of them, in any order of warps and copies."""
    monkeypatch.setattr(sanitized, "HEAD_DIMS", sanitized.HEAD_DIMS[:1])
    torch.manual_seed(0)
    sanitized.main(["cuda"], torch.device("cpu"))
    assert len(capsys.readouterr().out.splitlines()) == 2 * 3 + len(sanitized.LENGTHS)
