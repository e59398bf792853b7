"""One commit's fused_attn in a process of its own, measured by this checkout's tools: a line of JSON asks, a line of JSON answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import providers
from benchmarks.cases import Case, Problem
from benchmarks.environment import ROOT
from benchmarks.harness import About, Local, Setup, judge
from benchmarks.providers import Refusal
from benchmarks.timers import Sample
from fused_attn import UnsupportedError
from fused_attn.testing.workload import Verdict

# fused_attn comes from the commit's tree, but for fused_attn.testing, which measures: both sides must be measured by the same code.
BOOT = """
import sys, types
tree, here, *files = sys.argv[1:]
sys.path[0] = tree
import fused_attn
if not fused_attn.__file__.startswith(tree):
    sys.exit(f"{tree} has no fused_attn; {fused_attn.__file__} was found instead")
testing = types.ModuleType("fused_attn.testing")
testing.__path__ = [here + "/fused_attn/testing"]
sys.modules["fused_attn.testing"] = testing
sys.path[0] = here
from benchmarks.worker import serve
serve(files)
"""

# Alike on both sides, against what makes one process on a CPU slower than its twin. Memory stays in the heap instead of being given back
# and faulted in again, which some processes do on each call and others never (identical code differed by up to 25 %). And threads that
# wait give their core up after some 50 microseconds, since the other process's turn comes next (a spread of 2 % instead of 6 % within a launch).
CALM = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**40), "GOMP_SPINCOUNT": "10000"}


class Process:
    """A running worker.

    Args:
        tree: a checkout whose fused_attn is measured.
        name: of the commit, for messages.
        files: Python files that add providers.
    """

    def __init__(self, tree: Path, name: str, files: Sequence[Path] = ()) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | CALM
        self.process = subprocess.Popen(
            [sys.executable, "-c", BOOT, str(tree), str(ROOT), *(str(path.resolve()) for path in files)],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def ask(self, what: str, **arguments: Any) -> Any:
        """The worker's answer.

        Raises:
            Refusal: the provider cannot compute the case.
            RuntimeError: it failed, or its process ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with code {self.process.wait()}: {self._last_words()}")
        answer = json.loads(line)
        if "refused" in answer:
            raise Refusal(answer["refused"])
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer["value"]

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with suppress(BrokenPipeError):  # what it never read is of no use any more
                    stream.close()


class Remote:
    """A provider in a worker's process, which holds one for each place."""

    def __init__(self, process: Process, case: Case, provider: str, setup: Setup, place: int = 0) -> None:
        self.process, self.place = process, place
        options = {"device": str(setup.device), "sample": setup.sample, "timer": setup.timer, "cold": setup.cold}
        process.ask("bind", place=place, case=case.name, provider=provider, setup=options)

    def prepare(self) -> About:
        verdict, *rest = self.process.ask("prepare", place=self.place)
        return About(_verdict(verdict), *rest)

    def sample(self) -> Sample:
        return Sample(*self.process.ask("sample", place=self.place))

    def check(self) -> Verdict:
        return _verdict(self.process.ask("check", place=self.place))


def _verdict(values: list[Any]) -> Verdict:
    error, plain_error, broken = values
    return Verdict(error, plain_error, tuple(broken))


def serve(files: Sequence[str]) -> None:
    """Runs files that add providers, then answers until standard input ends."""
    for path in files:
        providers.load(Path(path))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not mix with the answers
    held: dict[int, Local] = {}
    for line in sys.stdin:
        try:
            answer = {"value": _answer(json.loads(line), held)}
        except (Refusal, UnsupportedError) as refusal:
            answer = {"refused": str(refusal)}
        except Exception as error:  # the other side decides what a failure means
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(request: dict[str, Any], held: dict[int, Local]) -> Any:
    what, place = request["what"], request["place"]
    if what == "bind":
        held.pop(place, None)
        options = request["setup"]
        setup = Setup(torch.device(options.pop("device")), **options)
        case = Case.parse(request["case"])
        twin = next((local for local in held.values() if local.problem.case == case), None)
        problem = Problem(case, setup.device) if twin is None else twin.problem
        held[place] = Local(request["provider"], problem, judge(problem) if twin is None else twin.judge, setup)
        return None
    local = held[place]
    if what == "prepare":
        about = local.prepare()
        return _values(about.verdict), about.peak, about.backend, about.config, about.outputs
    if what == "sample":
        local.call()  # the other process had the caches and, on the CPU, its threads may still spin
        return tuple(local.sample())
    return _values(local.check())


def _values(verdict: Verdict) -> tuple[float, float, tuple[str, ...]]:
    return verdict.error, verdict.plain_error, verdict.broken
