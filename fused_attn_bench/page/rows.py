"""One result as a row: what is shown, what it sorts and filters by, and the command that measures it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from fused_attn_bench import tables
from fused_attn_bench.case import parsed
from fused_attn_bench.operation import COLUMNS as OF_A_RESULT
from fused_attn_bench.operation import REFERENCE
from fused_attn_bench.results import Result
from fused_attn_bench.tables import reference_median
from fused_attn_bench.text import size


@dataclass(frozen=True)
class Cell:
    """A table's cell: what is shown, and the number that it sorts by."""

    text: str
    value: float | None = None


COLUMNS = (*OF_A_RESULT, f"2 × {REFERENCE}'s", "status")
FILTERS = ("op", "variant", "mode", "dtype", "provider", "status")


def cells(r: Result, results: Sequence[Result]) -> list[Cell]:
    """One row of the page's table, in the order of ``COLUMNS``; ``results`` are those of the same case and run."""
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


def metrics(r: Result) -> dict[str, float]:
    """The operation's own figures; what is an amount per call becomes a rate, and is left out where there is no time."""
    return {name: value / (r.median or 1.0) if name.endswith("/s") else value for name, value in r.metrics.items() if r.median}


def tags(r: Result) -> dict[str, str]:
    """What a row can be filtered by."""
    case = parsed(r.case)
    parts = {"op": case.op, "variant": case.variant, "mode": case.mode, "dtype": case.dtype} if case else {}
    return {"op": "", "variant": "", "mode": "", "dtype": "", **parts, "provider": r.provider, "status": r.status}


def command(r: Result, program: str, reference: bool) -> str:
    """What measures a row again, in turns with the reference where it was there; only what the result has kept of how it was measured.

    Example:
        >>> one = Result("softmax/plain/fwd/float32/8", "mine", timer="wall", environment={"threads": "2"})
        >>> command(one, "fused-attn-bench", True)
        'fused-attn-bench run --case softmax/plain/fwd/float32/8 --provider mine eager --device cpu --timer wall'
    """
    providers = list(dict.fromkeys((r.provider, REFERENCE))) if reference else [r.provider]
    words = ["run", "--case", r.case, "--provider", *providers]
    if r.environment:
        words += ["--device", "cpu" if r.environment.get("threads") else "cuda"]
    if r.timer:
        words += ["--timer", r.timer]
    busy = re.match(r"\d+", r.environment.get("busy", ""))
    if busy:
        words += ["--busy", busy[0]]
    return f"{program} {shlex.join(words)}"
