"""How often check is wrong on real times: ``python -m benchmarks.power_check --out FILE`` (a table of docs/benchmarking.md).

A baseline is written once; then the same code is checked against it, and the same code made 8 % slower, in turns and with the command's defaults
but for the time spent on each case. Nothing is retried or left out.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import tempfile
from pathlib import Path

from benchmarks import power
from benchmarks.__main__ import main as command
from benchmarks.power import CASES, Tally
from fused_attn_bench import baseline
from fused_attn_bench.significance import SAME, SLOWER

PROVIDER = "fused_attn"
TRUTHS = {"identical, check": (PROVIDER, SAME), "8 % slower, check": (f"{PROVIDER}+8%", SLOWER)}


def run(times: int, seconds: float, out: Path) -> list[Tally]:
    """Every check; the file is written after each."""
    tallies = {title: Tally(title, truth) for title, (_, truth) in TRUTHS.items()}
    with tempfile.TemporaryDirectory() as folder:
        stored, shown = Path(folder) / "baseline.jsonl", Path(folder) / "shown.json"
        options = ["--device", "cpu", "--seconds", str(seconds), "--json", str(shown)]
        _quietly(["check", str(stored), "--update", "--of", PROVIDER, "--case", *CASES, *options])
        entries = baseline.read(stored)
        for done in range(times):
            for title, (provider, _) in TRUTHS.items():
                renamed = [json.loads(line) | {"provider": provider} for line in stored.read_text().splitlines()]
                stored.write_text("".join(json.dumps(entry) + "\n" for entry in renamed))
                _quietly(["check", str(stored), *options])
                rows = json.loads(shown.read_text())["cases"]
                tallies[title].verdicts += [row["verdict"] for row in rows]
                tallies[title].percents += [100 * math.expm1(row["effect"]) for row in rows]
                about = {"environment": dict(entries[0].environment), "seconds": seconds, "cases": CASES}
                out.write_text(json.dumps(about | {"experiments": [vars(t) for t in tallies.values()]}, indent=1) + "\n")
            print(f"{done + 1} of {times}", end="\r", file=sys.stderr, flush=True)
    return list(tallies.values())


def _quietly(arguments: list[str]) -> None:
    """What matters is in the JSON; every exit code but that of bad arguments or a crash is an answer."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = command(arguments)
    if code not in (0, 1, 3):
        raise RuntimeError(f"{arguments[0]} must end with a verdict; it ended with {code}")


if __name__ == "__main__":
    sys.exit(power.command("benchmarks.power_check", __doc__, run, 3, 4.0))
