"""Keras' regularisers by name or class: callables that make a penalty of a weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_attn.nn.keras.lookup import Configured, by_name, find


@dataclass(frozen=True)
class Regularizer(Configured):
    """Base of all regularisers.

    Example:
        >>> L1L2(l1=0.5, l2=0.25)(torch.tensor([-2.0, 2.0]))
        tensor(4.)
    """

    module: ClassVar[str] = "keras.regularizers"

    def __call__(self, weight: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(weight).")


def _factor(name: str, value: Any) -> float:
    if not isinstance(value, (float, int)) or not 0 <= value < math.inf:
        raise ValueError(f"regularizer {name} must be a finite number >= 0; got {value!r}. It is the penalty's factor.")
    return float(value)


@dataclass(frozen=True)
class L1(Regularizer):
    """l1 times the sum of absolute values."""

    l1: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "l1", _factor("l1", 0.01 if self.l1 is None else self.l1))

    def __call__(self, weight: Tensor) -> Tensor:
        return self.l1 * weight.abs().sum()


@dataclass(frozen=True)
class L2(Regularizer):
    """l2 times the sum of squares."""

    l2: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "l2", _factor("l2", 0.01 if self.l2 is None else self.l2))

    def __call__(self, weight: Tensor) -> Tensor:
        return self.l2 * weight.square().sum()


@dataclass(frozen=True)
class L1L2(Regularizer):
    """Both penalties; a factor that is left out is 0, as in Keras, where the name alone penalises nothing."""

    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        for name in ("l1", "l2"):
            object.__setattr__(self, name, _factor(name, getattr(self, name) or 0.0))

    def __call__(self, weight: Tensor) -> Tensor:
        return self.l1 * weight.abs().sum() + self.l2 * weight.square().sum()


@dataclass(frozen=True)
class OrthogonalRegularizer(Regularizer):
    """``factor`` times the mean cosine, without sign, between different rows or columns of a matrix; a ValueError for any other rank."""

    factor: float = 0.01
    mode: str = "rows"

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", _factor("factor", self.factor))
        if self.mode not in ("rows", "columns"):
            raise ValueError(f"OrthogonalRegularizer mode must be 'rows' or 'columns'; got {self.mode!r}. Choose one.")

    def __call__(self, weight: Tensor) -> Tensor:
        if weight.dim() != 2:
            raise ValueError(
                f"OrthogonalRegularizer must get a matrix; got {list(weight.shape)}. Choose another regularizer for this weight."
            )
        vectors = torch.nn.functional.normalize(weight if self.mode == "rows" else weight.mT, dim=-1)
        count = vectors.shape[0]
        cosines = (vectors @ vectors.mT).abs()
        return self.factor * 0.5 * (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1) / 2)


_TABLE = by_name((L1, L2, L1L2, OrthogonalRegularizer))


def get(identifier: Any) -> Callable[[Tensor], Tensor] | None:
    """A regulariser by name, config, class or callable ``f(weight)``.

    Raises:
        ValueError: nothing is known by that name, or it is no callable.
    """
    return find("a regularizer", identifier, _TABLE)
