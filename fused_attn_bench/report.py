"""A run and its history as one HTML page that needs no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_attn_bench import changes, plots, tables
from fused_attn_bench.case import Case
from fused_attn_bench.changes import Change, Point, Series
from fused_attn_bench.results import Result, ResultsError
from fused_attn_bench.tables import REFERENCE, reference_median
from fused_attn_bench.text import size

FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Cell:
    """A table's cell: what is shown, and the number that it sorts by."""

    text: str
    value: float | None = None


COLUMNS = (
    "case",
    "provider",
    "backend",
    "time",
    "±",
    "host",
    "vs eager",
    "TFLOP/s",
    "GB/s",
    "of roof",
    "faults",
    "peak",
    "error",
    "2 × eager's",
    "status",
)


def cells(r: Result, results: Sequence[Result]) -> list[Cell]:
    """One row of the page's table."""
    plain, median = reference_median(r, results), r.median
    numbers = (
        median,
        r.spread,
        sorted(r.host)[len(r.host) // 2] if r.host else None,
        plain / median if plain and median else None,
        r.flops / median if median and r.flops else None,
        r.bytes / median if median else None,
        r.limit / median if r.limit and median else None,
        r.faults if median else None,
    )
    shown = [Cell(text, number) for text, number in zip(tables.figures(r, results), numbers, strict=True)]
    ran = f"{r.backend} {r.config}".strip() or "-"
    errors = [Cell("-" if e is None else f"{e:.1e}", e) for e in (r.error, None if r.plain_error is None else 2 * r.plain_error)]
    status = r.status if not r.reason else f"{r.status}: {r.reason}"
    return [Cell(r.case), Cell(r.provider), Cell(ran), *shown, Cell("-" if r.peak is None else size(r.peak), r.peak), *errors, Cell(status)]


def tags(r: Result) -> dict[str, str]:
    """What a row can be filtered by."""
    case = Case.parse(r.case)
    return {"op": case.op, "variant": case.variant, "mode": case.mode, "dtype": case.dtype, "provider": r.provider, "status": r.status}


def bars(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Speed against plain torch, case by case, longest bar = fastest of the page."""
    looks, found = plots.look([r.provider for r in results]), []
    ratios = {id(r): plain / r.median for r in results if r.provider != REFERENCE and r.median and (plain := reference_median(r, results))}
    top = max(ratios.values(), default=1.0)
    for r in results:
        if id(r) in ratios:
            ratio = ratios[id(r)]
            width, one = f"{100 * ratio / top:.2f}%", f"{100 / top:.2f}%"
            found.append(
                {"result": r, "tags": tags(r), "ratio": f"{ratio:.2f}×", "width": width, "one": one, "colour": looks[r.provider][0]}
            )
    return found


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> list[tuple[str, str, str, bool]]:
    """Name, value before, value now, whether they differ."""
    return [(name, old.get(name, ""), new.get(name, ""), old.get(name, "") != new.get(name, "")) for name in dict.fromkeys((*new, *old))]


def build(history: Sequence[Result], run: str | None = None) -> str:
    """The page of a run, by default the newest.

    Raises:
        ResultsError: there is no such run.
    """
    import jinja2
    from markupsafe import Markup

    runs = list(dict.fromkeys(r.run for r in history))
    run = run or (runs[-1] if runs else "")
    if run not in runs:
        raise ResultsError(
            f"the run must be one of the history's; got {run!r}. It has {', '.join(runs[-5:]) or 'none yet'}: python -m benchmarks run."
        )
    results = [r for r in history if r.run == run]
    earlier = [r for r in history if r.time < results[0].time and r.environment.get("device") == results[0].environment.get("device")]
    looks = plots.look([r.provider for r in results])
    drawn = [("Roofline", plots.roofline(results))] if any(r.flops and r.roofs for r in results) else []
    sweeps = [
        (f"Time over N, {name}", plots.sweep(name, axis, members, looks)) for name, (axis, members) in plots.families(results).items()
    ]
    found = _histories(history, results)
    past = [
        (f"History of {key[1]}, {key[2]}", plots.history(f"{key[1]}\n{key[2]}", points, steps)) for key, (points, steps) in found.items()
    ]

    def drawings(figures: Sequence[tuple[str, Any]], start: int) -> list[Any]:
        return [Markup(plots.svg(figure, label, start + i)) for i, (label, figure) in enumerate(figures)]

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    script = (FOLDER / "report.js").read_text()
    page: str = environment.get_template("report.html").render(
        run=run,
        first=results[0],
        columns=COLUMNS,
        rows=[(tags(r), cells(r, results)) for r in results],
        bars=bars(results),
        filters={name: sorted({tags(r)[name] for r in results}) for name in ("op", "variant", "mode", "dtype", "provider", "status")},
        roofline=drawings(drawn, 0),
        sweeps=drawings(sweeps, 100),
        histories=drawings(past, 1000),
        changed=[(key, points[c.index], c) for key, (points, steps) in found.items() for c in steps],
        environment=difference(earlier[-1].environment if earlier else results[0].environment, results[0].environment),
        earlier=earlier[-1].run if earlier else "",
        style=Markup((FOLDER / "report.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return page


def _histories(history: Sequence[Result], results: Sequence[Result]) -> dict[Series, tuple[list[Point], list[Change]]]:
    """The series of this run's results with more than one run, those with changes first; fused_attn's, or the ones that changed."""
    wanted = {(r.machine, r.case, r.provider) for r in results}
    kept = {key: points for key, points in changes.series(history).items() if key in wanted and len(points) > 1}
    found = changes.find(kept)
    shown = [key for key in kept if key in found or key[2].startswith("fused_attn")]
    return {key: (kept[key], found.get(key, [])) for key in sorted(shown, key=lambda key: key not in found)}
