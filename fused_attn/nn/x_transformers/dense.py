"""Attention on whole score arrays, for what no kernel computes row by row: O(q_len * kv_len) memory, through the fused masked softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fused_attn.dropout import Dropout, keep_factor
from fused_attn.functional import masked_softmax
from fused_attn.lowering import Grid, stat_dtype
from fused_attn.masks import Mask
from fused_attn.nn.x_transformers.cope import mixed
from fused_attn.nn.x_transformers.intermediates import Intermediates
from fused_attn.normalizers import Normalizer
from fused_attn.score_mods import ScoreMod
from fused_attn.scoring import Scoring
from fused_attn.selective import Selective

if TYPE_CHECKING:
    from fused_attn.nn.x_transformers.attend import Attend


@dataclass(frozen=True, eq=False)
class Inputs:
    """One call: q [batch, heads, q_len, head_dim], k and v [batch, kv_heads, kv_len, ...], what is added, which pairs may attend."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | Mask | None
    biases: tuple[ScoreMod, ...]
    prev_attn: Tensor | None
    causal: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, q_len, kv_len)."""
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def grid(self) -> Grid:
        """The pairs, the last query at the last key."""
        return Grid(self.shape, self.q.device, self.shape[3] - self.shape[2])

    @property
    def keep(self) -> Tensor | None:
        """The mask as a bool tensor that broadcasts to the scores."""
        return self.mask.allowed(self.grid) if isinstance(self.mask, Mask) else self.mask

    def scores(self, scoring: Scoring) -> Tensor:
        """Scores of all pairs in the dtype of arithmetic, head n with key head n % kv_heads."""
        dtype = stat_dtype(self.q.dtype)
        q: Tensor = self.q.to(dtype).unflatten(1, (-1, self.k.shape[1]))
        return scoring.score(q, self.k.to(dtype)[:, None]).flatten(1, 2).to(dtype)

    def values(self, weights: Tensor) -> Tensor:
        """weights @ v [batch, heads, q_len, value_dim] in q's dtype."""
        grouped: Tensor = weights.unflatten(1, (-1, self.v.shape[1]))
        return (grouped @ self.v.to(weights.dtype)[:, None]).flatten(1, 2).to(self.q.dtype)


def attention(attend: Attend, call: Inputs, attn_delta: Tensor | None, row_mask: Tensor | None) -> tuple[Tensor, Intermediates]:
    """Output and arrays, step by step in the package's order."""
    call = _without_strays(call)
    sim = call.scores(attend.scoring(call.q.shape[3], False))
    sim = sim if call.prev_attn is None else sim + call.prev_attn.to(sim.dtype)
    similarities = sim
    scale_after = None if attend.pre_scale_post_talking_heads is None else mixed(attend.pre_scale_post_talking_heads, sim)
    if attend.pre_softmax_talking_heads is not None:
        sim = sim + mixed(attend.pre_softmax_talking_heads, sim)
    for bias in call.biases:
        sim = bias.apply(sim, call.grid)
    if attend.softclamp_logits:
        sim = (sim / attend.logit_softclamp_value).tanh() * attend.logit_softclamp_value
    sign = sim.sign() if attend.cog_signed else None
    sim = sim.abs() if attend.cog_signed else sim
    sim = _masked(attend, sim, call, row_mask)
    if attend.cope is not None:
        sim = sim + attend.cope(call.q, sim)
    if attend.selective:
        sim = Selective().apply(sim, call.grid)
    if attend.head_attn_sink is not None:
        sink = attend.head_attn_sink.to(sim.dtype)[:, None, None].expand(*sim.shape[:3], 1)
        sim = torch.cat((sink.abs() if attend.cog_signed else sink, sim), -1)
        sign = None if sign is None else torch.cat((sink.sign(), sign), -1)
    weights = _weights(attend, sim, call.keep)
    weights = weights if attn_delta is None else weights + attn_delta
    weights = weights if sign is None else weights * sign
    dtype = call.q.dtype
    arrays = attend.record(similarities.to(dtype), sim.to(dtype), weights.to(dtype))
    weights = weights if attend.head_attn_sink is None else weights[..., 1:]
    if attend.training and attend.dropout > 0:
        weights = weights * keep_factor(Dropout(attend.dropout).lower(weights.device), Grid(call.shape, weights.device), weights.dtype)
    if attend.post_softmax_talking_heads is not None:
        weights = mixed(attend.post_softmax_talking_heads, weights)
    return call.values(weights if scale_after is None else weights * scale_after), arrays


def _without_strays(call: Inputs) -> Inputs:
    """The call without the NaN and infinities of keys that the mask hides from every query; products of whole arrays would spread them."""
    if call.keep is None:
        return call
    hidden = ~call.keep.expand(call.shape[0], -1, -1, call.shape[3]).any(1).any(1)[:, None, :, None]
    return replace(call, k=call.k.masked_fill(hidden & ~call.k.isfinite(), 0.0), v=call.v.masked_fill(hidden & ~call.v.isfinite(), 0.0))


def _masked(attend: Attend, sim: Tensor, call: Inputs, row_mask: Tensor | None) -> Tensor:
    """Scores whose hidden pairs hold the lowest number of the inputs' dtype; inverted attention hides rows instead of keys."""
    lowest = torch.finfo(call.q.dtype).min
    keep = call.keep
    if attend.inverted_attention:
        keep = None if row_mask is None else row_mask[:, None, :, None]
    sim = sim if keep is None else sim.masked_fill(~keep, lowest)
    if not call.causal:
        return sim
    grid = call.grid
    return sim.masked_fill(grid.kv_idx > grid.q_pos, lowest)


def _weights(attend: Attend, sim: Tensor, mask: Tensor | None) -> Tensor:
    """What each score becomes, by rows, or by columns and then scaled to rows that add up to 1."""
    make = _rows(attend)
    if not attend.inverted_attention:
        return make(sim).to(sim.dtype)
    weights = make(sim) if attend.custom_attn_fn is not None else make(sim.mT).mT
    weights = weights if mask is None else weights.masked_fill(~mask, 0.0)
    return normalize(weights.to(sim.dtype), 1.0, -1, 1e-8)


def _rows(attend: Attend) -> Callable[[Tensor], Tensor]:
    if attend.custom_attn_fn is not None:
        return attend.custom_attn_fn
    softmax: Any = partial(masked_softmax, backend=attend.backend)
    normalizer: Normalizer | None = attend.normalizer
    return softmax if normalizer is None else partial(normalizer.weights, softmax=softmax)
