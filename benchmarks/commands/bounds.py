"""Figures that are held to a bound: host cost of a call, and peak memory of a long window."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import memory, overhead

BOUNDS = {"overhead": overhead.run, "memory": memory.run}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which, and where."""
    parser.add_argument("--only", choices=BOUNDS, help="one of them (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=20.0, help="time to measure for, each (default 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there as well")


def run(args: argparse.Namespace) -> int:
    """0; 1 when a result is wrong or a bound is broken."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can see; it sees none. Check nvidia-smi and torch.version.cuda.")
    reports = []
    for name in [args.only] if args.only else BOUNDS:
        reports.append(BOUNDS[name](torch.device(args.device), args.seconds))
        print(f"{reports[-1]}\n", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    return 0 if all(report.holds for report in reports) else 1
