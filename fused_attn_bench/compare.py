"""A against B: two providers in one process, two commits in turns, or a run against earlier ones."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from fused_attn_bench.case import Case
from fused_attn_bench.harness import Contestant, Local, Setup, contest
from fused_attn_bench.history import History
from fused_attn_bench.judge import Judge
from fused_attn_bench.operation import Problem, problem_of
from fused_attn_bench.project import Project
from fused_attn_bench.results import Result
from fused_attn_bench.significance import SLOWER, UNCALIBRATED, Difference, against, blocks, corrected, difference, noise_floor
from fused_attn_bench.worker import Process, Remote

# Instead of a commit: the checkout as it is, with what is not committed yet.
HERE = "."
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """B measured against A on one case.

    Args:
        case: its name.
        a, b: the last result of each side.
        difference: None where a side has no time.
    """

    case: str
    a: Result
    b: Result
    difference: Difference | None = None

    @property
    def verdict(self) -> str:
        if self.difference is not None:
            return self.difference.verdict
        return next(r.status for r in (self.b, self.a) if r.status != "ok")

    @property
    def reason(self) -> str:
        """Why there is no difference, side by side."""
        return "; ".join(f"{r.provider}: {r.reason}" for r in (self.a, self.b) if r.status != "ok")

    @property
    def remark(self) -> str:
        """That one provider ran different backends, as when only one of two commits has its library built; empty when it did not."""
        same = self.a.provider.partition("@")[0] == self.b.provider.partition("@")[0]
        if not same or self.a.backend == self.b.backend or self.difference is None:
            return ""
        return f"{self.case}: {self.a.provider} ran {self.a.backend}, {self.b.provider} {self.b.backend}"


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
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="fused-attn-bench-")))
        root = self.project.repository
        try:
            self.trees = [self.stack.enter_context(_worktree(root, commit, folder / str(i))) for i, commit in enumerate(self.commits)]
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
            processes = [Process(tree, label, self.project, self.load) for tree, label in zip(self.trees, self.labels, strict=True)]
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


def git(root: Path, *arguments: str) -> str:
    """What git prints in a repository.

    Raises:
        ValueError: git's own message.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"commits are compared with git, which must be installed; got: {error}") from None
    if done.returncode:
        raise ValueError(f"git {arguments[0]} must succeed in {root}; it says: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()


def is_commit(root: Path, name: str) -> bool:
    """Whether git knows the name as a commit of the repository."""
    try:
        git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except ValueError:
        return False
    return True


Launches = dict[Case, tuple[tuple[Result, Result], list[list[float]]]]


def compare(sides: Sides, cases: Sequence[Case], setup: Setup, launches: int, progress: Progress = lambda text: None) -> list[Comparison]:
    """Every case in every launch; who begins alternates. The p-values allow for the number of cases.

    Args:
        sides: what is compared.
        cases: on what.
        setup: how; its seconds are shared by the launches.
        launches: fresh starts of both sides.
        progress: told of every case before it is measured.
    """
    measured = compare_launches(sides, cases, setup, launches, progress).items()
    return _corrected([Comparison(case.name, *last, difference(blocks) if _timed(last) else None) for case, (last, blocks) in measured])


def compare_launches(sides: Sides, cases: Sequence[Case], setup: Setup, launches: int, progress: Progress) -> Launches:
    """For each case the last result of both sides, and the blocks of each launch; see ``compare``."""
    if launches < 1:
        raise ValueError(f"there must be at least one launch; got {launches}")
    each = replace(setup, seconds=setup.seconds / launches)
    found: Launches = {}
    for launch in range(launches):
        with sides.launch() as make:
            for case in cases:
                if case in found and not _timed(found[case][0]):
                    continue
                progress(f"{case.name}, launch {launch + 1} of {launches}")
                order = (0, 1) if launch % 2 == 0 else (1, 0)
                results = contest(case, {str(side): functools.partial(make, case, side) for side in order}, each)
                a, b = (replace(results[order.index(side)], provider=sides.labels[side]) for side in (0, 1))
                earlier = found[case][1] if case in found else []
                found[case] = ((a, b), [*earlier, blocks(a.samples, b.samples)] if _timed((a, b)) else [])
    return found


def _timed(results: tuple[Result, Result]) -> bool:
    return all(r.status == "ok" for r in results)


def _corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    differences = iter(corrected([c.difference for c in comparisons if c.difference is not None]))
    return [replace(c, difference=next(differences)) if c.difference is not None else c for c in comparisons]


def with_floors(comparisons: Sequence[Comparison], sides: Sides, history: History, machine: tuple[str, ...]) -> list[Comparison]:
    """The same with the noise floors that ``calibrate`` found; the larger of the two sides' counts."""
    floored = []
    for c in comparisons:
        known = [f for name in set(sides.calibrations) if (f := history.floor(machine, c.case, name)) is not None]
        floor = max(known, default=UNCALIBRATED)
        floored.append(replace(c, difference=replace(c.difference, floor=floor)) if c.difference is not None else c)
    return floored


def described(comparisons: Sequence[Comparison], environment: Mapping[str, str]) -> list[Comparison]:
    """The same, with the environment that both sides ran in."""
    return [replace(c, a=replace(c.a, environment=environment), b=replace(c.b, environment=environment)) for c in comparisons]


def calibrate(sides: Sides, cases: Sequence[Case], setup: Setup, launches: int, times: int, progress: Progress) -> dict[str, float]:
    """Noise floors of cases: identical sides compared ``times`` times."""
    effects: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(times):
        for c in compare(sides, cases, setup, launches, progress):
            if c.difference is not None:
                effects[c.case].append(c.difference.effect)
    return {case: noise_floor(seen) for case, seen in effects.items() if seen}


def with_history(history: History, run: str) -> list[Comparison]:
    """A run against those before it on the same machine, case by case and provider by provider."""
    results = history.results()
    judged = [r for r in results if r.run == run]
    first = min((r.time for r in judged), default="")
    comparisons = []
    for latest in judged:
        if latest.status == "refused":
            continue
        same = [r for r in results if (r.machine, r.case, r.provider) == (latest.machine, latest.case, latest.provider)]
        before = [r for r in same if r.time < first and r.median is not None]
        name = f"{len(before)} earlier runs"
        found = None
        if latest.median is not None:
            floor = history.floor(latest.machine, latest.case, latest.provider)
            found = against([r.median for r in before if r.median], latest.median, UNCALIBRATED if floor is None else floor)
        comparisons.append(Comparison(latest.case, replace(before[-1] if before else latest, provider=name), latest, found))
    return _corrected(comparisons)


def regressions(comparisons: Sequence[Comparison], limit: float) -> list[Comparison]:
    """Those that are slower by at least the limit, a fraction, and those that no longer compute the right result."""
    slow = [c for c in comparisons if c.difference is not None and c.verdict == SLOWER and c.difference.percent >= 100 * limit]
    return slow + [c for c in comparisons if c.difference is None and c.b.status in ("wrong", "failed") and c.a.status == "ok"]
