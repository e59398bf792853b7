"""Write runs and their history as one HTML page, and on request a run's figures as PNG and SVG."""

from __future__ import annotations

import argparse
from pathlib import Path

from fused_attn_bench import plots, report
from fused_attn_bench.codes import GOOD
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.files import replacing
from fused_attn_bench.results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, where to."""
    parser.add_argument("--run", dest="shown", metavar="ID", help="default: the newest; of every other device it is the newest")
    parser.add_argument("--title", metavar="TEXT", help="of the page (default: the project's)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.html"), metavar="FILE.html", help="default: benchmarks.html")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the figures there as well")
    selection.add_filter(parser, runs=False)
    selection.add_history(parser)
    outputs.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """0."""
    outputs.begin(args, args.out)
    history, project, only = selection.history(args), args.project, selection.filtered(args)
    run_id = history.named(args.shown, compared=False) if args.shown else None
    # One at a time: raw samples of all runs together may not fit in memory.
    results = (record for record in history.each(only) if isinstance(record, Result))
    page = report.build(results, run_id, history.comparisons(only), title=args.title or project.title, program=project.program)
    with replacing(args.out) as file:
        file.write(page)
    newest = (run_id,) if run_id else history.runs()[-1:]  # none where there are comparisons only
    figures = [] if args.plots is None else [path for name in newest for path in plots.save(history.results(name), args.plots)]
    print(f"page written to {args.out}")
    for path in figures:
        print(f"figure written to {path}")
    outputs.write(args.json, [outputs.line({"page": str(args.out), "figures": list(map(str, figures))})])
    return GOOD
