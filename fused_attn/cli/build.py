"""Builds the native CUDA library, or with --cpu the CPU library."""

from __future__ import annotations

import argparse
from pathlib import Path

from fused_attn import build, build_cpu
from fused_attn.backends.cpu import library
from fused_attn.backends.cuda import library_path
from fused_attn.cli.errors import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--cpu, --flavour, --out and --verbose."""
    parser.add_argument("--cpu", action="store_true", help="the CPU library instead: g++ or clang++ alone, seconds")
    parser.add_argument(
        "--flavour", choices=tuple(build.FLAVOURS), default="release", help="machine code for GPUs, or PTX for the simulator"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the library goes (release: beside the package's modules)")
    parser.add_argument("--verbose", action="store_true", help="show the compilers' command lines")


def run(args: argparse.Namespace) -> int:
    """Compiles, and prints where the library is."""
    try:
        made = _cpu(args.out) if args.cpu else _cuda(args)
    except build.BuildError as error:
        raise CommandError(str(error)) from None
    print(f"{made}: {made.stat().st_size / 2**20:.1f} MiB")
    return 0


def _cuda(args: argparse.Namespace) -> Path:
    return build.build(args.flavour, args.out or (library_path() if args.flavour == "release" else None), args.verbose)


def _cpu(out: Path | None) -> Path:
    made = build_cpu.build(out or library.library_path(), report=print)
    made.with_name(build_cpu.FAILURE).unlink(missing_ok=True)
    return made
