"""Gate for CI: every case right, and none slower than a stored baseline, as a multiple of plain torch measured in the same minutes.

Exit codes: 0 all right; 1 slower; 2 bad arguments or an unreadable baseline; 3 wrong results or failures;
4 nothing to compare with (another device, driver, torch or Triton than the baseline's), results right.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from fused_attn_bench import baseline, planted, tables
from fused_attn_bench.baseline import Entry
from fused_attn_bench.commands import selection
from fused_attn_bench.commands.compare import progress
from fused_attn_bench.compare import Separate
from fused_attn_bench.environment import KEY, describe
from fused_attn_bench.operation import case_of
from fused_attn_bench.results import Result, machine
from fused_attn_bench.significance import Difference, corrected
from fused_attn_bench.text import ratio, table

SLOWER, WRONG, NOT_COMPARABLE = 1, 3, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The baseline, and what to hold it to."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("baseline", type=Path, metavar="BASELINE", help="JSON lines, kept with the project that is checked")
    parser.add_argument("--update", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument("--fail-on", type=selection.percentage, default=0.05, metavar="5%", help="smallest change that fails (default 5%%)")
    parser.add_argument("--of", metavar="PROVIDER", help="what is watched, with --update (default: the project's own)")
    parser.add_argument("--reference", default="eager", metavar="NAME", help="what it is measured against, with --update (default eager)")
    parser.add_argument("--launches", type=int, default=5, help="fresh starts; their spread is the error bar (default 5)")
    selection.add_cases(parser)
    selection.add_setup(parser, seconds=5.0)


def run(args: argparse.Namespace) -> int:
    """See the module's text."""
    if args.launches < 3:
        raise ValueError(f"--launches must be at least 3, or there is no spread to speak of; got {args.launches}")
    setup, described = selection.setup(args), describe(selection.setup(args).device, args.project.repository)
    old = {} if args.update else {entry.case: entry for entry in baseline.read(args.baseline)}
    first = next(iter(old.values()), None)
    pair = (first.reference, first.provider) if first else (args.reference, selection.watched(args))
    for name in pair:
        planted.known(name)
    cases = [case_of(name) for name in old] or selection.chosen_cases(args)
    with progress(len(cases) * args.launches) as tell:
        measured = baseline.measure(Separate(pair, setup, args.project, args.load), cases, setup, args.launches, tell)
    print(tables.environment(described))
    comparable = all(entry.machine == machine(described, setup.timer) for entry in old.values())
    new = [dataclasses.replace(entry, environment=described) for _, entry in measured if entry is not None]
    pairs = [(old[entry.case], entry) for entry in new] if old and comparable else []
    differences = corrected([baseline.difference(before, now) for before, now in pairs])
    changes = {now.case: (before, change) for (before, now), change in zip(pairs, differences, strict=True)}
    slower = {case for case, (_, change) in changes.items() if baseline.is_slower(change, args.fail_on)}
    rows = [_row(result, entry, changes.get(result.case), result.case in slower) for result, entry in measured]
    print(f"{pair[1]}: time as a multiple of {pair[0]}'s")
    print(table(("case", "baseline", "now", "change", "p", "verdict"), rows))
    if len(new) < len(measured):
        return WRONG
    if args.update:
        baseline.write(new, args.baseline)
        print(f"{len(new)} entries written to {args.baseline}")
        return 0
    if not comparable:
        was = next(iter(old.values())).machine
        both = zip((*KEY, "timer"), was, machine(described, setup.timer), strict=True)
        print(
            f"not comparable: {', '.join(f'{name} was {a!r}, is {b!r}' for name, a, b in both if a != b)}. Write a baseline here with --update."
        )
        return NOT_COMPARABLE
    return SLOWER if slower else 0


def _row(result: Result, entry: Entry | None, change: tuple[Entry, Difference] | None, is_slower: bool) -> tuple[str, ...]:
    if entry is None:
        return (result.case, "-", "-", "-", "-", f"{result.status}: {result.reason}")
    if change is None:
        return (result.case, "-", ratio(entry.median), "-", "-", "right")
    before, difference = change
    cells = (ratio(before.median), ratio(entry.median), f"{difference.percent:+.1f}%", f"{difference.p:.1g}")
    return (result.case, *cells, "SLOWER" if is_slower else "right")
