"""Remove runs or comparisons from the history, without asking."""

from __future__ import annotations

import argparse

from fused_attn_bench.codes import GOOD
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.history import Filter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which ones."""
    parser.add_argument("ids", nargs="+", metavar="RUN", help="ids, as the command runs lists them, or latest")
    selection.add_history(parser)
    outputs.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """0; one unknown id removes nothing."""
    outputs.begin(args)
    history, gone = selection.history(args, writes=True), []
    for run_id in list(dict.fromkeys(map(history.named, args.ids))):
        results, comparisons = history.delete(Filter(runs=(run_id,)))
        gone.append({"run": run_id, "results": results, "comparisons": comparisons})
        print(f"run {run_id}: {results} results and {comparisons} comparisons removed")
    outputs.write(args.json, map(outputs.line, gone))
    return GOOD
