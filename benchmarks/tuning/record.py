"""The file of Hopper's tables, rewritten with what was measured."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.tuning.candidates import shown
from benchmarks.tuning.verdict import Verdict
from fused_attn.backends.triton.hopper import tiles

# What the times depend on, of ``environment.describe``.
DEPENDS = ("device", "torch", "triton")


def text(tables: dict[str, dict[str, Any]]) -> str:
    """The file's text: an entry's tiles, its reason and its measurement on a line each.

    Example:
        >>> from fused_attn.backends.triton.hopper import tiles
        >>> text(json.loads(tiles.PATH.read_text())) == tiles.PATH.read_text()
        True
    """
    parts = []
    for table, entries in tables.items():
        lines = [
            f'  "{name}": {{\n' + ",\n".join(f'   "{field}": {json.dumps(value)}' for field, value in entry.items()) + "\n  }"
            for name, entry in entries.items()
        ]
        parts.append(f' "{table}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def revised(before: str, verdict: Verdict, described: dict[str, str]) -> str:
    """The file's text with an entry's fastest tiles, what they showed, and a reason where they are new ones.

    Args:
        before: the file's text.
        verdict: with tiles that were timed.
        described: of the machine, see ``environment.describe``.
    """
    best, tables = verdict.best, json.loads(before)
    assert best is not None, f"{verdict.entry.name} was not timed"
    entry, others = tables[verdict.entry.table][verdict.entry.name], [t for t in verdict.timed[1:] if t is not best]
    figures = {"candidates": len(verdict.timed), "milliseconds": {call: round(ms, 4) for call, ms in best.milliseconds.items()}}
    measured = {name: described[name] for name in DEPENDS} | {"ratio": round(best.ratio, 4)} | figures
    if others:
        measured["next"] = {"tiles": shown(others[0].tiles), "ratio": round(others[0].ratio, 4)}
    if best.tiles != verdict.entry.present:
        reason = (
            f"Fastest of {len(verdict.timed)} on {described['device']}: {best.ratio:.3f} of the time of {shown(verdict.entry.present)}."
        )
        entry = {"tiles": best.tiles._asdict(), "why": reason}
    tables[verdict.entry.table][verdict.entry.name] = entry | {"measured": measured}
    made = text(tables)
    tiles.read(made)
    return made
