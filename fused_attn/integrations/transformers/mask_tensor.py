"""A mask that looks like the bool tensor [batch, 1, q_len, kv_len] which models of the transformers package expect, without its elements.

Caches, checkpointing and compilers handle it as a tensor; attention reads the mask it holds; a model that computes with it gets the elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fused_attn.checks import require_shape
from fused_attn.lowering import Grid, KernelMask
from fused_attn.masks import Mask


@dataclass(frozen=True, eq=False)
class KeyRuns(Mask):
    """Keys from ``start`` up to, not including, ``end`` of every query.

    Args:
        start: int32 [batch|1, q_len].
        end: int32 [batch|1, q_len].

    Example:
        >>> print(KeyRuns(torch.tensor([[0, 1]]), torch.tensor([[2, 4]])).picture(2, 4))
        ##..
        .###
    """

    start: Tensor
    end: Tensor

    def keep(self, grid: Grid) -> Tensor:
        return self.lower(grid).allowed(grid)

    def lower(self, grid: Grid) -> KernelMask:
        return KernelMask(kv_start=self.start, kv_end=self.end)

    def check(self, grid: Grid) -> None:
        batch, _, q_len, _ = grid.shape
        for name in ("start", "end"):
            require_shape(f"KeyRuns {name}", getattr(self, name), ((batch, q_len), (1, q_len)), grid.device)


# What is asked of the tensor itself, and is the same of the whole tensor.
_METADATA = frozenset(
    (
        "__get__", "__hash__", "__len__", "_is_view", "_is_zerotensor", "data_ptr", "dim", "element_size", "get_device", "has_names", "is_complex", "is_conj",
        "is_contiguous", "is_floating_point", "is_inference", "is_neg", "is_pinned", "is_shared", "is_signed", "ndimension", "nelement", "numel", "size",
        "storage_offset", "stride", "untyped_storage",
    )
)  # fmt: skip

# What leaves the elements as they are, unless it converts them.
_MOVES = frozenset(("clone", "contiguous", "cpu", "cuda", "detach", "to"))


class RowMask(Tensor):
    """A bool tensor [batch, 1, q_len, kv_len] that holds a mask instead of its elements; an operator on it computes them first.

    Attributes:
        mask: the mask; not of positions, so that it means the same whatever ``q_offset`` is.

    Example:
        >>> mask = RowMask.of(KeyRuns(torch.tensor([[0, 1]]), torch.tensor([[2, 4]])), (1, 1, 2, 4), torch.device("cpu"))
        >>> mask.shape, mask.untyped_storage().nbytes()
        (torch.Size([1, 1, 2, 4]), 1)
        >>> mask.logical_not()
        tensor([[[[False, False,  True,  True],
                  [ True, False, False, False]]]])
    """

    mask: Mask

    @staticmethod
    def of(mask: Mask, shape: tuple[int, int, int, int], device: torch.device) -> RowMask:
        """A mask as a tensor of this shape, of which one byte exists."""
        byte = torch.zeros((), dtype=torch.bool, device=device)
        result: RowMask = torch.Tensor._make_subclass(RowMask, byte.expand(shape))
        result.mask = mask
        return result

    def dense(self) -> Tensor:
        """The elements, one byte each."""
        batch, heads, q_len, kv_len = self.shape
        grid = Grid((batch, heads, q_len, kv_len), self.device)
        return self.mask.allowed(grid).expand(grid.shape)

    def moved_by(self, operation: Callable[[Tensor], Tensor]) -> RowMask | None:
        """The same mask where ``operation`` puts a tensor; None where it makes a tensor of another kind."""
        byte = operation(torch.zeros((), dtype=torch.bool, device=self.device))
        if byte.dtype != torch.bool:
            return None
        mask = self.mask if byte.device == self.device else tree_map_only(Tensor, lambda t: t.to(byte.device), self.mask)
        return RowMask.of(mask, tuple(self.shape), byte.device)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        own = isinstance(args[0], RowMask) if args else False
        with torch._C.DisableTorchFunctionSubclass():
            if own and name in _METADATA:
                found = func(*args, **kwargs)
                if not isinstance(found, Tensor):  # .T and .data are tensors of the elements
                    return found
            elif own and name in _MOVES:
                moved = args[0].moved_by(lambda t: func(t, *args[1:], **kwargs))
                if moved is not None:
                    return moved
            elif own and not torch.compiler.is_compiling() and _writes(name):
                raise TypeError(f"a RowMask must not be written to; got {name}. Write to mask.dense(), a bool tensor.")
            return func(*[_elements(a) for a in args], **{key: _elements(value) for key, value in kwargs.items()})


def _writes(name: str) -> bool:
    """Whether a method of this name changes its tensor, in torch's way of naming."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name not in _READING)


_READING = ("__index__", "__int__", "__invert__")


def _elements(value: Any) -> Any:
    """An operator's argument with tensors in place of masks."""
    if isinstance(value, (list, tuple)):
        return type(value)([_elements(v) for v in value])
    return value.dense() if isinstance(value, RowMask) else value
