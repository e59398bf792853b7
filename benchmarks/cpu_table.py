"""The tables that docs/performance.md has of ``cpu_targets``: ratios with their targets, growth on a busy machine, times and host cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

BEGIN, END = "<!-- measured by python -m benchmarks.cpu_targets -->", "<!-- end -->"
# A target counts as reached within a tenth of it: medians of a shared machine repeat no better.
NOISE = 0.9
# Without the library: speed of single masks and biases in SDPA's, of their geometric mean, and of everything else in eager's.
BLOCKED, BLOCKED_MEAN, BLOCKED_EAGER = 0.9, 0.95, 1.0
# Growth of time beside busy processes, in eager's growth in the same run.
GROWTH = 1.5
REACHED, NEAR, MISSED = "✓", "~", "✗"

Line = Mapping[str, Any]


def mark(value: float, target: float) -> str:
    """Whether at least the target was reached, within the noise, or not.

    Example:
        >>> mark(1.2, 1.1), mark(1.0, 1.1), mark(0.9, 1.1)
        ('✓', '~', '✗')
    """
    return REACHED if value >= target else NEAR if value >= NOISE * target else MISSED


def ratio(line: Line, provider: str) -> float | None:
    """The rival's time over the provider's; None where one of them has none."""
    ours, rival = line["seconds"].get(provider), line["seconds"].get(line["rival"])
    return None if ours is None or rival is None else rival / ours


def library_target(line: Line) -> float | None:
    """What the kernels are held to."""
    return line["target"]


def blocked_target(line: Line) -> float | None:
    """What plain torch operations are held to."""
    return BLOCKED if line["rival"] == "sdpa" else BLOCKED_EAGER


def judged(line: Line, provider: str, target_of: Callable[[Line], float | None]) -> str:
    """One cell: the ratio with its mark, and the target where it is this line's own; a dash where nothing was measured."""
    if provider in line["wrong"]:
        return f"{MISSED} {line['wrong'][provider]}"
    value, target = ratio(line, provider), target_of(line)
    if value is None:
        return "-"
    return f"{value:.2f}" if target is None else f"{value:.2f} {mark(value, target)} ({target:.2g})"


def _groups(lines: Sequence[Line]) -> dict[tuple[str, str, str, str], dict[int, Line]]:
    """Attention's lines by kind, mode, head size and rival, and in there by length."""
    found: dict[tuple[str, str, str, str], dict[int, Line]] = {}
    for line in lines:
        found.setdefault((line["kind"], line["mode"], line["size"], line["rival"]), {})[line["length"]] = line
    return dict(sorted(found.items(), key=lambda item: int(item[0][2])))


def _is_attention(line: Line) -> bool:
    return "x" not in line["size"]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [headers, ["---"] * len(headers), *rows])


def ratios(lines: Sequence[Line], provider: str, target_of: Callable[[Line], float | None]) -> str:
    """Attention, one row per kind, mode and head size, one column per length; then the softmax."""
    attention = [line for line in lines if _is_attention(line)]
    lengths = sorted({line["length"] for line in attention})
    rows = [
        [kind, mode, size, _named(rival), *(judged(at[n], provider, target_of) if n in at else "-" for n in lengths)]
        for (kind, mode, size, rival), at in _groups(attention).items()
    ]
    parts = [_table(("case", "mode", "head size", "against", *(f"L = {n}" for n in lengths)), rows)] if rows else []
    others = [(x["kind"], f"[{x['size'].replace('x', ', ')}]", judged(x, provider, target_of)) for x in lines if not _is_attention(x)]
    return "\n\n".join([*parts, *([_table(("softmax, against eager", "scores", "speed"), others)] if others else [])])


def _named(provider: str) -> str:
    return "SDPA" if provider == "sdpa" else provider


def growth(lines: Sequence[Line]) -> list[tuple[Line, str, float]]:
    """Line, provider, and its growth beside busy processes in eager's growth."""
    found = []
    for line in lines:
        grown = {name: line["busy"][name] / line["seconds"][name] for name in line["busy"]}
        found += [(line, name, grown[name] / grown["eager"]) for name in ("cpu", "blocked") if name in grown and "eager" in grown]
    return found


def growth_table(lines: Sequence[Line]) -> str:
    """One row per case that was measured beside busy processes."""
    relative = {(id(line), name): value for line, name, value in growth(lines)}
    rows = []
    for line in lines:
        if not line["busy"]:
            continue
        grown = {name: line["busy"][name] / line["seconds"][name] for name in line["busy"]}
        cells = [f"{grown[name]:.2f}" if name in grown else "-" for name in ("cpu", "blocked", "sdpa", "eager")]
        for i, name in enumerate(("cpu", "blocked")):
            value = relative.get((id(line), name))
            cells[i] += "" if value is None else f", {value:.2f} of eager's {mark(1 / value, 1 / GROWTH)}"
        rows.append([line["kind"], line["mode"], line["size"], *cells])
    return _table(("case", "mode", "size", "cpu", "blocked", "SDPA", "eager"), rows)


def times_table(lines: Sequence[Line], length: int) -> str:
    """Milliseconds of every provider at one length on the first head size, and the page faults of a call."""
    first = next((line["size"] for line in lines if _is_attention(line)), "")
    rows = []
    for line in lines:
        if (line["length"], line["size"]) != (length, first) and _is_attention(line):
            continue
        cells = []
        for name in ("cpu", "blocked", "sdpa", "eager"):
            seconds = line["seconds"].get(name)
            cells.append("-" if seconds is None else f"{1e3 * seconds:.3g} ({line['faults'][name]:.0f})")
        rows.append([line["kind"], line["mode"], line["size"], *cells])
    return _table(("case", "mode", "size", "cpu", "blocked", "SDPA", "eager"), rows)


def host_table(costs: Sequence[Mapping[str, Any]]) -> str:
    """Microseconds of a call that computes almost nothing."""
    rows = [
        [
            cost["call"],
            f"{cost['ours']:.1f}",
            f"{cost['sdpa']:.1f}",
            f"{cost['ours'] / cost['sdpa']:.2f} {_within(cost)} ({cost['target']:g})",
        ]
        for cost in costs
    ]
    return _table(("call", "fused_attn, µs", "SDPA, µs", "ratio, at most"), rows)


def _within(cost: Mapping[str, Any]) -> str:
    return mark(cost["target"] * cost["sdpa"] / cost["ours"], 1.0)


def masks_and_biases(lines: Sequence[Line]) -> float | None:
    """Geometric mean of the blocked backend's speed in SDPA's; None where it was not measured."""
    found = [value for line in lines if line["rival"] == "sdpa" and (value := ratio(line, "blocked")) is not None]
    return statistics.geometric_mean(found) if found else None


def missed(found: Mapping[str, Any]) -> int:
    """How many targets were missed by more than the noise; wrong results among them."""
    lines, count = found["lines"], 0
    for line in lines:
        for provider, target_of in (("cpu", library_target), ("blocked", blocked_target)):
            value, target = ratio(line, provider), target_of(line)
            count += provider in line["wrong"] or (value is not None and target is not None and mark(value, target) == MISSED)
    count += sum(mark(1 / value, 1 / GROWTH) == MISSED for _, _, value in growth(lines))
    count += sum(_within(cost) == MISSED for cost in found["host"])
    mean = masks_and_biases(lines)
    return count + (mean is not None and mark(mean, BLOCKED_MEAN) == MISSED)


def rendered(found: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    lines, environment = found["lines"], found["environment"]
    about = f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}; CPU library: {environment['library']}; load before the run {environment['load']}."
    mean = masks_and_biases(lines)
    parts = [
        about,
        f"A cell is the rival's time over ours, with the target in brackets: {REACHED} reached, {NEAR} within a tenth of it, {MISSED} missed.",
        "### The cpu backend",
        ratios(lines, "cpu", library_target),
        "### Plain torch operations in blocks (the blocked backend)",
        "Not measured: this version has no such backend." if mean is None else ratios(lines, "blocked", blocked_target),
    ]
    if mean is not None:
        parts.append(f"Masks and biases in the geometric mean: {mean:.2f} {mark(mean, BLOCKED_MEAN)} ({BLOCKED_MEAN}).")
    if any(line["busy"] for line in lines):
        title = f"Time beside {found['busy']} busy processes over time alone, and in eager's growth, at most {GROWTH}:"
        parts += ["### Beside busy processes", title, growth_table(lines)]
    longest = max((n for n in (line["length"] for line in lines if _is_attention(line)) if n <= 2048), default=math.nan)
    parts += [
        f"### Milliseconds at L = {longest} (and page faults of a call)",
        times_table(lines, int(longest)) if longest == longest else "Not measured.",
        "### Host cost of a call, [1, 4, 32, 32], one thread",
        host_table(found["host"]),
    ]
    return "\n\n".join(parts)


def replaced(page: str, text: str) -> str:
    """The page with the text between its markers.

    Raises:
        ValueError: the page has no markers.
    """
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"the page must have the lines {BEGIN} and {END}; got one without. Add them where the tables belong.")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
