"""Write runs and their history as one HTML page, and on request a run's figures as PNG and SVG."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from fused_attn_bench import plots, report
from fused_attn_bench.commands import selection
from fused_attn_bench.results import History, Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, where to."""
    parser.add_argument("--run", metavar="ID", help="default: the newest; of every other device it is the newest")
    parser.add_argument("--title", metavar="TEXT", help="of the page (default: the project's)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.html"), metavar="FILE.html", help="default: benchmarks.html")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the figures there as well")
    selection.add_history(parser)


def run(args: argparse.Namespace) -> int:
    """0."""
    history, project = selection.history(args), args.project
    title = args.title or project.title
    page = report.build(_each(history), args.run, history.comparisons(), title=title, program=project.program)
    args.out.write_text(page, encoding="utf-8")
    print(f"page written to {args.out}")
    if args.plots is not None:
        for path in plots.save(history.results(args.run or history.runs()[-1]), args.plots):
            print(f"figure written to {path}")
    return 0


def _each(history: History) -> Iterator[Result]:
    """Every result, oldest first, a run at a time: raw samples of all runs together may not fit in memory."""
    for name in history.runs():
        yield from history.results(name)
