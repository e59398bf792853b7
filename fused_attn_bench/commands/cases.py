"""List the cases of a plain run, by the names that --case takes."""

from __future__ import annotations

import argparse

from fused_attn_bench.codes import GOOD
from fused_attn_bench.commands import outputs, selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The same filters as run's."""
    selection.add_cases(parser)
    selection.add_setup(parser, seconds=2.0)
    outputs.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """0; one line per case."""
    outputs.begin(args)
    chosen = selection.chosen_cases(args)
    for case in chosen:
        print(case.name)
    lines = ({"case": c.name, "op": c.op, "variant": c.variant, "mode": c.mode, "dtype": c.dtype, "sizes": c.sizes} for c in chosen)
    outputs.write(args.json, map(outputs.line, lines))
    return GOOD
