"""What the commands print: plain text for a terminal, Markdown for a pull request."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fused_attn_bench.compare import Comparison
from fused_attn_bench.operation import COLUMNS, REFERENCE
from fused_attn_bench.quiet import doubts
from fused_attn_bench.results import Result
from fused_attn_bench.significance import SAME, TELLING, Difference
from fused_attn_bench.text import ratio, seconds, size, table

# Before a time that is no plain fact.
DOUBT = "?"


def environment(described: Mapping[str, str]) -> str:
    """One line; of a run beside busy processes a second one says so."""
    line = ", ".join(f"{name} {value}" for name, value in described.items() if value and name != "busy")
    return f"{line}\nMeasured beside {described['busy']}: compared with such runs only." if described.get("busy") else line


def reference_median(result: Result, results: Sequence[Result]) -> float | None:
    """What plain torch took on the same case in the same run."""
    return next((r.median for r in results if (r.run, r.case, r.provider) == (result.run, result.case, REFERENCE)), None)


def figures(result: Result, results: Sequence[Result]) -> tuple[str, ...]:
    """Time, its spread, host time, speed against plain torch, TFLOP/s, GB/s, part of the roof, page faults; a dash where there is none."""
    median = result.median
    if median is None:
        return ("-",) * 8
    plain = reference_median(result, results)
    host = sorted(result.host)[len(result.host) // 2] if result.host else None
    return (
        f"{DOUBT * bool(doubts(result))} {seconds(median)}".lstrip(),
        "-" if result.spread is None else f"{100 * result.spread:.0f}%",
        "-" if host is None else seconds(host),
        "-" if plain is None else ratio(plain / median),
        f"{result.flops / median / 1e12:.3g}" if result.flops else "-",
        f"{result.bytes / median / 1e9:.3g}",
        "-" if result.limit is None else f"{100 * result.limit / median:.0f}%",
        f"{result.faults:.0f} {result.memory}".rstrip() if result.faults is not None else "-",
    )


def results(measured: Sequence[Result]) -> str:
    """One line per case and provider; what could not be measured, and what makes times doubtful, is a line of its own below."""
    own = list(dict.fromkeys(name for r in measured for name in r.metrics))
    rows, shown = [], ""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for r in measured:
        if r.status == "ok":
            name = "" if r.case == shown else r.case
            shown = r.case
            peak, error = "-" if r.peak is None else size(r.peak), "-" if r.error is None else f"{r.error:.1e}"
            rows.append((name, r.provider, r.backend or "-", *figures(r, measured), peak, error, *(metric(r, name) for name in own)))
        if r.reason or r.status != "ok":
            grouped.setdefault((r.provider, r.status, r.reason or "no reason given"), []).append(r.case)
        for doubt in doubts(r):
            grouped.setdefault((DOUBT, doubt), []).append(r.case)
    lines = [table((*COLUMNS, *own), rows, left=3)] if rows else []
    for (who, what, *why), cases in grouped.items():
        names = list(dict.fromkeys(cases))
        lines.append(": ".join((f"  {who} {what} ({names[0] if len(names) == 1 else f'{len(names)} cases'})", *why)))
    if any(map(doubts, measured)):
        lines.append(
            f"  {DOUBT} marks times that are no plain facts; measure again when the machine is quiet, or beside processes on purpose with --busy."
        )
    return "\n".join(lines)


def metric(result: Result, name: str) -> str:
    """An operation's own figure; an amount per call is shown per second."""
    value = result.metrics.get(name)
    if value is None or (name.endswith("/s") and result.median is None):
        return "-"
    return f"{value / result.median:.3g}" if name.endswith("/s") and result.median else f"{value:.3g}"


MEASURES = ("95 % interval", "p", "floor", "finds", "verdict")


@dataclass(frozen=True)
class Words:
    """How a comparison is put: what its sides are called, and how their times are written."""

    a: str = "A"
    b: str = "B"
    change: str = "B takes"
    time: Callable[[float], str] = seconds

    @property
    def headers(self) -> tuple[str, ...]:
        return ("case", self.a, self.b, self.change, *MEASURES)


def _cells(c: Comparison, words: Words) -> tuple[str, ...]:
    times = ("-" if t is None else words.time(t) for t in c.times)
    d = c.difference
    if d is None:
        return (c.case, *times, "-", "-", "-", "-", "-", c.words)
    finds = _percent(d.smallest) if d.smallest <= TELLING else "too few launches"
    return (c.case, *times, _percent(d.effect), _interval(d), f"{d.p:.1g}", _percent(d.floor), finds, c.words)


def _interval(d: Difference) -> str:
    """From … to; question marks where it is so wide that it says nothing."""
    low, high = (_percent(x if d.half <= TELLING else math.inf) for x in (d.low, d.high))
    return f"{low} … {high}"


def _percent(effect: float) -> str:
    """A log ratio as a change.

    Example:
        >>> _percent(0.0953), _percent(float("inf"))
        ('+10.0%', '?')
    """
    return f"{100 * math.expm1(effect):+.1f}%" if math.isfinite(effect) else "?"


def change(c: Comparison) -> str:
    """One line on a comparison."""
    if c.difference is None:
        return c.words
    return f"{_percent(c.difference.effect)} ({_interval(c.difference)}): {c.words}"


def comparisons(compared: Sequence[Comparison], words: Words | None = None) -> str:
    """A line per case, and below what is worse beside the time and what the sides did not have in common.

    "finds" is the smallest change that would have been found 95 times in a hundred.
    """
    words = words or Words()
    remarks = [f"  {remark}" for c in compared for remark in c.remarks]
    return "\n".join([table(words.headers, [_cells(c, words) for c in compared]), *remarks])


def markdown(title: str, described: Mapping[str, str], compared: Sequence[Comparison], words: Words | None = None) -> str:
    """For a pull request: changes and what is undecided first, the rest folded away."""
    words = words or Words()
    rest = [c for c in compared if c.words == SAME]
    changed = [c for c in compared if c not in rest]
    parts = [f"### {_escaped(title)}", _escaped(environment(described)), ""]
    parts += _markdown_table(changed, words) if changed else ["No change beyond the limits.", ""]
    if rest:
        parts += [f"<details><summary>{len(rest)} cases without a change</summary>", "", *_markdown_table(rest, words), "</details>", ""]
    parts += [f"- {_escaped(remark)}" for c in compared for remark in c.remarks]
    return "\n".join(parts)


def rows(compared: Sequence[Comparison], **stamp: Any) -> list[dict[str, Any]]:
    """What the table says, for JSON: a log ratio for each effect, seconds or multiples for times."""
    return [
        asdict(c.kept(**stamp))
        | {
            "worse": list(c.worse),
            "floor": None if c.difference is None else c.difference.floor,
            "limits": asdict(c.limits),
            "peaks": [c.a.peak, c.b.peak],
            "errors": [c.a.error, c.b.error],
            "host": None if c.host is None else c.host.effect,
        }
        for c in compared
    ]


def _markdown_table(compared: Sequence[Comparison], words: Words) -> list[str]:
    rows = [words.headers, *(_cells(c, words) for c in compared)]
    lines = ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(words.headers), *lines[1:], ""]


def _escaped(text: str) -> str:
    """No cell may end a table or begin a tag."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
