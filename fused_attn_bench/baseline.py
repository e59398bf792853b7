"""A stored baseline for other projects' CI: each case's time as a multiple of plain torch's, so that a slower hour does not count."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fused_attn_bench.case import Case
from fused_attn_bench.compare import Comparison, Launches, Plan, later, ratio, timed, typical
from fused_attn_bench.files import replacing
from fused_attn_bench.operation import case_of
from fused_attn_bench.results import Result, ResultsError, machine
from fused_attn_bench.significance import differences, group, of_change
from fused_attn_bench.text import first_line

# Beyond these a number of a baseline is none that was measured, and would overflow on the way.
MOST = {"ratios": 100.0, "hosts": 1e9, "peak": 2.0**63, "error": 1e300, "plain_error": 1e300}


@dataclass(frozen=True)
class Entry:
    """One line of a baseline.

    Args:
        case: its name.
        provider: what is watched.
        reference: what it is measured in turns with.
        ratios: log of time / reference's time, one median per launch: launches differ by more than what happens within one.
        hosts: seconds that its calls return later than the reference's, per launch; empty where that is the time itself.
        peak: bytes of peak memory.
        error, plain_error: distance from float64, and that of plain torch.
        marks: what others did on the machine meanwhile, in most launches; see ``quiet``.
        timer: what took the samples.
        environment: see ``environment.describe``.
    """

    case: str
    provider: str
    reference: str
    ratios: tuple[float, ...]
    hosts: tuple[float, ...] = ()
    peak: int | None = None
    error: float | None = None
    plain_error: float | None = None
    marks: tuple[str, ...] = ()
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
    """One JSON object per line; an old file stays until all of them are written."""
    with replacing(path) as file:
        file.writelines(json.dumps(asdict(entry), allow_nan=False) + "\n" for entry in entries)


def read(path: Path) -> list[Entry]:
    """The entries of a file.

    Raises:
        ResultsError: it cannot be read, or a line is no entry.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} must be a baseline; got: {error}. Write one with --update.") from None
    entries: list[Entry] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = _entry(json.loads(line))
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            raise ResultsError(
                f"{path}, line {number} must hold one entry of a baseline; got {line[:60]!r} ({first_line(error)}). Write it anew with --update."
            ) from None
        first = entries[0] if entries else entry
        if (entry.provider, entry.reference) != (first.provider, first.reference):
            raise ResultsError(
                f"{path}, line {number} must be of {first.provider} as a multiple of {first.reference}, as line 1 is; got {entry.provider} as a multiple of "
                f"{entry.reference}. Give each provider a baseline of its own."
            )
        if any(entry.case == other.case for other in entries):
            raise ResultsError(
                f"{path}, line {number} must be of another case than the lines before; got {entry.case} again. Leave one of them."
            )
        entries.append(entry)
    if not entries:
        raise ResultsError(f"{path} must hold at least one entry; it is empty. Write one with --update.")
    return entries


def _entry(known: Any) -> Entry:
    """A line of a baseline.

    Raises:
        ValueError, TypeError, KeyError, ArithmeticError: it is none; the message says in what.
    """
    if not isinstance(known, dict):
        raise TypeError("it must be a JSON object")
    needed = {f.name: known[f.name] for f in fields(Entry) if f.name in known or f.default is f.default_factory is MISSING}
    lists = {name: tuple(_list(name, known.get(name, []))) for name in ("ratios", "hosts", "marks")}
    entry = Entry(**needed | lists)
    texts = {name: getattr(entry, name) for name in ("case", "provider", "reference", "timer")}
    for name, value in (*texts.items(), *(("marks", mark) for mark in entry.marks)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be text")
    if not isinstance(entry.environment, dict) or not all(isinstance(value, str) for value in entry.environment.values()):
        raise TypeError("environment must be texts by name")
    case_of(entry.case)
    if len(entry.ratios) < 2:
        raise ValueError("ratios must be two numbers or more")
    for name, most in MOST.items():
        values = getattr(entry, name)
        for value in values if isinstance(values, tuple) else () if values is None else (values,):
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= most:
                raise ValueError(f"{name} must be finite numbers, of at most {most:g}")
    if any(value is not None and value < 0 for value in (entry.peak, entry.error, entry.plain_error)):
        raise ValueError("peak memory and errors must not be negative")
    return entry


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} must be a list")
    return value


def watched(found: Launches) -> dict[Case, Result]:
    """The watched provider's side of each case; where the reference has no time, that is what it is said to be."""
    results = {}
    for case, pairs in found.items():
        a, b = pairs[-1]
        results[case] = (
            typical([pair[1] for pair in pairs]) if a.status == "ok" else replace(b, status=a.status, reason=f"{a.provider}: {a.reason}")
        )
    return results


def entries(found: Launches, timer: str, environment: Mapping[str, str]) -> dict[str, Entry]:
    """An entry for each case that has times, by its name."""
    made = {}
    for case, pairs in found.items():
        if not all(map(timed, pairs)):
            continue
        reference, b = pairs[-1][0].provider, typical([pair[1] for pair in pairs])
        hosts = tuple(map(later, pairs)) if all(r.host for pair in pairs for r in pair) else ()
        ratios = tuple(map(ratio, pairs))
        made[case.name] = Entry(
            case.name, b.provider, reference, ratios, hosts, b.peak, b.error, b.plain_error, b.marks, timer, environment
        )
    return made


def judged(old: Mapping[str, Entry], found: Launches, plan: Plan) -> list[Comparison]:
    """What was measured against a baseline: A is the baseline, times are multiples of the reference's.

    The spread between launches on both sides is the error bar.
    """
    new = entries(found, "", {})
    results = {case.name: result for case, result in watched(found).items()}
    pairs = {name: (old[name], new[name]) for name in new if name in old}
    hosts = {name: (a.hosts, b.hosts) for name, (a, b) in pairs.items() if a.hosts and b.hosts}
    times, starts = differences(
        [
            [of_change(a.ratios, b.ratios, **plan.bounds(name)) for name, (a, b) in pairs.items()],
            [of_change(*both) for both in hosts.values()],
        ],
        len(plan.looks),
    )
    host = dict(zip(hosts, starts, strict=True))
    compared = []
    by_case = dict(zip(pairs, times, strict=True))
    for name, result in results.items():
        before = old.get(name)
        a = (
            Result(name, result.provider)
            if before is None
            else replace(result, status="ok", reason="", peak=before.peak, error=before.error, marks=before.marks)
        )
        difference = by_case.get(name)
        if difference is not None:
            # Work beside slows two providers by different factors: their ratio then is another one than the baseline's, whatever the code.
            difference = replace(difference, trusted=not (a.marks or result.marks))
        shown: tuple[float | None, float | None] = (None, None)
        if difference is not None:
            now = group(new[name].ratios).mean
            shown = (math.exp(now - difference.effect), math.exp(now))
        compared.append(Comparison(name, a, result, difference, shown, host.get(name), plan.rules(name)))
    return compared
