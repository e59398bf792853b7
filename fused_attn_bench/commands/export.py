"""Write the history, or a part of it, as JSON lines: results, comparisons, and the noise floors of the cases."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fused_attn_bench import results
from fused_attn_bench.codes import GOOD
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.history import Filter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and which part."""
    parser.add_argument("file", type=Path, metavar="FILE", help="- for standard output")
    selection.add_filter(parser)
    selection.add_history(parser)
    outputs.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """0."""
    if args.file == args.json == outputs.STANDARD:
        raise ValueError("standard output must be for one of FILE and --json; both are -. Name a file for the other.")
    outputs.begin(args, args.file)
    only = selection.filtered(args)
    records = selection.history(args).each(only)
    first = next(records, None)
    if first is None or isinstance(first, results.Floor):
        said = "" if only == Filter() else f" of run {', '.join(args.run)}" if args.run else " that the arguments choose"
        raise results.ResultsError(f"the history must hold results{said}; it holds none.")
    written: Counter[type[results.Record]] = Counter()

    def lines() -> Iterator[str]:
        for record in itertools.chain([first], records):
            written[type(record)] += 1
            yield results.to_line(record)

    outputs.write(args.file, lines())
    kinds = ((results.Result, "results"), (results.Compared, "comparisons"), (results.Floor, "noise floors"))
    with outputs.table_of(args.file):
        print(f"{', '.join(f'{written[kind]} {name}' for kind, name in kinds)} written to {args.file}")
    outputs.write(args.json, [outputs.line({"file": str(args.file), **{name: written[kind] for kind, name in kinds}})])
    return GOOD
