"""``python -m fused_attn``: demo, info, explain, build."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from fused_attn.cli.errors import CommandError

COMMANDS = {
    "demo": "a real sentence through a real encoder whose attention runs on fused_attn, checked and timed",
    "info": "versions, devices and backends",
    "explain": "which backend would run a described problem, and why each other one would not",
    "build": "the native CUDA extension",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fused_attn", description="Fused masked softmax and flash-style attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, summary in COMMANDS.items():
        module = import_module(f"fused_attn.cli.{name}")
        # Without RawDescriptionHelpFormatter the examples in a command's docstring would be run together.
        command = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status is 1 when it could not do its work, 2 for a mistake in what was asked."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return int(args.run(args))
    except CommandError as error:
        print(f"python -m fused_attn {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
