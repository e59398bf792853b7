"""Which tiles an entry of Hopper's tables may have instead of its present ones."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from fused_attn.backends.triton.hopper import tiles

# Registers are no axis: a chip has one CTA of these kernels per multiprocessor, and what it leaves unused serves nobody. Nor is O's own memory:
# without it the next query tile waits until O has left, so it has its own where that fits.
GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "forward": {"consumers": (2, 3), "keys": (128, 64), "stages": (2, 3), "ahead": (2, 1)},
    "backward": {"block_q": (128, 64), "stages": (2, 3), "early": (False, True), "held": (False, True)},
    "rows": {"consumers": (2,), "keys": (128, 64), "stages": (2, 3)},
}


class Entry(NamedTuple):
    """One line of a table: of the larger padded head size and a kind of calls."""

    table: str
    size: int
    kind: str

    @property
    def name(self) -> str:
        """As the table's file writes it.

        Example:
            >>> Entry("forward", 64, "plain").name
            '64 plain'
        """
        return f"{self.size} {self.kind}"

    @property
    def key(self) -> tuple[int, str]:
        return self.size, self.kind

    @property
    def present(self) -> Any:
        """Its tiles today."""
        return tiles.TABLES[self.table][self.key]


def entries(table: str | None = None, names: list[str] | None = None) -> list[Entry]:
    """The entries of one table or all, or those of these names.

    Raises:
        ValueError: a name is that of no entry.
    """
    known = [Entry(t, *key) for t in tiles.TABLES if table in (None, t) for key in tiles.TABLES[t]]
    unknown = sorted(set(names or ()) - {entry.name for entry in known})
    if unknown:
        raise ValueError(f"an entry must be one of {', '.join(dict.fromkeys(e.name for e in known))}; got {', '.join(unknown)}")
    return [entry for entry in known if not names or entry.name in names]


def candidates(entry: Entry) -> list[Any]:
    """The present tiles, then all of the grid that fit the chip, by computing what they take."""
    kind, grid = tiles.KINDS[entry.table], GRIDS[entry.table]
    found = [entry.present]
    for values in itertools.product(*grid.values()):
        fields = dict(zip(grid, values, strict=True))
        fields["registers"] = tiles.most_registers(fields.get("consumers", 2))
        outs = [{"own_out": own} for own in (True, False)] if "own_out" in kind.tiles._fields else [{}]
        made = [kind.tiles(**fields, **out) for out in outs]
        found += [t for t in made if not tiles.complaint(entry.table, entry.key, t)][:1]
    return list(dict.fromkeys(found))


def shown(chosen: Any) -> str:
    """Tiles in a line.

    Example:
        >>> shown(tiles.ForwardTiles(3, 128, 2, 160, 2, True))
        'consumers 3, keys 128, stages 2, registers 160, ahead 2, own_out'
    """
    parts = (name if value is True else f"{name} {value}" for name, value in chosen._asdict().items() if value is not False)
    return ", ".join(parts)
