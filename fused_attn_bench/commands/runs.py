"""List the runs and comparisons of the history."""

from __future__ import annotations

import argparse

from fused_attn_bench.codes import GOOD
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.text import table

HEADERS = ("run", "time", "device", "commit", "timer", "results", "comparisons")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which of them."""
    outputs.add_json(parser)
    selection.add_filter(parser)
    selection.add_history(parser)


def run(args: argparse.Namespace) -> int:
    """0; one line per run, oldest first."""
    outputs.begin(args)
    found = selection.history(args).overview(selection.filtered(args))
    rows = [(r.id, r.time, r.device or "-", r.commit[:10] or "-", r.timer or "-", str(r.results), str(r.comparisons)) for r in found]
    print(table(HEADERS, rows, left=5))
    outputs.write(args.json, (outputs.line(vars(r)) for r in found))
    return GOOD
