"""The mask vocabulary: small objects that say which keys a query may attend to, combined with ``&``, ``|`` and ``~``.

True always means *may attend*. Every class holds its whole concept: its meaning in plain torch (``keep``), its normal form
(``lower``), a picture, and examples that the tests discover. A mask of your own needs ``keep`` only; giving it ``lower`` as well
lets kernels skip the tiles it excludes.

Example:
    >>> print((Causal() & Band(2)).picture())
    #...
    ##..
    .##.
    ..##
    >>> print((~Causal() | Chunked(2)).picture())
    ####
    ####
    ..##
    ..##
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_attn.checks import FLOATS, INTS, described, own_rows, require_integer, require_shape, require_tensor, require_true
from fused_attn.lowering import Grid, KernelMask
from fused_attn.mask_base import And, Dense, Mask, Not, Or, as_mask
from fused_attn.mask_documents import BidirectionalBlocks, Documents
from fused_attn.mask_mod import MaskMod, from_mask_mod

__all__ = [
    "And",
    "Band",
    "BidirectionalBlocks",
    "BlockCausal",
    "Causal",
    "Chunked",
    "Dense",
    "Documents",
    "KeyPadding",
    "Mask",
    "MaskMod",
    "Not",
    "Or",
    "PrefixLM",
    "SlidingWindow",
    "ValidLengths",
    "as_mask",
    "from_mask_mod",
]


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
                object.__setattr__(self, name, require_integer(f"SlidingWindow {name}", getattr(self, name), 0))

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
        object.__setattr__(self, "width", require_integer("Band width", self.width, 1))

    def keep(self, grid: Grid) -> Tensor:
        return (grid.q_pos - grid.kv_idx).abs() < self.width

    def lower(self, grid: Grid) -> KernelMask:
        return KernelMask(left=self.width - 1, right=self.width - 1)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        yield cls(4)


@dataclass(frozen=True)
class Chunked(Mask):
    """Keys of the query position's own chunk of ``size`` positions, as in Llama 4's local layers (with ``Causal() &``).

    Example:
        >>> print(Chunked(2).picture())
        ##..
        ##..
        ..##
        ..##
    """

    size: int

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", require_integer("Chunked size", self.size, 1))

    def keep(self, grid: Grid) -> Tensor:
        return grid.q_pos // self.size == grid.kv_idx // self.size

    def lower(self, grid: Grid) -> KernelMask:
        start = grid.positions // self.size * self.size
        first, last = (t.clamp(0, grid.shape[3]).to(torch.int32) for t in (start, start + self.size))
        return KernelMask(kv_start=first, kv_end=last)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        yield cls(grid.shape[3] // 3 + 1)


@dataclass(frozen=True)
class BlockCausal(Mask):
    """Keys of the query position's own block of ``size`` positions and of all blocks before it.

    Example:
        >>> print(BlockCausal(2).picture())
        ##..
        ##..
        ####
        ####
    """

    size: int

    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", require_integer("BlockCausal size", self.size, 1))

    def keep(self, grid: Grid) -> Tensor:
        return grid.kv_idx // self.size <= grid.q_pos // self.size

    def lower(self, grid: Grid) -> KernelMask:
        end = (grid.positions // self.size + 1) * self.size
        return KernelMask(kv_end=end.clamp(0, grid.shape[3]).to(torch.int32))

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        yield cls(grid.shape[3] // 4 + 1)


@dataclass(frozen=True, eq=False)
class ValidLengths(Mask):
    """The first ``lens`` keys of each sequence, or of each query row. Fractions round up (1.5 keeps two); <= 0 keeps none.

    Args:
        lens: int or float tensor [batch] or [batch, q_len], without NaN.

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
        if lens.is_floating_point():
            message = "ValidLengths lens must be numbers; got NaN. Replace it, with 0 for a sequence without keys."
            object.__setattr__(self, "lens", require_true(~lens.isnan().any(), message, lens))

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

    def lower(self, grid: Grid) -> KernelMask:
        return KernelMask(keep=self.keep(grid))

    def check(self, grid: Grid) -> None:
        require_shape("KeyPadding keep", self.keep_keys, ((grid.shape[0], grid.shape[3]),), grid.device)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        batch, _, _, kv_len = grid.shape
        yield cls((torch.arange(batch * kv_len, device=grid.device).view(batch, kv_len) * 11) % 7 < 4)


@dataclass(frozen=True, eq=False)
class PrefixLM(Mask):
    """Causal, and the first ``prefix`` keys open to every query (T5's prefix language model, arXiv 1910.10683).

    Args:
        prefix: an int >= 0, or an int tensor [batch] of such.

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
            prefix = require_tensor("PrefixLM prefix", self.prefix, INTS, "an int or an int tensor [batch]", "Count the open keys.")
            message = "PrefixLM prefix must be >= 0; got a negative element. Count the open keys, 0 for none."
            object.__setattr__(self, "prefix", require_true((own_rows(prefix) >= 0).all(), message, prefix))
        else:
            object.__setattr__(self, "prefix", require_integer("PrefixLM prefix", self.prefix, 0))

    def keep(self, grid: Grid) -> Tensor:
        prefix = self.prefix[slice(*grid.ranges[0]), None, None, None] if isinstance(self.prefix, Tensor) else self.prefix
        return (grid.kv_idx <= grid.q_pos) | (grid.kv_idx < prefix)

    def lower(self, grid: Grid) -> KernelMask:
        prefix = self.prefix[:, None] if isinstance(self.prefix, Tensor) else self.prefix
        end = (grid.positions + 1).clamp(min=0)
        end = torch.maximum(end, prefix) if isinstance(prefix, Tensor) else end.clamp(min=prefix)
        return KernelMask(kv_end=end.clamp(0, grid.shape[3]).to(torch.int32))

    def check(self, grid: Grid) -> None:
        if isinstance(self.prefix, Tensor):
            require_shape("PrefixLM prefix", self.prefix, ((grid.shape[0],),), grid.device)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        yield cls(grid.shape[3] // 3)
        yield cls((torch.arange(grid.shape[0], device=grid.device) * 9) % (grid.shape[3] + 1))
