"""Weights as Keras lists them: names, shapes, order, arrays in and out, and building for those that come in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Weights(nn.Module):
    """A module whose parameters are made late, and whose parameters' names with "/" for "." are Keras'.

    Attributes:
        name: of the layer, for messages.
        built: whether the parameters are made.
    """

    name: str
    built: bool = False
    _placement: Tensor

    def keras_weights(self) -> dict[str, nn.Parameter]:
        """The parameters themselves by Keras' names ("query/kernel"), in Keras' order and shapes; empty before ``build``."""
        return {name.replace(".", "/"): parameter for name, parameter in self.named_parameters()}

    def get_weights(self) -> list[Any]:
        """Copies as numpy arrays in Keras' order, as ``keras.layers.Layer.get_weights``; float32 for bfloat16, which numpy does not have."""
        held = [p.detach().to("cpu", torch.float32 if p.dtype == torch.bfloat16 else p.dtype) for p in self.keras_weights().values()]
        return [p.numpy().copy() for p in held]

    @torch.no_grad()
    def set_weights(self, weights: Iterable[Any] | Mapping[str, Any]) -> None:
        """Copies arrays or tensors in Keras' order, or by Keras' names; builds the layer if it is not built.

        Args:
            weights: such as ``get_weights()`` of a layer of Keras, or ``keras_weights()``.

        Raises:
            ValueError: their number, a name or a shape is not the layer's.
        """
        names = self._weight_names()
        if isinstance(weights, Mapping):
            if set(weights) != set(names):
                raise ValueError(f"{self.name} must get weights named {', '.join(names)}; got {', '.join(weights)}. Pass one for each.")
            weights = [weights[name] for name in names]
        values = [torch.as_tensor(weight, device=self._placement.device) for weight in weights]
        if len(values) != len(names):
            raise ValueError(f"{self.name} must get {len(names)} weights ({', '.join(names)}); got {len(values)}. Pass one for each.")
        if not self.built:
            self._build_from({name: tuple(value.shape) for name, value in zip(names, values, strict=True)})
        for (name, parameter), value in zip(self.keras_weights().items(), values, strict=True):
            if parameter.shape != value.shape:
                raise ValueError(f"{self.name} {name} must have shape {list(parameter.shape)}; got {list(value.shape)}. Reshape it.")
            parameter.copy_(value)

    def _weight_names(self) -> list[str]:
        """Keras' names of the weights, also before ``build``."""
        return list(self.keras_weights())

    def _build_from(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Builds for weights of these shapes, by their Keras names; some may be missing."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *args: Any
    ) -> None:  # fmt: skip
        """Builds first, for those weights that the state holds; torch reports the others once there are parameters for them."""
        if not self.built:
            keys = {name: prefix + name.replace("/", ".") for name in self._weight_names()}
            held = {name: tuple(state_dict[key].shape) for name, key in keys.items() if key in state_dict}
            if held or not keys:
                self._build_from(held)
            if not self.built and (held or not local_metadata):  # without both, the state is of a layer that was not built either
                missing_keys += [keys[name] for name in keys if name not in held]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
