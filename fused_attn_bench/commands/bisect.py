"""Find the first commit that made a case slower: GOOD and commits up to BAD are measured in turns."""

from __future__ import annotations

import argparse

from fused_attn_bench import bisection, compare, tables
from fused_attn_bench.commands import selection
from fused_attn_bench.commands.compare import add_sides, progress
from fused_attn_bench.compare import Commits, Comparison
from fused_attn_bench.environment import describe
from fused_attn_bench.results import machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two commits and one case."""
    parser.add_argument("good", metavar="GOOD", help="a commit that is fast")
    parser.add_argument("bad", metavar="BAD", help="a later commit that is slow")
    add_sides(parser)


def run(args: argparse.Namespace) -> int:
    """0 when the commit was found."""
    root = args.project.repository
    setup, cases, history = selection.setup(args), selection.chosen_cases(args), selection.history(args)
    if len(cases) != 1:
        raise ValueError(f"bisect needs exactly one case; {len(cases)} are chosen. Name it with --case.")
    here = machine(describe(setup.device, root), setup.timer)

    def measure(commit: str) -> Comparison:
        two = Commits((args.good, commit), selection.watched(args), setup, args.project, args.build, args.load)
        with two, progress(args.launches) as tell:
            measured = compare.compare(two, cases, setup, args.launches, tell)
            found = compare.with_floors(measured, two, history, here)[0]
        print(f"{commit[:12]}  {tables.change(found)}", flush=True)
        return found

    found = bisection.search(args.good, bisection.commits(root, args.good, args.bad), measure)
    print(f"last good   {compare.git(root, 'log', '-1', '--format=%h %s', found.last_good)}")
    print(f"first slow  {compare.git(root, 'log', '-1', '--format=%h %an, %ad: %s', '--date=short', found.first_bad)}")
    if found.between:
        print(f"could not be measured, and may be the first instead: {' '.join(c[:12] for c in found.between)}")
    return 0
