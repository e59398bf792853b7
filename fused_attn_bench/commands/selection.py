"""Arguments that commands share: which cases, which providers, how to measure, and where results are kept."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_attn_bench import planted, timers
from fused_attn_bench.case import FORM, Case
from fused_attn_bench.database import default_path
from fused_attn_bench.files import unwritten
from fused_attn_bench.harness import Setup
from fused_attn_bench.history import Filter, History
from fused_attn_bench.operation import OPERATIONS, REFERENCE, Operation, case_of, operation, provider_names
from fused_attn_bench.problem import MODES
from fused_attn_bench.results import ResultsError


def add_history(parser: argparse.ArgumentParser) -> None:
    """``--db``."""
    text = "the history (default: FUSED_ATTN_BENCHMARKS, or benchmarks.sqlite in the user's data folder)"
    parser.add_argument("--db", type=Path, metavar="FILE", help=text)


def history(args: argparse.Namespace, writes: bool = False) -> History:
    """The history, opened, its path shown; what cannot be read of it is warned of.

    Raises:
        ResultsError: it cannot be opened, or ``writes`` is asked of one that can only be read.
    """
    path = args.db or default_path()
    print(f"history: {path}", file=sys.stderr)
    if not writes and not path.exists():
        print("warning: there is no such file yet; an empty history is read", file=sys.stderr)
        path = Path(":memory:")
    opened = History(path, warn=lambda text: print(f"warning: {text}", file=sys.stderr))
    args.opened.callback(opened.close)
    if writes:
        opened.must_be_writable()
    return opened


def unkept(keep: Callable[[], None]) -> str:
    """Keeps what was measured; why it could not be, or nothing. What it says is shown all the same.

    Raises:
        OSError: something else than a disk that is full or fails.
    """
    try:
        keep()
    except (OSError, ResultsError) as error:
        if isinstance(error, OSError) and not unwritten(error):
            raise
        return f"results could not be kept ({error})"
    return ""


def add_filter(parser: argparse.ArgumentParser, runs: bool = True) -> None:
    """Which part of the history; ``--run`` only where no argument of the command's own says it."""
    group = parser.add_argument_group("which part of the history")
    if runs:
        group.add_argument("--run", nargs="+", metavar="ID", default=(), help="these runs")
    group.add_argument("--case", nargs="+", metavar="NAME", default=(), help="these cases, by name or pattern")
    group.add_argument("--since", type=date, metavar="DATE", help="from then on, as 2026-01-31 or 2026-01-31T12:00, in UTC")
    group.add_argument("--last", type=count, metavar="N", help="the newest N runs")


def filtered(args: argparse.Namespace) -> Filter:
    """What ``add_filter``'s arguments say."""
    return Filter(tuple(getattr(args, "run", ())), tuple(args.case), since=args.since or "", last=args.last)


def date(text: str) -> str:
    """An ISO date or time, in full.

    Example:
        >>> date("2026-01-31")
        '2026-01-31T00:00:00'
    """
    try:
        return datetime.datetime.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"a date like 2026-01-31 is needed; got {text!r}") from None


def count(text: str) -> int:
    """A number from one on.

    Example:
        >>> count("3")
        3
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on is needed; got {text!r}")
    return int(text)


def add_cases(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    group = parser.add_argument_group("cases", "every combination of what is given; the others as in a plain run")
    group.add_argument("--case", nargs="+", metavar="NAME", help=f"{FORM}, or a pattern over the cases of a plain run")
    group.add_argument("--op", nargs="+", metavar="NAME")
    group.add_argument("--variant", nargs="+", metavar="NAME")
    group.add_argument("--mode", nargs="+", choices=MODES)
    group.add_argument("--dtype", nargs="+", choices=("float64", "float32", "bfloat16", "float16"))
    group.add_argument(
        "--shape", nargs="+", metavar="1x4x1024x64", help="sizes along the operation's axes, and its options: 1x4x1x64,kv_len=512"
    )
    add_files(group)


def add_files(parser: argparse._ActionsContainer) -> None:
    """``--load``."""
    text = "Python files that declare operations or providers"
    parser.add_argument("--load", type=Path, nargs="+", default=(), metavar="FILE.py", help=text)


def add_setup(parser: argparse.ArgumentParser, seconds: float) -> None:
    """How it is measured."""
    group = parser.add_argument_group("measuring")
    add_device(group)
    group.add_argument("--seconds", type=float, default=seconds, help=f"of timing per case, for all providers (default {seconds:g})")
    group.add_argument("--rounds", type=int, default=6, help="at least so many samples of each, even (default 6)")
    group.add_argument("--timer", choices=timers.TIMERS, default="auto", help="auto: wall on the CPU, events on a GPU; graph: CUDA graphs")
    group.add_argument("--warm", action="store_true", help="do not flush a GPU's L2 cache before each call")
    group.add_argument(
        "--precision",
        type=percentage,
        default=0.005,
        metavar="0.5%",
        help="end a case early once every median is known to that (default 0.5%%)",
    )
    group.add_argument("--again", type=int, default=1, metavar="N", help="measure a disturbed case so many times anew (default 1)")


def add_device(parser: argparse._ActionsContainer) -> None:
    """``--device``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")


def device(args: argparse.Namespace) -> torch.device:
    """As given, if it is there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can see; it sees none. Check nvidia-smi and torch.version.cuda.")
    return torch.device(args.device)


def setup(args: argparse.Namespace) -> Setup:
    """As given."""
    where = device(args)
    name = timers.make(args.timer, where).name
    return Setup(where, args.seconds, args.rounds, timer=name, cold=not args.warm, precision=args.precision, again=args.again)


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """Cases by name or pattern, or all combinations, or those of a plain run."""
    where = torch.device(args.device)
    if not OPERATIONS:
        raise ValueError("there must be an operation to measure; none is declared. Name a Python file that declares one with --load.")
    plain = [case for op in OPERATIONS.values() for case in op.defaults(where)]
    if args.case:
        return list(dict.fromkeys(case for name in args.case for case in _named(name, plain, args)))
    filters = (args.op, args.variant, args.mode, args.dtype, args.shape)
    for name in args.op or ():
        operation(name)
    if not any(filters):
        return plain or _nothing("declared", args)
    if not (args.dtype or args.shape):
        wanted = filters[:3]
        chosen = [c for c in plain if all(not f or x in f for f, x in zip(wanted, (c.op, c.variant, c.mode), strict=True))]
    else:
        chosen = [case for name in args.op or OPERATIONS for case in _combined(operation(name), args, plain)]
    return chosen or _nothing(f"op {args.op}, variant {args.variant}, mode {args.mode}, dtype {args.dtype}, shape {args.shape}", args)


def _named(name: str, plain: Sequence[Case], args: argparse.Namespace) -> list[Case]:
    if not set("*?[") & set(name):
        return [case_of(name)]
    return [case for case in plain if fnmatch.fnmatch(case.name, name)] or _nothing(name, args)


def _nothing(said: str, args: argparse.Namespace) -> Any:
    raise ValueError(
        f"the arguments must choose at least one case; none is {said}. A plain run's cases are listed by {args.project.program} cases."
    )


def _combined(op: Operation, args: argparse.Namespace, plain: Sequence[Case]) -> list[Case]:
    own = [case for case in plain if case.op == op.name]
    variants = [v for v in args.variant or op.variants if v in op.variants]
    modes = [m for m in args.mode or ("fwd", "fwd+bwd") if m in op.modes]
    shapes = args.shape or list(dict.fromkeys(case.sizes for case in own))
    dtypes = args.dtype or list(dict.fromkeys(case.dtype for case in own))[:1] or ["float32"]
    return [op.case("/".join((op.name, *parts))) for parts in itertools.product(variants, modes, dtypes, shapes)]


def add_providers(parser: argparse.ArgumentParser) -> None:
    """Who is measured."""
    text = "eager is the reference itself, eager+5%% the same made 5 %% slower (default: what the operations run on the device)"
    parser.add_argument("--provider", nargs="+", metavar="NAME", help=text)


def chosen_providers(args: argparse.Namespace, case: Case) -> list[str]:
    """As given, or the device's defaults for the case's operation: whoever names another's is told that it refuses."""
    where = torch.device(args.device)
    ours = [name for name in operation(case.op).runs(where) if name != REFERENCE]
    return [planted.known(name) for name in args.provider or (*ours, REFERENCE)]


def watched(args: argparse.Namespace) -> str:
    """The provider that commits and baselines are about: --of, the project's, or the only one there is.

    Raises:
        ValueError: there are several.
    """
    others = [name for name in provider_names() if name != REFERENCE]
    name = args.of or args.project.watched or (others[0] if len(others) == 1 else "")
    if not name:
        raise ValueError(f"what is measured must be named with --of, one of {', '.join(others) or 'no provider yet'}")
    return planted.known(name)


def percentage(text: str) -> float:
    """A fraction from "3%".

    Example:
        >>> percentage("3%")
        0.03
    """
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not text.endswith("%") or not 0 <= value < 1000:
        raise argparse.ArgumentTypeError(f"a percentage like 3% is needed; got {text!r}")
    return value / 100
