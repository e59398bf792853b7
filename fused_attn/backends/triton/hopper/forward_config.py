"""Tiles of the Hopper forward, as data."""

from __future__ import annotations

from typing import NamedTuple


class ForwardTiles(NamedTuple):
    """Consumers of 64 query rows, keys per tile, stages of K and V, registers of a consumer, and whether O has shared memory of its own."""

    consumers: int
    keys: int
    stages: int
    registers: int
    own_out: bool


HEAD_SIZES = (64, 128, 256)
# (larger padded head size, kind of call). "bias" has one that arrives in tiles, for which there is no room at head size 256. "heavy" wants
# registers, for dropout's counters, words of a dense mask, or heads of rows: at head size 64 three consumers with 160 each make 208, 13 and 37
# local accesses in a trip, two with 240 none; nor do they with a bias, for which it is 112.
TABLE = {
    (64, "plain"): ForwardTiles(3, 128, 2, 160, True),
    (64, "heavy"): ForwardTiles(2, 128, 2, 240, True),
    (64, "bias"): ForwardTiles(2, 128, 2, 240, True),
    (128, "plain"): ForwardTiles(2, 128, 2, 240, True),
    (128, "heavy"): ForwardTiles(2, 128, 2, 240, True),
    (128, "bias"): ForwardTiles(2, 128, 2, 240, False),
    (256, "plain"): ForwardTiles(2, 64, 2, 240, False),
    (256, "heavy"): ForwardTiles(2, 64, 2, 240, False),
}


def padded(dim: int) -> int:
    """The box that a head dimension is loaded as: TMA fills the rest with zeros.

    Example:
        >>> padded(64), padded(72)
        (64, 128)
    """
    return next(size for size in HEAD_SIZES if dim <= size)
