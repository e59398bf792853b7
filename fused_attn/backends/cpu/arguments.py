"""What the CPU library's C structs hold (``csrc/cpu/params.h``) as bytes, in the order of the header; every field has 64 bits.

Bytes joined make a plain softmax call's 864 in 2 us; one pack of all its numbers took 6. What had to be copied for the library to read it is
put in ``alive``, which the caller holds until the call is over.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from fused_attn.dropout import threshold
from fused_attn.kernel_dropout import KernelDropout, Sizes
from fused_attn.lowering import KernelMask
from fused_attn.mask_rules import Pairs

# ``enum DType``; masks and intervals say nothing there.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3, torch.bool: 0, torch.int32: 0}
# ``kMaxKeeps``.
MAX_KEEPS = 4

_matrix = Struct("6q").pack
_dropout = Struct("2qd5q").pack
ints = [Struct(f"{n}q").pack for n in range(9)]
double = Struct("d").pack

# What stands for a struct that is not there.
NO_MATRIX = bytes(48)
NO_MASK = ints[2](-1, -1) + bytes(24) + NO_MATRIX * (2 + MAX_KEEPS)
NO_DROPOUT = bytes(64)


def matrix(tensor: Tensor) -> bytes:
    """``struct Matrix`` of a 4-D tensor, with strides of 0 along dimensions of size 1."""
    batches, heads, rows, columns = tensor.shape
    batch, head, row, column = tensor.stride()
    return _matrix(
        tensor.data_ptr(),
        0 if batches == 1 else batch, 0 if heads == 1 else head, 0 if rows == 1 else row, 0 if columns == 1 else column,
        DTYPES[tensor.dtype],
    )  # fmt: skip


def addressable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its memory does not hold its values: torch negates lazily, and zeros need no memory at all."""
    return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor


def _limits(limits: Tensor | None, alive: list[Tensor]) -> bytes:
    """``struct Matrix`` of the first or one-past-last keys [batch|1, q_len] of rows."""
    if limits is None:
        return NO_MATRIX
    limits = limits.to(torch.int32)[:, None, :, None]
    alive.append(limits)
    return matrix(limits)


def keeps_of(mask: KernelMask) -> tuple[Tensor, ...] | None:
    """The stored tensors [batch|1, heads|1, q_len|1, kv_len|1] that all have to allow a pair, or None where the library takes no such mask."""
    first = () if mask.keep is None else (mask.keep,)
    if not mask.rules:
        return first
    keeps = (*first, *[rule.keep for rule in mask.rules if isinstance(rule, Pairs)])
    return keeps if len(keeps) == len(first) + len(mask.rules) <= MAX_KEEPS else None


def mask_fields(mask: KernelMask, q_offset: int | Tensor, keeps: tuple[Tensor, ...], alive: list[Tensor]) -> bytes:
    """``struct Mask``.

    Args:
        mask: its intervals count; what it says besides is in ``keeps``.
        q_offset: key position of query 0, an int or an int tensor [batch].
        keeps: see ``keeps_of``; at most ``MAX_KEEPS``.
        alive: takes the tensors that the fields point to.
    """
    if not keeps and not mask.has_intervals and isinstance(q_offset, int) and q_offset == 0:
        return NO_MASK
    offset, offsets = 0, 0
    if isinstance(q_offset, Tensor):
        positions = q_offset.to(torch.int64).contiguous()
        alive.append(positions)
        offsets = positions.data_ptr()
    else:
        offset = q_offset
    alive.extend(keeps)
    return b"".join(
        (
            ints[4](-1 if mask.left is None else mask.left, -1 if mask.right is None else mask.right, offset, offsets),
            _limits(mask.kv_start, alive),
            _limits(mask.kv_end, alive),
            ints[1](len(keeps)),
            *map(matrix, keeps),
            NO_MATRIX * (MAX_KEEPS - len(keeps)),
        )
    )


def dropout_fields(dropout: KernelDropout | None, shape: Sizes) -> bytes:
    """``struct Dropout`` of a call of that shape."""
    if dropout is None:
        return NO_DROPOUT
    places, shift = dropout.counters(shape)
    return _dropout(dropout.seed.data_ptr(), threshold(dropout.p), 1 / (1 - dropout.p) if dropout.p < 1 else 0.0, *places, shift)
