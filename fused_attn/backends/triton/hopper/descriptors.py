"""Tensors as TMA sees them: host descriptors, cached by address, sizes and strides.

A descriptor keeps no tensor alive and holds nothing but numbers, and a kernel takes the map by value: captured graphs keep their own copy.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from .compat import TensorDescriptor, tensor_map
from .eligible import UNIT

_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32, torch.int32: gl.int32}
# Address, dtype, sizes and strides of a tensor.
_Seen = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]
# What the compiler says of a descriptor, ``metadata.tensordesc_meta``, as items.
Meta = tuple[tuple[str, Any], ...]


class Tiles(NamedTuple):
    """A tensor that a kernel reads or writes tile by tile.

    Args:
        tensor: up to five dimensions, the last with stride 1; see ``eligible.strides_reason``.
        box: a tile's size along each dimension.
        swizzled: as warpgroup products read it; otherwise rows of a tile lie one after the other.
    """

    tensor: Tensor
    box: tuple[int, ...]
    swizzled: bool = True

    @property
    def kind(self) -> tuple[object, ...]:
        """What a kernel is compiled for."""
        return self.tensor.dtype, self.box, self.swizzled

    def descriptor(self) -> TensorDescriptor:
        """What Triton compiles for."""
        return _descriptor(self._seen, self.box, self.swizzled)

    def arguments(self, meta: Meta) -> tuple[Any, ...]:
        """What a compiled kernel is given: the tensor map, sizes and strides."""
        return _arguments(self._seen, self.box, self.swizzled, meta)

    @property
    def _seen(self) -> _Seen:
        tensor = self.tensor
        return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


class _Address(NamedTuple):
    """What Triton asks of a descriptor's base."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def arguments_at(
    address: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzled: bool, meta: Meta
) -> tuple[Any, ...]:
    """``Tiles.arguments`` of a tensor that lies there."""
    return _arguments((address, dtype, sizes, strides), box, swizzled, meta)


@functools.lru_cache(maxsize=4096)
def _descriptor(seen: _Seen, box: tuple[int, ...], swizzled: bool) -> TensorDescriptor:
    address, dtype, shape, strides = seen
    element = _ELEMENTS[dtype]
    if swizzled:
        layout = gl.NVMMASharedLayout.get_default_for(list(box), element)
    else:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * dtype.itemsize, rank=len(box))
    # A dimension of size 1 may have any stride, and TMA takes only some.
    legal = [UNIT // dtype.itemsize if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    return TensorDescriptor(_Address(address, dtype), list(shape), [*legal[:-1], 1], list(box), layout)


@functools.lru_cache(maxsize=4096)
def _arguments(seen: _Seen, box: tuple[int, ...], swizzled: bool, meta: Meta) -> tuple[Any, ...]:
    descriptor = _descriptor(seen, box, swizzled)
    return tensor_map(descriptor, dict(meta)), *descriptor.shape, *descriptor.strides
