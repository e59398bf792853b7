"""Figures that are held to a bound: host cost of a call, peak memory of a long window, time and peak memory of additive attention."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks import additive, memory, overhead
from fused_attn_bench.commands import selection

BOUNDS = {"overhead": overhead.run, "memory": memory.run, "additive": additive.run}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which, and where."""
    parser.add_argument("--only", choices=BOUNDS, help="one of them (default: all)")
    selection.add_device(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="time to measure for, each (default 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there as well")


def run(args: argparse.Namespace) -> int:
    """0; 1 when a result is wrong or a bound is broken."""
    device, reports = selection.device(args), []
    for name in [args.only] if args.only else BOUNDS:
        reports.append(BOUNDS[name](device, args.seconds))
        print(f"{reports[-1]}\n", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    return 0 if all(report.holds for report in reports) else 1
