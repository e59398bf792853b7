"""What a stack of layers may be called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from fused_attn.masks import Mask
from fused_attn.nn.x_transformers.intermediates import LayerIntermediates
from fused_attn.nn.x_transformers.refusals import refuse
from fused_attn.nn.x_transformers.rotary import Rotation


@dataclass
class Arguments:
    """What a stack may be called with besides its input x [batch, length, dim].

    Args:
        context: [batch, context_length, dim] of cross attention.
        mask: bool [batch, length], True where a position counts.
        context_mask: bool [batch, context_length].
        attn_mask: bool mask of self-attention's pairs, [length, length], [heads, ...] or [batch, heads, ...], or a mask of this package.
        self_attn_kv_mask: bool [batch, length] of self-attention's keys, instead of ``mask``.
        mems: memories [batch, mem_len, dim] before the keys, one per self-attention.
        mem_masks: bool [batch, mem_len], one per self-attention.
        seq_start_pos: int [batch], where left-padded sequences begin.
        seq_pos_offset: position of the first of x; the cache's length by default.
        cache: what a call with ``return_hiddens=True`` gave; x then holds new positions, or all of them.
        input_not_include_cache: taken for the package's sake; nothing differs.
        cache_age: how many positions of x are new.
        return_hiddens: whether to give ``LayerIntermediates`` too.
        return_gumbel_log_probs: whether they hold log-probabilities of hard choices.
        rotary_pos_emb: angles and scale, instead of the stack's own.
        polar_pos_emb: angles and phases, likewise.
        pos: int [length] or [batch, length], positions.
        context_pos: positions of the context, so that cross attention is rotary too.
        attn_bias: float, broadcastable to self-attention's scores.
        deep_embeds_and_ids: a table [tokens, layers, dim] and ids [batch, length] that scale feed-forward outputs.
        self_attn_additional_kv: keys and values in front, a list of pairs or ``LayerIntermediates``, for the last layers.
        additional_kv_mask: bool [batch, n] of these.
        detach_additional_kv: whether no gradient reaches them.
        route_additional_kv_to_top: whether the last layers get them; else the first.
        condition: [batch, dim_condition] or [batch, length, dim_condition] of adaptive norms.
        in_attn_cond: [batch, dim] or [batch, length, dim], added to every layer's input.
        layers_execute_order: which layers run, in order.
        repeat_blocks: which blocks run several times.
        self_attn_kv_residuals: [layers, batch, length, dim], or one, added to what keys and values are made of.
        cross_attn_kv_residuals: likewise, of the context.
        flash_pack_seq_kwargs: must be None.
        flash_pack_seq_context_kwargs: must be None.
        causal: of self-attention, instead of the constructor's.
        transform_block_inputs: a function of (depth, stream), or functions of the stream by depth, before blocks from the second on.
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    context_mask: Tensor | None = None
    attn_mask: Tensor | Mask | None = None
    self_attn_kv_mask: Tensor | None = None
    mems: list[Tensor | None] | None = None
    mem_masks: list[Tensor | None] | None = None
    seq_start_pos: Tensor | None = None
    seq_pos_offset: int | None = None
    cache: LayerIntermediates | None = None
    input_not_include_cache: bool = False
    cache_age: int = 1
    return_hiddens: bool = False
    return_gumbel_log_probs: bool = False
    rotary_pos_emb: Rotation | None = None
    polar_pos_emb: tuple[Tensor, Tensor] | None = None
    pos: Tensor | None = None
    context_pos: Tensor | None = None
    attn_bias: Tensor | None = None
    deep_embeds_and_ids: tuple[Tensor, Tensor] | None = None
    self_attn_additional_kv: LayerIntermediates | list[tuple[Tensor, Tensor]] | None = None
    additional_kv_mask: Tensor | None = None
    detach_additional_kv: bool = False
    route_additional_kv_to_top: bool = True
    condition: Tensor | None = None
    in_attn_cond: Tensor | None = None
    layers_execute_order: tuple[int, ...] | None = None
    repeat_blocks: Any = None
    self_attn_kv_residuals: Tensor | None = None
    cross_attn_kv_residuals: Tensor | None = None
    flash_pack_seq_kwargs: dict[str, Any] | None = None
    flash_pack_seq_context_kwargs: dict[str, Any] | None = None
    causal: bool | None = None
    transform_block_inputs: dict[int, Callable[[Tensor], Tensor]] | Callable[[int, Tensor], Tensor] | None = None

    @classmethod
    def of(cls, context: Tensor | None, mask: Tensor | None, others: dict[str, Any]) -> Arguments:
        """From the arguments of a call.

        Raises:
            TypeError: one of them is unknown.
        """
        unknown = sorted(set(others) - NAMES)
        if unknown:
            raise TypeError(f"arguments of a call must be known; got {', '.join(unknown)}. Options go to the constructor.")
        for name in ("flash_pack_seq_kwargs", "flash_pack_seq_context_kwargs"):
            if others.get(name) is not None:
                raise refuse(name, "Pack sequences with attn_mask=fused_attn.Documents(...)")
        return cls(context, mask, **others)


NAMES = frozenset(f.name for f in fields(Arguments))
