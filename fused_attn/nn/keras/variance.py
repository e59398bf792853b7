"""Keras' initialisers that scale their variance by the numbers of inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_attn.nn.keras.draws import Initializer, Shape, normal, truncated, uniform

Axes = Sequence[int] | None
# The standard deviation of a standard normal distribution that is cut off at two of them.
_CUT_DEVIATION = 0.87962566103423978


def fans(shape: Shape, input_axes: Axes = None, output_axes: Axes = None) -> tuple[int, int]:
    """Numbers of inputs and outputs of a weight: of the named axes, or of the last two times all before them.

    Example:
        >>> fans((6, 2, 4), (0,), (1, 2)), fans((6, 2, 4)), fans((5,))
        ((6, 8), (12, 24), (5, 5))
    """
    if input_axes is not None and output_axes is not None:
        return math.prod(shape[a] for a in input_axes), math.prod(shape[a] for a in output_axes)
    if len(shape) < 2:
        return (shape[0], shape[0]) if shape else (1, 1)
    return math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]


MODES: dict[str, Callable[[int, int], float]] = {
    "fan_in": lambda inputs, outputs: inputs,
    "fan_out": lambda inputs, outputs: outputs,
    "fan_avg": lambda inputs, outputs: (inputs + outputs) / 2,
}
DISTRIBUTIONS = ("uniform", "truncated_normal", "untruncated_normal")


@dataclass(frozen=True)
class VarianceScaling(Initializer):
    """Variance ``scale`` over the number of inputs, of outputs, or their mean (He et al., arXiv 1502.01852).

    Args:
        scale: positive.
        mode: "fan_in", "fan_out" or "fan_avg".
        distribution: "uniform", "truncated_normal" (also "normal") or "untruncated_normal".
        seed: an int, or None for torch's generator.
        input_axes: axes that count as inputs; a layer's projections name theirs.
        output_axes: axes that count as outputs.
    """

    scale: float = 1.0
    mode: str = "fan_in"
    distribution: str = "truncated_normal"
    seed: int | None = None
    input_axes: Axes = None
    output_axes: Axes = None

    def __post_init__(self) -> None:
        distribution = self.distribution.lower()
        object.__setattr__(self, "distribution", "truncated_normal" if distribution == "normal" else distribution)
        if self.scale <= 0:
            raise ValueError(f"VarianceScaling scale must be positive; got {self.scale}. Use zeros for none.")
        for name, allowed in (("mode", tuple(MODES)), ("distribution", DISTRIBUTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"VarianceScaling {name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}. Choose one.")

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = MODES[self.mode](*fans(shape, self.input_axes, self.output_axes))
        deviation = math.sqrt(self.scale / max(1.0, count))
        if self.distribution == "uniform":
            limit = math.sqrt(3.0) * deviation
            return uniform(self.seed, shape, dtype, device) * (2 * limit) - limit
        if self.distribution == "untruncated_normal":
            return normal(self.seed, shape, dtype, device) * deviation
        return truncated(self.seed, shape, dtype, device) * (deviation / _CUT_DEVIATION)


@dataclass(frozen=True)
class Named(Initializer):
    """A ``VarianceScaling`` with a name of its own."""

    seed: int | None = None
    input_axes: Axes = None
    output_axes: Axes = None
    rule: ClassVar[tuple[float, str, str]]

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return VarianceScaling(*self.rule, self.seed, self.input_axes, self.output_axes).draw(shape, dtype, device)


class GlorotUniform(Named):
    """Uniform within sqrt(6 / (inputs + outputs)), Keras' default for kernels (Glorot and Bengio, AISTATS 2010)."""

    rule = (1.0, "fan_avg", "uniform")


class GlorotNormal(Named):
    """Truncated normal of variance 2 / (inputs + outputs)."""

    rule = (1.0, "fan_avg", "truncated_normal")


class HeUniform(Named):
    """Uniform within sqrt(6 / inputs)."""

    rule = (2.0, "fan_in", "uniform")


class HeNormal(Named):
    """Truncated normal of variance 2 / inputs."""

    rule = (2.0, "fan_in", "truncated_normal")


class LecunUniform(Named):
    """Uniform within sqrt(3 / inputs)."""

    rule = (1.0, "fan_in", "uniform")


class LecunNormal(Named):
    """Truncated normal of variance 1 / inputs."""

    rule = (1.0, "fan_in", "truncated_normal")
