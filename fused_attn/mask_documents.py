"""Masks that read an id per key: documents packed into one sequence, and blocks that see each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_attn.checks import INTS, captured, own_rows, require_integer, require_own_data, require_shape, require_tensor, require_true
from fused_attn.lowering import Grid, KernelMask
from fused_attn.mask_base import Mask

_CU_ADVICE = "Use the cumsum of the lengths with a leading 0."


def _require_ids(name: str, ids: object, each: str) -> Tensor:
    tensor = require_tensor(name, ids, INTS, "an int tensor", f"Use torch.tensor(ids), one id per {each}.")
    if tensor.dim() not in (1, 2):
        length = "q_len" if each == "query" else "kv_len"
        raise ValueError(f"{name} must have shape [{length}] or [batch, {length}]; got {list(tensor.shape)}. Reshape it.")
    return tensor


def _matrix(ids: Tensor) -> Tensor:
    return ids if ids.dim() == 2 else ids[None]


def _runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """First and one-past-last position of each key's run of equal ids, [batch|1, kv_len]."""
    length = ids.shape[1]
    position = torch.arange(length, device=ids.device).expand_as(ids)
    if length == 0:
        return position, position
    changes, edge = ids[:, 1:] != ids[:, :-1], torch.ones_like(ids[:, :1], dtype=torch.bool)
    start = position.where(torch.cat((edge, changes), 1), 0).cummax(1).values
    end = (position + 1).where(torch.cat((changes, edge), 1), length).flip(1).cummin(1).values.flip(1)
    return start, end


def _are_runs(ids: Tensor, counted: Tensor) -> Tensor:
    """Whether equal ids are neighbours, among those that count, [batch|1, kv_len]: as many runs as distinct ids."""
    heads = _runs(ids)[0] == torch.arange(ids.shape[1], device=ids.device)
    ordered, order = ids.sort(1)
    changes = torch.cat((torch.ones_like(ordered[:, :1], dtype=torch.bool), ordered[:, 1:] != ordered[:, :-1]), 1)
    return ((heads & counted).sum(1) == (changes & counted.gather(1, order)).sum(1)).all()


def _at_queries(per_key: Tensor, grid: Grid, outside: int) -> Tensor:
    """Values [batch|1, kv_len] of the keys at the queries' positions, [batch|1, q]; ``outside`` where a query lies beyond the keys."""
    length = per_key.shape[1]
    if isinstance(grid.q_offset, int) and grid.q_offset == 0 and grid.ranges[2] == (0, length) and per_key.shape[0] == 1:
        return per_key
    position = grid.positions
    rows = torch.broadcast_shapes(position.shape[:1], per_key.shape[:1])[0]
    position, per_key = position.expand(rows, -1), per_key.expand(rows, -1)
    if length == 0:
        return torch.full_like(position, outside)
    return per_key.gather(1, position.clamp(0, length - 1)).where((position >= 0) & (position < length), outside)


def _of_region(ids: Tensor, grid: Grid) -> Tensor:
    """The rows of [batch|1, length] that belong to the grid's batches."""
    return ids if ids.shape[0] == 1 else ids[slice(*grid.ranges[0])]


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Keys of the query's own document, for sequences packed one after another.

    Args:
        ids: int tensor [kv_len] or [batch, kv_len]; equal ids must be neighbours (a document is one run).
        q_ids: int tensor [q_len] or [batch, q_len] in any order, the queries' documents; None where a query belongs to the key at its
            position.

    Example:
        >>> print(Documents(torch.tensor([0, 0, 0, 1])).picture())
        ###.
        ###.
        ###.
        ...#
        >>> print(Documents(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1])).picture(2, 4))
        ###.
        ...#
        >>> Documents.from_cu_seqlens(torch.tensor([0, 2, 5])).ids.tolist()
        [0, 0, 1, 1, 1]
    """

    ids: Tensor
    q_ids: Tensor | None = None

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return self.q_ids is None

    def __post_init__(self) -> None:
        ids = _require_ids("Documents ids", self.ids, "key")
        if self.q_ids is not None:
            _require_ids("Documents q_ids", self.q_ids, "query")
        message = (
            "Documents ids must hold each document as one run of equal ids; got an id that comes back after another one. "
            "Use Dense(ids[..., :, None] == ids[..., None, :]) for scattered groups."
        )
        rows = own_rows(_matrix(ids))
        object.__setattr__(self, "ids", require_true(_are_runs(rows, torch.ones_like(rows, dtype=torch.bool)), message, ids))

    @classmethod
    def from_cu_seqlens(cls, cu_q: Tensor, cu_k: Tensor | None = None, *, total: int | tuple[int, int] | None = None) -> Documents:
        """From cumulative lengths [documents + 1], as FlashAttention's variable-length calls take them.

        Args:
            cu_q: 0, then the end of each document among the queries (and the keys, without ``cu_k``).
            cu_k: the same among the keys, where they are packed in other lengths.
            total: the last element, with ``cu_k`` the pair of both; needed where values cannot be looked at (inside torch.compile), and
                checked on the device then.

        Example:
            >>> print(Documents.from_cu_seqlens(torch.tensor([0, 1, 2]), torch.tensor([0, 3, 4])).picture(2, 4))
            ###.
            ...#
        """
        if cu_k is None:
            return cls(_ids_of("cu_seqlens", cu_q, total))
        if total is not None and not (isinstance(total, (tuple, list)) and len(total) == 2):
            raise TypeError(f"total must be a pair (total_q, total_k) with cu_k; got {total!r}. Pass total=(q_len, kv_len).")
        q_ids, ids = (_ids_of(name, cu, n) for name, cu, n in zip(("cu_q", "cu_k"), (cu_q, cu_k), total or (None, None), strict=True))
        if cu_q.shape != cu_k.shape:
            raise ValueError(
                f"cu_q and cu_k must count the same documents; got {list(cu_q.shape)} and {list(cu_k.shape)}. Repeat an end for an empty one."
            )
        return cls(ids, q_ids)

    def keep(self, grid: Grid) -> Tensor:
        ids = _of_region(_matrix(self.ids), grid)
        if self.q_ids is not None:
            mine, theirs = _of_region(_matrix(self.q_ids), grid)[:, slice(*grid.ranges[2])], ids[:, slice(*grid.ranges[3])]
            return (mine[:, :, None] == theirs[:, None, :])[:, None]
        known = (grid.positions >= 0) & (grid.positions < ids.shape[1])
        mine = _at_queries(ids, grid, 0)
        return (mine[:, None, :, None] == ids[:, None, None, slice(*grid.ranges[3])]) & known[:, None, :, None]

    def lower(self, grid: Grid) -> KernelMask:
        start, end = self._found() if self.q_ids is not None else (_at_queries(t, grid, 0) for t in _runs(_matrix(self.ids)))
        return KernelMask(kv_start=start.to(torch.int32), kv_end=end.to(torch.int32))

    def _found(self) -> tuple[Tensor, Tensor]:
        """First and one-past-last key of every query's document, [batch|1, q_len]."""
        assert self.q_ids is not None
        ids, mine = (_matrix(t).to(torch.int64) for t in (self.ids, self.q_ids))
        rows = torch.broadcast_shapes(ids.shape[:1], mine.shape[:1])[0]
        ids, mine = (t.expand(rows, -1).contiguous() for t in (ids, mine))
        if ids.shape[1] == 0:
            return torch.zeros_like(mine), torch.zeros_like(mine)
        # A document is one run, so that a stable sort keeps its keys in order and its first one first.
        ordered, order = ids.sort(dim=1, stable=True)
        first, last = torch.searchsorted(ordered, mine), torch.searchsorted(ordered, mine, right=True)
        start = order.gather(1, first.clamp(max=ids.shape[1] - 1))
        return start, start + (last - first)

    def check(self, grid: Grid) -> None:
        batch, _, q_len, kv_len = grid.shape
        require_shape("Documents ids", self.ids, ((kv_len,), (batch, kv_len)), grid.device)
        if self.q_ids is not None:
            require_shape("Documents q_ids", self.q_ids, ((q_len,), (batch, q_len)), grid.device)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        batch, _, q_len, kv_len = grid.shape
        yield cls(torch.arange(kv_len, device=grid.device) // max(1, kv_len // 3))
        shift = torch.arange(batch, device=grid.device)[:, None] * 5
        yield cls((torch.arange(kv_len, device=grid.device) + shift) // 17)
        yield cls(-(torch.arange(kv_len, device=grid.device) // 5), -(torch.arange(q_len, device=grid.device) * 7 % 4))


def _ids_of(name: str, cu_seqlens: object, total: object) -> Tensor:
    """The document of every element, [total], from cumulative lengths."""
    cu = require_tensor(name, cu_seqlens, INTS, "an int tensor [documents + 1]", _CU_ADVICE)
    require_own_data(name, cu)
    if cu.dim() != 1 or cu.shape[0] < 2:
        raise ValueError(f"{name} must have shape [documents + 1]; got {list(cu.shape)}. {_CU_ADVICE}")
    if total is None:
        if captured(cu):
            raise ValueError(
                "total must be given to from_cu_seqlens where values cannot be looked at; got None. Pass the packed length, total=kv_len."
            )
        total = int(cu[-1])
    length = require_integer("total", total, 0)
    values = f"; got {cu.tolist()[:8]}" if not captured(cu) else ""
    holds = (cu[0] == 0) & (cu[1:] >= cu[:-1]).all()
    cu = require_true(holds, f"{name} must start at 0 and never fall{values}. {_CU_ADVICE}", cu)
    message = f"total must be the last element of {name}{values} and total={length}. Pass the packed length."
    cu = require_true(cu[-1] == length, message, cu)
    return torch.searchsorted(cu[1:].to(torch.int64), torch.arange(length, device=cu.device), right=True)


@dataclass(frozen=True, eq=False)
class BidirectionalBlocks(Mask):
    """Keys of the query's own block, nothing where it is in none; ``Causal() | BidirectionalBlocks(ids)`` is causal text with images.

    Args:
        ids: int tensor [kv_len] or [batch, kv_len], negative outside blocks; equal ids from 0 on must be neighbours (a block is one run).

    Example:
        >>> print(BidirectionalBlocks(torch.tensor([0, 0, -1, 1])).picture())
        ##..
        ##..
        ....
        ...#
        >>> from fused_attn import Causal
        >>> print((Causal() | BidirectionalBlocks(torch.tensor([-1, 0, 0, -1]))).picture())
        #...
        ###.
        ###.
        ####
    """

    ids: Tensor

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ids = _require_ids("BidirectionalBlocks ids", self.ids, "key")
        message = (
            "BidirectionalBlocks ids must hold each block as one run of equal ids; got an id >= 0 that comes back after another one. "
            "Give every block an id of its own, -1 to keys in none."
        )
        rows = own_rows(_matrix(ids))
        object.__setattr__(self, "ids", require_true(_are_runs(rows, rows >= 0), message, ids))

    def keep(self, grid: Grid) -> Tensor:
        ids = _of_region(_matrix(self.ids), grid)
        mine = _at_queries(ids.to(torch.int64), grid, -1)[:, None, :, None]
        return (mine == ids[:, None, None, slice(*grid.ranges[3])]) & (mine >= 0)

    def lower(self, grid: Grid) -> KernelMask:
        ids = _matrix(self.ids)
        start, end = (_at_queries(t.where(ids >= 0, 0), grid, 0).to(torch.int32) for t in _runs(ids))
        return KernelMask(kv_start=start, kv_end=end)

    def check(self, grid: Grid) -> None:
        batch, _, _, kv_len = grid.shape
        require_shape("BidirectionalBlocks ids", self.ids, ((kv_len,), (batch, kv_len)), grid.device)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        batch, _, _, kv_len = grid.shape
        index = torch.arange(kv_len, device=grid.device)
        yield cls((index // 3).where(index // 3 % 2 == 0, -1))
        yield cls(((index + torch.arange(batch, device=grid.device)[:, None] * 2) // 6) - 1)
