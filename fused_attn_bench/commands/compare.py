"""Compare A with B: two providers, two commits, or a run with the history.

Exit codes: 0 same or faster; 1 worse by the limit or more, or wrong; 2 bad arguments; 3 undecided; 4 a side failed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fused_attn_bench import codes, compare, limits, planted, tables
from fused_attn_bench.case import Case
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.compare import Comparison, Interrupted, Plan
from fused_attn_bench.environment import describe
from fused_attn_bench.files import replacing
from fused_attn_bench.harness import Setup
from fused_attn_bench.history import History
from fused_attn_bench.limits import Limits, Rules
from fused_attn_bench.operation import provider_names
from fused_attn_bench.project import why_no_commit
from fused_attn_bench.results import machine, new_run
from fused_attn_bench.sides import HERE, Commits, Providers, Sides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two operands, what to measure, and when to fail."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("a", metavar="A", help="a provider, a commit, . for the checkout as it is, or history")
    parser.add_argument("b", metavar="B", help="the same; after history: a run's id, or latest")
    add_limits(parser, "3%")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there as well, for a pull request")
    add_sides(parser)
    add_most(parser)


def add_limits(parser: argparse.ArgumentParser, default: str) -> None:
    """``--fail-on``, ``--limits`` and ``--json``."""
    text = (
        f"limit of the time: smallest slowdown that fails, and largest difference that is no change (default {default.replace('%', '%%')})"
    )
    parser.add_argument("--fail-on", type=selection.percentage, default=selection.percentage(default), metavar=default, help=text)
    parser.add_argument("--limits", type=Path, metavar="FILE.toml", help="limits of time, memory, host and error for patterns of cases")
    outputs.add_json(parser)


def add_sides(parser: argparse.ArgumentParser) -> None:
    """What commands that measure two sides share."""
    parser.add_argument("--of", metavar="PROVIDER", help="what is measured of commits (default: the project's own)")
    parser.add_argument("--build", action="store_true", help="build each commit's native code for a GPU first")
    add_launches(parser)
    selection.add_cases(parser)
    selection.add_setup(parser, seconds=8.0)
    selection.add_history(parser)


def add_launches(parser: argparse.ArgumentParser) -> None:
    """``--launches``."""
    parser.add_argument("--launches", type=int, default=8, help="fresh starts of both sides; their spread is the error bar (default 8)")


def add_most(parser: argparse.ArgumentParser) -> None:
    """``--most-launches``."""
    text = "launches of a case that stays undecided (default: three times --launches)"
    parser.add_argument("--most-launches", type=int, metavar="N", help=text)


def plan(args: argparse.Namespace, floor: Callable[[str], float] = Plan.floor) -> Plan:
    """As given."""
    most = 3 * args.launches if args.most_launches is None else args.most_launches
    return Plan(args.launches, most, rules(args), floor)


def rules(args: argparse.Namespace) -> Rules:
    """Limits as given."""
    default = Limits(time=args.fail_on)
    return Rules(default) if args.limits is None else limits.read(args.limits, default)


def warn_of_idle(args: argparse.Namespace, cases: Iterable[str]) -> None:
    """Says which patterns of ``--limits`` match none of the cases."""
    for pattern in rules(args).idle(cases):
        print(f'warning: {args.limits}, ["{pattern}"] matches none of the cases', file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """See the module's text."""
    outputs.begin(args, args.markdown)
    rules(args)
    history, stopped, lost = selection.history(args, writes=args.a != "history"), False, ""
    if args.a == "history":
        compared = against_history(history, args.b, rules(args))
        described = next((c.b.environment for c in compared if c.b.environment), {})
    else:
        setup, cases = selection.setup(args), selection.chosen_cases(args)
        described = describe(setup.device, args.project.repository)
        compared, stopped = measured(args, cases, setup, history)
        lost = selection.unkept(lambda: keep(history, compared, setup))
    print(tables.environment(described))
    print(tables.comparisons(compared))
    try:
        return finish(args, compared, stopped, lost)
    finally:  # also where there is no room for JSON
        if args.markdown is not None:
            with replacing(args.markdown) as file:
                file.write(tables.markdown(f"{args.b} against {args.a}", described, compared))


def finish(args: argparse.Namespace, compared: Sequence[Comparison], stopped: bool, lost: str = "", **more: Any) -> int:
    """Says what is worse, what was lost and which limits were of no use, writes JSON, and gives the exit code."""
    warn_of_idle(args, [c.case for c in compared])
    code = codes.CRASHED if lost else codes.INTERRUPTED if stopped else compare.code(compared)
    environment = next((dict(c.b.environment) for c in compared if c.b.environment), {})
    for c in compared:
        if c.code in (codes.WORSE, codes.CRASHED):
            what = "failure" if c.code == codes.CRASHED else "wrong" if "wrong" in (c.a.status, c.b.status) else "regression"
            print(f"{what}: {c.case}: {c.words}")
    if stopped:
        print(f"interrupted; {len(compared)} of the cases have been measured")
    if lost:
        print(lost)
    outputs.write(args.json, [outputs.line({"code": code, "environment": environment, **more, "cases": tables.rows(compared)})])
    return code


def against_history(history: History, run: str, rules: Rules) -> list[Comparison]:
    """A run among the earlier ones of the machine."""
    return compare.with_history(history, history.named(run, compared=False), rules)


def sides(a: str, b: str, args: argparse.Namespace, setup: Setup) -> AbstractContextManager[Sides]:
    """Two providers, or two commits.

    Raises:
        ValueError: the operands are neither.
    """
    known = [planted.split(name)[0] in provider_names() for name in (a, b)]
    if all(known):
        return nullcontext(Providers((a, b), setup))
    for name in (a, b):
        if name != HERE and (reason := why_no_commit(args.project.repository, name)):
            raise ValueError(
                f"A and B must both be providers ({', '.join(provider_names())}), or both commits of this repository; got {name!r}: {reason}."
            )
    return Commits((a, b), selection.watched(args), setup, args.project, args.build, args.load)


def measured(args: argparse.Namespace, cases: Sequence[Case], setup: Setup, history: History) -> tuple[list[Comparison], bool]:
    """Both sides in turns, with the noise floors that are known. Whether Ctrl-C ended it."""
    described = describe(setup.device, args.project.repository)
    with sides(args.a, args.b, args, setup) as two, progress(len(cases) * args.launches) as tell:
        floor = compare.floors(two, history, machine(described, setup.timer))
        compared, stopped = until_stopped(lambda: compare.compare(two, cases, setup, plan(args, floor), tell))
    return compare.described(compared, described), stopped


def until_stopped(measure: Callable[[], list[Comparison]]) -> tuple[list[Comparison], bool]:
    """What was measured, and whether Ctrl-C ended it."""
    try:
        return measure(), False
    except Interrupted as stop:
        return stop.comparisons, True


def keep(history: History, compared: Sequence[Comparison], setup: Setup) -> None:
    """Adds comparisons to the history, as a run of their own."""
    run, time = new_run()
    history.add(c.kept(run=run, time=time, timer=setup.timer, environment=c.b.environment) for c in compared)


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
