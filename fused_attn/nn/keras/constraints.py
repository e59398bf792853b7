"""Keras' constraints by name or class: callables that make an allowed weight of a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fused_attn.nn.keras.lookup import Configured, by_name, find

# Keras' default epsilon, which keeps a norm of 0 from dividing.
_EPSILON = 1e-7


@dataclass(frozen=True)
class Constraint(Configured):
    """Base of all constraints.

    Example:
        >>> import torch
        >>> MaxNorm(1.0, axis=0)(torch.tensor([[3.0, 0.3], [4.0, 0.4]]))
        tensor([[0.6000, 0.3000],
                [0.8000, 0.4000]])
    """

    module: ClassVar[str] = "keras.constraints"

    def __call__(self, weight: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(weight).")


def _norms(weight: Tensor, axis: int | Sequence[int]) -> Tensor:
    return weight.square().sum(axis if isinstance(axis, int) else tuple(axis), keepdim=True).sqrt()


@dataclass(frozen=True)
class NonNeg(Constraint):
    """No weight below 0."""

    def __call__(self, weight: Tensor) -> Tensor:
        return weight.clamp(min=0)


@dataclass(frozen=True)
class MaxNorm(Constraint):
    """Norms along an axis of at most ``max_value``."""

    max_value: float = 2
    axis: int | Sequence[int] = 0

    def __call__(self, weight: Tensor) -> Tensor:
        norms = _norms(weight, self.axis)
        return weight * (norms.clamp(0, self.max_value) / (_EPSILON + norms))


@dataclass(frozen=True)
class UnitNorm(Constraint):
    """Norms along an axis of 1."""

    axis: int | Sequence[int] = 0

    def __call__(self, weight: Tensor) -> Tensor:
        return weight / (_EPSILON + _norms(weight, self.axis))


@dataclass(frozen=True)
class MinMaxNorm(Constraint):
    """Norms along an axis moved by ``rate`` of the way into [min_value, max_value]."""

    min_value: float = 0.0
    max_value: float = 1.0
    rate: float = 1.0
    axis: int | Sequence[int] = 0

    def __call__(self, weight: Tensor) -> Tensor:
        norms = _norms(weight, self.axis)
        wanted = self.rate * norms.clamp(self.min_value, self.max_value) + (1 - self.rate) * norms
        return weight * (wanted / (_EPSILON + norms))


_TABLE = by_name((NonNeg, MaxNorm, UnitNorm, MinMaxNorm))


def get(identifier: Any) -> Callable[[Tensor], Tensor] | None:
    """A constraint by name, config, class or callable ``f(weight)``.

    Raises:
        ValueError: nothing is known by that name, or it is no callable.
    """
    return find("a constraint", identifier, _TABLE)
