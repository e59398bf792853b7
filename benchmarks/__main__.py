"""``python -m benchmarks run [--op overhead|attention|softmax|memory]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import attention, memory, overhead, softmax

OPS = {"overhead": overhead.run, "softmax": softmax.run, "attention": attention.run, "memory": memory.run}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a report per benchmark; 1 when a result is wrong or a bound is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    run = parser.add_subparsers(dest="command", required=True, metavar="command").add_parser("run", help="measure and print")
    run.add_argument("--op", choices=OPS, help="one benchmark (default: all)")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--seconds", type=float, default=20.0, help="time to measure for, per benchmark (default 20)")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the tables there as well")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can see")
    reports = []
    for op in [args.op] if args.op else OPS:
        reports.append(OPS[op](torch.device(args.device), args.seconds))
        print(f"{reports[-1]}\n", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    return 0 if all(report.holds for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
