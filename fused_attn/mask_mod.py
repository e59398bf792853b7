"""FlexAttention's ``mask_mod`` functions as masks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fused_attn.checks import described, is_traced
from fused_attn.lowering import Grid
from fused_attn.mask_base import Mask


class _IndexByTensors(TorchFunctionMode):
    """``table[q_idx]`` as an operator: Python's own indexing asks an index without dimensions for its value, which a graph cannot tell."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if all(isinstance(i, Tensor) for i in index):
                return torch.ops.aten.index(args[0], list(index))
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class MaskMod(Mask):
    """A function of indices as a mask; made by ``from_mask_mod``."""

    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(
                f"mask_mod must be a function of (b, h, q_idx, kv_idx); got {described(self.fn)}. Pass what create_block_mask would take."
            )
        if not torch.compiler.is_compiling():  # Dynamo does not look at signatures
            _require_four_arguments(self.fn)

    def keep(self, grid: Grid) -> Tensor:
        if 0 in grid.sizes:
            return torch.ones(grid.sizes, dtype=torch.bool, device=grid.device)
        if is_traced():
            return self._traced(grid)
        function: Callable[..., Tensor] = self._answer
        for dim in reversed(range(4)):
            function = torch.vmap(function, in_dims=tuple(0 if i == dim else None for i in range(4)))
        indices = [torch.arange(*ends, device=grid.device) for ends in grid.ranges]
        # Dynamo translates indexing by itself.
        with nullcontext() if torch.compiler.is_dynamo_compiling() else _IndexByTensors():
            try:
                allowed = function(*indices)
            except RuntimeError as error:
                if "control flow" not in str(error):
                    raise
                raise TypeError(
                    "mask_mod must not branch on its indices, which stand for all of them at once; got a Python if, and, or, not. "
                    "Write &, |, ~ and torch.where."
                ) from error
        # vmap repeats, with stride 0, what does not depend on an index.
        for dim in range(4):
            if allowed.shape[dim] != 1 and allowed.stride(dim) == 0:
                allowed = allowed.narrow(dim, 0, 1)
        return allowed

    def _traced(self, grid: Grid) -> Tensor:
        """The function on whole index tensors: torch.vmap would leave this length in a trace."""
        b, h, q_idx, kv_idx = (torch.arange(*ends, device=grid.device) for ends in grid.ranges)
        result = self.fn(b[:, None, None, None], h[:, None, None], q_idx[:, None], kv_idx)
        if not isinstance(result, Tensor) or result.dtype != torch.bool or result.dim() > 4:
            raise TypeError(f"mask_mod must return a bool tensor; got {described(result)}. In a trace it is asked for all indices at once.")
        return result[(None,) * (4 - result.dim())]

    def _answer(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = self.fn(b, h, q_idx, kv_idx)
        if not isinstance(result, Tensor) or result.dtype != torch.bool or result.dim() != 0:
            raise TypeError(
                f"mask_mod must return a bool tensor without dimensions for one (b, h, q_idx, kv_idx); got {described(result)}. "
                "Compare the indices, or index a bool tensor with them."
            )
        return result


def _require_four_arguments(function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind(0, 0, 0, 0)
    except ValueError:  # some functions written in C tell no signature
        return
    except TypeError as error:
        raise TypeError(
            f"mask_mod must take (b, h, q_idx, kv_idx); got a function that does not: {error}. Pass what create_block_mask would take."
        ) from None


def from_mask_mod(mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> MaskMod:
    """A mask from a FlexAttention ``mask_mod(b, h, q_idx, kv_idx)``, True where a pair may attend.

    The function gets int tensors without dimensions under ``torch.vmap``, as FlexAttention calls it, so that it may index tables and
    reduce; ``q_idx`` counts queries from 0, whatever ``q_offset`` says. Where its pattern is one run of keys per query, kernels skip
    the rest, otherwise ``explain`` says what it costs.

    Example:
        >>> print(from_mask_mod(lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 2 == 0).picture(2, 4))
        #.#.
        .#.#
    """
    return MaskMod(mask_mod)
