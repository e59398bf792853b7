"""Find the first commit that made a case slower: GOOD and commits up to BAD are measured in turns."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fused_attn_bench import bisection, codes, compare, tables
from fused_attn_bench.bisection import Found
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.commands.compare import add_most, add_sides, keep, progress, until_stopped
from fused_attn_bench.compare import Comparison, Plan
from fused_attn_bench.environment import describe
from fused_attn_bench.project import git
from fused_attn_bench.results import machine
from fused_attn_bench.sides import Commits
from fused_attn_bench.significance import SLOWER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two commits and one case."""
    parser.add_argument("good", metavar="GOOD", help="a commit that is fast")
    parser.add_argument("bad", metavar="BAD", help="a later commit that is slow")
    outputs.add_json(parser)
    add_sides(parser)
    add_most(parser)


def run(args: argparse.Namespace) -> int:
    """0 when the commit was found; 3 where BAD cannot be told from GOOD, 1 where one of them is wrong, 4 where one fails."""
    outputs.begin(args)
    root = args.project.repository
    setup, cases, history = selection.setup(args), selection.chosen_cases(args), selection.history(args, writes=True)
    if len(cases) != 1:
        raise ValueError(f"bisect needs exactly one case; {len(cases)} are chosen. Name it with --case.")
    described = describe(setup.device, root)
    most = 3 * args.launches if args.most_launches is None else args.most_launches
    steps: list[dict[str, Any]] = []

    def measure(commit: str) -> Comparison:
        two = Commits((args.good, commit), selection.watched(args), setup, args.project, args.build, args.load)
        plan = Plan(args.launches, most, floor=compare.floors(two, history, machine(described, setup.timer)))
        with two, progress(args.launches) as tell:
            compared, stopped = until_stopped(lambda: compare.compare(two, cases, setup, plan, tell))
        for found in compare.described(compared, described):
            print(f"{commit[:12]}  {tables.change(found)}{', interrupted' * stopped}", flush=True)
            keep(history, [found], setup)
            steps.append({"commit": commit, **tables.rows([found])[0]})
            written()
        if stopped:
            raise KeyboardInterrupt
        return found

    def written(**more: Any) -> None:
        outputs.write(args.json, [outputs.line({"environment": described, **more, "steps": steps})])

    candidates = bisection.commits(root, args.good, args.bad)
    try:
        worst = measure(candidates[-1])
    except KeyboardInterrupt:
        print(f"interrupted; BAD is not judged yet, and {len(candidates) - 1} commits between GOOD and BAD are left")
        written(code=codes.INTERRUPTED, left=candidates)
        return codes.INTERRUPTED
    if worst.verdict != SLOWER and (worst.difference is None or worst.code == codes.UNDECIDED):
        print(f"BAD must be slower than GOOD beyond the noise; the verdict is {worst.words}")
        return worst.code or codes.UNDECIDED
    found = bisection.search(args.good, candidates, lambda commit: worst if commit == candidates[-1] else measure(commit))
    _tell(root, found)
    code = codes.INTERRUPTED if found.left else codes.GOOD
    written(code=code, **{name: value for name, value in asdict(found).items() if name != "steps"})
    return code


def _tell(root: Path, found: Found) -> None:
    """Between which commits the regression lies, and what is not known of those in between."""
    if found.left:
        judged = sum(step.slow is not None for step in found.steps)
        print(f"interrupted; {judged} commits are judged, {len(found.left)} are left: {' '.join(c[:12] for c in found.left)}")
    print(f"last good   {git(root, 'log', '-1', '--format=%h %s', found.last_good)}")
    print(f"first slow  {git(root, 'log', '-1', '--format=%h %an, %ad: %s', '--date=short', found.first_bad)}")
    if found.between:
        print(f"could not be measured, and may be the first instead: {' '.join(c[:12] for c in found.between)}")
