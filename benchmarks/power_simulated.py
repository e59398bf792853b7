"""How often compare and check are wrong on noise that is known: ``python -m benchmarks.power_simulated --out FILE`` (figures of docs/benchmarking.md).

Log ratios of launches are drawn and go through the commands' own statistics, added launches included: 25 cases a run, a launch noise of 1 %,
the same in all cases or not, with spoiled launches or with heavy tails. No time is taken, so that thousands of runs take minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fused_attn_bench.compare import Plan
from fused_attn_bench.limits import Limits, Rules
from fused_attn_bench.significance import FASTER, SLOWER, UNDECIDED, Difference, differences, of_change, of_mean, until_decided
from fused_attn_bench.text import table

CASES, SIGMA = 25, 0.01
Draw = Callable[[Any, tuple[int, int]], Any]
NOISE: dict[str, Draw] = {
    "equal": lambda chance, size: chance.normal(0, SIGMA, size),
    # A case in six is twice as noisy or more, another half as noisy or less.
    "unequal": lambda chance, size: chance.normal(0, SIGMA * np.exp(chance.normal(0, 0.7, (size[0], 1))), size),
    # Other work makes one launch in twenty slower, by 20 % on average.
    "spoiled launches": lambda chance, size: chance.normal(0, SIGMA, size) + (chance.random(size) < 0.05) * chance.exponential(0.2, size),
    "heavy tails": lambda chance, size: chance.standard_t(3, size) / np.sqrt(3) * SIGMA,
}
# Each command's limit, as it is by default.
COMMANDS = {"compare": 0.03, "check": 0.05}
# One of the cases is slower by that much.
TRUTHS = {"nothing changed": 0.0, "3 % slower": 0.03, "5 % slower": 0.05, "8 % slower": 0.08}


@dataclass
class Tally:
    """Runs of one command on one kind of noise, with one truth.

    Args:
        command, noise, title: what was simulated.
        runs: how many.
        alarms: runs in which a case without a change was called changed.
        found: runs in which the changed case was called slower.
        failed: those that exit with 1 for it: by the limit or more.
        undecided: cases without a change that stayed undecided.
        launches: on average, per case.
    """

    command: str
    noise: str
    title: str
    runs: int = 0
    alarms: int = 0
    found: int = 0
    failed: int = 0
    undecided: int = 0
    launches: float = 0.0

    def row(self) -> tuple[str, ...]:
        """For a table; shares of runs, with the exact upper bound (95 %) of that of false alarms."""
        from scipy import stats

        bound = stats.binomtest(self.alarms, self.runs, alternative="less").proportion_ci(0.95).high
        planted = self.title != "nothing changed"
        shares = [f"{100 * x / self.runs:.1f}%" if planted else "-" for x in (self.found, self.failed)]
        unknown = f"{100 * self.undecided / self.runs / (CASES - planted):.1f}%"
        return (
            self.command,
            self.noise,
            self.title,
            f"{self.alarms} of {self.runs} (< {100 * bound:.2f}%)",
            *shares,
            unknown,
            f"{self.launches:.1f}",
        )


HEADERS = ("command", "noise", "truth", "runs with a false alarm", "found", "exit 1", "undecided", "launches")


def simulate(command: str, kind: str, runs: int, seed: int) -> Iterator[Tally]:
    """A tally for each truth."""
    plan = Plan(rules=Rules(Limits(time=COMMANDS[command])))
    for title, slower in TRUTHS.items():
        chance, tally = np.random.default_rng(seed), Tally(command, kind, title, runs)
        for _ in range(runs):
            found = _run(command, NOISE[kind], plan, slower, chance)
            changed, others = found[0], found[1:] if slower else found
            tally.alarms += any(d.verdict in (SLOWER, FASTER) for d in others)
            tally.undecided += sum(d.verdict == UNDECIDED for d in others)
            tally.found += slower > 0 and changed.verdict == SLOWER
            tally.failed += slower > 0 and changed.verdict == SLOWER and changed.effect >= changed.limit
            tally.launches += sum(d.launches for d in found) / CASES / runs
        yield tally


def _run(command: str, noise: Draw, plan: Plan, slower: float, chance: Any) -> list[Difference]:
    """One run of 25 cases, of which the first is slower."""
    # Both sides of check have the noise of their case, as the launches of one case have.
    drawn = noise(chance, (CASES, plan.most + plan.launches))
    new, old = drawn[:, : plan.most], drawn[:, plan.most :]
    new[0] += np.log1p(slower)
    have: dict[str, int] = {}
    names, found = [str(i) for i in range(CASES)], list[Difference]()

    def measure(pending: list[str], number: int) -> None:
        have.update(dict.fromkeys(pending, number))

    def judge() -> dict[str, str]:
        taken = [list(new[i, : have[name]]) for i, name in enumerate(names)]
        bounds = plan.bounds("")
        contrasts = [of_mean(x, **bounds) if command == "compare" else of_change(list(old[i]), x, **bounds) for i, x in enumerate(taken)]
        (found[:],) = differences([contrasts], len(plan.looks))
        return {name: d.verdict for name, d in zip(names, found, strict=True)}

    until_decided(names, plan.looks, measure, judge)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.power_simulated", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="every count, as JSON")
    parser.add_argument("--runs", type=int, default=2000, help="of each kind (default 2000)")
    args = parser.parse_args(argv)
    tallies = []
    for command in COMMANDS:
        for kind in NOISE:
            tallies += simulate(command, kind, args.runs, seed=0)
            print(f"{command}, {kind}", end="\r", file=sys.stderr, flush=True)
    plan = Plan()
    content = {"cases": CASES, "sigma": SIGMA, "looks": plan.looks, "tallies": [vars(t) for t in tallies]}
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(HEADERS, [t.row() for t in tallies], left=3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
