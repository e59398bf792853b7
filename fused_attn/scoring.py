"""The scoring vocabulary: how a score comes from a query and a key, before any score modification.

Every class holds its whole concept: its meaning in plain torch (``score``) and, where there is one, its form as a dot product (``lower``),
which every kernel backend runs. Without ``lower`` the eager and cpu backends run ``score`` itself; ``Additive`` has kernels of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fused_attn.checks import FLOATS, as_number, described, require_broadcast, require_device, require_shape, require_tensor
from fused_attn.kernel_score import KernelScore, unlowerable
from fused_attn.lowering import Grid, stat_dtype
from fused_attn.pytrees import HoldsTensors, register
from fused_attn.score_mods import Bias, ScoreMod


class Product(NamedTuple):
    """A scoring as scale * q k^T followed by modifications: q and k in the shapes and dtype they came in, made by differentiable torch."""

    q: Tensor
    k: Tensor
    scale: float
    mods: tuple[ScoreMod, ...] = ()


class Scoring(HoldsTensors):
    """Base of all scorings; subclasses are dataclasses with a unique ``name``, whose fields are tensors, numbers, bools or None.

    Attributes:
        name: what backends resolve; registered when the class is defined.
        kernels: names of the score modifications that ``lower`` adds.
        lowers: whether the class has a ``lower``; set when it is defined.
        by_parts: whether its tensors are 4-D with a dimension of heads in the normal form, so that one head's scores can be asked for.
        is_tame: True where finite inputs give finite scores with finite derivatives, in pairs that may not attend too.

    Example:
        >>> @dataclass(frozen=True, eq=False)
        ... class WeightedL1(Scoring):
        ...     weight: Tensor  # [head_dim]
        ...     name = "weighted_l1"
        ...
        ...     def score(self, q, k):
        ...         return -(q[..., :, None, :] - k[..., None, :, :]).abs() @ self.weight
        >>> WeightedL1(torch.ones(8)).score(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 5, 8)).shape
        torch.Size([1, 2, 3, 5])
        >>> WeightedL1.lowers, DotProduct.lowers
        (False, True)
    """

    name: ClassVar[str] = ""
    kernels: ClassVar[tuple[str, ...]] = ()
    lowers: ClassVar[bool] = False
    by_parts: ClassVar[bool] = False
    is_tame: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        register(cls)
        cls.lowers = cls.lower is not Scoring.lower
        if cls.name:
            SCORINGS[cls.name] = cls

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """The meaning: q [batch, heads, q, head_dim] and k [batch, heads, kv, head_dim] to scores [batch, heads, q, kv].

        Lengths are those of a block; heads are all of them, keys repeated where query heads share one. Batches are all of them where a
        tensor of the scoring has a dimension of the batch's size. Blocks of one call may differ in size.
        """
        raise TypeError(
            f"{type(self).__name__} must define score(q, k); got a scoring without it. Return a tensor [batch, heads, q_len, kv_len]."
        )

    def lower(self, q: Tensor, k: Tensor) -> Product:
        """The same scores as a dot product, by differentiable torch; q [batch, heads, q_len, head_dim], k [batch, kv_heads, kv_len, head_dim]."""
        raise TypeError(f"{type(self).__name__} must define lower(q, k) to be a dot product; got a scoring without it. Call score(q, k).")

    def fold(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Scoring]:
        """q, k and the scoring as kernels take them where it does not lower: the same scores, by differentiable torch; by default as they are."""
        return q, k, self

    def part(self, grid: Grid) -> Scoring | None:
        """The scoring of some batches and heads, those of the grid's region; None for code of one's own, which wants the whole call."""
        return None

    def to_kernel(self) -> KernelScore:
        """The normal form of a scoring that does not lower: its fields in order."""
        reason = unlowerable(self, SCORINGS)
        if reason:
            raise TypeError(f"{reason}.")
        return KernelScore.of(self, self.name)

    @classmethod
    def from_kernel(cls, score: KernelScore) -> Any:
        """The inverse of ``to_kernel``."""
        return score.rebuilt(cls)

    def view(self, tensor: Tensor, grid: Grid) -> Tensor:
        """A tensor of the scoring as device functions read it: 4-D, by default with dimensions of size 1 in front."""
        return tensor[(None,) * (4 - tensor.dim())]

    def check(self, grid: Grid) -> None:
        """Raises ValueError or TypeError when the scoring does not fit a grid of this shape."""

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Scoring]:
        """Instances for a grid of this shape."""
        yield from ()


SCORINGS: dict[str, type[Scoring]] = {}


def scored(scoring: Scoring, q: Tensor, k: Tensor) -> Tensor:
    """``scoring.score``, held to its contract: scores [batch, heads, q, kv], taken in q's dtype.

    Raises:
        TypeError: it returned something of another shape.
    """
    result, wanted = scoring.score(q, k), (*q.shape[:3], k.shape[2])
    if not isinstance(result, Tensor) or tuple(result.shape) != wanted:
        raise TypeError(
            f"{type(scoring).__name__}.score must return scores {list(wanted)} for q {list(q.shape)} and k {list(k.shape)}; got {described(result)}. "
            "Sum over head_dim and keep [batch, heads, q, kv]."
        )
    return result.to(q.dtype)


def as_product(scoring: Scoring, q: Tensor, k: Tensor) -> Product:
    """``scoring.lower``, held to its contract.

    Raises:
        TypeError: the new q or k has another shape or dtype.
    """
    product = scoring.lower(q, k)
    for name, before, after in (("q", q, product.q), ("k", k, product.k)):
        if after.shape != before.shape or after.dtype != before.dtype:
            raise TypeError(
                f"{type(scoring).__name__}.lower must keep the shape and dtype of {name}, {described(before)}; got {described(after)}. "
                "Fold factors into q, and write terms of one query or key as Bias."
            )
    return product


def _require_scale(owner: str, scale: object) -> None:
    if isinstance(scale, Tensor):
        require_tensor(f"{owner} scale", scale, FLOATS, "a number or a floating-point tensor", "Give one factor, or one per head.")
    else:
        as_number(f"{owner} scale", scale, "Pass a float, or a float tensor such as [heads, 1, 1].")


def _check_scale(owner: str, scale: Any, grid: Grid) -> None:
    if isinstance(scale, Tensor):
        require_broadcast(f"{owner} scale", scale, (*grid.shape[:2], 1, 1), "[batch, heads, 1, 1]", grid.device)


def _in_four_dimensions(scale: Tensor) -> Tensor:
    return scale[(None,) * (4 - scale.dim())]


def _scale_of(scale: Any, grid: Grid) -> Any:
    """A scale's part for the grid's region."""
    return grid.crop(_in_four_dimensions(scale)) if isinstance(scale, Tensor) else scale


@dataclass(frozen=True, eq=False)
class DotProduct(Scoring):
    """scale * q k^T, with a scale that may be learned.

    Args:
        scale: a float, 1/sqrt(head_dim) for None, or a float tensor with gradient that broadcasts to [batch, heads, 1, 1]: 0-d, or
            [heads, 1, 1]. On kernel backends a tensor is multiplied into q, in q's dtype.

    Example:
        >>> q = torch.tensor([[[[3.0, 4.0]]]])
        >>> DotProduct(torch.tensor(0.5)).score(q, q)
        tensor([[[[12.5000]]]])
    """

    scale: float | Tensor | None = None
    name: ClassVar[str] = "dot_product"

    def __post_init__(self) -> None:
        if self.scale is not None:
            _require_scale("DotProduct", self.scale)

    def check(self, grid: Grid) -> None:
        _check_scale("DotProduct", self.scale, grid)

    def part(self, grid: Grid) -> DotProduct:
        return DotProduct(_scale_of(self.scale, grid))

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * (_in_four_dimensions(self.scale) if isinstance(self.scale, Tensor) else self._number(q))

    def lower(self, q: Tensor, k: Tensor) -> Product:
        if isinstance(self.scale, Tensor):
            return Product(_times(q, _in_four_dimensions(self.scale)), k, 1.0)
        return Product(q, k, self._number(q))

    def _number(self, q: Tensor) -> float:
        if self.scale is not None:
            return float(self.scale)
        return float(q.shape[-1] ** -0.5) if q.shape[-1] else 1.0

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Scoring]:
        yield cls()
        yield cls(0.25)
        yield cls(torch.linspace(0.25, 0.75, grid.shape[1], device=grid.device)[:, None, None])


@dataclass(frozen=True, eq=False)
class NegativeL2(Scoring):
    """-scale * ||q - k||^2, so that a query attends to its nearest keys.

    Computed as 2 q k - ||q||^2 - ||k||^2, whose rounding is that of the largest square: take a large offset that queries and keys share off
    both of them first. (No mean is taken off here: it would hold keys that nobody attends to.)

    Args:
        scale: a float, or a float tensor with gradient that broadcasts to [batch, heads, 1, 1]: 0-d, or [heads, 1, 1].

    Example:
        >>> q, k = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[3.0, 2.0]]]])
        >>> NegativeL2(0.5).score(q, k)
        tensor([[[[-2.]]]])
    """

    scale: float | Tensor = 1.0
    name: ClassVar[str] = "negative_l2"
    kernels: ClassVar[tuple[str, ...]] = ("bias", "bias")

    def __post_init__(self) -> None:
        _require_scale("NegativeL2", self.scale)

    def check(self, grid: Grid) -> None:
        _check_scale("NegativeL2", self.scale, grid)

    def part(self, grid: Grid) -> NegativeL2:
        return NegativeL2(_scale_of(self.scale, grid))

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        distances = _squares(q)[..., None] - 2 * (q @ k.mT) + _squares(k)[..., None, :]
        return -distances * (_in_four_dimensions(self.scale) if isinstance(self.scale, Tensor) else self.scale)

    def lower(self, q: Tensor, k: Tensor) -> Product:
        groups = q.shape[1] // k.shape[1] if k.shape[1] else 1
        keys = _squares(k).repeat_interleave(groups, 1)[:, :, None, :]
        if not isinstance(self.scale, Tensor):
            factor = float(self.scale)
            return Product(q, k, 2 * factor, (Bias(-factor * _squares(q)[..., None]), Bias(-factor * keys)))
        scale = _in_four_dimensions(self.scale).to(keys.dtype)
        scaled = _times(q, scale)
        # Of the rounded product, so that what 16 bits round away moves the query a little instead of tearing the square apart.
        queries = _squares(scaled)[..., None] / scale.masked_fill(scale == 0, 1.0)
        return Product(scaled, k, 2.0, (Bias(-queries), Bias(-scale * keys)))

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Scoring]:
        yield cls(0.125)
        yield cls(torch.linspace(0.05, 0.15, grid.shape[1], device=grid.device)[:, None, None])


@dataclass(frozen=True, eq=False)
class Additive(Scoring):
    """sum_d weight_d * tanh(scale * (q_d + k_d)): additive attention (Bahdanau et al., arXiv 1409.0473).

    Kernel backends never hold head_dim values for every pair; on eager, blocks of queries do. A score of a query or key that is not finite is NaN,
    as in every scoring with code of its own, where tanh alone would make 1 of an infinity.

    Args:
        weight: a float, or a float tensor with gradient: 0-d, [head_dim], or [heads, head_dim] by query heads.
        scale: a float, or a 0-d float tensor with gradient; None for 1. On kernel backends it is multiplied into q and k, in their dtype.

    Raises:
        ValueError: the weight fits neither head_dim nor the heads, or a number is not finite.
        TypeError: an argument is neither a number nor a floating-point tensor.

    Example:
        >>> q, k = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[-1.0, 9.0], [-1.0, -2.0]]]])
        >>> Additive(torch.tensor([5.0, 0.5])).score(q, k)
        tensor([[[[0.5000, 0.0000]]]])
    """

    weight: float | Tensor
    scale: float | Tensor | None = None
    name: ClassVar[str] = "additive"
    is_tame: ClassVar[bool] = True
    by_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("scale", self.scale)):
            if isinstance(value, Tensor):
                advice = "Give one factor per element of a query." if name == "weight" else "Give one factor of q + k."
                require_tensor(f"Additive {name}", value, FLOATS, "a number or a floating-point tensor", advice)
            elif value is not None or name == "weight":
                as_number(f"Additive {name}", value, "Pass a float or a float tensor.")

    def check(self, grid: Grid) -> None:
        if isinstance(self.scale, Tensor):
            require_shape("Additive scale", self.scale, ((),), grid.device)
        if isinstance(self.weight, Tensor):
            require_device("Additive weight", self.weight, grid.device)
            shape, heads = tuple(self.weight.shape), grid.shape[1]
            # In normal form, as double backward finds it, it is 4-D.
            if not (
                len(shape) < 2 or (len(shape) == 2 and shape[0] == heads) or (len(shape) == 4 and shape[:3] in ((1, 1, 1), (1, heads, 1)))
            ):
                raise self._misfit(shape, heads, "head_dim")

    def part(self, grid: Grid) -> Additive:
        if not isinstance(self.weight, Tensor) or self.weight.dim() < 2:
            return self
        rows = self.weight[None, :, None] if self.weight.dim() == 2 else self.weight
        return Additive(rows if rows.shape[1] == 1 else rows[:, slice(*grid.ranges[1])], self.scale)

    def _misfit(self, shape: tuple[int, ...], heads: int, head_dim: object) -> ValueError:
        return ValueError(
            f"Additive weight must be a scalar, [head_dim] or [heads, head_dim] = [{heads}, {head_dim}]; got {list(shape)}. "
            "Give one factor per element of a query, or one such row per query head."
        )

    def _row(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight as [1, heads|1, 1, head_dim]."""
        heads, head_dim = q.shape[1], q.shape[3]
        if not isinstance(self.weight, Tensor):
            return q.new_full((1, 1, 1, head_dim), float(self.weight), dtype=dtype)
        if self.weight.dim() and self.weight.shape[-1] != head_dim:
            raise self._misfit(tuple(self.weight.shape), heads, head_dim)
        weight = self.weight[:, None] if self.weight.dim() == 2 else self.weight
        return _in_four_dimensions(weight).expand(1, -1, 1, head_dim).to(dtype)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        pairs = q[..., :, None, :] + k[..., None, :, :]
        pairs = pairs if self.scale is None else pairs * self.scale
        return (pairs.tanh() * self._row(q, q.dtype)[:, :, None]).sum(-1)

    def fold(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Scoring]:
        weight = self._row(q, stat_dtype(q.dtype))
        if isinstance(self.scale, Tensor):
            q, k = (_times(t, _in_four_dimensions(self.scale)) for t in (q, k))
        elif self.scale is not None:
            q, k = (t * float(self.scale) for t in (q, k))
        return q, k, Additive(weight)

    def to_kernel(self) -> KernelScore:
        """One tensor [1, heads|1, 1, head_dim], of a call that was folded; without a layout, for a tile may hold some of the heads."""
        assert isinstance(self.weight, Tensor)
        assert self.weight.dim() == 4
        assert self.scale is None
        return KernelScore(self.name, (), (self.weight,))

    @classmethod
    def from_kernel(cls, score: KernelScore) -> Additive:
        return cls(*score.tensors)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Scoring]:
        yield cls(0.5)
        yield cls(torch.tensor(0.25, device=grid.device), 0.5)
        yield cls(torch.tensor(-0.5, device=grid.device), torch.tensor(0.75, device=grid.device))


def _times(q: Tensor, scale: Tensor) -> Tensor:
    """q * scale in q's dtype, where elements of q that are not finite give the scale no gradient.

    That would be NaN times what arrives at them, which is 0 in a row without keys; in every other row a NaN arrives at the finite ones too.
    """
    finite = q.isfinite()
    zeros = torch.zeros_like(q)
    return (torch.where(finite, q, zeros) * scale + torch.where(finite, zeros, q) * scale.detach()).to(q.dtype)


def _squares(vectors: Tensor) -> Tensor:
    """||x||^2 of every vector in the dtype of arithmetic; elements that are not finite count as 0 and get no gradient.

    The product carries them to the rows that attend to them, and here they would reach every row of the key.
    """
    wide = vectors.to(stat_dtype(vectors.dtype))
    finite = torch.where(wide.isfinite(), wide, torch.zeros_like(wide))
    return (finite * finite).sum(-1)  # the derivative of square() is 2 x times what arrives: infinity times 0 where 2 x overflows
