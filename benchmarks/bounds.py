"""Figures that are held to a bound, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fused_attn_bench.text import table


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table.

    Args:
        cells: as shown.
        holds: whether the results are right and the figure keeps its bound; None where there is no bound.
    """

    cells: tuple[str, ...]
    holds: bool | None = None


@dataclass(frozen=True)
class Report:
    """A benchmark's outcome."""

    title: str
    headers: tuple[str, ...]
    rows: Sequence[Row]
    note: str

    @property
    def holds(self) -> bool:
        return all(row.holds is not False for row in self.rows)

    def __str__(self) -> str:
        verdicts = {True: "yes", False: "NO", None: "-"}
        cells = [(*row.cells, verdicts[row.holds]) for row in self.rows]
        return f"{self.title}\n{table((*self.headers, 'holds'), cells)}\n  {self.note}"
