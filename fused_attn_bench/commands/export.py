"""Write the history, or one run of it, as JSON lines."""

from __future__ import annotations

import argparse
from pathlib import Path

from fused_attn_bench import results
from fused_attn_bench.commands import selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and which run."""
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--run", metavar="ID", help="one run (default: all)")
    selection.add_history(parser)


def run(args: argparse.Namespace) -> int:
    """0."""
    found = selection.history(args).results(args.run)
    if not found:
        raise results.ResultsError(f"the history must hold results{f' of run {args.run}' if args.run else ''}; it holds none.")
    print(f"{results.export(found, args.file)} results written to {args.file}")
    return 0
