"""Keras' initialisers by name or class: callables that make a tensor of a shape.

Example:
    >>> Constant(2.0)((1, 3))
    tensor([[2., 2., 2.]])
    >>> get("glorot_uniform")((4, 5)).abs().max() <= (6 / 9) ** 0.5
    tensor(True)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_attn.nn.keras.draws import Initializer, Orthogonal, RandomNormal, RandomUniform, Shape, TruncatedNormal
from fused_attn.nn.keras.lookup import by_name, find
from fused_attn.nn.keras.variance import (
    Axes,
    GlorotNormal,
    GlorotUniform,
    HeNormal,
    HeUniform,
    LecunNormal,
    LecunUniform,
    Named,
    VarianceScaling,
)


@dataclass(frozen=True)
class Constant(Initializer):
    """One number everywhere."""

    value: float = 0.0

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, self.value, dtype=dtype, device=device)


@dataclass(frozen=True)
class Zeros(Initializer):
    """Zeros everywhere."""

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class Ones(Initializer):
    """Ones everywhere."""

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class Identity(Initializer):
    """``gain`` on the diagonal of a matrix; a ValueError for any other rank."""

    gain: float = 1.0

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if len(shape) != 2:
            raise ValueError(f"identity must initialise a matrix; got shape {list(shape)}. Choose another initialiser for this weight.")
        return self.gain * torch.eye(*shape, dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor of the weight's shape as its initialiser."""

    values: Tensor

    def __call__(self, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        return self.values


_CLASSES = (
    Constant, Zeros, Ones, Identity, RandomNormal, TruncatedNormal, RandomUniform, Orthogonal, VarianceScaling,
    GlorotUniform, GlorotNormal, HeUniform, HeNormal, LecunUniform, LecunNormal,
)  # fmt: skip
_ALIASES = {"normal": RandomNormal, "uniform": RandomUniform, "one": Ones, "zero": Zeros}
_TABLE = by_name(_CLASSES, **_ALIASES, IdentityInitializer=Identity, OrthogonalInitializer=Orthogonal)


def get(identifier: Any) -> Callable[..., Any] | None:
    """An initialiser by name, config, class, tensor of the weight's shape, or callable ``f(shape, dtype)``.

    Raises:
        ValueError: nothing is known by that name, or it is no callable.
    """
    if isinstance(identifier, Tensor):
        return Held(identifier)
    return find("an initializer", identifier, _TABLE)


def made(
    initializer: Callable[..., Any], shape: Shape, axes: tuple[Axes, Axes], dtype: torch.dtype, device: torch.device
) -> Tensor:  # fmt: skip
    """What an initialiser gives for a weight whose input and output axes are known."""
    if isinstance(initializer, (VarianceScaling, Named)) and None in (initializer.input_axes, initializer.output_axes):
        initializer = replace(initializer, input_axes=axes[0], output_axes=axes[1])
    if isinstance(initializer, Initializer):
        return initializer(shape, dtype, device)
    values = torch.as_tensor(initializer(tuple(shape), dtype=dtype), device=device).detach()
    if tuple(values.shape) != tuple(shape):
        raise ValueError(
            f"an initializer must give the weight's shape {list(shape)}; got {list(values.shape)}. Return one value per weight."
        )
    return values.to(dtype, copy=True)
