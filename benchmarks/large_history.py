"""How long a large history takes: ``python -m benchmarks.large_history`` makes one of 100,000 results and times the commands that read it."""

from __future__ import annotations

import argparse
import datetime
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.project import ROOT
from fused_attn_bench.history import History
from fused_attn_bench.results import Result
from fused_attn_bench.text import seconds, size, table

PROVIDERS = ("fused_attn", "eager", "sdpa", "compile")
START = datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)


def run_of(number: int, runs: int, series: int, chance: random.Random) -> Iterator[Result]:
    """One run: every fifth series became 8 % slower at some time, every fifth drifts by 10 % in all, one run in thirty is an outlier."""
    environment = {
        "device": "NVIDIA H100 80GB HBM3", "driver": "580.159.04", "cuda": "13.0", "torch": "2.11.0+cu130", "triton": "3.6.0", "threads": "",
        "busy": "", "python": "3.12.3", "system": "Linux-6.8.0-x86_64-with-glibc2.39", "commit": f"{number:040x}", "fused_attn": "0.5.0",
    }  # fmt: skip
    for i in range(series):
        case, provider = divmod(i, len(PROVIDERS))
        level = 1e-3 * (1 + case / 10) * (1.08 if i % 5 == 0 and number > runs * (1 + i % 7) / 9 else 1.0)
        level *= 1 + 0.1 * number / runs if i % 5 == 1 else 1.0
        level *= math.exp(chance.gauss(0, 0.01)) * (1.3 if chance.random() < 1 / 30 else 1.0)
        samples = tuple(level * math.exp(chance.gauss(0, 0.02)) for _ in range(12))
        sensors = {"sm_mhz": 1935, "memory_mhz": 2619, "watts": round(chance.uniform(150, 600), 3), "celsius": 49, "throttled": []}
        yield Result(
            f"attention/causal/fwd/bfloat16/1x8x{128 * (case + 1)}x64", PROVIDERS[provider], backend="triton", config="fwd=128x64x8x2x64", error=1.2e-3,
            plain_error=4.2e-3, peak=73433600, outputs=67108864, samples=samples, host=tuple(s / 2 for s in samples), telemetry=(sensors,) * 12,
            flops=2.7e11, bytes=2.7e8, roofs=(3.0e12, 7.8e14), run=f"run{number:04}", time=(START + datetime.timedelta(days=number)).isoformat(),
            timer="events", environment=environment,
        )  # fmt: skip


def main() -> None:
    """Makes the history and prints the table of times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--series", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, chance, rows = Path(folder) / "h.sqlite", random.Random(0), []
        begun, history = time.perf_counter(), History(path)
        for number in range(args.runs):
            history.add(run_of(number, args.runs, args.series, chance))
        history.close()
        rows.append(("made, run by run", seconds(time.perf_counter() - begun), size(path.stat().st_size)))
        lines = f"{folder}/h.jsonl"
        for command in (
            ["track"], ["track", "--last", "100"], ["track", "--case", "*x128x64"], ["report", "--out", f"{folder}/x.html"], ["runs"], ["show", "latest"],
            ["export", lines], ["import", lines, "--db", f"{folder}/copy.sqlite"], ["prune", "--keep", "10"],
        ):  # fmt: skip
            begun = time.perf_counter()
            where = () if "--db" in command else ("--db", str(path))
            subprocess.run([sys.executable, "-m", "benchmarks", *command, *where], cwd=ROOT, check=True, capture_output=True)
            shown = " ".join(word for word in command if folder not in word and word not in ("--db", "--out"))
            rows.append((shown, seconds(time.perf_counter() - begun), size(path.stat().st_size)))
            print(f"{shown}: {rows[-1][1]}", file=sys.stderr, flush=True)
        print(f"{args.runs * args.series} results, {args.series} series of {args.runs} runs")
        print(table(("command", "time", "file"), rows))


if __name__ == "__main__":
    main()
