"""The first commit that made a case slower: halving the range, each commit measured in turns with the good one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_attn_bench.compare import Comparison
from fused_attn_bench.project import git
from fused_attn_bench.significance import SLOWER

# Measures a commit against the good one.
Measure = Callable[[str], Comparison]


@dataclass(frozen=True)
class Step:
    """One commit measured.

    Args:
        commit: its full id.
        slow: whether it has the regression; None where it could not be measured.
        comparison: against the good commit.
    """

    commit: str
    slow: bool | None
    comparison: Comparison


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Args:
        last_good: the newest commit before the regression that could be measured.
        first_bad: the oldest with it.
        between: commits of which neither is known, since they could not be measured.
        steps: all that was measured, in order.
        left: commits between the two that Ctrl-C left unmeasured; none at a search's own end.
    """

    last_good: str
    first_bad: str
    between: tuple[str, ...]
    steps: tuple[Step, ...]
    left: tuple[str, ...] = ()


def commits(root: Path, good: str, bad: str) -> list[str]:
    """Full ids after ``good`` up to ``bad``, oldest first, along first parents."""
    found = git(root, "rev-list", "--first-parent", "--reverse", f"{good}..{bad}").split()
    if not found:
        raise ValueError(f"BAD must come after GOOD; no commit lies in {good}..{bad}")
    return found


def search(good: str, candidates: Sequence[str], measure: Measure) -> Found:
    """The first slow commit among the candidates, whose last one must be slow.

    A commit has the regression when it is slower than the good one by more than half of what the last one is: the middle between
    "as fast as before" and "as slow as now". Ctrl-C ends the search with what is known so far.

    Raises:
        ValueError: the last candidate is not slower.
    """
    worst = measure(candidates[-1])
    if worst.difference is None or worst.verdict != SLOWER:
        raise ValueError(f"BAD must be slower than GOOD beyond the noise; the verdict is {worst.verdict}. {worst.reason}".strip())
    half = worst.difference.effect / 2
    steps = [Step(candidates[-1], True, worst)]
    pending, last_good, first_bad, unknown = list(candidates[:-1]), good, candidates[-1], set()
    while pending:
        middle = len(pending) // 2
        commit = pending[middle]
        try:
            comparison = measure(commit)
        except KeyboardInterrupt:
            break
        slow = None if comparison.difference is None else comparison.difference.effect > half
        steps.append(Step(commit, slow, comparison))
        if slow is None:
            unknown.add(commit)
            del pending[middle]
        elif slow:
            first_bad, pending = commit, pending[:middle]
        else:
            last_good, pending = commit, pending[middle + 1 :]
    order = [good, *candidates]
    between = order[order.index(last_good) + 1 : order.index(first_bad)]
    return Found(last_good, first_bad, tuple(c for c in between if c in unknown), tuple(steps), tuple(pending))
