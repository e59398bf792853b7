"""Measure and keep: every provider on every case, checked against float64 before and after it is timed."""

from __future__ import annotations

import argparse
import datetime
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import roofs, tables, timers
from benchmarks.busy import neighbours
from benchmarks.cases import Case
from benchmarks.commands import selection
from benchmarks.environment import describe
from benchmarks.harness import Setup, measure
from benchmarks.results import Result, export

# What shells say of a process that Ctrl-C ended.
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, by whom, how, and where to."""
    selection.add_cases(parser)
    selection.add_providers(parser)
    selection.add_setup(parser, seconds=2.0)
    selection.add_history(parser)
    text = "keep so many processes busy meanwhile; such results are never compared with quiet ones"
    parser.add_argument("--busy", type=int, default=0, metavar="N", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well, as JSON lines")


def run(args: argparse.Namespace) -> int:
    """0; 1 when fused_attn failed or any result is wrong; 130 after Ctrl-C, with what was done kept and shown."""
    selection.load(args)
    setup, cases, providers = selection.setup(args), selection.chosen_cases(args), selection.chosen_providers(args)
    history, done, code = selection.history(args), [], 0
    try:
        with neighbours(args.busy):
            for results in measured(cases, providers, setup, beside=args.busy):
                history.add(results)
                done += results
    except KeyboardInterrupt:
        code = INTERRUPTED
    print(tables.environment(done[0].environment if done else describe(setup.device, beside=args.busy)))
    print(tables.results(done))
    if args.json is not None:
        export(done, args.json)
    if code:
        print(f"interrupted after {len({r.case for r in done})} of {len(cases)} cases; those are kept")
    if done:
        print(f"run {done[0].run}")
    return code or int(any(map(is_failure, done)))


def is_failure(result: Result) -> bool:
    """A wrong result, or one of fused_attn's that raised."""
    return result.status == "wrong" or (result.status == "failed" and result.provider.startswith("fused_attn"))


def measured(cases: Sequence[Case], providers: Sequence[str], setup: Setup, beside: int = 0) -> Iterator[list[Result]]:
    """The results of each case as soon as it is done, stamped with the run and the environment."""
    from tqdm import tqdm

    now = datetime.datetime.now(datetime.timezone.utc)
    stamp = {
        "run": f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        "time": now.isoformat(timespec="seconds"),
        "timer": setup.timer,
        "environment": describe(setup.device, beside=beside),
    }
    limits: Mapping[str, roofs.Roofs] = {
        dtype: roofs.measure(setup.device, getattr(torch, dtype), timers.make(setup.timer, setup.device))
        for dtype in dict.fromkeys(case.dtype for case in cases)
    }
    with tqdm(total=len(cases), unit="case", disable=None, leave=False) as bar:
        for case in cases:
            bar.set_description(case.name)
            yield [replace(result, **stamp) for result in measure(case, providers, setup, limits[case.dtype])]  # type: ignore[arg-type]
            bar.update()
