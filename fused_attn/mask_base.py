"""What a mask is: its meaning, its normal form, its picture, and how several combine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_attn import pytrees
from fused_attn.checks import captured, described, require_broadcast, require_tensor
from fused_attn.lowering import Grid, KernelMask
from fused_attn.mask_rules import multiplies_out


class Mask:
    """Base of all masks; subclass it to define your own.

    ``a & b`` allows what both allow, ``a | b`` what any of them does, ``~a`` what a does not. Masks of one class that hold the same
    values are equal, and have the same hash.

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
    __array_ufunc__ = None  # numpy's & would go through an array's elements instead of saying what must hold

    def __init_subclass__(cls) -> None:
        pytrees.register(cls)
        # Written into the class, or a dataclass would make its own, which asks tensors for their truth value.
        for name in () if "__eq__" in vars(cls) else ("__eq__", "__hash__"):
            setattr(cls, name, getattr(Mask, name))

    def keep(self, grid: Grid) -> Tensor:
        """The meaning: bool, broadcastable to the grid's [batch, heads, q, kv]."""
        raise TypeError(f"{type(self).__name__} must define keep(grid); got a mask without it. Return a bool tensor, True = may attend.")

    def allowed(self, grid: Grid) -> Tensor:
        """``keep``, checked and viewed as 4-D."""
        keep, name = self.keep(grid), f"{type(self).__name__}.keep(grid)"
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            raise TypeError(f"{name} must return a bool tensor; got {described(keep)}. Compare, or convert with .to(torch.bool).")
        require_broadcast(name, keep, grid.sizes, "the grid's [batch, heads, q, kv]", grid.device)
        return keep[(None,) * (4 - keep.dim())]

    def lower(self, grid: Grid) -> KernelMask:
        """The normal form for kernels; by default a rule: ``keep``, asked for one region at a time."""
        return KernelMask(rules=(self,))

    def check(self, grid: Grid) -> None:
        """Raises ValueError or TypeError when the mask does not fit a grid of this shape."""

    def picture(self, q_len: int = 4, kv_len: int = 4) -> str:
        """One line per query, ``#`` where it may attend, for batch 0 and head 0."""
        rows = self.allowed(Grid((1, 1, q_len, kv_len), torch.device("cpu")))[0, 0].expand(q_len, kv_len)
        return "\n".join("".join("#" if allowed else "." for allowed in row) for row in rows.tolist())

    def __and__(self, other: Mask | Tensor) -> And:
        return And((*_parts(self, And), *_parts(as_mask(other), And)))

    def __rand__(self, other: Tensor) -> And:
        return And((*_parts(as_mask(other), And), *_parts(self, And)))

    def __or__(self, other: Mask | Tensor) -> Or:
        return Or((*_parts(self, Or), *_parts(as_mask(other), Or)))

    def __ror__(self, other: Tensor) -> Or:
        return Or((*_parts(as_mask(other), Or), *_parts(self, Or)))

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            f"masks must be combined with &, | and ~; got the truth value of a {type(self).__name__}, which `and`, `or`, `not` and `if` ask for. "
            "Write a & b instead of `a and b`, and `mask is not None` to ask whether there is one."
        )

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return pytrees.is_same(pytrees.state(self), pytrees.state(other)) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), pytrees.fingerprint(pytrees.state(self))))

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        """Instances for a grid of this shape; the test-suite runs every backend on each of them."""
        yield from ()


def _parts(mask: Mask, kind: type[And] | type[Or]) -> tuple[Mask, ...]:
    return mask.masks if isinstance(mask, kind) else (mask,)


def as_mask(mask: object) -> Mask:
    """A bool tensor becomes ``Dense``; a mask stays itself; anything else is a TypeError."""
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        return Dense(mask)
    got = f"the class {mask.__name__} itself" if isinstance(mask, type) else described(mask)
    raise TypeError(
        f"mask must be a fused_attn mask or a bool tensor; got {got}. Write Causal(), wrap a condition in Dense(keep), or combine masks with &, | and ~."
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

    def __invert__(self) -> Or:
        return Or(tuple(~mask for mask in self.masks))


@dataclass(frozen=True, eq=False)
class Or(Mask):
    """Any of several masks; made by ``|``. One interval per row where the masks' own join to one, a rule otherwise.

    Example:
        >>> from fused_attn.masks import Band, Causal
        >>> print((Causal() | Band(2)).picture())
        ##..
        ###.
        ####
        ####
    """

    masks: tuple[Mask, ...]

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return any(m.positional for m in self.masks)

    def keep(self, grid: Grid) -> Tensor:
        result = self.masks[0].allowed(grid)
        for mask in self.masks[1:]:
            result = result | mask.allowed(grid)
        return result

    def lower(self, grid: Grid) -> KernelMask:
        forms = [mask.lower(grid) for mask in self.masks]
        if any(form.is_trivial for form in forms):
            return KernelMask()
        joined: KernelMask | None = None
        if not any(form.has_pairs for form in forms):
            joined = _joined_windows(forms) or _joined_intervals(forms, grid)
        elif not any(form.has_intervals or form.rules for form in forms):
            joined = _joined_pairs([form.keep for form in forms if form.keep is not None])
        return KernelMask(rules=(self,)) if joined is None else joined

    def check(self, grid: Grid) -> None:
        for mask in self.masks:
            mask.check(grid)

    def __invert__(self) -> And:
        return And(tuple(~mask for mask in self.masks))


def _joined_windows(forms: list[KernelMask]) -> KernelMask | None:
    """Windows hold the query's own position, so that any two of them join, whatever the values."""
    if any(form.kv_start is not None or form.kv_end is not None for form in forms):
        return None
    left, right = (None if None in (sides := [getattr(f, side) for f in forms]) else max(sides) for side in ("left", "right"))
    return KernelMask(left, right)


def _joined_intervals(forms: list[KernelMask], grid: Grid) -> KernelMask | None:
    """The union of intervals, row by row, where it is known to be one: all begin with the first key, all end with the last, or one looks."""
    rows = [torch.broadcast_tensors(*form.row_intervals(grid)) for form in forms]
    pairs = torch.broadcast_tensors(*(t for row in rows for t in row))
    starts, ends = torch.stack(pairs[::2]), torch.stack(pairs[1::2])
    if all(form.right is None and form.kv_end is None for form in forms):
        return KernelMask(kv_start=starts.amin(0).to(torch.int32))
    if all(form.left is None and form.kv_start is None for form in forms):
        return KernelMask(kv_end=ends.amax(0).to(torch.int32))
    if captured(starts):
        return None
    # Empty intervals go to the end of the keys, where they join nothing and leave no gap.
    kv_len, empty = grid.shape[3], starts >= ends
    starts, order = starts.masked_fill(empty, kv_len).sort(0)
    ends = ends.masked_fill(empty, 0).gather(0, order)
    if not bool(((starts[1:] <= ends.cummax(0).values[:-1]) | (starts[1:] == kv_len)).all()):
        return None
    return KernelMask(kv_start=starts[0].to(torch.int32), kv_end=ends.amax(0).to(torch.int32))


def _joined_pairs(tensors: list[Tensor]) -> KernelMask | None:
    keep = tensors[0]
    for other in tensors[1:]:
        if multiplies_out(keep, other):
            return None
        keep = keep | other
    return KernelMask(keep=keep)


@dataclass(frozen=True, eq=False)
class Not(Mask):
    """What a mask does not allow; made by ``~``. One interval per row where the mask leaves keys on one side only, a rule otherwise.

    Example:
        >>> from fused_attn.masks import Causal
        >>> print((~Causal()).picture())
        .###
        ..##
        ...#
        ....
    """

    mask: Mask

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return self.mask.positional

    def keep(self, grid: Grid) -> Tensor:
        return ~self.mask.allowed(grid)

    def lower(self, grid: Grid) -> KernelMask:
        form, kv_len = self.mask.lower(grid), grid.shape[3]
        if form.rules or (form.has_intervals and form.keep is not None):
            return KernelMask(rules=(self,))
        if form.keep is not None:
            return KernelMask(keep=~form.keep)
        start, end = torch.broadcast_tensors(*form.row_intervals(grid))
        if form.left is None and form.kv_start is None:
            return KernelMask(kv_start=end.to(torch.int32))
        if form.right is None and form.kv_end is None:
            return KernelMask(kv_end=start.to(torch.int32))
        from_first, empty = start <= 0, start >= end
        if captured(start) or not bool((from_first | empty | (end >= kv_len)).all()):
            return KernelMask(rules=(self,))
        start, end = end.where(from_first, 0).masked_fill(empty, 0), torch.full_like(end, kv_len).where(from_first | empty, start)
        return KernelMask(kv_start=start.to(torch.int32), kv_end=end.to(torch.int32))

    def check(self, grid: Grid) -> None:
        self.mask.check(grid)

    def __invert__(self) -> Mask:
        return self.mask


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

    def lower(self, grid: Grid) -> KernelMask:
        return KernelMask(keep=self.keep(grid))

    def check(self, grid: Grid) -> None:
        batch, _, q_len, kv_len = grid.shape
        if tuple(self.keep_pairs.shape) == (batch, kv_len) and batch not in (1, q_len):
            raise ValueError(
                f"mask must broadcast to [batch, heads, q_len, kv_len] = {list(grid.shape)}, so that a 2-D one is [q_len, kv_len]; got "
                f"{[batch, kv_len]}. Write KeyPadding(mask) for one that says of each sequence which keys count."
            )
        require_broadcast("mask", self.keep_pairs, grid.shape, "[batch, heads, q_len, kv_len]", grid.device)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Mask]:
        batch, heads, q_len, kv_len = grid.shape
        pairs = torch.arange(q_len, device=grid.device)[:, None] * 3 + torch.arange(kv_len, device=grid.device)
        yield cls(pairs % 5 < 3)
        yield cls((pairs + torch.arange(batch * heads, device=grid.device).view(batch, heads, 1, 1)) % 7 < 5)
