"""Add JSON lines to the history; what is there already is not added again."""

from __future__ import annotations

import argparse
from pathlib import Path

from fused_attn_bench import results
from fused_attn_bench.codes import GOOD
from fused_attn_bench.commands import outputs, selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where."""
    parser.add_argument("file", type=Path, nargs="+", metavar="FILE")
    selection.add_history(parser)
    outputs.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """0; files are read before anything is written, so that a bad one adds nothing."""
    from tqdm import tqdm

    outputs.begin(args)
    read = [record for path in args.file for record in results.load(path)]
    added = selection.history(args, writes=True).add(tqdm(read, unit="record", disable=None, leave=False))
    print(f"{added} records added, {len(read) - added} were there already")
    outputs.write(args.json, [outputs.line({"added": added, "there": len(read) - added})])
    return GOOD
