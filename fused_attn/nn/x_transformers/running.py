"""One pass through a stack: the stream from layer to layer, and what goes along with it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_attn.nn.x_transformers.arguments import Arguments
from fused_attn.nn.x_transformers.attend import Attend
from fused_attn.nn.x_transformers.feedforward import softclamp
from fused_attn.nn.x_transformers.intermediates import Intermediates, LayerIntermediates
from fused_attn.nn.x_transformers.refusals import needs
from fused_attn.nn.x_transformers.rotary import Rotation

if TYPE_CHECKING:
    from fused_attn.nn.x_transformers.layers import AttentionLayers


class Run:
    """A call of a stack; what its parts share lives here."""

    def __init__(self, stack: AttentionLayers, x: Tensor, call: Arguments) -> None:
        _check(stack, call)
        self.stack, self.call = stack, call
        offset = call.seq_pos_offset
        if offset is None:
            offset = 0 if call.cache is None else call.cache.cache_length
        self.condition = _condition(stack, call.condition)
        self.keys = _key_mask(x, call, offset)
        self.pos, self.rotation, self.of_cross = _rotary(stack, x, call, offset)
        self.phases = _phases(stack, x, call, offset)
        self.context, self.context_mask = call.context, call.context_mask
        if call.cache is not None:
            self.context = None if call.context is None else call.context[:, :0]
            x = x[:, -call.cache_age :] if call.cache_age > 0 else x
        self.length = x.shape[1]
        if stack.stream_emb is not None:
            x = (x[:, None] + stack.stream_emb[:, None]).flatten(0, 1)
        self.x = x
        self.inject = _injection(stack, x, call.in_attn_cond)
        self.order = _order(stack, call)
        self._begin_iterators()
        self.prev: dict[str, Tensor | None] = {"a": None, "c": None}
        self.first: dict[str, Tensor | None] = {}
        self.returns = call.return_hiddens or call.return_gumbel_log_probs
        self.looks_back = any(views is not None for views in stack.layer_integrators)
        self.joins = any(join is not None for join in stack.skip_combines)
        self.left = LayerIntermediates()
        self.skips: list[Tensor] = []

    def _begin_iterators(self) -> None:
        """What one layer after the other takes its own of."""
        call, count = self.call, sum(self.stack.layer_types[i] == "a" for i in self.order)
        self.caches = iter([] if call.cache is None else call.cache.attn_intermediates)
        self.mems, self.mem_masks = iter(call.mems or []), iter(call.mem_masks or [])
        self.own_residuals, self.cross_residuals = (_each(t) for t in (call.self_attn_kv_residuals, call.cross_attn_kv_residuals))
        self.additional = iter(_additional(call, count))
        embeds: Any = []
        if call.deep_embeds_and_ids is not None:
            table, ids = call.deep_embeds_and_ids
            ids = ids[:, -call.cache_age :] if call.cache is not None and call.cache_age > 0 else ids
            embeds = table[ids].movedim(2, 0)
        self.embeds = iter(embeds)

    def __call__(self) -> Tensor | tuple[Tensor, LayerIntermediates]:
        """Output, and intermediates where they are asked for."""
        block, x = self.stack.plan.block, self.x
        for step, place in enumerate(self.order):
            if step % block == 0 and step:
                x = self._transformed(step // block + 1, x)
            if self.joins:
                self.skips.append(x)
            join = self.stack.skip_combines[place]
            x = x if join is None else join(x, self.skips)
            chance = self.stack.layer_dropouts[place]
            if self.stack.training and chance > 0 and random() < chance:
                continue
            x = self._layer(step, x)
            if self.returns and ((step + 1) % block == 0 or step == len(self.stack.layers) - 1):
                self.left.block_hiddens.append(x)
        if self.returns:
            self.left.layer_hiddens.append(x)
        x = softclamp(x, self.stack.softclamp_output_value) if self.stack.softclamp_output else x
        x = x if self.stack.stream_emb is None else x.unflatten(0, (-1, self.stack.num_residual_streams)).sum(1)
        x = self._normed(self.stack.final_norm, x)
        return (x, self._finished(x)) if self.returns else x

    def _layer(self, step: int, x: Tensor) -> Tensor:
        """One layer's branch and how it joins the stream."""
        kind, stack = self.stack.layer_types[self.order[step]], self.stack
        parts: Any = stack.layers[self.order[step]]
        (pre, post_branch, post_main), layer, residual = parts
        if kind == "a" and self.returns:
            self.left.hiddens.append(x)
        elif kind == "c" and stack.training and stack.cross_attn_tokens_dropout > 0 and self.context is not None:
            self.context, self.context_mask = kept_tokens(self.context, self.context_mask, stack.cross_attn_tokens_dropout)
        branch, stream, more = residual.prepare(x)
        if self.returns or self.looks_back:
            self.left.layer_hiddens.append(branch)
        views = stack.layer_integrators[self.order[step]]
        branch = branch if views is None else views(branch, self.left.layer_hiddens)
        branch = branch if self.inject is None else branch + self.inject
        branch = self._normed(pre, branch)
        layer = partial(layer, condition=self.condition) if stack.branch_needs_condition else layer
        if kind == "f":
            out = layer(branch, deep_embed=next(self.embeds, None))
        else:
            out, left = layer(branch, **(self._of_self(pre) if kind == "a" else self._of_cross()))
            self._keep(kind, left, step)
        out = self._normed(post_branch, out)
        return self._normed(post_main, residual(out, stream, mask=self.call.mask, **more))

    def _of_self(self, pre: nn.Module | None) -> dict[str, Any]:
        """Arguments of a self-attention."""
        mem = next(self.mems, None)
        call = self.call
        return {
            **self._common("a"),
            "context_mask": self.keys,
            "attn_mask": call.attn_mask,
            "rel_pos": self.stack.rel_pos,
            "pos": self.pos,
            "rotary_pos_emb": self.rotation,
            "polar_pos_emb": self.phases,
            "additional_key_values": next(self.additional, None),
            "additional_key_value_mask": call.additional_kv_mask,
            "mem": None if mem is None else self._normed(pre, mem),
            "mem_mask": next(self.mem_masks, None),
            "attn_bias": call.attn_bias,
            "kv_input_residual": next(self.own_residuals, None),
            "causal": call.causal,
        }

    def _of_cross(self) -> dict[str, Any]:
        """Arguments of a cross attention."""
        return {
            **self._common("c"),
            "context": self.context,
            "context_mask": self.context_mask,
            "kv_input_residual": next(self.cross_residuals, None),
            **self.of_cross,
        }

    def _common(self, kind: str) -> dict[str, Any]:
        return {
            "mask": self.call.mask,
            "prev_attn": self.prev[kind],
            "cache": next(self.caches, None),
            "value_residual": self.first.get(kind),
            "return_intermediates": True,
        }

    def _keep(self, kind: str, left: Intermediates, step: int) -> None:
        """What later layers, and the caller, take of an attention; its scores where one of its kind follows."""
        if self.stack.add_value_residual:
            self.first.setdefault(kind, left.values)
        if self.returns:
            left.layer_type = kind
            self.left.attn_intermediates.append(left)
        residual = self.stack.residual_attn if kind == "a" else self.stack.cross_residual_attn
        if residual and any(self.stack.layer_types[place] == kind for place in self.order[step + 1 :]):
            self.prev[kind] = scores_of(self.stack.layers[self.order[step]], left)

    def _normed(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        if norm is None:
            return x
        conditioned = self.stack.norm_need_condition and not isinstance(norm, nn.Identity)
        normed: Tensor = norm(x, condition=self.condition) if conditioned else norm(x)
        return normed

    def _transformed(self, depth: int, x: Tensor) -> Tensor:
        change = self.call.transform_block_inputs
        if isinstance(change, dict):
            return change[depth](x) if depth in change else x
        return x if change is None else change(depth, x)

    def _finished(self, x: Tensor) -> LayerIntermediates:
        left, cache = self.left, self.call.cache
        if left.block_hiddens:
            left.block_hiddens[-1] = x
        if self.call.return_gumbel_log_probs:
            for of_layer in left.attn_intermediates:
                of_layer.log_probs = chosen_log_probs(of_layer)
        left.last_hidden = x
        left.cache_length = self.length + (0 if cache is None else cache.cache_length)
        return left


def _check(stack: AttentionLayers, call: Arguments) -> None:
    needs(stack.cross_attend == (call.context is not None), "context must be given exactly with cross_attend", f"cross_attend={stack.cross_attend}",
          "Pass context=, or build the stack without it")  # fmt: skip
    needs(stack.need_condition == (call.condition is not None), "condition must be given exactly with adaptive norms or scales",
          "neither" if call.condition is None else "one", "Pass condition=, or build the stack without them")  # fmt: skip
    if call.cache is not None:
        needs(stack.causal and call.attn_mask is None, "a cache must come with causal attention and no attn_mask", "it", "Leave cache out")
        needs(
            stack.can_cache_kv,
            "a cache must not meet selective attention or data_dependent_alibi, whose scores need all queries",
            "such a layer",
            "Run the whole sequence again",
        )


def _condition(stack: AttentionLayers, condition: Tensor | None) -> Tensor | None:
    """[batch, 1 or length, width] through the condition's own map."""
    if condition is None:
        return None
    size = stack.dim_condition
    needs(condition.dim() in (2, 3) and condition.shape[-1] == size, f"condition must be [batch, {size}] or [batch, length, {size}]",
          repr(list(condition.shape)), "Reshape it")  # fmt: skip
    mapped: Tensor = stack.adaptive_mlp(condition[:, None] if condition.dim() == 2 else condition)
    return mapped


def _key_mask(x: Tensor, call: Arguments, offset: int) -> Tensor | None:
    """Which keys of self-attention count, left padding taken out."""
    if call.seq_start_pos is None:
        return call.self_attn_kv_mask
    places = torch.arange(x.shape[1] + offset, device=x.device)
    begun = places >= call.seq_start_pos[..., None]
    return begun if call.self_attn_kv_mask is None else call.self_attn_kv_mask & begun


def _rotary(stack: AttentionLayers, x: Tensor, call: Arguments, offset: int) -> tuple[Tensor | None, Rotation | None, dict[str, Any]]:
    """Positions, angles of self-attention, and what cross attention gets of them."""
    pos, rotation = call.pos, call.rotary_pos_emb
    if stack.rotary_pos_emb is None:
        return pos, rotation, {}
    if rotation is None:
        first = None if not call.mems else call.mems[0]
        mem_len = 0 if first is None else first.shape[1]
        pos = torch.arange(x.shape[1] + mem_len + offset, device=x.device) - mem_len if pos is None else pos
        rotation = stack.rotary_pos_emb(pos)
    if call.context_pos is None:
        return pos, rotation, {}
    needs(stack.cross_attend, "context_pos must come with cross_attend", "cross_attend=False", "Leave it out")
    return pos, rotation, {"rotary_pos_emb": rotation, "context_rotary_pos_emb": stack.rotary_pos_emb(call.context_pos)}


def _phases(stack: AttentionLayers, x: Tensor, call: Arguments, offset: int) -> tuple[Tensor, Tensor] | None:
    if stack.polar_pos_emb is None or call.polar_pos_emb is not None:
        return call.polar_pos_emb
    pos = torch.arange(x.shape[1] + offset, device=x.device) if call.pos is None else call.pos
    phases: tuple[Tensor, Tensor] = stack.polar_pos_emb(pos)
    return phases


def _injection(stack: AttentionLayers, x: Tensor, given: Tensor | None) -> Tensor | None:
    """What is added to the input of every layer."""
    if stack.reinject_input_proj is not None:
        needs(given is None, "in_attn_cond must be None with reinject_input", "a tensor", "Choose one")
        added = stack.reinject_input_proj(x)
    elif given is None:
        return None
    else:
        added = given if given.dim() == 3 else given[:, None]
    gate = stack.learned_reinject_input_gate
    result: Tensor = added if gate is None else added * gate(x).sigmoid()
    return result


def _order(stack: AttentionLayers, call: Arguments) -> tuple[int, ...]:
    if call.repeat_blocks is None:
        return stack.layers_execute_order if call.layers_execute_order is None else call.layers_execute_order
    needs(call.layers_execute_order is None, "layers_execute_order must be None with repeat_blocks", "both", "Choose one")
    needs(not stack.has_custom_layer_types, "repeat_blocks must come with blocks of one kind", "custom layers", "Pass layers_execute_order")
    return stack.plan.repeated(call.repeat_blocks)


def _each(residuals: Tensor | None) -> Iterator[Tensor]:
    """One tensor [batch, length, dim] per layer; a single one is the first layer's."""
    if residuals is None:
        return iter(())
    return iter(residuals[None] if residuals.dim() == 3 else residuals)


def _additional(call: Arguments, count: int) -> list[Any]:
    """Keys and values in front for each of ``count`` self-attentions."""
    given = call.self_attn_additional_kv
    if given is None:
        return []
    pairs: list[Any] = [left.cached_kv for left in given.attn_intermediates] if isinstance(given, LayerIntermediates) else list(given)
    if call.detach_additional_kv:
        pairs = [tuple(t.detach() for t in pair) for pair in pairs]
    if not call.route_additional_kv_to_top:
        return pairs
    pairs = pairs[-count:]
    return [None] * (count - len(pairs)) + pairs


def scores_of(layer: nn.Module, left: Intermediates) -> Tensor:
    """RealFormer's scores for the next layer [batch, heads, q_len, kv_len]: what the softmax got, but for the column of learned sinks."""
    scores = left.pre_softmax_attn
    assert scores is not None
    attend = next(m for m in layer.modules() if isinstance(m, Attend))
    result: Tensor = scores if attend.head_attn_sink is None else scores[..., 1:]
    return result


def chosen_log_probs(left: Intermediates) -> Tensor:
    """Log-probabilities [batch, heads, q_len] of the keys that got the largest weights."""
    assert left.pre_softmax_attn is not None
    assert left.post_softmax_attn is not None
    chosen = left.post_softmax_attn.argmax(-1, keepdim=True)
    result: Tensor = left.pre_softmax_attn.log_softmax(-1).gather(-1, chosen)[..., 0]
    return result


def kept_tokens(context: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor | None]:
    """A share of the context's tokens, drawn at random, and their mask.

    Example:
        >>> kept_tokens(torch.zeros(2, 8, 4), None, 0.25)[0].shape
        torch.Size([2, 6, 4])
    """
    batch, length = context.shape[:2]
    draws = torch.randn(batch, length, device=context.device)
    draws = draws if mask is None else draws.masked_fill(~mask, torch.finfo(draws.dtype).min)
    keep = max(1, int((1.0 - dropout) * length))
    places = draws.topk(keep, 1).indices
    rows = torch.arange(batch, device=context.device)[:, None]
    if mask is None:
        return context[rows, places], None
    counts = (mask.sum(-1, keepdim=True) * (1.0 - dropout)).ceil()
    return context[rows, places], mask[rows, places] & (torch.arange(keep, device=context.device) < counts)
