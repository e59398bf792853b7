"""List the cases of a plain run, by the names that --case takes."""

from __future__ import annotations

import argparse

from fused_attn_bench.commands import selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The same filters as run's."""
    selection.add_cases(parser)
    selection.add_setup(parser, seconds=2.0)


def run(args: argparse.Namespace) -> int:
    """0; one line per case."""
    for case in selection.chosen_cases(args):
        print(case.name)
    return 0
