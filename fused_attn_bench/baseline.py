"""A stored baseline for other projects' CI: each case's time as a multiple of plain torch's, so that a slower hour does not count."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from fused_attn_bench.case import Case
from fused_attn_bench.compare import Progress, Separate, compare_launches
from fused_attn_bench.harness import Setup
from fused_attn_bench.results import Result, ResultsError, machine
from fused_attn_bench.significance import SLOWER, Difference


@dataclass(frozen=True)
class Entry:
    """One line of a baseline.

    Args:
        case: its name.
        provider: what is watched.
        reference: what it is measured in turns with.
        ratios: log of time / reference's time, one median per launch: launches differ by more than what happens within one.
        timer: what took the samples.
        environment: see ``environment.describe``.
    """

    case: str
    provider: str
    reference: str
    ratios: tuple[float, ...]
    timer: str = "wall"
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def machine(self) -> tuple[str, ...]:
        """What has to agree before two entries may be compared."""
        return machine(self.environment, self.timer)

    @property
    def median(self) -> float:
        """Time as a multiple of the reference's."""
        return math.exp(statistics.median(self.ratios))


def write(entries: Sequence[Entry], path: Path) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(asdict(entry), allow_nan=False) + "\n" for entry in entries))


def read(path: Path) -> list[Entry]:
    """The entries of a file.

    Raises:
        ResultsError: it cannot be read, or a line is no entry.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} must be a baseline; got: {error}. Write one with --update.") from None
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            known = json.loads(line)
            entry = Entry(**{f.name: known[f.name] for f in fields(Entry)} | {"ratios": tuple(known["ratios"])})
            Case.parse(entry.case)
            if len(entry.ratios) < 2 or not all(isinstance(x, float) and math.isfinite(x) for x in entry.ratios):
                raise ValueError("ratios must be two numbers or more")
        except (ValueError, TypeError, KeyError) as error:
            raise ResultsError(f"{path}, line {number} must hold one entry of a baseline; got {line[:60]!r} ({error}).") from None
        entries.append(entry)
    if not entries:
        raise ResultsError(f"{path} must hold at least one entry; it is empty. Write one with --update.")
    return entries


def measure(pair: Separate, cases: Sequence[Case], setup: Setup, launches: int, progress: Progress) -> list[tuple[Result, Entry | None]]:
    """The provider's last result on each case, and its entry; None where it or the reference has no time.

    Args:
        pair: reference and provider, in a new process for each launch: within one process launches are more alike than two days are.
        cases: on what.
        setup: how; its seconds are shared by the launches.
        launches: fresh starts of both.
        progress: told of every case before it is measured.
    """
    reference, provider = pair.labels
    measured = compare_launches(pair, cases, setup, launches, progress)
    found: list[tuple[Result, Entry | None]] = []
    for case, ((a, b), blocks) in measured.items():
        timed = a.status == b.status == "ok"
        ratios = tuple(statistics.median(launch) for launch in blocks) if timed else ()
        found.append(
            (
                b if a.status == "ok" else replace(b, status=a.status, reason=f"{reference}: {a.reason}"),
                Entry(case.name, provider, reference, ratios, setup.timer) if timed else None,
            )
        )
    return found


def difference(old: Entry, new: Entry) -> Difference:
    """How much longer it takes now; the spread between launches on both sides is the error bar.

    Yuen's test: a fifth of the launches is left out at each end, for one that other work on the machine spoiled.
    """
    from scipy import stats

    test = stats.ttest_ind(new.ratios, old.ratios, equal_var=False, trim=0.2)
    low, high = test.confidence_interval(0.95)
    effect = float(stats.trim_mean(new.ratios, 0.2) - stats.trim_mean(old.ratios, 0.2))
    return Difference(effect, float(low), float(high), float(test.pvalue), len(new.ratios), floor=0.0)


def is_slower(found: Difference, limit: float) -> bool:
    """At least the limit, a fraction, and beyond the spread between launches."""
    return found.verdict == SLOWER and found.percent >= 100 * limit
