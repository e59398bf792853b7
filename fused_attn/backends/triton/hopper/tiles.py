"""Tiles of Hopper's kernels: ``tiles.json``, read once and held to what kernels and chip allow. ``python -m benchmarks tune`` writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .tile_shapes import CAPACITY, BackwardConfig, ForwardTiles, Key, RowTiles

HEAD_SIZES = (64, 128, 256)
PATH = Path(__file__).with_name("tiles.json")


class Kind(NamedTuple):
    """What a table may hold: the tiles' type, kinds of calls of each head size, kinds that may be absent, values of fields."""

    tiles: Any
    kinds: dict[int, tuple[str, ...]]
    optional: tuple[str, ...]
    values: dict[str, tuple[int, ...]]

    @property
    def keys(self) -> list[Key]:
        """Every entry that there may be."""
        return [(size, kind) for size, kinds in self.kinds.items() for kind in kinds]


_STAGES = tuple(range(1, 9))
# "bias": one that arrives in tiles. "heavy": dropout, a dense mask, heads of a group in a tile's rows, or a modification that reads memory for
# each score. "modified": anything but a mask between product and exponent.
KINDS = {
    "forward": Kind(
        ForwardTiles,
        dict.fromkeys(HEAD_SIZES, ("plain", "heavy", "bias")),
        ("bias",),
        {"consumers": (2, 3), "keys": (64, 128), "stages": _STAGES, "ahead": (1, 2), "own_out": (False, True)},
    ),
    "backward": Kind(
        BackwardConfig,
        dict.fromkeys(HEAD_SIZES[:2], ("plain", "modified")),
        (),
        {"block_q": (64, 128), "stages": _STAGES, "early": (False, True), "held": (False, True)},
    ),
    "rows": Kind(RowTiles, dict.fromkeys(HEAD_SIZES, ("plain",)), (), {"consumers": (2,), "keys": (64, 128), "stages": _STAGES}),
}


def most_registers(consumers: int) -> int:
    """What a consumer's thread may have of the chip's 65536 when a warpgroup's worth of 24 is left to the other warps.

    Example:
        >>> most_registers(2), most_registers(3)
        (240, 160)
    """
    return (65536 - 128 * 24) // (128 * consumers) // 8 * 8


def complaint(table: str, key: Key, tiles: Any) -> str:
    """Why an entry cannot have these tiles; empty if it can."""
    kind = KINDS[table]
    for field, value in tiles._asdict().items():
        allowed = kind.values.get(field) or tuple(range(24, most_registers(getattr(tiles, "consumers", 2)) + 1, 8))
        if type(value) is not type(allowed[0]) or value not in allowed:
            return f"{field} must be one of {', '.join(map(str, allowed))}; got {value!r}"
    if getattr(tiles, "ahead", 1) > 1 and not tiles.own_out:
        return "O can take Q's place only where Q has one stage: ahead must be 1 without own_out; got 2"
    if getattr(tiles, "early", False) and tiles.stages < 2:
        return "scores of the next tile want a stage beside the present one's: stages must be at least 2 with early; got 1"
    needed = tiles.shared(key)
    return "" if needed <= CAPACITY else f"a CTA has {CAPACITY} bytes of shared memory; these take {needed}"


def typed(table: str, data: Mapping[str, Any]) -> dict[Key, Any]:
    """A table's entries {"64 plain": {"tiles": ..., "why": ...}} as tiles by key.

    Raises:
        ValueError: an entry is unknown or missing, or its tiles are not what they may be.
    """
    kind, found = KINDS[table], {}
    names = {f"{size} {what}": (size, what) for size, what in kind.keys}
    for name, entry in data.items():
        key = names.get(name) or _refuse(f"{table} must have entries of {', '.join(names)}; got {name!r}")
        if not isinstance(entry, dict) or not {"tiles", "why"} <= entry.keys() <= {"tiles", "why", "measured"} or not entry["why"]:
            _refuse(f"{table} {name} must have tiles, a reason (why) and at most what was measured; got {entry}")
        if not isinstance(entry["tiles"], dict) or sorted(entry["tiles"]) != sorted(kind.tiles._fields):
            _refuse(f"the tiles of {table} {name} must have {', '.join(kind.tiles._fields)}; got {entry['tiles']}")
        found[key] = kind.tiles(**entry["tiles"])
        if said := complaint(table, key, found[key]):
            _refuse(f"{table} {name}: {said}")
    missing = [name for name, key in names.items() if key not in found and key[1] not in kind.optional]
    if missing:
        _refuse(f"{table} must have entries of {', '.join(missing)} as well")
    return found


def _refuse(reason: str) -> NoReturn:
    raise ValueError(f"{PATH.name}: {reason}. python -m benchmarks tune writes it.")


def read(text: str) -> dict[str, dict[Key, Any]]:
    """All tables of a file.

    Raises:
        ValueError: see ``typed``; or a table is unknown or missing.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        _refuse(f"it must hold JSON; got {error}")
    if not isinstance(data, dict) or not all(isinstance(entries, dict) for entries in data.values()):
        _refuse("it must hold tables of entries by name; got something else")
    if sorted(data) != sorted(KINDS):
        _refuse(f"the tables must be {', '.join(KINDS)}; got {', '.join(data)}")
    return {table: typed(table, entries) for table, entries in data.items()}


# What every launch looks its tiles up in, and what an override changes.
TABLES = read(PATH.read_text())
FORWARD: dict[Key, ForwardTiles] = TABLES["forward"]
BACKWARD: dict[Key, BackwardConfig] = TABLES["backward"]
ROWS: dict[Key, RowTiles] = TABLES["rows"]


def padded(dim: int) -> int:
    """The box that a head dimension is loaded as: TMA fills the rest with zeros.

    Example:
        >>> padded(64), padded(72)
        (64, 128)
    """
    return next(size for size in HEAD_SIZES if dim <= size)
