"""Masks for models of the transformers package: one run of keys per query where the pattern is one, made once per forward pass.

``row_mask`` stands in ``AttentionMaskInterface``. What it returns looks like the bool tensor [batch, 1, q_len, kv_len] that models expect,
so that caches, checkpointing and compilers may handle it, but holds two integers per query. A model that computes with it gets the
whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_attn.checks import captured, described, require_shape
from fused_attn.integrations.transformers.patterns import Window, window_of
from fused_attn.lowering import Grid, KernelMask
from fused_attn.mask_rules import intervals
from fused_attn.masks import Dense, KeyPadding, Mask, from_mask_mod

Offset = int | Tensor


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
        "__get__", "__len__", "__hash__", "_is_view", "data_ptr", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
        "is_floating_point", "is_inference", "is_signed", "ndimension", "nelement", "numel", "size", "storage_offset", "stride", "untyped_storage",
    )
)  # fmt: skip


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

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        with torch._C.DisableTorchFunctionSubclass():
            if name in _METADATA:
                found = func(*args, **kwargs)
                if not isinstance(found, Tensor):  # .T and .data are tensors of the elements
                    return found
            elif not torch.compiler.is_compiling() and _writes(name):
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


@dataclass(frozen=True, eq=False)
class _Pattern(Mask):
    """A mask function of indices, asked for whole index tensors that broadcast."""

    function: Callable[..., Tensor]
    q_offset: Offset
    kv_offset: Offset

    def keep(self, grid: Grid) -> Tensor:
        b, h, q_idx, kv_idx = (torch.arange(*ends, device=grid.device) for ends in grid.ranges)
        return self.function(
            b[:, None, None, None], h[:, None, None], q_idx[:, None] + self.q_offset, kv_idx + self.kv_offset
        )  # fmt: skip


def _runs_of(window: Window, grid: Grid) -> Mask:
    form = KernelMask(window.left, window.right)
    return KeyRuns(*(t.to(torch.int32) for t in form.row_intervals(grid)))


def _evaluated(pattern: Mask, grid: Grid) -> Mask:
    """A pattern looked at block by block: its runs, or one byte per pair where it has gaps or nobody may look."""
    form = KernelMask(rules=(pattern,)).settled(grid).as_tensors(grid)
    return Dense(form.keep) if form.keep is not None else KeyRuns(form.kv_start, form.kv_end)  # type: ignore[arg-type]


def _padding(keep: Tensor, q_len: int) -> Mask | None:
    """Keys that are no padding, [batch, kv_len]; None where all of them are none."""
    if captured(keep):
        return KeyPadding(keep)
    if bool(keep.all()):
        return None
    batch, kv_len = keep.shape
    found = intervals((KeyPadding(keep),), Grid((batch, 1, 1, kv_len), keep.device))
    return KeyPadding(keep) if found is None else KeyRuns(*(t.expand(-1, q_len) for t in found))


def _keys_of(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The part of a padding mask [batch, tokens] that belongs to the keys, bool [batch, kv_len]; what lies beyond it is padding."""
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must have shape [batch, tokens], or four dimensions; got {described(attention_mask)}. Mark tokens by 1, padding by 0."
        )
    missing = max(kv_length + kv_offset - attention_mask.shape[-1], 0)
    return torch.nn.functional.pad(attention_mask.to(torch.bool), (0, missing))[:, kv_offset : kv_offset + kv_length]


def row_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Offset = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> RowMask | None:
    """What models hand to attention as their mask, as ``transformers.AttentionMaskInterface`` asks for it.

    A function that compares positions only, and padding on either side, cost two integers per query. Another one is evaluated in blocks of
    queries, and costs two integers per query where it allows one run of keys; with gaps, or inside a compiler, it costs one byte per pair.

    Args:
        batch_size: sequences.
        q_length: queries.
        kv_length: keys.
        q_offset: position of query 0, an int or an int tensor [].
        kv_offset: position of key 0.
        mask_function: (batch, head, query position, key position) to True where a query may attend; causal without it.
        attention_mask: [batch, tokens], nonzero where a token is no padding.
        allow_is_causal_skip: whether None may stand for a causal mask without padding.
        allow_is_bidirectional_skip: whether None may stand for a mask that allows everything.
        use_vmap: whether the function has to be called with single indices, under ``torch.vmap``.
        device: where the queries are.

    Returns:
        A mask, or None.

    Raises:
        ValueError: attention_mask is not [batch, tokens].

    Example:
        >>> print(row_mask(1, 2, 4, q_offset=2, attention_mask=torch.tensor([[0, 1, 1, 1]])).mask.picture(2, 4))
        .##.
        .###
    """
    function = _causal if mask_function is None else mask_function
    padding = None if attention_mask is None else _padding(_keys_of(attention_mask, kv_length, kv_offset), q_length)
    window = window_of(function)
    shift = q_offset - kv_offset
    if padding is None and window is not None:
        if allow_is_causal_skip and _is_implied(window, shift, q_length, kv_length):
            return None
        if allow_is_bidirectional_skip and window == Window():
            return None
    device = torch.device(device)
    offset = shift.reshape(1) if isinstance(shift, Tensor) else shift
    grid = Grid((batch_size, 1, q_length, kv_length), device, offset)
    if window is not None:
        mask = _runs_of(window, grid)
    elif use_vmap:
        mask = _evaluated(from_mask_mod(lambda b, h, q, kv: function(b, h, q + q_offset, kv + kv_offset)), grid)
    else:
        mask = _evaluated(_Pattern(function, q_offset, kv_offset), grid)
    return RowMask.of(mask if padding is None else mask & padding, grid.shape, device)


def _causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


def _is_implied(window: Window, shift: Offset, q_length: int, kv_length: int) -> bool:
    """Whether attention takes no mask for the same: causal from the first key on for several queries, all keys for one."""
    if isinstance(shift, Tensor) or window.right != 0:
        return False
    last = shift + q_length - 1
    if window.left is not None and window.left < last:
        return False
    return last >= kv_length - 1 if q_length == 1 else shift == 0 and q_length == kv_length
