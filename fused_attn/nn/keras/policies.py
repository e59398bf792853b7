"""A layer's dtype: of its variables, and of what it computes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fused_attn.checks import FLOATS, described

_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


class DTypePolicy(NamedTuple):
    """What Keras calls a dtype policy.

    Attributes:
        name: as Keras spells it.
        variables: dtype of the variables when they are made.
        compute: dtype of inputs and results; None for that of the variables, wherever ``Module.to`` takes them.
    """

    name: str
    variables: torch.dtype
    compute: torch.dtype | None = None

    @classmethod
    def of(cls, dtype: Any) -> DTypePolicy:
        """The policy of a name, a torch dtype or a config; float32 for None.

        Raises:
            ValueError: it is none of these.

        Example:
            >>> DTypePolicy.of("mixed_bfloat16").compute, DTypePolicy.of(torch.float64).name
            (torch.bfloat16, 'float64')
        """
        name = dtype
        if isinstance(dtype, dict):
            name = dtype.get("config", {}).get("name")
        elif isinstance(dtype, torch.dtype):
            name = str(dtype).removeprefix("torch.")
        if name is None:
            return cls("float32", torch.float32)
        if isinstance(name, str) and name in _NAMES:
            return cls(name, _NAMES[name])
        if isinstance(name, str) and name in ("mixed_float16", "mixed_bfloat16"):
            return cls(name, torch.float32, _NAMES[name.removeprefix("mixed_")])
        raise ValueError(f"dtype must be one of {', '.join(_NAMES)}, mixed_float16 or mixed_bfloat16; got {described(dtype)}. Name one.")

    def moved(self, variables: torch.dtype) -> DTypePolicy:
        """The policy of a layer whose variables were converted afterwards."""
        if variables == self.variables or (self.compute not in (None, variables)):
            return self
        return DTypePolicy.of(variables)

    def get_config(self) -> dict[str, Any]:
        """The config that Keras and ``of`` read."""
        return {"module": "keras", "class_name": "DTypePolicy", "config": {"name": self.name}, "registered_name": None}
