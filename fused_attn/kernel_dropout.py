"""The normal form of dropout: the chance of removal, a seed, and where a call stands in the whole problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Sizes = tuple[int, int, int, int]
_OWN = (-1, -1, -1, -1)


class KernelDropout(NamedTuple):
    """Random removal of probabilities: the chance of removal, an int64 seed tensor [] on the inputs' device, and the call's place.

    Args:
        p: chance of removal.
        seed: key of the generator.
        origin: index of the call's first (batch, head, query, key) in the whole problem.
        extent: sizes of the whole problem; None where the call is the whole.
    """

    p: float
    seed: Tensor
    origin: Sizes = (0, 0, 0, 0)
    extent: Sizes | None = None

    def is_whole(self, shape: Sizes) -> bool:
        """Whether a call of that shape is the whole problem."""
        return self.origin == (0, 0, 0, 0) and self.extent in (None, shape)

    def counters(self, shape: Sizes) -> tuple[Sizes, int]:
        """How the elements of a call of that shape are numbered: ((first, batch, head, row), shift).

        Element (b, h, q, k) draws word (k + shift) % 4 of counter first + b * batch + h * head + q * row + (k + shift) // 4.

        Example:
            >>> import torch
            >>> KernelDropout(0.5, torch.tensor(0), (0, 1, 0, 6), (1, 2, 3, 10)).counters((1, 1, 3, 4))
            ((10, 18, 9, 3), 2)
        """
        _, heads, q_len, kv_len = self.extent or shape
        b, h, q, k = self.origin
        row = -(-kv_len // 4)
        head = q_len * row
        return (b * heads * head + h * head + q * row + k // 4, heads * head, head, row), k % 4

    @classmethod
    def at(cls, p: float, seed: Tensor, place: Sequence[int]) -> KernelDropout:
        """The inverse of ``place``."""
        origin, extent = (place[0], place[1], place[2], place[3]), (place[4], place[5], place[6], place[7])
        return cls(p, seed, origin, None if place[4] < 0 else extent)


def place(dropout: KernelDropout) -> tuple[int, ...]:
    """Origin and extent as the eight numbers that an op's arguments hold; -1 where the call is the whole.

    A function, for Dynamo of torch 2.10 knows no properties of named tuples.
    """
    return (*dropout.origin, *(dropout.extent or _OWN))


def part_of(dropout: KernelDropout | None, first: Sizes, shape: Sizes) -> KernelDropout | None:
    """The dropout of the part that begins at ``first`` of a call of that shape; a function as ``place`` is.

    Example:
        >>> import torch
        >>> part_of(KernelDropout(0.5, torch.tensor(0)), (0, 1, 2, 0), (1, 2, 3, 4)).origin
        (0, 1, 2, 0)
    """
    if dropout is None:
        return None
    (b, h, q, kv), (moved_b, moved_h, moved_q, moved_kv) = dropout.origin, first
    return dropout._replace(origin=(b + moved_b, h + moved_h, q + moved_q, kv + moved_kv), extent=dropout.extent or shape)
