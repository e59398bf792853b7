"""Benchmarks that can be trusted: COMMAND --help says more."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from types import ModuleType

from fused_attn_bench.codes import CRASHED, INTERRUPTED, USAGE
from fused_attn_bench.commands import outputs
from fused_attn_bench.files import unwritten
from fused_attn_bench.project import Project

COMMANDS = {
    "run": "measure providers on cases and keep the results",
    "compare": "two providers, two commits, or a run against history: which cases changed",
    "calibrate": "measure the noise floor of each case by comparing identical code",
    "bisect": "find the first commit that made a case slower",
    "track": "find changes and slow drift in the history",
    "report": "write an HTML page and plots",
    "check": "correctness and performance gate against a stored baseline",
    "runs": "list the runs of the history",
    "show": "show a run or a comparison again",
    "delete": "remove runs from the history",
    "prune": "remove what is old, or cannot be read, from the history",
    "export": "write the history as JSON lines",
    "import": "add JSON lines to the history",
    "cases": "list the cases of a plain run",
    "profile": "run one provider on one case under ncu, nsys or another profiler",
}


def modules(project: Project) -> dict[str, tuple[str, str]]:
    """Each command's module and a line on it, the project's own ones last."""
    own = {name: (f"fused_attn_bench.commands.{name}{'_' * (name == 'import')}", text) for name, text in COMMANDS.items()}
    return own | dict(project.commands)


def parser(project: Project) -> tuple[argparse.ArgumentParser, dict[str, ModuleType]]:
    """The command line and the module behind each command."""
    made = argparse.ArgumentParser(prog=project.program, description=__doc__)
    commands, found = made.add_subparsers(dest="command", required=True, metavar="command"), {}
    for name, (module, text) in modules(project).items():
        found[name] = importlib.import_module(module)
        sub = commands.add_parser(name, help=text, description=found[name].__doc__)
        sub.set_defaults(project=project)
        found[name].add_arguments(sub)
    return made, found


def main(argv: Sequence[str] | None = None, project: Project | None = None) -> int:
    """Runs a command of a project; the exit codes are those of ``fused_attn_bench.codes``."""
    project = project or Project()
    command = project.program
    try:
        made, found = parser(project)
        args = made.parse_args(argv)
        command = f"{project.program} {args.command}"
        code = _ran(found[args.command], args)
        outputs.flush()
        return code
    except ValueError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        # Also a full disk or a damaged file: whatever it was, it is no verdict on what was measured.
        if unwritten(error):
            remedy = "Whoever reads it must read all" if isinstance(error, BrokenPipeError) else "Make room for it"
            print(
                f"{command}: all of the output must be written; got: {error}. {remedy}, and repeat the command.",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        return CRASHED


def _ran(module: ModuleType, args: argparse.Namespace) -> int:
    """A command's exit code; an exit of code that it measures is never it.

    Raises:
        RuntimeError: what it measures ended Python.
    """
    try:
        # What a command opens is closed however it ends: an open history has files beside it.
        with ExitStack() as args.opened:
            # Files of operations may print, which belongs to no JSON.
            args.opened.enter_context(outputs.table_of(getattr(args, "json", None)))
            if hasattr(args, "load"):
                from fused_attn_bench.operation import load

                for path in (*args.project.files, *args.load):
                    load(path)
            return int(module.run(args))
    except SystemExit as error:
        raise RuntimeError(f"what is measured must not end Python; it raised SystemExit: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
