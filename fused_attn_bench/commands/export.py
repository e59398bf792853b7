"""Write the history, or a part of it, as JSON lines: results, comparisons, and the noise floors of the cases."""

from __future__ import annotations

import argparse
from pathlib import Path

from fused_attn_bench import results
from fused_attn_bench.codes import GOOD
from fused_attn_bench.commands import outputs, selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and which part."""
    parser.add_argument("file", type=Path, metavar="FILE", help="- for standard output")
    selection.add_filter(parser)
    selection.add_history(parser)


def run(args: argparse.Namespace) -> int:
    """0."""
    outputs.writable(args.file)
    history, only = selection.history(args), selection.filtered(args)
    found, compared, floors = history.results(only=only), history.comparisons(only), history.floors(only)
    if not (found or compared):
        said = f" of run {', '.join(args.run)}" if args.run else " that the arguments choose" if vars(only) != vars(type(only)()) else ""
        raise results.ResultsError(f"the history must hold results{said}; it holds none.")
    records: list[results.Record] = [*found, *compared, *floors]
    outputs.write(args.file, map(results.to_line, records))
    with outputs.table_of(args.file):
        print(f"{len(found)} results, {len(compared)} comparisons and {len(floors)} noise floors written to {args.file}")
    return GOOD
