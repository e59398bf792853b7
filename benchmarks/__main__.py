"""Benchmarks that can be trusted: ``python -m benchmarks COMMAND --help`` says more."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from benchmarks.commands.run import INTERRUPTED

COMMANDS = {
    "run": "measure providers on cases and keep the results",
    "compare": "two providers, two commits, or a run against history: which cases changed",
    "calibrate": "measure the noise floor of each case by comparing identical code",
    "bisect": "find the first commit that made a case slower",
    "track": "find changes and slow drift in the history",
    "report": "write an HTML page and plots",
    "check": "correctness and performance gate against a stored baseline",
    "export": "write the history as JSON lines",
    "import": "add JSON lines to the history",
    "cases": "list the cases of a plain run",
    "bounds": "host cost per call and peak memory, held to their bounds",
    "tune": "choose the tiles of Hopper's kernels by measuring",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 2 when it cannot be understood or has nothing to work on, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    modules = {name: importlib.import_module(f"benchmarks.commands.{name}{'_' * (name == 'import')}") for name in COMMANDS}
    for name, text in COMMANDS.items():
        modules[name].add_arguments(commands.add_parser(name, help=text, description=modules[name].__doc__))
    args = parser.parse_args(argv)
    try:
        return int(modules[args.command].run(args))
    except ValueError as error:
        print(f"python -m benchmarks {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
