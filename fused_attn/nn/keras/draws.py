"""Random initialisers of Keras' and what they draw with.

With an integer seed they draw what Keras draws on its torch backend, anew at every call; without one they draw from torch's generator, so that
``torch.manual_seed`` acts on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_attn.nn.keras.lookup import Configured

Shape = Sequence[int]


@dataclass(frozen=True)
class Initializer(Configured):
    """Base of all initialisers.

    Example:
        >>> @dataclass(frozen=True)
        ... class Halves(Initializer):
        ...     def draw(self, shape, dtype, device):
        ...         return torch.full(shape, 0.5, dtype=dtype, device=device)
        >>> Halves()((1, 3))
        tensor([[0.5000, 0.5000, 0.5000]])
    """

    module: ClassVar[str] = "keras.initializers"

    def __call__(self, shape: Shape, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        return self.draw(tuple(shape), dtype or torch.get_default_dtype(), device or torch.get_default_device())

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new tensor of that shape."""
        raise NotImplementedError(f"{type(self).__name__} must define draw(shape, dtype, device).")


def _generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    if seed is None or device.type == "meta":
        return None
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"an initialiser's seed must be an int or None; got {type(seed).__name__}. Draw one number of your generator.")
    return torch.Generator(device).manual_seed(seed & 0xFFFFFFFF)


def normal(seed: int | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A standard normal distribution."""
    return torch.normal(0.0, 1.0, shape, generator=_generator(seed, device), dtype=dtype, device=device)


def truncated(seed: int | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A standard normal distribution cut off at two: the first of four draws that lies inside."""
    drawn = normal(seed, (*shape, 4), dtype, device)
    inside = (drawn > -2) & (drawn < 2)
    return drawn.gather(-1, inside.to(torch.int8).argmax(-1, keepdim=True)).squeeze(-1)


def uniform(seed: int | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(shape, generator=_generator(seed, device), dtype=dtype, device=device)


@dataclass(frozen=True)
class RandomNormal(Initializer):
    """Normally distributed."""

    mean: float = 0.0
    stddev: float = 0.05
    seed: int | None = None

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return normal(self.seed, shape, dtype, device) * self.stddev + self.mean


@dataclass(frozen=True)
class TruncatedNormal(Initializer):
    """Normally distributed within two standard deviations."""

    mean: float = 0.0
    stddev: float = 0.05
    seed: int | None = None

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return truncated(self.seed, shape, dtype, device) * self.stddev + self.mean


@dataclass(frozen=True)
class RandomUniform(Initializer):
    """Uniform in [minval, maxval)."""

    minval: float = -0.05
    maxval: float = 0.05
    seed: int | None = None

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return uniform(self.seed, shape, dtype, device) * (self.maxval - self.minval) + self.minval


@dataclass(frozen=True)
class Orthogonal(Initializer):
    """``gain`` times a matrix with orthogonal rows or columns; all axes but the last make its rows (arXiv 1312.6120)."""

    gain: float = 1.0
    seed: int | None = None

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if len(shape) < 2:
            raise ValueError(
                f"orthogonal must initialise a matrix or more; got shape {list(shape)}. Choose another initialiser for this weight."
            )
        rows, columns = math.prod(shape[:-1]), shape[-1]
        wide = torch.promote_types(dtype, torch.float32)
        q: Tensor
        q, r = torch.linalg.qr(normal(self.seed, (max(rows, columns), min(rows, columns)), dtype, device).to(wide))
        q = q * r.diagonal().sign()
        if rows < columns:
            q = q.mT
        return (q.reshape(shape) * self.gain).to(dtype)
