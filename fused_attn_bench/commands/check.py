"""Gate for CI: every case right, and none worse than a stored baseline; times are multiples of plain torch's, measured in the same minutes.

Exit codes: 0 same or faster; 1 worse by the limit or more, or wrong; 2 bad arguments or an unreadable baseline;
3 undecided, also where the baseline is from another device, driver, torch or Triton, results being right; 4 a failure; 130 interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from fused_attn_bench import baseline, codes, compare, planted, tables
from fused_attn_bench.baseline import Entry
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.commands.compare import add_launches, add_limits, add_most, finish, plan, progress, until_stopped
from fused_attn_bench.compare import Comparison, Launches, Plan
from fused_attn_bench.environment import KEY, describe
from fused_attn_bench.harness import Setup
from fused_attn_bench.operation import case_of, operation
from fused_attn_bench.results import machine
from fused_attn_bench.sides import Separate
from fused_attn_bench.text import ratio, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The baseline, and what to hold it to."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("baseline", type=Path, metavar="BASELINE", help="JSON lines, kept with the project that is checked")
    parser.add_argument("--update", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument("--of", metavar="PROVIDER", help="what is watched, with --update (default: the project's own)")
    parser.add_argument("--reference", default="eager", metavar="NAME", help="what it is measured against, with --update (default eager)")
    add_limits(parser, "5%")
    add_launches(parser)
    add_most(parser)
    selection.add_cases(parser)
    selection.add_setup(parser, seconds=8.0)


def run(args: argparse.Namespace) -> int:
    """See the module's text."""
    planned = plan(args)
    if args.launches < 3:
        raise ValueError(f"--launches must be at least 3, or there is no spread to speak of; got {args.launches}")
    setup = selection.setup(args)
    described = describe(setup.device, args.project.repository)
    outputs.begin(args, args.baseline if args.update else None)
    if args.update:
        return _update(args, setup, described)
    old = {entry.case: entry for entry in baseline.read(args.baseline)}
    first = next(iter(old.values()))
    if args.of not in (None, first.provider):
        raise ValueError(
            f"--of names what a baseline is written of; {args.baseline} is of {first.provider}, got {args.of}. Leave it out, or add --update."
        )
    here = machine(described, setup.timer)
    differing = [entry.machine for entry in old.values() if entry.machine != here]
    if differing:  # whether it is right can be said all the same
        planned = Plan(1, 1)
    compared, stopped, _ = _measured(args, (first.reference, first.provider), setup, planned, {} if differing else old)
    compared = compare.described(compared, described)
    print(tables.environment(described))
    print(f"{first.provider}: time as a multiple of {first.reference}'s")
    print(tables.comparisons(compared, tables.Words("baseline", "now", "change", ratio)))
    code = finish(args, compared, stopped, unit=f"multiples of {first.reference}'s time")
    if differing and code == codes.UNDECIDED:
        both = zip((*KEY, "timer"), differing[0], here, strict=True)
        changes = ", ".join(f"{name} was {a!r}, is {b!r}" for name, a, b in both if a != b)
        print(f"not comparable: {changes}. Results are right. Write a baseline here with --update.")
    return code


def _update(args: argparse.Namespace, setup: Setup, described: Mapping[str, str]) -> int:
    """Writes the baseline, unless something is wrong."""
    pair = (args.reference, selection.watched(args))
    compared, stopped, found = _measured(args, pair, setup, Plan(args.launches, args.launches), {})
    made = baseline.entries(found, setup.timer, described)
    print(tables.environment(described))
    print(f"{pair[1]}: time as a multiple of {pair[0]}'s")
    rows = [
        (c.case, ratio(made[c.case].median) if c.case in made else "-", c.b.status, "; ".join((c.b.reason, *c.b.marks)).lstrip("; "))
        for c in compared
    ]
    print(table(("case", "now", "status", ""), rows))
    content = [
        {"case": c.case, "multiple": made[c.case].median if c.case in made else None, "status": c.b.status, "reason": c.b.reason}
        for c in compared
    ]
    code = codes.INTERRUPTED if stopped else codes.GOOD
    if not stopped and len(made) < len(compared):
        code = codes.WORSE if any(c.b.status == "wrong" for c in compared) else codes.CRASHED
    outputs.write(args.json, [outputs.line({"code": code, "environment": dict(described), "cases": content})])
    if code != codes.GOOD:
        print(f"{'interrupted; ' * stopped}{args.baseline} is left as it was")
        return code
    baseline.write(list(made.values()), args.baseline)
    print(f"{len(made)} entries written to {args.baseline}")
    if any(entry.marks for entry in made.values()):
        print("The machine was not quiet: write the baseline again when it is, or no change against these entries will be believed.")
    return codes.GOOD


def _measured(
    args: argparse.Namespace, pair: tuple[str, str], setup: Setup, planned: Plan, old: Mapping[str, Entry]
) -> tuple[list[Comparison], bool, Launches]:
    """Reference and provider in turns, held to the baseline; whether Ctrl-C ended it, and the launches."""
    for name in pair:
        planted.known(name)
    cases = selection.chosen_cases(args) if args.update else [case_of(e.case) for e in baseline.read(args.baseline)]
    if args.update and not args.case:  # of the operations that have both; whoever names a case is told of a refusal
        cases = [c for c in cases if {planted.split(name)[0] for name in pair} <= {*operation(c.op).providers}] or cases
    last: Launches = {}

    def judge(found: Launches) -> list[Comparison]:
        last.update(found)
        return baseline.judged(old, found, planned)

    with progress(len(cases) * planned.launches) as tell:
        two = Separate(pair, setup, args.project, args.load)
        compared, stopped = until_stopped(lambda: compare.decide(two, cases, setup, planned, judge, tell))
    return compared, stopped, last
