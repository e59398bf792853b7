"""Arguments that commands share: which cases, which providers, how to measure, and where results are kept."""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, providers, results, timers
from benchmarks.cases import MODES, VARIANTS, Case
from benchmarks.harness import Setup


def add_history(parser: argparse.ArgumentParser) -> None:
    """``--db``."""
    text = "the history (default: FUSED_ATTN_BENCHMARKS, or benchmarks.sqlite in the user's data folder)"
    parser.add_argument("--db", type=Path, metavar="FILE", help=text)


def history(args: argparse.Namespace) -> results.History:
    """The history, opened, its path shown."""
    path = args.db or results.default_path()
    opened = results.History(path)
    print(f"history: {path}", file=sys.stderr)
    return opened


def add_cases(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    group = parser.add_argument_group("cases", "every combination of what is given; the others as in a plain run")
    group.add_argument("--case", nargs="+", metavar="NAME", help="op/variant/mode/dtype/shape, or a pattern over the cases of a plain run")
    group.add_argument("--op", nargs="+", choices=VARIANTS)
    group.add_argument("--variant", nargs="+", choices=sorted({v for known in VARIANTS.values() for v in known}))
    group.add_argument("--mode", nargs="+", choices=MODES)
    group.add_argument("--dtype", nargs="+", choices=("float64", "float32", "bfloat16", "float16"))
    group.add_argument(
        "--shape", nargs="+", metavar="1x4x1024x64", help="attention: batch, heads, length, head_dim; softmax: that of the scores"
    )
    group.add_argument("--load", type=Path, nargs="+", default=(), metavar="FILE.py", help="Python files that add providers of your own")


def add_setup(parser: argparse.ArgumentParser, seconds: float) -> None:
    """How it is measured."""
    group = parser.add_argument_group("measuring")
    add_device(group)
    group.add_argument("--seconds", type=float, default=seconds, help=f"of timing per case, for all providers (default {seconds:g})")
    group.add_argument("--rounds", type=int, default=6, help="at least so many samples of each, even (default 6)")
    group.add_argument("--timer", choices=timers.TIMERS, default="auto", help="auto: wall on the CPU, events on a GPU; graph: CUDA graphs")
    group.add_argument("--warm", action="store_true", help="do not flush a GPU's L2 cache before each call")


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
    return Setup(where, args.seconds, args.rounds, timer=name, cold=not args.warm)


def load(args: argparse.Namespace) -> None:
    """Runs the files that add providers."""
    for path in args.load:
        providers.load(path)


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """Cases by name or pattern, or all combinations, or those of a plain run."""
    plain = cases.defaults(torch.device(args.device))
    if args.case:
        return list(dict.fromkeys(case for name in args.case for case in _named(name, plain)))
    filters = (args.op, args.variant, args.mode, args.dtype, args.shape)
    if not any(filters):
        return plain
    if not (args.dtype or args.shape):
        wanted = filters[:3]
        chosen = [c for c in plain if all(not f or x in f for f, x in zip(wanted, (c.op, c.variant, c.mode), strict=True))]
    else:
        chosen = [c for op in args.op or VARIANTS for c in _combined(op, args, [p for p in plain if p.op == op])]
    return chosen or _nothing(f"op {args.op}, variant {args.variant}, mode {args.mode}, dtype {args.dtype}, shape {args.shape}")


def _named(name: str, plain: Sequence[Case]) -> list[Case]:
    if not set("*?[") & set(name):
        return [Case.parse(name)]
    return [case for case in plain if fnmatch.fnmatch(case.name, name)] or _nothing(name)


def _nothing(said: str) -> Any:
    raise ValueError(
        f"the arguments must choose at least one case; none is {said}. A plain run's cases are listed by python -m benchmarks cases."
    )


def _combined(op: str, args: argparse.Namespace, plain: Sequence[Case]) -> list[Case]:
    variants = [v for v in args.variant or VARIANTS[op] if v in VARIANTS[op]]
    shapes = args.shape or list(dict.fromkeys(case.name.rpartition("/")[2] for case in plain))
    combinations = itertools.product(variants, args.mode or ("fwd", "fwd+bwd"), args.dtype or [plain[0].dtype], shapes)
    return [Case.parse("/".join((op, *parts))) for parts in combinations]


def add_providers(parser: argparse.ArgumentParser) -> None:
    """Who is measured."""
    text = f"of {', '.join(providers.names())}; eager+5%% is eager made 5 %% slower (default: those that are common on the device)"
    parser.add_argument("--provider", nargs="+", metavar="NAME", help=text)


def chosen_providers(args: argparse.Namespace) -> list[str]:
    """As given, or the device's defaults."""
    return [providers.known(name) for name in args.provider or providers.defaults(torch.device(args.device))]


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
