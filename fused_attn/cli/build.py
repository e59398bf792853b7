"""Builds the native CUDA library."""

from __future__ import annotations

import argparse
from pathlib import Path

from fused_attn import build
from fused_attn.backends.cuda import library_path
from fused_attn.cli.errors import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--flavour, --out and --verbose."""
    parser.add_argument(
        "--flavour", choices=tuple(build.FLAVOURS), default="release", help="machine code for GPUs, or PTX for the simulator"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the library goes (release: beside the package's modules)")
    parser.add_argument("--verbose", action="store_true", help="show the compilers' command lines")


def run(args: argparse.Namespace) -> int:
    """Compiles, and prints where the library is."""
    destination = args.out or (library_path() if args.flavour == "release" else None)
    try:
        library = build.build(args.flavour, destination, args.verbose)
    except build.BuildError as error:
        raise CommandError(str(error)) from None
    print(f"{library}: {library.stat().st_size / 2**20:.1f} MiB")
    return 0
