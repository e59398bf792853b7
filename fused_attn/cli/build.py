"""Builds the native CUDA extension."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    """Says that there is nothing to build."""
    print(
        "This version has no native sources to build: its triton, cpu and eager backends need no compiler.",
        file=sys.stderr,
    )
    return 1
