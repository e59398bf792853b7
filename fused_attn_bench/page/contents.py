"""The data of a page: what its script draws, within limits that keep the page small however long the history is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fused_attn_bench import changes, plots
from fused_attn_bench.case import parsed
from fused_attn_bench.changes import Series
from fused_attn_bench.environment import KEY
from fused_attn_bench.operation import REFERENCE
from fused_attn_bench.page import notes, rows
from fused_attn_bench.page.source import Device
from fused_attn_bench.results import Compared, Result

# Of all devices together. A row is about 0.7 kB, a point 20 bytes and a sample 10 of the page's 6 MB, of which the plotting library takes 2.
ROWS, RUNS, POINTS, SAMPLES, COMPARISONS = 2000, 1000, 80_000, 60_000, 300
# A search for changes takes 10 ms in a series of so many runs, and 10 s in so many series.
SEARCHED_RUNS, SEARCHED_SERIES = 500, 1000


def contents(devices: Sequence[Device], compared: Sequence[Compared] = (), *, title: str, program: str, part: int = 1) -> dict[str, Any]:
    """What a page holds, ready for JSON; within one ``part``-th of the limits."""
    providers = [key[2] for device in devices for key in device.points] + [r.provider for device in devices for r in device.shown]
    return {
        "title": title,
        "reference": REFERENCE,
        "filters": rows.FILTERS,
        "key": KEY,
        "looks": {name: (colour, plots.PLOTLY_MARKS[mark]) for name, (colour, mark) in plots.look(providers).items()},
        "devices": [_device(device, compared, program, part * len(devices)) for device in devices],
    }


def _device(device: Device, compared: Sequence[Compared], program: str, share: int) -> dict[str, Any]:
    shown = device.shown[: max(ROWS // share, 1)]
    kept, left_out = _newest_runs(device, share)
    if len(shown) < len(device.shown):
        left_out.append(f"{len(device.shown) - len(shown)} of the run's {len(device.shown)} results")
    names = {name: i for i, name in enumerate(kept)}
    environments = {environment: i for i, environment in enumerate(dict.fromkeys(device.runs[name].environment for name in kept))}
    series = [key for key, values in device.points.items() if not names.keys().isdisjoint(values)]
    machines = {machine: i for i, machine in enumerate(dict.fromkeys(machine for machine, _, _ in series))}
    mine = [c for c in compared if c.environment.get("device", "") == device.name]
    if len(mine) > COMPARISONS:
        left_out.append(f"{len(mine) - COMPARISONS} older comparisons")
    found, not_searched = _changes(device, kept, names)
    columns, made = _rows(shown, program)
    return {
        "name": device.name or "unknown device",
        "run": names[device.run],
        "runs": [
            {"id": r.id, "time": r.time, "commit": r.commit, "timer": r.timer, "env": environments[r.environment]}
            for r in (device.runs[name] for name in kept)
        ],
        "environments": [dict(e) for e in environments],
        "machines": _labels(list(machines)),
        "series": [_series(device, key, names, machines) for key in series],
        "columns": columns,
        "rows": made,
        "samples": _samples(shown, SAMPLES // share, left_out),
        "sweeps": _sweeps(shown),
        "changes": found,
        "comparisons": [_comparison(c) for c in reversed(mine[-COMPARISONS:])],
        "warnings": notes.warnings(device.shown),
        "left_out": left_out + not_searched,
    }


def _newest_runs(device: Device, share: int) -> tuple[list[str], list[str]]:
    """Ids of as many of the newest runs as there is room for, and of the shown one; and a sentence's part on what is left out."""
    sizes = Counter(run for values in device.points.values() for run in values)
    kept, room = {device.run}, POINTS // share - sizes[device.run]
    for name in reversed(device.runs):
        room -= 0 if name in kept else sizes[name]
        if room < 0 or len(kept) >= max(RUNS // share, 1):
            break
        kept.add(name)
    missing = len(device.runs) - len(kept)
    return [name for name in device.runs if name in kept], [f"{missing} older runs of {len(device.runs)}"] if missing else []


def _digits(value: float, digits: int) -> float:
    """So many significant digits; an int where that is shorter in JSON."""
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded


def _micros(seconds: float, digits: int = 5) -> float:
    return _digits(seconds * 1e6, digits)


def _series(device: Device, key: Series, names: Mapping[str, int], machines: Mapping[tuple[str, ...], int]) -> list[Any]:
    """Case, provider, machine, runs, medians in µs, spreads in thousandths."""
    values = {i: device.points[key][name] for name, i in names.items() if name in device.points[key]}
    spreads = [None if spread is None else round(1000 * spread) for _, spread in values.values()]
    return [key[1], key[2], machines[key[0]], list(values), [_micros(median) for median, _ in values.values()], spreads]


def _labels(machines: Sequence[tuple[str, ...]]) -> list[str]:
    """What tells each machine of a device from the others; empty where there is one."""
    names = (*KEY, "timer")
    differing = [i for i, name in enumerate(names) if len({m[i] for m in machines}) > 1]
    return [", ".join(f"{names[i]} {m[i]}" for i in differing) for m in machines]


def _rows(shown: Sequence[Result], program: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The table's columns, with the operations' own figures before the status, and its rows."""
    own = list(dict.fromkeys(name for r in shown for name in r.metrics))
    by_case: dict[str, list[Result]] = {}
    for r in shown:
        by_case.setdefault(r.case, []).append(r)
    made = []
    for r in shown:
        figures, beside = rows.metrics(r), by_case[r.case]
        cells = rows.cells(r, beside)
        cells[-1:-1] = [rows.Cell(f"{figures[name]:.4g}", figures[name]) if name in figures else rows.Cell("-") for name in own]
        made.append(
            {
                "tags": list(rows.tags(r).values()),
                "cells": [cell.text if cell.value is None else [cell.text, cell.value] for cell in cells],
                "work": [r.flops, r.bytes, *r.roofs] if r.flops and r.bytes and r.roofs else None,
                "command": rows.command(r, program, any(b.provider == REFERENCE for b in beside)),
            }
        )
    return [*rows.COLUMNS[:-1], *own, rows.COLUMNS[-1]], made


def _samples(shown: Sequence[Result], room: int, left_out: list[str]) -> list[dict[str, Any] | None]:
    """Each row's samples in µs and what the sensors said beside them; every n-th, where there are too many."""
    names = ("sm_mhz", "watts", "load")
    taken = sum(len(r.samples) * (2 + sum(name in r.telemetry[0] for name in names) if r.telemetry else 1) for r in shown)
    step = max(1, -(-taken // room))
    if step > 1:
        left_out.append(f"all but one in {step} of the raw samples")
    found: list[dict[str, Any] | None] = []
    for r in shown:
        one: dict[str, Any] = {"us": [_micros(s) for s in r.samples[::step]], "step": step}
        if len(r.telemetry) == len(r.samples):
            thinned = r.telemetry[::step]
            for name in names:
                if any(name in sample for sample in thinned):
                    one[name] = [None if sample.get(name) is None else _digits(sample[name], 4) for sample in thinned]
            if any(sample.get("throttled") for sample in thinned):
                one["throttled"] = [" ".join(sample.get("throttled") or ()) for sample in thinned]
        found.append(one if r.samples else None)
    return found


def _sweeps(shown: Sequence[Result]) -> list[dict[str, Any]]:
    """Families of cases that differ in one size: the rows and their sizes."""
    places = {id(r): i for i, r in enumerate(shown)}
    found = []
    for name, (axis, members) in plots.families(shown).items():
        sizes = [case.shape[axis] for r in members if (case := parsed(r.case))]
        found.append({"name": name, "rows": [places[id(r)] for r in members], "sizes": sizes})
    return found


def _changes(device: Device, kept: Sequence[str], names: Mapping[str, int]) -> tuple[list[dict[str, Any]], list[str]]:
    """Changes in the newest runs of every series, newest first, and what was not searched; the series of the shown run go before others."""
    shown = {(r.machine, r.case, r.provider) for r in device.shown}
    histories = dict(sorted(device.history(kept).items(), key=lambda item: item[0] not in shown))
    searched = {key: points[-SEARCHED_RUNS:] for key, points in list(histories.items())[:SEARCHED_SERIES]}
    missing = []
    if any(len(points) > SEARCHED_RUNS for points in histories.values()):
        missing.append(f"changes before the newest {SEARCHED_RUNS} runs of a series")
    if len(searched) < len(histories):
        missing.append(f"changes in {len(histories) - len(searched)} series")
    found = []
    for key, steps in changes.find(searched).items():
        points = searched[key]
        for step in steps:
            after, before = points[step.index], points[max(step.index - 1, 0)]
            place = {"run": names[after.run], "before": names[before.run]}
            found.append({"case": key[1], "provider": key[2], "kind": step.kind, "percent": _digits(step.percent, 3), **place})
    return sorted(found, key=lambda c: (-c["run"], -abs(c["percent"]))), missing


def _comparison(c: Compared) -> dict[str, Any]:
    named = ("case", "a", "b", "verdict", "reason", "medians", "effect", "low", "high", "smallest", "launches", "time")
    return {name: getattr(c, name) for name in named} | {"commit": c.environment.get("commit", "")}
