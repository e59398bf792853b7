"""Compare A with B: two providers, two commits, or a run with the history."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fused_attn_bench import compare, planted, tables
from fused_attn_bench.commands import selection
from fused_attn_bench.compare import Commits, Comparison, Providers, Sides
from fused_attn_bench.environment import describe
from fused_attn_bench.harness import Setup
from fused_attn_bench.history import History
from fused_attn_bench.operation import provider_names
from fused_attn_bench.results import machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two operands, what to measure, and when to fail."""
    parser.add_argument("a", metavar="A", help="a provider, a commit, . for the checkout as it is, or history")
    parser.add_argument("b", metavar="B", help="the same; after history: a run's id, or latest")
    parser.add_argument(
        "--fail-on", type=selection.percentage, metavar="3%", help="exit with 1 when a case is slower by at least that, or wrong"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there as well, for a pull request")
    add_sides(parser)


def add_sides(parser: argparse.ArgumentParser) -> None:
    """What commands that measure two sides share."""
    parser.add_argument("--launches", type=int, default=8, help="fresh starts of both sides; their spread is the error bar (default 8)")
    parser.add_argument("--of", metavar="PROVIDER", help="what is measured of commits (default: the project's own)")
    parser.add_argument("--build", action="store_true", help="build each commit's native code for a GPU first")
    selection.add_cases(parser)
    selection.add_setup(parser, seconds=8.0)
    selection.add_history(parser)


def run(args: argparse.Namespace) -> int:
    """0; 1 when --fail-on says so."""
    history = selection.history(args)
    compared = against_history(history, args.b) if args.a == "history" else measured(args, history)
    described = next((c.b.environment for c in compared if c.b.environment), {})
    print(tables.environment(described))
    print(tables.comparisons(compared))
    if args.markdown is not None:
        args.markdown.write_text(tables.markdown(f"{args.b} against {args.a}", described, compared))
    failing = compare.regressions(compared, args.fail_on) if args.fail_on is not None else []
    for c in failing:
        print(f"regression: {c.case}: {c.verdict}")
    return int(bool(failing))


def against_history(history: History, run: str) -> list[Comparison]:
    """A run among the earlier ones of the machine."""
    return compare.with_history(history, history.named(run, compared=False))


def sides(a: str, b: str, args: argparse.Namespace, setup: Setup) -> AbstractContextManager[Sides]:
    """Two providers, or two commits.

    Raises:
        ValueError: the operands are neither.
    """
    known = [planted.split(name)[0] in provider_names() for name in (a, b)]
    if all(known):
        return nullcontext(Providers((a, b), setup))
    for name in (a, b):
        if name != "." and not compare.is_commit(args.project.repository, name):
            raise ValueError(
                f"A and B must both be providers ({', '.join(provider_names())}), or both commits of this repository; got {name!r}, which is no commit."
            )
    return Commits((a, b), selection.watched(args), setup, args.project, args.build, args.load)


def measured(args: argparse.Namespace, history: History) -> list[Comparison]:
    """Both sides in turns, with the noise floors that are known."""
    setup, cases = selection.setup(args), selection.chosen_cases(args)
    with sides(args.a, args.b, args, setup) as two, progress(len(cases) * args.launches) as tell:
        compared = compare.compare(two, cases, setup, args.launches, tell)
        described = describe(setup.device, args.project.repository)
        floored = compare.with_floors(compared, two, history, machine(described, setup.timer))
    return compare.described(floored, described)


class progress:
    """A bar that each message moves on by one."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, disable=None, leave=False)

    def __enter__(self) -> Callable[[str], None]:
        def tell(text: str) -> None:
            self.bar.set_description(text)
            self.bar.update()

        return tell

    def __exit__(self, *raised: object) -> None:
        self.bar.close()
