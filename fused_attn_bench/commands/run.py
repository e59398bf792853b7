"""Measure and keep: every provider on every case, checked against float64 before and after it is timed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fused_attn_bench import roofs, tables, timers
from fused_attn_bench.busy import neighbours
from fused_attn_bench.case import Case
from fused_attn_bench.codes import CRASHED, GOOD, INTERRUPTED, WORSE
from fused_attn_bench.commands import selection
from fused_attn_bench.environment import describe
from fused_attn_bench.harness import Setup, measure
from fused_attn_bench.project import Project
from fused_attn_bench.results import Result, export, new_run


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
    """0; 1 when a result is wrong, 4 when what is watched failed; 130 after Ctrl-C, with what was done kept and shown."""
    setup, cases, providers = selection.setup(args), selection.chosen_cases(args), selection.chosen_providers(args)
    history, done, code = selection.history(args), [], 0
    try:
        with neighbours(args.busy):
            for results in measured(cases, providers, setup, args.project, args.busy):
                history.add(results)
                done += results
    except KeyboardInterrupt:
        code = INTERRUPTED
    print(tables.environment(done[0].environment if done else describe(setup.device, args.project.repository, args.busy)))
    print(tables.results(done))
    if args.json is not None:
        export(done, args.json)
    if code:
        print(f"interrupted after {len({r.case for r in done})} of {len(cases)} cases; those are kept")
    if done:
        print(f"run {done[0].run}")
    return code or outcome(done, args.project.watched)


def outcome(results: Sequence[Result], watched: str) -> int:
    """The exit code of results: wrong ones count whoever gave them, failed ones if they are watched (all, where nothing is named)."""
    if any(r.status == "wrong" for r in results):
        return WORSE
    return CRASHED if any(r.status == "failed" and r.provider.startswith(watched) for r in results) else GOOD


def measured(cases: Sequence[Case], providers: Sequence[str], setup: Setup, project: Project, beside: int = 0) -> Iterator[list[Result]]:
    """The results of each case as soon as it is done, stamped with the run and the environment; beside so many busy processes."""
    from tqdm import tqdm

    run, time = new_run()
    stamp = {
        "run": run,
        "time": time,
        "timer": setup.timer,
        "environment": describe(setup.device, project.repository, beside),
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
