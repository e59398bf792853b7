"""Measure the noise floor of each case: identical code compared with itself, as compare would do it."""

from __future__ import annotations

import argparse

from fused_attn_bench import codes, compare, planted, significance
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.commands.compare import add_sides, progress, sides
from fused_attn_bench.compare import Plan
from fused_attn_bench.environment import describe
from fused_attn_bench.results import machine
from fused_attn_bench.text import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, and how often."""
    parser.add_argument("operand", metavar="A", help="a provider, or a commit or . for comparisons of commits")
    parser.add_argument("--times", type=int, default=10, help="comparisons per case (default 10)")
    outputs.add_json(parser)
    add_sides(parser)


def run(args: argparse.Namespace) -> int:
    """0; prints each floor and keeps it in the history. 4 where the disk is full; 130 after Ctrl-C, with the comparisons that were complete."""
    outputs.begin(args)
    setup, cases, history = selection.setup(args), selection.chosen_cases(args), selection.history(args, writes=True)
    if args.times < 2:
        raise ValueError(f"--times must be at least 2, or there is no spread; got {args.times}")
    described, plan, code = describe(setup.device, args.project.repository), Plan(args.launches, args.launches), codes.GOOD
    effects: dict[str, list[float]] = {}
    with sides(args.operand, args.operand, args, setup) as two, progress(len(cases) * args.launches * args.times) as tell:
        name = two.calibrations[0]
        try:
            for _ in range(args.times):
                for c in compare.compare(two, cases, setup, plan, tell):
                    if c.difference is not None:
                        effects.setdefault(c.case, []).append(c.difference.effect)
        except KeyboardInterrupt:
            code = codes.INTERRUPTED
    floors = {case: significance.noise_floor(seen) for case, seen in effects.items() if len(seen) > 1}

    def keep() -> None:
        for case, floor in floors.items():
            history.set_floor(machine(described, setup.timer), case, name, floor, len(effects[case]))

    lost = selection.unkept(keep)
    code = codes.CRASHED if lost else code
    times = max(map(len, effects.values()), default=0)
    print(
        f"{planted.split(name)[0]}: {times} comparisons with itself; a change must exceed max(floor, {100 * significance.MIN_EFFECT:.0f}%)"
    )
    print(table(("case", "floor"), [(case, f"{100 * floor:.2f}%") for case, floor in floors.items()]))
    if lost:
        print(lost)
    cases_found = [{"case": case, "floor": floor, "comparisons": len(effects[case])} for case, floor in floors.items()]
    outputs.write(args.json, [outputs.line({"code": code, "environment": described, "cases": cases_found})])
    return code
