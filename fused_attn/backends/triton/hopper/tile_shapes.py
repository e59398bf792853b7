"""Tiles of Hopper's kernels, and the shared memory that they take: at most what any call of their entry takes."""

from __future__ import annotations

from typing import NamedTuple

# The larger padded head size of an entry, and the kind of call.
Key = tuple[int, str]
# Of a CTA on compute capability 9.0, in bytes.
CAPACITY = 227 * 1024
# Barriers, and what warps of other roles are handed: 400 to 650 bytes in tests/hopper_counts.json.
_OTHERS = 1024
_HALF, _FLOAT = 2, 4
# Keys of a backward's tile.
_KEYS = 128


class ForwardTiles(NamedTuple):
    """Consumers of 64 query rows, keys per tile, stages of K and V, registers of a consumer; stages of Q; whether O has shared memory of its own."""

    consumers: int
    keys: int
    stages: int
    registers: int
    ahead: int
    own_out: bool

    def shared(self, key: Key) -> int:
        """Bytes, q and k or v having a smaller padded size included; O has memory of its own then."""
        size, kind = key
        smaller = [s for s in (64, 128) if s < size]
        sizes = [(size, size, self.own_out), *((a, b, True) for s in smaller for a, b in ((size, s), (s, size)))]
        rows = 64 * self.consumers
        bias = self.stages * rows * self.keys if kind == "bias" else 0
        most = max(
            rows * (self.ahead * head + own_out * value) + self.stages * self.keys * (head + value) for head, value, own_out in sizes
        )
        return _HALF * (most + bias) + _OTHERS


class BackwardConfig(NamedTuple):
    """Queries per tile, stages of their ring, registers of the second consumer's threads, and when things are done.

    ``early``: scores of the next tile are under way while dq leaves; ``held``: exponentials run beside the product dP, see ``registers.held``.
    """

    block_q: int
    stages: int
    registers: int
    early: bool
    held: bool

    def shared(self, key: Key) -> int:
        """Bytes, with rows' intervals from tensors; of a modified call with a bias in tiles and with dropout's words on their way."""
        size, kind = key
        fixed = _HALF * (2 * _KEYS * size + _KEYS * self.block_q) + _FLOAT * self.block_q * size
        ring = self.stages * self.block_q * (_HALF * 2 * size + _FLOAT * 4)
        modified = _HALF * self.stages * self.block_q * _KEYS + _FLOAT * 64 * self.block_q if kind == "modified" else 0
        return fixed + ring + modified + _OTHERS


class RowTiles(NamedTuple):
    """Consumers of 64 query rows, keys per tile, stages of K, registers of a consumer."""

    consumers: int
    keys: int
    stages: int
    registers: int

    def shared(self, key: Key) -> int:
        """Bytes, with probabilities of 16 bits and scores of 32."""
        size, rows = key[0], 64 * self.consumers
        return _HALF * size * (rows + self.stages * self.keys) + (_HALF + _FLOAT) * rows * self.keys + _OTHERS
