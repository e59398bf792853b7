"""Run one provider on one case under a profiler: ncu, nsys, or any that is put around --tool none.

Inputs, compilation and first calls come before what the profiler records; the cache is warm.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

import torch

from fused_attn_bench import planted
from fused_attn_bench.codes import CRASHED, GOOD
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.operation import case_of, operation, problem_of
from fused_attn_bench.problem import Refusal
from fused_attn_bench.text import line_of

# How each profiler is told to wait for torch.cuda.profiler.start. No GPU has shown yet that they do.
TOOLS: dict[str, tuple[str, ...]] = {
    "ncu": ("ncu", "--profile-from-start", "off"),
    "nsys": ("nsys", "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop"),
    "none": (),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, under which profiler, and what the profiler is told."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("case", metavar="CASE", help="one case by its name")
    parser.add_argument("--provider", required=True, metavar="NAME")
    parser.add_argument("--tool", choices=TOOLS, default="ncu", help="none: only run, so that a profiler can be put around this command")
    parser.add_argument("--calls", type=int, default=1, help="calls that are recorded (default 1)")
    parser.add_argument("--options", default="", metavar="TEXT", help='more for the profiler, as one text: "--set full -o out"')
    selection.add_device(parser)
    selection.add_files(parser)
    outputs.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """0; 4 when the profiler failed."""
    if args.calls < 1:
        raise ValueError(f"--calls must be at least 1; got {args.calls}")
    outputs.begin(args)
    case, provider = case_of(args.case), planted.known(args.provider)
    if args.tool == "none":
        return _record(args, case.name, provider)
    command = TOOLS[args.tool]
    if shutil.which(command[0]) is None:
        raise ValueError(f"--tool {args.tool} needs {command[0]} on PATH; it is not there. --tool none runs without it.")
    here = [
        sys.executable,
        *args.project.launch,
        "profile",
        case.name,
        "--provider",
        provider,
        "--tool",
        "none",
        "--calls",
        str(args.calls),
    ]
    files = ["--load", *map(str, args.load)] if args.load else []
    done = subprocess.run([*command, *args.options.split(), *here, "--device", args.device, *files], check=False)
    code = CRASHED if done.returncode else GOOD
    _write(args, case.name, provider, code)
    return code


def _write(args: argparse.Namespace, case: str, provider: str, code: int) -> None:
    outputs.write(args.json, [outputs.line({"code": code, "case": case, "provider": provider, "tool": args.tool, "calls": args.calls})])


def _record(args: argparse.Namespace, case: str, provider: str) -> int:
    device = selection.device(args)
    refusals: tuple[type[Exception], ...] = (Refusal, *operation(case_of(case).op).refusals)
    try:
        call = planted.bind(provider, problem_of(case_of(case), device))
        for _ in range(3):
            call()
    except refusals as refusal:
        raise ValueError(
            f"{provider} must be able to compute {case}; it refuses: {line_of(refusal) or 'no reason given'}. Name another."
        ) from None
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
    for _ in range(args.calls):
        call()
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()
    print(f"{provider} ran {args.calls} time{'s' * (args.calls > 1)} on {case}")
    _write(args, case, provider, GOOD)
    return GOOD
