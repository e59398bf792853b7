"""Find changes in the history: steps with their last good and first slow commit, and slow drift."""

from __future__ import annotations

import argparse

from fused_attn_bench import changes
from fused_attn_bench.commands import selection
from fused_attn_bench.text import seconds, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which history, and when to fail."""
    parser.add_argument(
        "--fail-on", type=selection.percentage, metavar="3%", help="exit with 1 when the newest level is slower by at least that"
    )
    selection.add_history(parser)


def run(args: argparse.Namespace) -> int:
    """0; 1 when --fail-on says so."""
    histories = changes.series(selection.history(args).results())
    found = changes.find(histories)
    rows, failing = [], 0
    for key, steps in found.items():
        points = histories[key]
        for change in steps:
            before, after = points[max(0, change.index - 1)], points[change.index if change.kind == changes.STEP else -1]
            between = f"{before.commit[:10] or '-'} → {after.commit[:10] or '-'}"
            rows.append(
                (key[1], key[2], change.kind, f"{change.percent:+.1f}%", f"{change.p:.1g}", between, after.time, seconds(after.median))
            )
        newest = steps[-1]
        failing += args.fail_on is not None and newest.percent >= 100 * args.fail_on
    long_enough = sum(len(p) >= 2 * changes.SEGMENT for p in histories.values())
    print(f"{len(histories)} series, {long_enough} of them with the {2 * changes.SEGMENT} runs that a change needs; {len(rows)} changes")
    if rows:
        print(table(("case", "provider", "kind", "change", "p", "commits", "since", "time"), rows, left=3))
    return int(failing > 0)
