"""Write a run and its history as one HTML page, and on request its figures as PNG and SVG."""

from __future__ import annotations

import argparse
from pathlib import Path

from fused_attn_bench import plots, report
from fused_attn_bench.commands import selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, where to."""
    parser.add_argument("--run", metavar="ID", help="default: the newest")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.html"), metavar="FILE.html", help="default: benchmarks.html")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the figures there as well")
    selection.add_history(parser)


def run(args: argparse.Namespace) -> int:
    """0."""
    history = selection.history(args).results()
    args.out.write_text(report.build(history, args.run), encoding="utf-8")
    print(f"page written to {args.out}")
    if args.plots is not None:
        run_id = args.run or history[-1].run
        for path in plots.save([r for r in history if r.run == run_id], args.plots):
            print(f"figure written to {path}")
    return 0
