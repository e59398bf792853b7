"""Make the history smaller: remove what is old, or what cannot be read, without asking."""

from __future__ import annotations

import argparse

from fused_attn_bench.codes import GOOD
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.history import Filter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What goes."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--keep", type=selection.count, metavar="N", help="all but the newest N runs and the newest N comparisons")
    which.add_argument("--before", type=selection.date, metavar="DATE", help="what is older, as 2026-01-31, in UTC")
    which.add_argument("--broken", action="store_true", help="rows that cannot be read")
    selection.add_history(parser)
    outputs.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """0; noise floors stay."""
    outputs.begin(args)
    history = selection.history(args, writes=True)
    if args.broken:
        gone = {"broken": history.delete_broken()}
        print(f"{gone['broken']} rows that cannot be read removed")
    else:
        older = history.delete(Filter(before=args.before)) if args.before else history.delete(Filter(last=args.keep), others=True)
        gone = dict(zip(("results", "comparisons"), older, strict=True))
        print(f"{gone['results']} results and {gone['comparisons']} comparisons removed")
    outputs.write(args.json, [outputs.line(gone)])
    history.shrink()
    return GOOD
