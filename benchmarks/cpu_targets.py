"""The CPU kernels against their targets in one interleaved run: ``python -m benchmarks.cpu_targets`` (ten minutes on two quiet cores).

Every case is checked before it is timed. The file it writes is where docs/performance.md has its tables from, which are written anew with it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import cpu_table
from benchmarks.cpu_cases import CPU, KINDS, KINDS_AGAIN, LENGTHS, SOFTMAX, Attention, Job
from benchmarks.overhead import Call, costs
from benchmarks.project import ROOT
from fused_attn.backends.cpu import library as cpu_library
from fused_attn_bench import timers
from fused_attn_bench.busy import neighbours
from fused_attn_bench.environment import describe
from fused_attn_bench.measure import Effort, interleaved

RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "targets.json"
PAGE = ROOT / "docs" / "performance.md"
# Cases that are measured beside busy processes too: one of each way to split the work.
BUSY_KINDS = ("plain", "dense mask", "bias", "probabilities", "masked softmax")
BUSY_LENGTH = 1024
# Least rounds and seconds of a case, and seconds for the host's cost.
ROUNDS = 3
LEAST_SECONDS = 0.3
HOST_SECONDS = 6.0


@dataclass(frozen=True)
class Line:
    """What was measured of one job.

    Args:
        kind, mode, length, size, target, rival: those of the job.
        seconds: provider -> median.
        faults: provider -> page faults of one call, after calls that warmed it up.
        wrong: provider -> results that broke the error rule, or the error that it raised; it has no time.
        busy: provider -> median beside busy processes; empty where it was not measured.
    """

    kind: str
    mode: str
    length: int
    size: str
    target: float | None
    rival: str
    seconds: dict[str, float]
    faults: dict[str, float]
    wrong: dict[str, str] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)


def attention_jobs(head_sizes: Sequence[int], lengths: Sequence[int]) -> Iterator[list[Job]]:
    """All kinds on the first head size, on the others those that differ there; tensors of one kind at a time."""
    for length in lengths:
        for i, head_dim in enumerate(head_sizes):
            for kind in KINDS:
                if i == 0 or kind.name in KINDS_AGAIN:
                    yield Attention(kind, length, head_dim).jobs()


def total_work(head_sizes: Sequence[int], lengths: Sequence[int]) -> float:
    """Of all attention jobs, as ``Job.work`` counts."""
    kinds = len(KINDS) + (len(head_sizes) - 1) * len(KINDS_AGAIN)
    return sum(4 * length**2 * kinds for length in lengths)


def measure(job: Job, seconds: float, busy: int) -> Line:
    """Checks every provider, then times in turns those that are right, and beside busy processes if any."""
    wrong = {name: reason for name, call in job.calls.items() if (reason := _fault(job, name, call))}
    right = {name: call for name, call in job.calls.items() if name not in wrong}
    quiet = _medians(right, seconds)
    faults = {name: timers.WallTimer()(call, 1).faults or 0.0 for name, call in right.items()}
    beside: dict[str, float] = {}
    if busy:
        with neighbours(busy):
            beside = _medians(right, 2 * seconds)
    return Line(job.kind, job.mode, job.length, job.size, job.target, job.rival, quiet, faults, wrong, beside)


def _fault(job: Job, name: str, call: Callable[[], Any]) -> str:
    try:
        broken = job.judge(name, call())
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return f"breaks the error rule in {broken}" if broken else ""


def _medians(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    return {name: timing.median for name, timing in interleaved(calls, CPU, Effort(seconds, ROUNDS)).items()}


@dataclass(frozen=True)
class HostCost:
    """Median microseconds of one call that computes almost nothing, and SDPA's."""

    call: str
    ours: float
    sdpa: float
    target: float


def host_costs(seconds: float) -> list[HostCost]:
    """[1, 4, 32, 32] without mask at one thread: without gradients, forward of inputs that want them, and with backward."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_host_cost(call, seconds / 3) for call in (Call(), Call(grad=True), Call(grad=True, backward=True))]
    finally:
        torch.set_num_threads(threads)


def _host_cost(call: Call, seconds: float) -> HostCost:
    right, ours, theirs = costs(call, CPU, Effort(seconds, 20, sample=0.002))
    assert right, "attention [1, 4, 32, 32] broke the error rule"
    return HostCost(call.title, 1e6 * ours, 1e6 * theirs, 2.5 if call.grad else 2.0)


def library() -> str:
    """The instruction set of the CPU library's kernels, or why there is none."""
    return cpu_library.isa() or f"none: {cpu_library.failure()}"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, as they are stored."""
    load = f"{os.getloadavg()[0]:.2f}"
    torch.set_num_threads(args.threads)
    lines: list[Line] = []

    def add(job: Job, seconds: float) -> None:
        watched = job.kind in BUSY_KINDS and (job.length == BUSY_LENGTH and job.size in (str(args.head_size[0]), "64x1024x1024"))
        line = measure(job, seconds, args.busy if watched else 0)
        lines.append(line)
        shown = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in line.seconds.items())
        print(f"{line.kind} {line.mode} {line.size} {line.length}: {shown}{'; ' if line.wrong else ''}{line.wrong or ''}", file=sys.stderr)

    per_work = args.seconds / total_work(args.head_size, args.length)
    for jobs in attention_jobs(args.head_size, args.length):
        while jobs:
            job = jobs.pop(0)
            add(job, min(max(LEAST_SECONDS, per_work * job.work), 8.0))
        gc.collect()
    for rows in SOFTMAX:
        add(rows.job(), 5 * LEAST_SECONDS)
    environment = describe(CPU, ROOT) | {"library": library(), "load": load}
    costs = [asdict(cost) for cost in host_costs(HOST_SECONDS)]
    return {"environment": environment, "busy": args.busy, "lines": [asdict(line) for line in lines], "host": costs}


def parser() -> argparse.ArgumentParser:
    """The arguments of a run."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.cpu_targets", description=__doc__)
    found.add_argument("--head-size", type=int, nargs="+", default=[64, 80], help="all cases on the first, some on the others")
    found.add_argument("--length", type=int, nargs="+", choices=LENGTHS, default=list(LENGTHS))
    found.add_argument(
        "--seconds", type=float, default=180.0, help="of timing for attention; each case has at least 3 rounds (default 180)"
    )
    found.add_argument("--threads", type=int, default=2)
    found.add_argument(
        "--busy", type=int, default=2, metavar="N", help="beside how many busy processes growth is measured; 0 for not at all"
    )
    found.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    found.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="whose tables are written anew")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every target is reached within the noise, otherwise 1."""
    args = parser().parse_args(argv)
    found = run(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    text = cpu_table.rendered(found)
    args.page.write_text(cpu_table.replaced(args.page.read_text(), text))
    print(text)
    return int(cpu_table.missed(found) > 0)


if __name__ == "__main__":
    sys.exit(main())
