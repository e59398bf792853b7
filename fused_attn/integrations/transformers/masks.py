"""Masks for models of the transformers package: one run of keys per query where the pattern is one, made once per forward pass.

``row_mask`` stands in ``AttentionMaskInterface``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_attn.checks import captured, described, is_traced
from fused_attn.integrations.transformers.mask_tensor import KeyRuns, RowMask
from fused_attn.integrations.transformers.models import leaves_masks_to_attention
from fused_attn.integrations.transformers.patterns import Window, window_of
from fused_attn.lowering import Grid, KernelMask
from fused_attn.mask_rules import intervals
from fused_attn.masks import Dense, KeyPadding, Mask, from_mask_mod

Offset = int | Tensor


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
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    added_mask: Callable[..., Tensor | None] | None = None,
    **_: Any,
) -> Tensor | None:
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
        dtype: the scores', for ``added_mask``.
        config: the model's configuration.
        added_mask: makes the mask of models that add it to their scores themselves, in place of this function.

    Returns:
        A ``RowMask``, None, or what ``added_mask`` gives; a bool tensor where a program is recorded.

    Raises:
        ValueError: attention_mask is not [batch, tokens].

    Example:
        >>> print(row_mask(1, 2, 4, q_offset=2, attention_mask=torch.tensor([[0, 1, 1, 1]])).mask.picture(2, 4))
        .##.
        .###
    """
    function = _causal if mask_function is None else mask_function
    if added_mask is not None and config is not None and not leaves_masks_to_attention(type(config)):
        return added_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask,
            dtype=dtype, allow_is_bidirectional_skip=allow_is_bidirectional_skip, use_vmap=use_vmap, device=device,
        )  # fmt: skip
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
    mask = mask if padding is None else mask & padding
    return mask.allowed(grid).expand(grid.shape) if _is_recorded() else RowMask.of(mask, grid.shape, device)


def _is_recorded() -> bool:
    """Whether tensors stand for others (torch.export, make_fx, torch.jit.trace), of which no subclass can be made."""
    return not torch.compiler.is_dynamo_compiling() and (torch._C._len_torch_dispatch_stack() > 0 or is_traced())


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
