"""Measure and keep: every provider on every case, checked against float64 before and after it is timed."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from fused_attn_bench import roofs, tables, timers
from fused_attn_bench.busy import neighbours
from fused_attn_bench.case import Case
from fused_attn_bench.clocks import locked
from fused_attn_bench.codes import CRASHED, GOOD, INTERRUPTED, WORSE
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.environment import describe
from fused_attn_bench.files import unwritten
from fused_attn_bench.harness import Setup, measure
from fused_attn_bench.problem import dtype_of
from fused_attn_bench.results import Result, ResultsError, new_run, to_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, by whom, how, and where to."""
    selection.add_cases(parser)
    selection.add_providers(parser)
    selection.add_setup(parser, seconds=2.0)
    selection.add_history(parser)
    text = "keep so many processes busy meanwhile; such results are never compared with quiet ones"
    parser.add_argument("--busy", type=int, default=0, metavar="N", help=text)
    text = "hold the GPU's clock there meanwhile, which takes an administrator; such results are compared with each other only"
    parser.add_argument("--lock-clocks", type=int, default=0, metavar="MHZ", help=text)
    outputs.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """0; 1 when a result is wrong, 4 when what is watched failed or the disk is full; 130 after Ctrl-C; what was done is kept and shown."""
    setup, cases = selection.setup(args), selection.chosen_cases(args)
    providers = [selection.chosen_providers(args, case) for case in cases]
    outputs.begin(args)
    history, done, code, ended = selection.history(args, writes=True), [], GOOD, ""
    described = describe(setup.device, args.project.repository, args.busy, args.lock_clocks)
    try:
        with neighbours(args.busy), locked(setup.device, args.lock_clocks):
            for results in measured(cases, providers, setup, described):
                history.add(results)
                done += results
    except KeyboardInterrupt:
        code, ended = INTERRUPTED, "interrupted"
    except (OSError, ResultsError) as error:
        if isinstance(error, OSError) and not unwritten(error):
            raise
        code, ended = CRASHED, f"ended because results could not be written ({error})"
    print(tables.environment(described))
    print(tables.results(done))
    if ended:
        print(f"{ended} after {len({r.case for r in done})} of {len(cases)} cases; those are kept")
    if done:
        print(f"run {done[0].run}")
    outputs.write(args.json, map(to_line, done))
    return code or outcome(done, args.project.watched)


def outcome(results: Sequence[Result], watched: str) -> int:
    """The exit code of results: wrong ones count whoever gave them, failed ones if they are watched (all, where nothing is named)."""
    if any(r.status == "wrong" for r in results):
        return WORSE
    return CRASHED if any(r.status == "failed" and r.provider.startswith(watched) for r in results) else GOOD


def measured(
    cases: Sequence[Case], providers: Sequence[Sequence[str]], setup: Setup, environment: Mapping[str, str]
) -> Iterator[list[Result]]:
    """The results of each case, by its providers, as soon as it is done, stamped with the run and the environment."""
    from tqdm import tqdm

    run, time = new_run()
    stamp = {
        "run": run,
        "time": time,
        "timer": setup.timer,
        "environment": environment,
    }
    measure_roofs = functools.partial(roofs.measure, setup.device, timer=timers.make(setup.timer, setup.device))
    limits = {dtype: measure_roofs(dtype_of(dtype)) for dtype in dict.fromkeys(case.dtype for case in cases)}
    with tqdm(total=len(cases), unit="case", disable=None, leave=False) as bar:
        for case, asked in zip(cases, providers, strict=True):
            bar.set_description(case.name)
            found = measure(case, asked, setup, limits[case.dtype])
            if any(r.limit and r.median and r.limit > r.median for r in found):
                # A roof that something ran through was measured while the machine did something else.
                limits[case.dtype] = limits[case.dtype].raised(measure_roofs(dtype_of(case.dtype)))
                found = [replace(r, roofs=limits[case.dtype] if r.roofs else ()) for r in found]
            yield [replace(result, **stamp) for result in found]  # type: ignore[arg-type]
            bar.update()
