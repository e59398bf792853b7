"""Who holds which part of a sequence: contiguous runs, or two chunks a rank so that a causal mask gives every rank the same work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fused_attn.checks import described
from fused_attn.lowering import Grid, KernelMask, Range

Order = Literal["contiguous", "zigzag"]


@dataclass(frozen=True)
class Shards:
    """How ``ranks`` processes share a sequence.

    Args:
        ranks: how many there are.
        order: "contiguous": rank r holds the r-th run; "zigzag": chunks r and 2 * ranks - 1 - r of 2 * ranks (Megatron's and
            ring-flash-attention's balance: under a causal mask early queries have few keys and late ones many).
        length: of the whole sequence.

    Raises:
        ValueError: the order is none of these, or its chunks do not divide the length.

    Example:
        >>> Shards(2, "zigzag", 8).chunks(0), Shards(2, "zigzag", 8).chunks(1)
        (((0, 2), (6, 8)), ((2, 4), (4, 6)))
    """

    ranks: int
    order: Order
    length: int

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"order must be 'contiguous' or 'zigzag'; got {described(self.order)}. 'zigzag' balances causal masks.")
        if self.length % self.count:
            raise ValueError(
                f"the sequence must be a multiple of {self.count} = {self.count // self.ranks} x {self.ranks} ranks long; got {self.length}. Pad it, and mask the padding."
            )

    @property
    def count(self) -> int:
        """How many chunks the sequence has."""
        return self.ranks * (2 if self.order == "zigzag" else 1)

    @property
    def size(self) -> int:
        """Positions of a chunk."""
        return self.length // self.count

    def numbers(self, rank: int) -> tuple[int, ...]:
        """The chunks of a rank, in the order in which it holds them."""
        return (rank, self.count - 1 - rank) if self.order == "zigzag" else (rank,)

    def chunks(self, rank: int) -> tuple[Range, ...]:
        """The positions of a rank, as half-open ranges."""
        return tuple([(n * self.size, (n + 1) * self.size) for n in self.numbers(rank)])

    def of(self, tensor: Tensor, rank: int, dim: int = 2) -> Tensor:
        """A rank's part of a whole tensor.

        Example:
            >>> Shards(2, "zigzag", 8).of(torch.arange(8), 1, dim=0).tolist()
            [2, 3, 4, 5]
        """
        return torch.cat([tensor.narrow(dim, start, end - start) for start, end in self.chunks(rank)], dim)

    def whole(self, parts: list[Tensor], dim: int = 2) -> Tensor:
        """All ranks' parts put together, in the sequence's order; the inverse of ``of``.

        Example:
            >>> shards = Shards(2, "zigzag", 8)
            >>> shards.whole([shards.of(torch.arange(8), rank, dim=0) for rank in range(2)], dim=0).tolist()
            [0, 1, 2, 3, 4, 5, 6, 7]
        """
        placed = {
            n: piece
            for rank, part in enumerate(parts)
            for n, piece in zip(self.numbers(rank), part.tensor_split(len(self.numbers(rank)), dim), strict=True)
        }
        return torch.cat([placed[n] for n in range(self.count)], dim)

    def meetings(self, mask: KernelMask, grid: Grid) -> list[list[bool]]:
        """Which chunk of queries may find a key in which chunk of keys, by the rows' intervals; ``keep`` and rules are not looked at.

        Windows alone are answered by arithmetic on the host; intervals that lie on a device are brought over once.
        """
        if not self.size:
            return [[False] * self.count for _ in range(self.count)]
        host = torch.device("cpu")
        limits = {name: None if (t := getattr(mask, name)) is None else t.to(host) for name in ("kv_start", "kv_end")}
        offset: Any = grid.q_offset.to(host) if isinstance(grid.q_offset, Tensor) else grid.q_offset
        form = KernelMask(mask.left, mask.right, limits["kv_start"], limits["kv_end"])
        first, end, _, _ = form.tile_bounds(Grid(grid.shape, host, offset), self.size)
        at = torch.arange(self.count, device=host) * self.size
        found = (first[..., None] < at + self.size) & (end[..., None] > at) & (first < end)[..., None]
        result: list[list[bool]] = found.any(0).tolist()
        return result
