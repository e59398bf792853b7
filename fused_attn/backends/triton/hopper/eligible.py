"""Which calls the Hopper kernels take, and why not the others; needs no Triton."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

CHIP = 90
MAX_HEAD_DIM = 256
# Of the one-pass backward: dk and dv of more columns do not fit the registers of two consumers.
MAX_BACKWARD_DIM = 128
# TMA's unit in bytes: addresses and strides are multiples of it.
UNIT = 16
# What Triton's plain kernels load by whole vectors, in bytes of 16-bit elements: strides of multiples of 16 of them.
VECTOR_UNIT = 32
# A scale s is divided by, and multiplied with log2(e): far from where float32 ends.
_LARGEST_SCALE = 2.0**64
# Sizes and coordinates are 32-bit there.
_LONGEST = 2**31 - 1


def reasons(tensors: tuple[Tensor, Tensor, Tensor], terms: Any) -> list[str]:
    """Why q, k, v [batch, heads, length, dim] with these terms (a problem's modifiers or a call's) run on the plain kernels; empty if they do not."""
    if os.environ.get("FUSED_ATTN_HOPPER") == "off":
        return ["FUSED_ATTN_HOPPER=off"]
    q, _, v = tensors
    found = []
    if q.dtype not in (torch.float16, torch.bfloat16):
        found.append(f"{str(q.dtype).removeprefix('torch.')} has no warpgroup products of full accuracy")
    sizes = (q.shape[-1], v.shape[-1])
    if any(size % 8 or size > MAX_HEAD_DIM for size in sizes):
        found.append(f"head_dim and value_dim must be multiples of 8 up to {MAX_HEAD_DIM}; got {sizes[0]} and {sizes[1]}")
    else:
        found += [f"{name} {why}" for name, tensor in zip("qkv", tensors, strict=True) if (why := _repeats(tensor))]
    if any(0 in tensor.shape for tensor in tensors):
        found.append("a call without queries, keys or columns leaves them nothing to load")
    if any(size > _LONGEST for tensor in tensors for size in tensor.shape):
        found.append("lengths of 2^31 and more have no coordinates in TMA")
    # A scoring that is a dot product of other operands has become one by the time that a call is lowered.
    if (terms.scoring is not None and not getattr(terms.scoring, "lowers", False)) or terms.normalizer is not None:
        found.append("only the softmax of a dot product has Hopper kernels")
    if terms.dropout is not None and terms.dropout.origin[3] % 4:
        found.append(
            f"the first key must stand where dropout begins to draw for four; got key {terms.dropout.origin[3]} of the whole problem"
        )
    if not 1 / _LARGEST_SCALE <= terms.scale <= _LARGEST_SCALE:
        found.append(f"scores carry their scale along, which must be positive and in [2^-64, 2^64]; got {terms.scale}")
    return found


def strides_reason(tensor: Tensor) -> str:
    """What TMA does not take of a tensor's place in memory; empty if it takes it.

    Example:
        >>> strides_reason(torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16))
        ''
        >>> strides_reason(torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16).expand(1, 2, 8, 64))
        'has stride 0 along dimension 1'
    """
    return _repeats(tensor) or alignment_reason(tensor)


def _repeats(tensor: Tensor) -> str:
    """Which dimension repeats what lies in memory once: TMA does not, and a copy would take as many times the memory."""
    for dim, (length, stride) in enumerate(zip(tensor.shape[:-1], tensor.stride(), strict=False)):
        if length > 1 and stride == 0:
            return f"has stride 0 along dimension {dim}"
    return ""


def alignment_reason(tensor: Tensor, unit: int = UNIT) -> str:
    """Why rows of a tensor are not whole units of bytes; empty if they are."""
    size, (*lengths, last), (*strides, step) = tensor.element_size(), tensor.shape, tensor.stride()
    if last > 1 and step != 1:
        return f"must have stride 1 along its last dimension; got {step}"
    for dim, (length, stride) in enumerate(zip(lengths, strides, strict=True)):
        if length > 1 and stride * size % unit:
            return f"must have strides of multiples of {unit} bytes; got {stride * size} along dimension {dim}"
    if not _is_fake(tensor) and tensor.data_ptr() % UNIT:
        return f"must begin at a multiple of {UNIT} bytes"
    return ""


def _is_fake(tensor: Tensor) -> bool:
    """Whether the tensor has no address to ask for."""
    if type(tensor) is Tensor:
        return tensor.is_meta
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.is_meta
