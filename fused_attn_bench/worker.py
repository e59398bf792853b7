"""One commit's code in a process of its own, measured by the installed engine: a line of JSON asks, a line of JSON answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any, TextIO

import torch

from fused_attn_bench.case import Case
from fused_attn_bench.harness import About, Local, Setup
from fused_attn_bench.judge import Verdict
from fused_attn_bench.operation import case_of, load, operation, problem_of
from fused_attn_bench.problem import DeclarationError, Refusal
from fused_attn_bench.project import Project, git
from fused_attn_bench.text import first_line, line_of
from fused_attn_bench.timers import Sample

ENGINE = Path(__file__).resolve().parent
# The code under test comes from the commit's tree, and nothing of it from the working copy; the engine, which measures, and the packages that
# declare what is measured come from where they were started, so that both sides are measured alike. Their folders are no path to import from:
# the packages' own code could come from there as well.
# Whatever else prints or reads, at import already and from C, must not mix with questions and answers.
BOOT = r"""
import importlib.util, os, sys
from pathlib import Path
questions, answers = os.dup(0), os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
tree, repository, *packages = sys.argv[1].split("\n")
sys.path[:1] = [str(Path(tree) / "src"), tree]
for path in packages:
    name = Path(path).name
    spec = importlib.util.spec_from_file_location(name, Path(path) / "__init__.py", submodule_search_locations=[path])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
from fused_attn_bench.worker import loaded, serve
loaded(Path(tree), Path(repository), packages, sys.argv[2:])
serve(os.fdopen(questions), os.fdopen(answers, "w"))
"""

# Alike on both sides, against what makes one process on a CPU slower than its twin. Memory stays in the heap instead of being given back
# and faulted in again, which some processes do on each call and others never (identical code differed by up to 25 %). And threads that
# wait give their core up after some 50 microseconds, since the other process's turn comes next (a spread of 2 % instead of 6 % within a launch).
CALM = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**40), "GOMP_SPINCOUNT": "10000"}


# Seconds between two looks whether the process that asks is still there.
PATIENCE = 5.0


class Process:
    """A running worker.

    Args:
        tree: a checkout whose code is measured.
        name: of the commit, for messages.
        project: whose declarations are loaded as they are here.
        files: Python files that declare more; one that the tree has is taken from it.
        absent: submodules that the tree lacks, named where something cannot be found.
    """

    def __init__(self, tree: Path, name: str, project: Project, files: Sequence[Path] = (), absent: Sequence[str] = ()) -> None:
        self.name, self.here, self.absent = name, tree == project.repository, absent
        packages = [ENGINE, *project.packages]
        files = [*project.files, *(_within(tree, project.repository, path) for path in files)]
        places = "\n".join(map(str, (tree, project.repository, *packages)))
        self.command, self.tree, self.starts = [sys.executable, "-c", BOOT, places, *map(str, files)], tree, 0
        self._start()

    def _start(self) -> None:
        self.starts, self.ready = self.starts + 1, False
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(
            self.command,
            cwd=self.tree,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | CALM,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for who measures: a worker that it ended would look like a commit that crashed
        )

    def revived(self) -> int:
        """How often it was started, now that it runs: what a provider ended goes on without it. One that could not begin is left as it is."""
        if self.ready and self.process.poll() is not None:
            self.close()
            self._start()
        return self.starts

    def ask(self, what: str, **arguments: Any) -> Any:
        """The worker's answer.

        Raises:
            Refusal: the provider cannot compute the case.
            DeclarationError: the working copy's operation is not declared as it must be.
            RuntimeError: it failed, or its process ended.
        """
        if not self.ready:
            self._answered({"what": "begin"})
            self.ready = True
        answer = self._answered({"what": what, **arguments})
        if "refused" in answer:
            raise Refusal(answer["refused"])
        if "declared" in answer and self.here:
            raise DeclarationError(answer["declared"])
        # An earlier commit's declaration cannot be mended: that side has failed, and the others are measured.
        if "failed" in answer or "declared" in answer:
            raise RuntimeError(self._explained(answer.get("failed") or answer["declared"]))
        return answer["value"]

    def _answered(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with code {self.process.wait()}: {self._explained(self._last_words())}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _explained(self, said: str) -> str:
        if not self.absent or not re.search(r"ModuleNotFoundError|ImportError|FileNotFoundError", said):
            return said
        names = " ".join(self.absent)
        return f"{said}; submodules of {self.name} must be in the working copy's repository, which lacks {names}. Run git submodule update --init --recursive."

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
    """A provider in a worker's process, which holds one for each place. Where another one ended the process, a new one goes on with it."""

    def __init__(self, process: Process, case: Case, provider: str, setup: Setup, place: int = 0) -> None:
        self.process, self.place = process, place
        options = {"device": str(setup.device), "sample": setup.sample, "timer": setup.timer, "cold": setup.cold}
        self.about = {"case": case.name, "provider": provider, "setup": options}
        self._bind()

    def _bind(self) -> None:
        self.start = self.process.revived()
        self.process.ask("bind", place=self.place, **self.about)

    def prepare(self) -> About:
        verdict, *rest = self.process.ask("prepare", place=self.place)
        return About(_verdict(verdict), *rest)

    def _ask(self, what: str) -> Any:
        if self.start != self.process.revived():
            self._bind()
            self.prepare()
        return self.process.ask(what, place=self.place)

    def sample(self) -> Sample:
        return Sample(*self._ask("sample"))

    def check(self) -> Verdict:
        return _verdict(self._ask("check"))


def _within(tree: Path, repository: Path, path: Path) -> Path:
    """A file of the repository as the tree has it, also where it had another name then, or as it is here where the tree has none."""
    path = path.resolve()
    if not path.is_relative_to(repository):
        return path
    name = path.relative_to(repository)
    inside = tree / name
    if not inside.is_file() and (tree / ".git").exists():
        commit = git(tree, "rev-parse", "HEAD")
        renamed = git(repository, "diff", "--find-renames", "--diff-filter=R", "--name-status", "-z", "--relative", commit).split("\0")
        before = dict(zip(renamed[2::3], renamed[1::3], strict=False))
        inside = tree / before.get(str(name), name)
    return inside if inside.is_file() else path


def _verdict(values: list[Any]) -> Verdict:
    error, plain_error, broken, reason = values
    return Verdict(error, plain_error, tuple(broken), reason)


def loaded(tree: Path, repository: Path, packages: Sequence[str], files: Sequence[str]) -> None:
    """Runs files that declare operations, in a process that ends when whoever asks has gone: a provider may never return."""
    threading.Thread(target=_outlive, args=(os.getppid(),), daemon=True).start()
    for path in files:
        load(Path(path))
    strays = _strays(tree, repository, [Path(path) for path in (*packages, *files)])
    if strays:
        sys.exit(f"{strays[0]} would be measured instead of the commit's: it is imported from the working copy, and {tree} has none")


def serve(questions: TextIO, answers: TextIO) -> None:
    """Answers until there are no more questions."""
    held: dict[int, Local] = {}
    for line in questions:
        request = json.loads(line)
        try:
            answer = {"value": _answer(request, held)}
        except _refusals(request, held) as refusal:
            answer = {"refused": line_of(refusal)}
        except DeclarationError as error:
            answer = {"declared": str(error)}
        except BaseException as error:  # the other side decides what a failure means
            answer = {"failed": first_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _outlive(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PATIENCE)
    os._exit(1)


def _strays(tree: Path, repository: Path, declared: Sequence[Path]) -> list[str]:
    """Modules of the working copy that are neither the tree's nor declared to be taken from here."""
    found = []
    for module in list(sys.modules.values()):
        name = getattr(module, "__file__", None)
        path = Path(name).resolve() if name else None
        if path is None or not path.is_relative_to(repository) or "site-packages" in path.parts:
            continue
        if not path.is_relative_to(tree) and not any(path.is_relative_to(here) for here in declared):
            found.append(str(path))
    return sorted(found)


def _refusals(request: dict[str, Any], held: dict[int, Local]) -> tuple[type[BaseException], ...]:
    local = held.get(request.get("place", 0))
    return (Refusal, *(operation(local.problem.case.op).refusals if local is not None else ()))


def _answer(request: dict[str, Any], held: dict[int, Local]) -> Any:
    what, place = request["what"], request.get("place", 0)
    if what == "begin":
        return None
    if what == "bind":
        held.pop(place, None)
        options = request["setup"]
        setup = Setup(torch.device(options.pop("device")), **options)
        case = case_of(request["case"])
        twin = next((local for local in held.values() if local.problem.case == case), None)
        problem = problem_of(case, setup.device) if twin is None else twin.problem
        held[place] = Local(request["provider"], problem, problem.judge() if twin is None else twin.judge, setup)
        return None
    local = held[place]
    if what == "prepare":
        return astuple(local.prepare())
    if what == "sample":
        local.call()  # the other process had the caches and, on the CPU, its threads may still spin
        return tuple(local.sample())
    return astuple(local.check())
