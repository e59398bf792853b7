"""What a mask is: its meaning, its normal form, its picture, and how several combine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_attn.checks import described, require_broadcast, require_tensor
from fused_attn.lowering import Grid, KernelMask
from fused_attn.pytrees import register


class Mask:
    """Base of all masks; subclass it to define your own.

    Attributes:
        positional: True where the mask compares query positions with key positions, so that calls with q_len != kv_len must
            say ``q_offset``.

    Example:
        >>> class EveryOther(Mask):
        ...     positional = True
        ...
        ...     def keep(self, grid):
        ...         return (grid.q_pos - grid.kv_idx) % 2 == 0
        >>> print(EveryOther().picture(2, 4))
        #.#.
        .#.#
    """

    positional: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        register(cls)

    def keep(self, grid: Grid) -> Tensor:
        """The meaning: bool, broadcastable to the grid's [batch, heads, q, kv]."""
        raise TypeError(f"{type(self).__name__} must define keep(grid); got a mask without it. Return a bool tensor, True = may attend.")

    def allowed(self, grid: Grid) -> Tensor:
        """``keep``, checked and viewed as 4-D."""
        keep, name = self.keep(grid), f"{type(self).__name__}.keep(grid)"
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            raise TypeError(f"{name} must return a bool tensor; got {described(keep)}. Compare, or convert with .to(torch.bool).")
        require_broadcast(name, keep, tuple(end - start for start, end in grid.ranges), "the grid's [batch, heads, q, kv]", grid.device)
        return keep[(None,) * (4 - keep.dim())]

    def lower(self, grid: Grid) -> KernelMask:
        """The normal form for kernels; by default the dense tensor that ``keep`` gives."""
        return KernelMask(keep=self.allowed(grid))

    def check(self, grid: Grid) -> None:
        """Raises ValueError or TypeError when the mask does not fit a grid of this shape."""

    def picture(self, q_len: int = 4, kv_len: int = 4) -> str:
        """One line per query, ``#`` where it may attend, for batch 0 and head 0."""
        rows = self.allowed(Grid((1, 1, q_len, kv_len), torch.device("cpu")))[0, 0].expand(q_len, kv_len)
        return "\n".join("".join("#" if allowed else "." for allowed in row) for row in rows.tolist())

    def __and__(self, other: Mask | Tensor) -> And:
        return And((*_parts(self), *_parts(as_mask(other))))

    def __rand__(self, other: Tensor) -> And:
        return And((*_parts(as_mask(other)), *_parts(self)))

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        """Instances for a grid of this shape; the test-suite runs every backend on each of them."""
        yield from ()


def _parts(mask: Mask) -> tuple[Mask, ...]:
    return mask.masks if isinstance(mask, And) else (mask,)


def as_mask(mask: object) -> Mask:
    """A bool tensor becomes ``Dense``; a mask stays itself; anything else is a TypeError."""
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        return Dense(mask)
    got = f"the class {mask.__name__} itself" if isinstance(mask, type) else described(mask)
    raise TypeError(
        f"mask must be a fused_attn mask or a bool tensor; got {got}. Write Causal(), wrap a condition in Dense(keep), or combine masks with &."
    )


@dataclass(frozen=True, eq=False)
class And(Mask):
    """All of several masks at once; made by ``&``."""

    masks: tuple[Mask, ...]

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return any(m.positional for m in self.masks)

    def keep(self, grid: Grid) -> Tensor:
        result = self.masks[0].allowed(grid)
        for mask in self.masks[1:]:
            result = result & mask.allowed(grid)
        return result

    def lower(self, grid: Grid) -> KernelMask:
        result = self.masks[0].lower(grid)
        for mask in self.masks[1:]:
            result = result & mask.lower(grid)
        return result

    def check(self, grid: Grid) -> None:
        for mask in self.masks:
            mask.check(grid)


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """Any bool tensor that broadcasts to [batch, heads, q_len, kv_len].

    Example:
        >>> print(Dense(torch.eye(4, dtype=torch.bool)).picture())
        #...
        .#..
        ..#.
        ...#
    """

    keep_pairs: Tensor

    def __post_init__(self) -> None:
        require_tensor(
            "mask",
            self.keep_pairs,
            (torch.bool,),
            "a bool tensor (True = may attend)",
            "Convert it with .to(torch.bool); numbers to add go to score_mods=(Bias(tensor),).",
        )

    def keep(self, grid: Grid) -> Tensor:
        return grid.crop(self.keep_pairs[(None,) * (4 - self.keep_pairs.dim())])

    def check(self, grid: Grid) -> None:
        require_broadcast("mask", self.keep_pairs, grid.shape, "[batch, heads, q_len, kv_len]", grid.device)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        batch, heads, q_len, kv_len = grid.shape
        pairs = torch.arange(q_len, device=grid.device)[:, None] * 3 + torch.arange(kv_len, device=grid.device)
        yield cls(pairs % 5 < 3)
        yield cls((pairs + torch.arange(batch * heads, device=grid.device).view(batch, heads, 1, 1)) % 7 < 5)
