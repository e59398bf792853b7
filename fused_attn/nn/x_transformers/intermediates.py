"""What a layer leaves besides its output: arrays of the scores' size that exist once somebody reads them."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_attn.problem import active_transform

ARRAYS = ("qk_similarities", "pre_softmax_attn", "post_softmax_attn")
Field = Tensor | Callable[[], Tensor] | None


class _Lazy:
    """A field that holds a tensor or what makes one; reading makes it and keeps it, assigning replaces it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.place = f"_{name}"

    def __get__(self, of: Any, owner: type | None = None) -> Any:
        if of is None:
            return self
        value = getattr(of, self.place)
        if value is not None and not isinstance(value, Tensor):
            value = value()
            setattr(of, self.place, value)
        return value

    def __set__(self, of: Any, value: Field) -> None:
        setattr(of, self.place, value)


class Intermediates:
    """What x-transformers' class of the same name holds; its three arrays [batch, heads, q_len, kv_len] may be computed when they are read.

    Gradients flow through what is read.

    Args:
        qk_similarities: scores before bias, clamp and masks, with the scores of the layer before.
        pre_softmax_attn: scores that the softmax got; masked ones hold the lowest finite number of their dtype.
        post_softmax_attn: weights before dropout.
        values: values [batch, kv_heads, kv_len, dim] before a value residual.
        cached_kv: keys and values of all positions so far.
        layer_type: "a" or "c" in a stack of layers.
        hybrid_hidden: state of a hybrid module.
        log_probs: log-probabilities of hard choices [batch, heads, q_len].

    Example:
        >>> left = Intermediates(post_softmax_attn=lambda: torch.ones(1))
        >>> left.post_softmax_attn, left.to_tuple()
        (tensor([1.]), (None, None, tensor([1.])))
    """

    qk_similarities = _Lazy()
    pre_softmax_attn = _Lazy()
    post_softmax_attn = _Lazy()

    def __init__(
        self,
        qk_similarities: Field = None,
        pre_softmax_attn: Field = None,
        post_softmax_attn: Field = None,
        values: Tensor | None = None,
        cached_kv: tuple[Tensor, Tensor | None] | None = None,
        layer_type: str | None = None,
        hybrid_hidden: Tensor | None = None,
        log_probs: Tensor | None = None,
    ) -> None:
        self.qk_similarities = qk_similarities
        self.pre_softmax_attn = pre_softmax_attn
        self.post_softmax_attn = post_softmax_attn
        self.values = values
        self.cached_kv = cached_kv
        self.layer_type = layer_type
        self.hybrid_hidden = hybrid_hidden
        self.log_probs = log_probs

    def to_tuple(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three arrays, made now where they are not there yet."""
        return self.qk_similarities, self.pre_softmax_attn, self.post_softmax_attn


class _Filled(torch.autograd.Function):
    """-inf as the lowest finite number; backward needs nothing of it, for masked scores get no gradient anyway."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor) -> Tensor:
        return scores.masked_fill(scores == -torch.inf, torch.finfo(scores.dtype).min)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def filled(scores: Tensor) -> Tensor:
    """Scores whose masked elements hold the lowest finite number of their dtype instead of -inf.

    Example:
        >>> filled(torch.tensor([1.0, -torch.inf]))
        tensor([ 1.0000e+00, -3.4028e+38])
    """
    if active_transform() is not None:  # transforms follow plain operations; these keep the places of masked scores
        return scores.masked_fill(scores == -torch.inf, torch.finfo(scores.dtype).min)
    result: Tensor = _Filled.apply(scores)  # type: ignore[no-untyped-call]
    return result


@dataclass
class LayerIntermediates:
    """What a stack of layers leaves besides its output; also what it goes on from as a ``cache``.

    Args:
        hiddens: the stream before each self-attention.
        last_hidden: the output.
        attn_intermediates: of every attention in the order it ran.
        layer_hiddens: the stream before each layer, and at the end.
        block_hiddens: the stream after each block; the last is the output.
        cache_length: positions so far.

    The other fields are what x-transformers' ``TransformerWrapper`` fills, None here.
    """

    hiddens: list[Tensor] = field(default_factory=list)
    last_hidden: Tensor | None = None
    attn_intermediates: list[Intermediates] = field(default_factory=list)
    layer_hiddens: list[Tensor] = field(default_factory=list)
    block_hiddens: list[Tensor] = field(default_factory=list)
    cache_length: int = 0
    attn_z_loss: Tensor | None = None
    mems: list[Tensor] | None = None
    last_layer_hiddens: Tensor | None = None
    initial_embeds: Tensor | None = None
    attn_pooled_tokens: Tensor | None = None
    memory_tokens: Tensor | None = None
    logit_entropies: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: list[Tensor] | None = None
    all_pred_logits: list[Tensor] | None = None
    exit_indices: Tensor | None = None
    looped_prompt_kv_cache: tuple[Tensor, Tensor] | None = None

    def __copy__(self) -> LayerIntermediates:
        """A copy whose lists may change on their own."""
        return replace(self, attn_intermediates=[copy(left) for left in self.attn_intermediates], block_hiddens=[*self.block_hiddens])
