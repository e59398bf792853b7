"""``benchmarks/gpu_check.sh OUT_DIR``: what a GPU shows that nothing else can, on one page and in one JSON file.

The tests with ``--device cuda``, compute-sanitizer on a small selection, and the benchmarks. Each step is a process of its own with a log in
OUT_DIR; a step that cannot run here says why and does not count as passed. Nothing is built or installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.commands.bounds import BOUNDS
from benchmarks.project import ROOT
from fused_attn.backends.cuda import library_path
from fused_attn.cli.info import devices, versions
from fused_attn_bench.environment import commit
from fused_attn_bench.text import seconds, table

# The tests whose subject is what kernels compute; the others compile, or look at the source.
PARITY = (
    "attention",
    "softmax",
    "dropout",
    "definition",
    "bug_classes_contract",
    "bug_classes_masks",
    "bug_classes_numerics",
    "sdpa",
    "extension",
    "compile",
)
# The results of every provider on every case, as JSON lines: what is committed under benchmarks/results/.
SWEEP = "sweep.jsonl"
# [batch, heads, length, head_dim] with 16384 tokens and 2048 columns each, as other packages publish them.
SHAPES = tuple(f"{16384 // length}x{2048 // dim}x{length}x{dim}" for dim in (64, 128, 256) for length in (512, 2048, 4096, 16384))
NEEDED = ("pytest", "hypothesis", "numpy")


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: of the step and of its log.
        command: what runs.
        limit: seconds after which it is stopped.
        summary: from the log's text to what the table shows.
        missing: why it cannot run here, or an empty string.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    summary: Callable[[str], str]
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed" or "not run"."""

    step: str
    verdict: str
    seconds: float
    detail: str


def steps(out_dir: Path, device: str, budget: float) -> list[Step]:
    """Every step, in order."""
    python = sys.executable
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    files = [f"tests/test_{name}.py" for name in PARITY]
    parity = (python, "-m", "pytest", "-q", "--device", device, "-p", "no:cacheprovider", f"--junitxml={out_dir / 'parity.xml'}", *files)
    made = [Step("parity", parity, 1500, _last_line, f"{', '.join(lacking)} not installed" if lacking else "")]
    # A kernel that hangs ends its test's process after two minutes (WATCHDOG there), and this step with it.
    on_chip = (python, "-m", "pytest", "-q", "--device", device, "-p", "no:cacheprovider", "tests/test_hopper_device.py")
    made.append(Step("hopper", on_chip, 900, _last_line, f"{', '.join(lacking)} not installed" if lacking else _not_hopper(device)))
    sanitizer = _sanitizer()
    missing = "it needs a GPU" if device == "cpu" else "" if sanitizer else "compute-sanitizer was not found on PATH or in CUDA_HOME"
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = (sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", python, "-m", "tests.sanitized")
        made.append(Step(tool, command, 600, _sanitizer_line, missing))
    measuring = (python, "-m", "benchmarks")
    where = ("--device", device, "--seconds")
    for name in BOUNDS:
        command = (*measuring, "bounds", "--only", name, *where, str(budget), "--json", str(out_dir / f"{name}.json"))
        made.append(Step(name, command, 60 + 10 * budget, _bounds))
    kept = ("--json", str(out_dir / SWEEP), "--db", str(out_dir / "history.sqlite"))
    # As long as one bound's benchmark for every ten cases: each case has many providers on a GPU.
    without_bar = "" if importlib.util.find_spec("tqdm") else "tqdm not installed"
    made.append(Step("sweep", (*measuring, "run", *where, str(budget / 10), *kept), 1200, _last_line, without_bar))
    made.append(Step("first_call", (python, "-m", "benchmarks.first_call", "--device", device), 600, _last_line))
    # Every head size, length and direction against everything torch has and FlashAttention, in turns.
    grid = ("--op", "attention", "--variant", "plain", "causal", "--mode", "fwd", "bwd", "--dtype", "bfloat16", "--shape", *SHAPES)
    chosen = ("--provider", "fused_attn", "sdpa:flash", "sdpa:cudnn", "sdpa:efficient", "flex", "flash-attn-3")
    kept = ("--json", str(out_dir / "hopper_sweep.jsonl"), "--db", str(out_dir / "history.sqlite"))
    sweep = (*measuring, "run", *grid, *chosen, *where, str(budget / 20), *kept)
    made.append(Step("hopper_sweep", sweep, 1800, _last_line, without_bar or _not_hopper(device)))
    # Whether other tiles than today's would be faster on this chip; nothing is written.
    tune = (*measuring, "tune", *where, str(budget / 10), "--json", str(out_dir / "tune.json"))
    made.append(Step("tune", tune, 1800, _last_line, _not_hopper(device)))
    return made


def _not_hopper(device: str) -> str:
    """Why the device shows nothing of Hopper's kernels, or an empty string."""
    if device == "cpu":
        return "it needs a GPU"
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return "" if found == (9, 0) else f"the device has compute capability {found[0]}.{found[1]}, not 9.0"


def _sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = [shutil.which("compute-sanitizer"), *(shutil.which("compute-sanitizer", path=f"{home}/bin") for home in homes if home)]
    return next(filter(None, found), None)


def _last_line(log: str) -> str:
    return next((line.strip("= ") for line in reversed(log.splitlines()) if line.strip()), "no output")


def _sanitizer_line(log: str) -> str:
    """Its own summary."""
    found = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", log, re.M)
    return found[-1] if found else _last_line(log)


def _bounds(log: str) -> str:
    """How many rows keep their bound; the last column of the table says so."""
    verdicts = re.findall(r" (yes|NO)$", log, re.M)
    return f"{verdicts.count('yes')} of {len(verdicts)} bounds hold" if verdicts else _last_line(log)


def perform(step: Step, out_dir: Path) -> Outcome:
    """Runs a step, its output into ``<name>.log``."""
    if step.missing:
        return Outcome(step.name, "not run", 0.0, step.missing)
    start, log = time.perf_counter(), out_dir / f"{step.name}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=step.limit, check=False).returncode
        except subprocess.TimeoutExpired:
            return Outcome(step.name, "failed", step.limit, f"stopped after {step.limit:.0f} s")
    text = log.read_text(errors="replace")
    return Outcome(step.name, "passed" if code == 0 else "failed", time.perf_counter() - start, step.summary(text))


def environment() -> dict[str, str]:
    """What the numbers belong to."""
    library = library_path()
    native = f"{library.name}, {library.stat().st_size} bytes" if library.is_file() else "not built"
    return {**dict(versions()), **dict(devices()), "commit": commit(ROOT), "native library": native}


def main(argv: Sequence[str] | None = None) -> int:
    """0 when no step failed."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_check.sh", description=__doc__)
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="where logs and results.json go")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: to try the script itself (default cuda)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps: parity, memcheck, racecheck, synccheck, or a benchmark")
    parser.add_argument("--seconds", type=float, default=20.0, help="time to measure for, per benchmark (default 20)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch must see a GPU; it sees none. Check nvidia-smi and torch.version.cuda.")
    out_dir = args.out_dir.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    planned = steps(out_dir, args.device, args.seconds)
    unknown = set(args.only or ()) - {step.name for step in planned}
    if unknown:
        parser.error(f"--only takes {', '.join(step.name for step in planned)}; got {', '.join(sorted(unknown))}")
    outcomes = []
    for step in planned:
        if args.only and step.name not in args.only:
            continue
        outcomes.append(perform(step, out_dir))
        # Written after every step: what has been measured survives whatever comes next.
        reports = {name: json.loads(path.read_text()) for name in BOUNDS if (path := out_dir / f"{name}.json").is_file()}
        results = {"environment": environment(), "steps": [asdict(o) for o in outcomes], "benchmarks": reports}
        (out_dir / "results.json").write_text(json.dumps(results, indent=1))
    for name, value in environment().items():
        print(f"{name}: {value}")
    print(table(("step", "verdict", "detail", "time"), [(o.step, o.verdict, o.detail, seconds(o.seconds)) for o in outcomes], left=3))
    return 1 if any(o.verdict == "failed" for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
