"""What can be measured against each other: two providers in one process or in one of their own, two commits in turns."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fused_attn_bench import submodules
from fused_attn_bench.case import Case
from fused_attn_bench.harness import Contestant, Local, Setup
from fused_attn_bench.judge import Judge
from fused_attn_bench.operation import problem_of
from fused_attn_bench.problem import Problem
from fused_attn_bench.project import Project, git
from fused_attn_bench.worker import Process, Remote

# Instead of a commit: the checkout as it is, with what is not committed yet.
HERE = "."
# Of the folder that holds worktrees; the id of its process follows, by which leftovers are known.
PREFIX = "fused-attn-bench-"


class Sides(Protocol):
    """Two sides that can be measured against each other; one launch is a fresh start of both."""

    @property
    def labels(self) -> tuple[str, str]:
        """What they are called."""

    @property
    def calibrations(self) -> tuple[str, str]:
        """What their noise floors are kept under."""

    def launch(self) -> AbstractContextManager[Callable[[Case, int], Contestant]]:
        """A context in which ``make(case, side)`` gives contestants."""


@dataclass
class Providers:
    """Two providers in this process: the same tensors for both, new ones in each launch."""

    labels: tuple[str, str]
    setup: Setup
    judges: dict[Case, Judge] = field(default_factory=dict)

    @property
    def calibrations(self) -> tuple[str, str]:
        return self.labels

    @contextmanager
    def launch(self) -> Iterator[Callable[[Case, int], Contestant]]:
        """New tensors for every case."""
        problems: dict[Case, Problem] = {}

        def make(case: Case, side: int) -> Contestant:
            if case not in problems:
                problems.clear()
                problems[case] = problem_of(case, self.setup.device)
            if case not in self.judges:
                self.judges[case] = problems[case].judge()
            return Local(self.labels[side], problems[case], self.judges[case], self.setup)

        yield make


@dataclass
class Separate:
    """Two providers together in a process of their own, a new one in each launch: their ratio as another day's run would find it."""

    labels: tuple[str, str]
    setup: Setup
    project: Project
    load: Sequence[Path] = ()

    @property
    def calibrations(self) -> tuple[str, str]:
        return self.labels

    @contextmanager
    def launch(self) -> Iterator[Callable[[Case, int], Contestant]]:
        """A new process."""
        with closing(Process(self.project.repository, "the measuring", self.project, self.load)) as process:
            yield lambda case, side: Remote(process, case, self.labels[side], self.setup, side)


@dataclass
class Commits:
    """One provider built from two commits, each in a worktree and, in each launch, in a new process.

    Args:
        commits: names that git knows.
        provider: what is measured.
        setup: how.
        project: whose commits.
        build: whether native code for a GPU is built in each worktree first.
        load: Python files that declare operations; each side takes those of its commit.
    """

    commits: tuple[str, str]
    provider: str
    setup: Setup
    project: Project
    build: bool = False
    load: Sequence[Path] = ()

    @property
    def labels(self) -> tuple[str, str]:
        return (f"{self.provider}@{self.commits[0]}", f"{self.provider}@{self.commits[1]}")

    @property
    def calibrations(self) -> tuple[str, str]:
        return (f"{self.provider}@", f"{self.provider}@")

    def __enter__(self) -> Commits:
        self.stack = ExitStack()
        root = self.project.repository
        remove_leftovers(root)
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-")))
        try:
            self.trees = [self.stack.enter_context(_worktree(root, commit, folder / str(i))) for i, commit in enumerate(self.commits)]
            self.absent = [[] if tree == root else submodules.check_out(root, tree) for tree in self.trees]
            for tree in self.trees:
                self.project.build(tree, self.build)
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self.stack.close()

    @contextmanager
    def launch(self) -> Iterator[Callable[[Case, int], Contestant]]:
        """Two new processes."""
        with ExitStack() as stack:
            sides = zip(self.trees, self.labels, self.absent, strict=True)
            processes = [Process(tree, label, self.project, self.load, absent) for tree, label, absent in sides]
            for process in processes:
                stack.callback(process.close)
            yield lambda case, side: Remote(processes[side], case, self.provider, self.setup)


@contextmanager
def _worktree(root: Path, commit: str, path: Path) -> Iterator[Path]:
    if commit == HERE:
        yield root
        return
    git(root, "worktree", "add", "--detach", "--quiet", str(path), commit)
    try:
        yield path
    finally:
        git(root, "worktree", "remove", "--force", str(path))


def remove_leftovers(root: Path) -> None:
    """Removes worktrees of processes that were killed, and what git keeps of them."""
    if os.name != "posix":  # elsewhere a process cannot be asked whether it runs without ending it
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = re.match(rf"{PREFIX}(\d+)-", folder.name)
        if owner and not _runs(int(owner[1])):
            shutil.rmtree(folder, ignore_errors=True)
    if (root / ".git").exists():
        git(root, "worktree", "prune")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
