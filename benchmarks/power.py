"""How often compare is wrong, and how often it sees what is there: ``python -m benchmarks.power --out FILE`` (the figures of docs/benchmarking.md).

Identical code is compared with itself, and with itself made slower by a known amount, again and again, with the settings that compare
has by default but for the time spent on each case. Each comparison is one that a user could have made; nothing is retried or left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import benchmarks.providers  # noqa: F401  (declares the operations)
from benchmarks.project import PROJECT, ROOT
from fused_attn_bench.case import Case
from fused_attn_bench.compare import Plan, compare
from fused_attn_bench.environment import describe
from fused_attn_bench.harness import Setup
from fused_attn_bench.sides import HERE, Commits, Providers, Sides
from fused_attn_bench.significance import FASTER, SAME, SLOWER
from fused_attn_bench.text import table

CASES = ("attention/causal/fwd/float32/1x4x512x64", "attention/plain/fwd+bwd/float32/1x4x512x64", "softmax/masked/fwd/float32/2x4x512x1024")
PLAN = Plan()


@dataclass(frozen=True)
class Experiment:
    """A comparison whose right answer is known.

    Args:
        title: what is compared.
        sides: A and B.
        truth: the verdict that is right.
        share: of ``--times`` that it is repeated; identical code needs more repeats, its errors are rare.
    """

    title: str
    sides: tuple[str, str]
    truth: str
    share: float = 1.0


EXPERIMENTS = (
    Experiment("3 % slower", ("eager", "eager+3%"), SLOWER),
    Experiment("5 % slower", ("eager", "eager+5%"), SLOWER),
    Experiment("10 % slower", ("eager", "eager+10%"), SLOWER),
    Experiment("5 % faster", ("eager+5%", "eager"), FASTER),
    Experiment("identical, one process", ("eager", "eager"), SAME, 3.0),
    Experiment("identical, fused_attn", ("fused_attn", "fused_attn"), SAME, 2.0),
    Experiment("identical commits", (HERE, HERE), SAME),
)


@dataclass
class Tally:
    """What came out of an experiment so far."""

    title: str
    truth: str
    verdicts: list[str] = field(default_factory=list)
    percents: list[float] = field(default_factory=list)

    def row(self) -> tuple[str, ...]:
        """Title, count, share of right verdicts with its exact 95 % interval, the middle nine tenths of the effects."""
        import numpy as np
        from scipy import stats

        right = self.verdicts.count(self.truth)
        low, high = stats.binomtest(right, len(self.verdicts)).proportion_ci(0.95)
        middle = " … ".join(f"{x:+.1f}%" for x in np.percentile(self.percents, [5, 95]))
        share = f"{100 * right / len(self.verdicts):.1f}%"
        return self.title, self.truth, f"{right} of {len(self.verdicts)}", share, f"{100 * low:.1f} … {100 * high:.1f}%", middle


def run(times: int, seconds: float, out: Path) -> list[Tally]:
    """Every experiment in turns, so that an hour of noise hits all of them; the file is written after each comparison."""
    setup = Setup(torch.device("cpu"), seconds)
    cases = [Case.parse(name) for name in CASES]
    tallies = [Tally(e.title, e.truth) for e in EXPERIMENTS]
    pairs = zip(EXPERIMENTS, tallies, strict=True)
    plan = sorted(((i / (times * e.share), e, t) for e, t in pairs for i in range(round(times * e.share))), key=lambda entry: entry[0])
    for done, (_, experiment, tally) in enumerate(plan, 1):
        with _sides(experiment, setup) as sides:
            for c in compare(sides, cases, setup, PLAN):
                tally.verdicts.append(c.verdict)
                tally.percents += [c.difference.percent] if c.difference is not None else []
        content: dict[str, Any] = {"environment": describe(setup.device, ROOT), "seconds": seconds, "launches": PLAN.looks, "cases": CASES}
        out.write_text(json.dumps(content | {"experiments": [vars(t) for t in tallies]}, indent=1) + "\n")
        print(f"{done} of {len(plan)}", end="\r", file=sys.stderr, flush=True)
    return tallies


def _sides(experiment: Experiment, setup: Setup) -> AbstractContextManager[Sides]:
    if HERE in experiment.sides:
        return Commits(experiment.sides, "eager", setup, PROJECT)
    return nullcontext(Providers(experiment.sides, setup))


def command(module: str, text: str | None, run: Callable[[int, float, Path], Sequence[Tally]], times: int, seconds: float) -> int:
    """A script that counts verdicts: reads its arguments, runs, prints the table of docs/benchmarking.md; 0."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=text)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="every verdict, as JSON")
    parser.add_argument("--times", type=int, default=times, help=f"repeats of each kind; some need more (default {times})")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"of timing per case (default {seconds:g})")
    args = parser.parse_args()
    tallies = run(args.times, args.seconds, args.out)
    print(table(("comparison", "truth", "right", "share", "95 % interval", "effects, 5th … 95th"), [t.row() for t in tallies], left=2))
    return 0


if __name__ == "__main__":
    sys.exit(command("benchmarks.power", __doc__, run, 20, 3.0))
