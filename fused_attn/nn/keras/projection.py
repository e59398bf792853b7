"""Keras' einsum projections: kernels with a dimension for every input and output axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn.checks import described
from fused_attn.nn.keras import constraints, initializers, regularizers
from fused_attn.nn.keras.layer import Layer
from fused_attn.nn.keras.lookup import Config, serialized


@dataclass(frozen=True)
class Rules:
    """What a layer hands to all its projections."""

    kernel_initializer: Callable[..., Any] | None
    bias_initializer: Callable[..., Any] | None
    kernel_regularizer: Callable[[Tensor], Tensor] | None
    bias_regularizer: Callable[[Tensor], Tensor] | None
    activity_regularizer: Callable[[Tensor], Tensor] | None
    kernel_constraint: Callable[[Tensor], Tensor] | None
    bias_constraint: Callable[[Tensor], Tensor] | None

    @classmethod
    def of(cls, given: dict[str, Any]) -> Rules:
        """Names, configs and callables by the fields' names, looked up; a ValueError for an initialiser that is None."""
        for name, value in given.items():
            if value is None and name.endswith("_initializer"):
                raise ValueError(f"{name} must be a name, a config, a class, a tensor or a callable; got None. 'zeros' is the plainest.")
        tables = {"initializer": initializers, "regularizer": regularizers, "constraint": constraints}
        return cls(**{name: tables[name.rpartition("_")[2]].get(value) for name, value in given.items()})

    def get_config(self) -> Config:
        """The fields as Keras reads them."""
        return {name: serialized(value) for name, value in vars(self).items()}


class Projection(Layer):
    """x [..., *inputs] times a kernel [*inputs, *outputs], plus a bias [*outputs], through the sigmoid if asked.

    Args:
        rules: initialisers, regularisers and constraints.
        inputs: sizes of the trailing input axes that are summed over.
        outputs: sizes of the output axes in their place.
        placement: a tensor with the dtype and on the device that the parameters get.
        use_bias: whether there is a bias.
        has_sigmoid: whether the result goes through the sigmoid.
        options: those of every layer.
    """

    kernel: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        rules: Rules,
        inputs: Sequence[int],
        outputs: Sequence[int],
        placement: Tensor,
        *,
        use_bias: bool,
        has_sigmoid: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(activity_regularizer=rules.activity_regularizer, **options)
        self._placement = placement.new_empty(0)
        self._inputs, self._outputs, self._has_sigmoid = tuple(inputs), tuple(outputs), has_sigmoid
        count = len(self._inputs)
        axes = (range(count), range(count, count + len(self._outputs)))
        self.add_weight(
            "kernel", (*inputs, *outputs), rules.kernel_initializer, axes=axes,
            regularizer=rules.kernel_regularizer, constraint=rules.kernel_constraint,
        )  # fmt: skip
        self.register_parameter("bias", None)
        if use_bias:
            self.add_weight(
                "bias", outputs, rules.bias_initializer, regularizer=rules.bias_regularizer, constraint=rules.bias_constraint
            )  # fmt: skip
        self.built = True

    def call(self, inputs: Tensor) -> Tensor:
        if inputs.shape[-len(self._inputs) :] != self._inputs:
            raise ValueError(
                f"{self.name} must have {' x '.join(map(str, self._inputs))} features, as the layer was built for; got {described(inputs)}. "
                "Make another layer for other features."
            )
        dtype = self.compute_dtype
        weight = self.kernel.reshape(math.prod(self._inputs), -1).mT.to(dtype)
        bias = None if self.bias is None else self.bias.reshape(-1).to(dtype)
        outputs: Tensor = F.linear(inputs.flatten(inputs.dim() - len(self._inputs)), weight, bias)
        outputs = outputs.reshape(*outputs.shape[:-1], *self._outputs)
        return outputs.sigmoid() if self._has_sigmoid else outputs
