"""Show one run again: the table that it printed, or what a comparison found."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from fused_attn_bench import tables
from fused_attn_bench.codes import GOOD
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.history import Filter
from fused_attn_bench.results import Compared, Result, to_line
from fused_attn_bench.text import seconds, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which one."""
    parser.add_argument("id", metavar="RUN", help="its id, as the command runs lists it, or latest")
    outputs.add_json(parser)
    selection.add_history(parser)


def run(args: argparse.Namespace) -> int:
    """0."""
    outputs.begin(args)
    history = selection.history(args)
    only = Filter(runs=(history.named(args.id),))
    results, compared = history.results(only=only), history.comparisons(only)
    records: list[Result | Compared] = [*results, *compared]
    for first in records[:1]:
        print(f"run {first.run}, {first.time}")
        print(tables.environment(first.environment))
    if results:
        print(tables.results(results))
    if compared:
        print(comparisons(compared))
    outputs.write(args.json, map(to_line, records))
    return GOOD


def comparisons(compared: Sequence[Compared]) -> str:
    """A line per case of what a comparison found."""

    def change(effect: float | None) -> str:
        return "-" if effect is None else f"{100 * math.expm1(effect):+.1f}%"

    rows = [
        (
            c.case, c.a, c.b, *("-" if m is None else seconds(m) for m in c.medians), change(c.effect),
            "-" if c.low is None else f"{change(c.low)} … {change(c.high)}", f"{c.verdict}: {c.reason}" if c.reason else c.verdict,
        )
        for c in compared
    ]  # fmt: skip
    return table(("case", "A", "B", "A takes", "B takes", "change", "95 % interval", "verdict"), rows, left=3)
