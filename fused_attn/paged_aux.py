"""What a decoding step gives out besides its output, by the definition in parts of the keys: nothing larger than what is given out.

Row statistics come first and are kept as a maximum and a sum, since a single lse would lose log S next to a maximum of 1e9.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.backends.base import AuxTensors
from fused_attn.lowering import Range, stat_dtype
from fused_attn.paged_call import LoweredPaged
from fused_attn.score_mods import modified
from fused_attn.vocabulary import modifiers_of


def attention_aux_of_keys(call: LoweredPaged, request: AuxRequest, reach: Range) -> AuxTensors:
    """What is asked for, probabilities and scores of the request's rows and heads.

    Args:
        call: the step; its v is not read.
        request: what is wanted.
        reach: the keys beyond which no row may attend to any.
    """
    rows, parts = _Rows(call), list(call.parts_of_keys(reach))
    once = [rows.scores(parts[0])] if len(parts) == 1 else None

    def of_parts() -> Iterable[tuple[Tensor, Tensor]]:
        return once or (rows.scores(keys) for keys in parts)

    softmax, statistics = call.terms.normalizer is None, rows.statistics(of_parts())
    result, places = _room(call, request), request.indices(*call.shape[1:3])
    for keys, (scores, allowed) in zip(parts, of_parts(), strict=True):
        probs = (rows.weights(scores, statistics) if softmax else rows.own_weights(scores)).masked_fill(~allowed, 0.0)
        columns = slice(*keys)
        if result.probs is not None:
            result.probs[..., columns] = _picked(probs, places)
        if result.scores is not None:
            result.scores[..., columns] = _picked(scores, places)
        if result.column_sums is not None:
            result.column_sums[..., columns] = probs.sum(-2)
        if result.entropy is not None:
            some = probs.masked_fill(probs == 0, 1.0)
            result.entropy.sub_((some * some.log()).sum(-1))
    if result.max_scores is not None:
        result.max_scores.copy_(statistics[2])
    return _marked(call, result, places)


@dataclass(frozen=True)
class _Rows:
    """The score array of a call, a part of the keys at a time."""

    call: LoweredPaged

    def scores(self, keys: Range) -> tuple[Tensor, Tensor]:
        """Scores [batch, heads, q_len, n] in float32 or wider, -inf where masked, and where they are not."""
        call = self.call
        batch, heads, q_len, _ = call.shape
        q, k = (t.to(stat_dtype(t.dtype)) for t in (call.q, call.of_keys(call.k, keys)))
        grouped = q.reshape(batch, k.shape[1], -1, q.shape[-1]) if k.shape[1] else q
        grid = call.grid.at((0, batch), (0, heads), (0, q_len), keys)
        scores = (grouped @ k.mT).reshape(batch, heads, q_len, -1) * call.terms.scale
        for mod in modifiers_of(call.terms).score_mods:
            scores = modified(mod, scores, grid)
        allowed = call.terms.mask.allowed(grid)
        # Selected: what a pair holds that may not attend reaches nothing.
        return scores.masked_fill(~allowed, -torch.inf), allowed

    def statistics(self, parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's base of exponents and sum of exponentials, sinks included, and its largest score; [batch, heads, q_len]."""
        call, dtype = self.call, stat_dtype(self.call.q.dtype)
        top = call.q.new_full(call.shape[:3], -torch.inf, dtype=dtype)
        base, total = torch.zeros_like(top), torch.zeros_like(top)
        for scores, _ in parts:
            top_now = torch.maximum(top, scores.amax(-1))
            base_now = top_now.masked_fill(top_now == -torch.inf, 0.0)
            # What was summed before the first finite score is 0.
            total = total * torch.exp(top.masked_fill(top == -torch.inf, 0.0) - base_now).masked_fill(top == -torch.inf, 0.0)
            total = total + torch.exp(scores - base_now[..., None]).sum(-1)
            top, base = top_now, base_now
        if call.terms.sinks is not None:
            sinks = call.terms.sinks.to(dtype)[:, None]
            highest = torch.maximum(top, sinks)
            highest = highest.masked_fill(highest == -torch.inf, 0.0)
            total = torch.where(total == 0, total, total * torch.exp(base - highest)) + torch.exp(sinks - highest)
            base = highest
        return base, total, top

    def weights(self, scores: Tensor, statistics: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The softmax's probabilities, 0 in rows without keys."""
        base, total, _ = statistics
        return torch.exp(scores - base[..., None]) / total.masked_fill(total == 0, 1.0)[..., None]

    def own_weights(self, scores: Tensor) -> Tensor:
        """Those of a normaliser that weighs every pair by itself."""
        normalizer = modifiers_of(self.call.terms).normalizer
        assert normalizer is not None
        return normalizer.weights(scores, lambda row: row.softmax(-1))


def _room(call: LoweredPaged, request: AuxRequest) -> AuxTensors:
    """Results as they are where no row attends to any key."""
    batch, heads, q_len, kv_len = call.shape
    dtype = stat_dtype(call.q.dtype)
    of_heads, of_rows = request.indices(heads, q_len)
    picked = (batch, heads if of_heads is None else of_heads.shape[0], q_len if of_rows is None else of_rows.shape[0], kv_len)
    return AuxTensors(
        call.q.new_zeros(picked) if request.probs else None,
        call.q.new_full(picked, -torch.inf, dtype=request.scores_dtype or call.q.dtype) if request.scores else None,
        call.q.new_empty((batch, heads, q_len), dtype=dtype) if request.max_scores else None,
        call.q.new_zeros((batch, heads, kv_len), dtype=dtype) if request.column_sums else None,
        call.q.new_zeros((batch, heads, q_len), dtype=dtype) if request.entropy else None,
    )


def _picked(full: Tensor, places: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Heads and rows of [batch, heads, q_len, n]."""
    for dim, indices in enumerate(places, 1):
        full = full if indices is None else full.index_select(dim, indices)
    return full


def _marked(call: LoweredPaged, result: AuxTensors, places: tuple[Tensor | None, Tensor | None]) -> AuxTensors:
    """NaN in rows whose keys end beyond those that there are."""
    if call.beyond is None:
        return result
    beyond = call.beyond.expand(-1, call.shape[2])
    rows = beyond if places[1] is None else beyond.index_select(1, places[1])
    for tensor, where in (
        (result.probs, rows[:, None, :, None]), (result.scores, rows[:, None, :, None]), (result.max_scores, beyond[:, None]),
        (result.column_sums, beyond.any(1)[:, None, None]), (result.entropy, beyond[:, None]),
    ):  # fmt: skip
        if tensor is not None:
            tensor.masked_fill_(where, torch.nan)
    return result
