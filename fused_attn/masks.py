"""The mask vocabulary: small objects that say which keys a query may attend to, combined with ``&``.

True always means *may attend*. Every class holds its whole concept: its meaning in plain torch (``keep``), its normal form
(``lower``), a picture, and examples that the tests discover. A mask of your own needs ``keep`` only; giving it ``lower`` as well
lets kernels skip the tiles it excludes.

Example:
    >>> print((Causal() & Band(2)).picture())
    #...
    ##..
    .##.
    ..##
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_attn.checks import FLOATS, INTS, captured, described, require_integer, require_shape, require_tensor, require_true
from fused_attn.lowering import Grid, KernelMask
from fused_attn.mask_base import And, Dense, Mask, as_mask

__all__ = ["And", "Band", "Causal", "Dense", "Documents", "KeyPadding", "Mask", "PrefixLM", "SlidingWindow", "ValidLengths", "as_mask"]


@dataclass(frozen=True)
class Causal(Mask):
    """Keys at or before the query's position.

    Example:
        >>> print(Causal().picture())
        #...
        ##..
        ###.
        ####
    """

    positional: ClassVar[bool] = True

    def keep(self, grid: Grid) -> Tensor:
        return grid.kv_idx <= grid.q_pos

    def lower(self, grid: Grid) -> KernelMask:
        return KernelMask(right=0)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        yield cls()


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Keys within [q - left, q + right]; None on a side means no limit there (Longformer, arXiv 2004.05150).

    Example:
        >>> print(SlidingWindow(1, 2).picture())
        ###.
        ####
        .###
        ..##
    """

    left: int | None
    right: int | None

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                require_integer(f"SlidingWindow {name}", getattr(self, name), 0)

    def keep(self, grid: Grid) -> Tensor:
        distance = grid.kv_idx - grid.q_pos
        inside = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            inside = inside & (distance >= -self.left)
        if self.right is not None:
            inside = inside & (distance <= self.right)
        return inside

    def lower(self, grid: Grid) -> KernelMask:
        return KernelMask(left=self.left, right=self.right)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        yield cls(3, 5)
        yield cls(grid.shape[3] // 2, 0)
        yield cls(None, 2)


@dataclass(frozen=True)
class Band(Mask):
    """Keys nearer than ``width`` on either side: |q - k| < width.

    Example:
        >>> print(Band(2).picture())
        ##..
        ###.
        .###
        ..##
    """

    width: int

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_integer("Band width", self.width, 1)

    def keep(self, grid: Grid) -> Tensor:
        return (grid.q_pos - grid.kv_idx).abs() < self.width

    def lower(self, grid: Grid) -> KernelMask:
        return KernelMask(left=self.width - 1, right=self.width - 1)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        yield cls(4)


@dataclass(frozen=True, eq=False)
class ValidLengths(Mask):
    """The first ``lens`` keys of each sequence, or of each query row. Fractions round up (1.5 keeps two); <= 0 keeps none.

    Args:
        lens: int or float tensor [batch] or [batch, q_len].

    Example:
        >>> print(ValidLengths(torch.tensor([3])).picture(2, 4))
        ###.
        ###.
    """

    lens: Tensor

    def __post_init__(self) -> None:
        lens = require_tensor(
            "ValidLengths lens",
            self.lens,
            (*INTS, *FLOATS),
            "an int or float tensor",
            "Use torch.tensor(lengths); booleans go to KeyPadding.",
        )
        if lens.dim() not in (1, 2):
            raise ValueError(
                f"ValidLengths lens must have shape [batch] or [batch, q_len]; got {described(lens)}. Give one length per sequence."
            )

    def _per_row(self) -> Tensor:
        # Narrow dtypes can hold neither kv_len nor every key index.
        lens = self.lens.to(torch.float64 if self.lens.is_floating_point() else torch.int64)
        return lens[:, None] if lens.dim() == 1 else lens

    def keep(self, grid: Grid) -> Tensor:
        return grid.kv_idx < grid.crop(self._per_row()[:, None, :, None])

    def lower(self, grid: Grid) -> KernelMask:
        lens = self._per_row()
        # Clamped first: inf or 1e20 must not wrap when it becomes an int32.
        ends = lens.clamp(0, grid.shape[3]).ceil() if lens.is_floating_point() else lens.clamp(0, grid.shape[3])
        return KernelMask(kv_end=ends.to(torch.int32).expand(-1, grid.shape[2]))

    def check(self, grid: Grid) -> None:
        batch, _, q_len, _ = grid.shape
        require_shape("ValidLengths lens", self.lens, ((batch,), (batch, q_len)), grid.device)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        batch, _, q_len, kv_len = grid.shape
        yield cls((torch.arange(batch, device=grid.device) * 7 + kv_len // 2) % (kv_len + 1))
        yield cls((torch.arange(batch * q_len, device=grid.device).view(batch, q_len) * 5) % (kv_len + 2))


@dataclass(frozen=True, eq=False)
class KeyPadding(Mask):
    """Keys marked True, for all queries of a sequence.

    Args:
        keep_keys: bool tensor [batch, kv_len].

    Example:
        >>> print(KeyPadding(torch.tensor([[True, False, True, False]])).picture(2, 4))
        #.#.
        #.#.
    """

    keep_keys: Tensor

    def __post_init__(self) -> None:
        require_tensor(
            "KeyPadding keep",
            self.keep_keys,
            (torch.bool,),
            "a bool tensor [batch, kv_len]",
            "Convert it with .to(torch.bool), True = may attend.",
        )

    def keep(self, grid: Grid) -> Tensor:
        return grid.crop(self.keep_keys[:, None, None, :])

    def check(self, grid: Grid) -> None:
        require_shape("KeyPadding keep", self.keep_keys, ((grid.shape[0], grid.shape[3]),), grid.device)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        batch, _, _, kv_len = grid.shape
        yield cls((torch.arange(batch * kv_len, device=grid.device).view(batch, kv_len) * 11) % 7 < 4)


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Keys of the query's own document, for sequences packed one after another.

    Args:
        ids: int tensor [kv_len] or [batch, kv_len]; equal ids must be neighbours (a document is one run).

    Example:
        >>> print(Documents(torch.tensor([0, 0, 0, 1])).picture())
        ###.
        ###.
        ###.
        ...#
        >>> Documents.from_cu_seqlens(torch.tensor([0, 2, 5])).ids.tolist()
        [0, 0, 1, 1, 1]
    """

    ids: Tensor

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ids = require_tensor("Documents ids", self.ids, INTS, "an int tensor", "Use torch.tensor(ids), one id per key.")
        if ids.dim() not in (1, 2):
            raise ValueError(f"Documents ids must have shape [kv_len] or [batch, kv_len]; got {list(ids.shape)}. Reshape it.")
        message = (
            "Documents ids must hold each document as one run of equal ids; got an id that comes back after another one. "
            "Use Dense(ids[..., :, None] == ids[..., None, :]) for scattered groups."
        )
        object.__setattr__(self, "ids", require_true(self._is_contiguous(), message, ids))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, total: int | None = None) -> Documents:
        """From cumulative lengths [documents + 1], as FlashAttention's variable-length calls take them.

        Args:
            cu_seqlens: 0, then the end of each document.
            total: its last element, where that cannot be looked at (inside torch.compile) or need not be (saves a device sync).
        """
        advice = "Use the cumsum of the lengths with a leading 0."
        cu = require_tensor("cu_seqlens", cu_seqlens, INTS, "an int tensor [documents + 1]", advice)
        if cu.dim() != 1 or cu.shape[0] < 2:
            raise ValueError(f"cu_seqlens must have shape [documents + 1]; got {list(cu.shape)}. {advice}")
        if total is None:
            if captured(cu):
                raise ValueError(
                    "total must be given to from_cu_seqlens where values cannot be looked at; got None. Pass the packed length, total=kv_len."
                )
            if int(cu[0]) != 0 or bool((cu.diff() < 0).any()):
                raise ValueError(f"cu_seqlens must start at 0 and never fall; got {cu.tolist()[:8]}. {advice}")
            total = int(cu[-1])
        require_integer("total", total, 0)
        return cls(torch.searchsorted(cu[1:].to(torch.int64), torch.arange(total, device=cu.device), right=True))

    def _runs(self) -> tuple[Tensor, Tensor]:
        """First and one-past-last position of each key's run, [batch|1, kv_len]."""
        ids = self.ids if self.ids.dim() == 2 else self.ids[None]
        length = ids.shape[1]
        position = torch.arange(length, device=ids.device).expand_as(ids)
        changes = ids[:, 1:] != ids[:, :-1]
        first = torch.cat((torch.ones_like(ids[:, :1], dtype=torch.bool), changes), 1)
        last = torch.cat((changes, torch.ones_like(ids[:, :1], dtype=torch.bool)), 1)
        start = position.where(first, 0).cummax(1).values if length else position
        end = (position + 1).where(last, length).flip(1).cummin(1).values.flip(1) if length else position
        return start, end

    def _is_contiguous(self) -> Tensor:
        ids = (self.ids if self.ids.dim() == 2 else self.ids[None]).sort(1).values
        runs = (self._runs()[0] == torch.arange(ids.shape[1], device=ids.device)).sum(1)
        distinct = (ids[:, 1:] != ids[:, :-1]).sum(1) + min(1, ids.shape[1])
        return (runs == distinct).all()

    def _of_queries(self, per_key: Tensor, grid: Grid, outside: int) -> Tensor:
        """Values of the keys at the queries' positions, [batch|1, q]; ``outside`` where a query lies beyond the keys."""
        position = grid.q_pos.reshape(-1, grid.q_idx.shape[0])
        rows = max(position.shape[0], per_key.shape[0])
        position, per_key = position.expand(rows, -1), per_key.expand(rows, -1)
        length = per_key.shape[1]
        inside = (position >= 0) & (position < length)
        if length == 0:
            return torch.full_like(position, outside)
        return per_key.gather(1, position.clamp(0, length - 1)).where(inside, outside)

    def keep(self, grid: Grid) -> Tensor:
        ids = (self.ids if self.ids.dim() == 2 else self.ids[None])[:, None, None, :]
        ids = ids if ids.shape[0] == 1 else ids[slice(*grid.ranges[0])]
        position = grid.q_pos.reshape(-1, grid.q_idx.shape[0])
        mine = self._of_queries(ids[:, 0, 0], grid, 0)
        known = (position >= 0) & (position < ids.shape[-1])
        return (mine[:, None, :, None] == ids[..., slice(*grid.ranges[3])]) & known[:, None, :, None]

    def lower(self, grid: Grid) -> KernelMask:
        start, end = (self._of_queries(t, grid, 0).to(torch.int32) for t in self._runs())
        return KernelMask(kv_start=start, kv_end=end)

    def check(self, grid: Grid) -> None:
        batch, _, _, kv_len = grid.shape
        require_shape("Documents ids", self.ids, ((kv_len,), (batch, kv_len)), grid.device)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        batch, _, _, kv_len = grid.shape
        yield cls(torch.arange(kv_len, device=grid.device) // max(1, kv_len // 3))
        shift = torch.arange(batch, device=grid.device)[:, None] * 5
        yield cls((torch.arange(kv_len, device=grid.device) + shift) // 17)


@dataclass(frozen=True, eq=False)
class PrefixLM(Mask):
    """Causal, and the first ``prefix`` keys open to every query (T5's prefix language model, arXiv 1910.10683).

    Args:
        prefix: an int, or an int tensor [batch].

    Example:
        >>> print(PrefixLM(2).picture())
        ##..
        ##..
        ###.
        ####
    """

    prefix: int | Tensor

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.prefix, Tensor):
            require_tensor("PrefixLM prefix", self.prefix, INTS, "an int or an int tensor [batch]", "Count the open keys.")
        else:
            require_integer("PrefixLM prefix", self.prefix, 0)

    def keep(self, grid: Grid) -> Tensor:
        prefix = self.prefix[slice(*grid.ranges[0]), None, None, None] if isinstance(self.prefix, Tensor) else self.prefix
        return (grid.kv_idx <= grid.q_pos) | (grid.kv_idx < prefix)

    def lower(self, grid: Grid) -> KernelMask:
        prefix = self.prefix[:, None] if isinstance(self.prefix, Tensor) else self.prefix
        end = (grid.q_pos.reshape(-1, grid.shape[2]) + 1).clamp(min=0)
        end = torch.maximum(end, prefix) if isinstance(prefix, Tensor) else end.clamp(min=prefix)
        return KernelMask(kv_end=end.clamp(0, grid.shape[3]).to(torch.int32))

    def check(self, grid: Grid) -> None:
        if isinstance(self.prefix, Tensor):
            require_shape("PrefixLM prefix", self.prefix, ((grid.shape[0],),), grid.device)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        yield cls(grid.shape[3] // 3)
        yield cls((torch.arange(grid.shape[0], device=grid.device) * 9) % (grid.shape[3] + 1))
