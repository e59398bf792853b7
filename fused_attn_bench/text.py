"""Aligned plain-text tables, numbers with units, wrapped notes: what a terminal, a log and a README show alike."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 120


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their widest cell; the first ``left`` ones are aligned left, the others right.

    Example:
        >>> print(table(("case", "time"), [("a", "1.5 ms"), ("long", "12 ms")]))
        case    time
        ────  ──────
        a     1.5 ms
        long   12 ms
    """
    cells = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    cells.insert(1, ["─" * width for width in widths])
    return "\n".join(
        "  ".join(f"{c:{'<' if i < left else '>'}{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells
    )


def note(text: str) -> str:
    """One paragraph, wrapped and indented."""
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def seconds(value: float) -> str:
    """Three significant digits with a unit.

    Example:
        >>> seconds(0.001234), seconds(12.3), seconds(4.5e-6)
        ('1.23 ms', '12.3 s', '4.50 µs')
    """
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor or unit == "µs":
            break
    return f"{_three_digits(value / factor)} {unit}"


def size(value: float) -> str:
    """Bytes in binary units.

    Example:
        >>> size(1536 * 1024), size(3 * 2**30)
        ('1.50 MiB', '3.00 GiB')
    """
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor or unit == "KiB":
            break
    return f"{_three_digits(value / factor)} {unit}"


def ratio(value: float) -> str:
    """A factor between two times.

    Example:
        >>> ratio(2.345), ratio(12.34)
        ('2.35x', '12.3x')
    """
    return f"{_three_digits(value)}x"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def first_line(error: BaseException) -> str:
    """An exception's class and the first line of its message."""
    return f"{type(error).__name__}: {line_of(error) or 'no message'}"


def line_of(error: BaseException) -> str:
    """The first line of a message, for a table: nothing in it moves a cursor or changes a colour."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a message is code as well
        return "a message that cannot be read"
    return "".join(letter for letter in lines[0] if letter.isprintable()) if lines else ""
