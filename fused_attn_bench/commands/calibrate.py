"""Measure the noise floor of each case: identical code compared with itself, as compare would do it."""

from __future__ import annotations

import argparse

from fused_attn_bench import compare, planted, significance
from fused_attn_bench.commands import selection
from fused_attn_bench.commands.compare import add_sides, progress, sides
from fused_attn_bench.environment import describe
from fused_attn_bench.results import machine
from fused_attn_bench.text import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, and how often."""
    parser.add_argument("operand", metavar="A", help="a provider, or a commit or . for comparisons of commits")
    parser.add_argument("--times", type=int, default=10, help="comparisons per case (default 10)")
    add_sides(parser)


def run(args: argparse.Namespace) -> int:
    """0; prints each floor and keeps it in the history."""
    setup, cases, history = selection.setup(args), selection.chosen_cases(args), selection.history(args, writes=True)
    if args.times < 2:
        raise ValueError(f"--times must be at least 2, or there is no spread; got {args.times}")
    described, rows = describe(setup.device, args.project.repository), []
    with sides(args.operand, args.operand, args, setup) as two, progress(len(cases) * args.launches * args.times) as tell:
        name = two.calibrations[0]
        for case, floor in compare.calibrate(two, cases, setup, args.launches, args.times, tell).items():
            history.set_floor(machine(described, setup.timer), case, name, floor, args.times)
            rows.append((case, f"{100 * floor:.2f}%"))
    print(
        f"{planted.split(name)[0]}: {args.times} comparisons with itself; a change must exceed max(floor, {100 * significance.MIN_EFFECT:.0f}%)"
    )
    print(table(("case", "floor"), rows))
    return 0
