"""The definition: masks' and modifications' own meaning, plain torch operations, torch's autograd.

It shares no hand-written formula with what it checks but the products over allowed pairs, whose derivatives are those of a product. It runs
in any dtype including float64, follows every torch transform, and costs O(q_len * kv_len) memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_attn.allowed_products import differentiable_products, differentiable_sum
from fused_attn.auxiliary import NOTHING, AuxOutput, AuxRequest
from fused_attn.checks import captured, has_finite_products
from fused_attn.dropout import keep_factor
from fused_attn.kernel_dropout import KernelDropout
from fused_attn.layout import laid_out_like, with_laid_out_gradients
from fused_attn.lowering import Grid, stat_dtype
from fused_attn.modifiers import Modifiers
from fused_attn.normalizers import Softmax, weighed
from fused_attn.problem import AttentionProblem, SoftmaxProblem
from fused_attn.score_mods import Level, modified
from fused_attn.scoring import Scoring, scored
from fused_attn.selective import Selective

# Elements that a scoring's own code may need at a time: 64 MB of float32.
BLOCK = 1 << 24


def attention(problem: AttentionProblem, dtype: torch.dtype | None = None, softmax: Softmax | None = None) -> tuple[Tensor, AuxOutput]:
    """Attention as its formula reads: softmax(mods(scale * q k^T), over the allowed keys) v.

    Args:
        problem: the checked call.
        dtype: what the two products are computed in; float32 for narrower inputs by default. The inputs' own dtype gives the
            error that a plain torch implementation makes, which the error rule compares with.
        softmax: what other normalisers take for a softmax; the definition's own by default.
    """
    dtype = dtype or stat_dtype(problem.q.dtype)
    problem = _with_laid_out_gradients(problem)
    grid, modifiers, request = problem.grid, problem.modifiers, problem.aux or NOTHING
    q, k, v = (t.to(dtype) for t in (problem.q, problem.k, problem.v))
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    allowed = None if modifiers.mask is None else modifiers.mask.allowed(grid)
    rows = Rows.of((q, k), modifiers, grid, allowed, problem.empty_rows, softmax)
    weights = _dropped(rows.probs, modifiers.dropout.lower(grid.device) if modifiers.dropout else None, grid)
    allowed = rows.allowed
    if modifiers.normalizer is not None:
        weights = modifiers.normalizer.mix(weights)
        allowed = allowed.any(1, keepdim=True) if allowed is not None and modifiers.normalizer.mixes_heads else allowed
    out = differentiable_sum(weights.to(dtype), v, allowed)
    return laid_out_like(out.to(problem.q.dtype), problem.q), _picked(rows.aux(request, problem.q.dtype), request)


def _picked(aux: AuxOutput, request: AuxRequest) -> AuxOutput:
    """The probabilities and scores cut to the rows and heads asked for."""
    if not request.is_picked:
        return aux

    def cut(full: Tensor | None) -> Tensor | None:
        for dim, indices in enumerate(() if full is None else request.indices(*full.shape[1:3]), 1):
            full = full if full is None or indices is None else full.index_select(dim, indices)
        return full

    return replace(aux, probs=cut(aux.probs), scores=cut(aux.scores))


def repeated(keys: Tensor, heads: int) -> Tensor:
    """Keys or values [batch, kv_heads, ...] once per query head."""
    groups = heads // keys.shape[1] if keys.shape[1] else 1
    return keys.repeat_interleave(groups, 1) if groups != 1 else keys


class Rows(NamedTuple):
    """What some rows of the score array come to, all keys of them.

    scores [batch, heads, rows, kv_len] after all modifications, -inf where masked; probs of that shape; lse [batch, heads, rows];
    allowed, broadcastable to the scores, or None where every value counts.
    """

    scores: Tensor
    probs: Tensor
    lse: Tensor
    allowed: Tensor | None

    @classmethod
    def of(
        cls,
        pair: tuple[Tensor, Tensor],
        modifiers: Modifiers,
        grid: Grid,
        allowed: Tensor | None,
        empty_rows: str = "zero",
        softmax: Softmax | None = None,
    ) -> Rows:
        """The rows of a grid's region.

        Args:
            pair: the region's queries [batch, heads, rows, head_dim] and all keys [batch, heads, kv_len, head_dim].
            modifiers: what is applied.
            grid: the region.
            allowed: which of its pairs may attend, or None for all.
            empty_rows: what rows without keys give.
            softmax: what other normalisers take for a softmax.
        """
        careful, within = _may_break(*pair, modifiers), allowed
        scores = _scores(modifiers, pair, grid, within, careful)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        is_plain = within is None and len(modifiers.score_mods) == 0 and modifiers.scoring is None
        if scores.shape[-1] and not (is_plain and captured(scores)) and _any(empty):
            # A row whose scores are all -inf counts as one without keys: nothing it holds may show.
            within = (~empty if within is None else within & ~empty).expand(scores.shape)
            scores = _scores(modifiers, pair, grid, within, careful)
        if modifiers.normalizer is not None:
            probs, lse = weighed(modifiers.normalizer, scores, softmax or _plain_softmax), scores.new_empty(0)
        else:
            probs, lse = _softmax(scores, modifiers.sinks)
        probs = probs if within is None else probs.masked_fill(~within, 0.0)
        if empty_rows == "zero" or scores.shape[-1] == 0:
            return cls(scores, probs, lse, within)
        nobody = (lse == -torch.inf)[..., None]
        levels = torch.zeros_like(scores)
        if empty_rows == "softmax":
            union = None if within is None else (within | nobody).expand(scores.shape)
            levels = Level().apply(_scores(modifiers, pair, grid, union, careful, within), grid)
        return cls(scores, torch.where(nobody, _softmax(levels, None)[0], probs), lse, None if within is None else within | nobody)

    def aux(self, request: AuxRequest, dtype: torch.dtype) -> AuxOutput:
        """What is asked for."""
        return AuxOutput(
            probs=self.probs.to(dtype).contiguous() if request.probs else None,
            scores=self.scores.to(request.scores_dtype or dtype).contiguous() if request.scores else None,
            lse=self.lse if request.lse else None,
            max_scores=_row_max(self.scores) if request.max_scores else None,
            column_sums=self.probs.sum(-2) if request.column_sums else None,
            entropy=_entropy(self.probs) if request.entropy else None,
        )


def masked_scores(pair: tuple[Tensor, Tensor], modifiers: Modifiers, grid: Grid, allowed: Tensor | None) -> Tensor:
    """Scores of a region after all modifications, -inf where masked; see ``Rows.of``."""
    return _scores(modifiers, pair, grid, allowed, _may_break(*pair, modifiers))


def _scores(
    modifiers: Modifiers, pair: tuple[Tensor, Tensor], grid: Grid, allowed: Tensor | None, careful: bool, attended: Tensor | None = None
) -> Tensor:
    """Scores after all modifications, -inf where masked.

    ``careful`` keeps everything in a masked pair finite on the way, so that its derivative is 0 and not 0 * NaN. ``attended`` are the
    pairs that take from others, where they are fewer than those that are allowed a score.
    """
    q, k = pair
    hidden = None if allowed is None else ~allowed
    if modifiers.scoring is not None:
        scores = _own_scores(modifiers.scoring, q, k) if careful else _in_blocks(modifiers.scoring, q, k)
        scores = scores if hidden is None else scores.masked_fill(hidden, 0.0)
    else:
        scores = differentiable_products(q, k, allowed) if careful else q @ k.mT
    scores = scores.to(stat_dtype(q.dtype)) * modifiers.scale
    for mod in modifiers.score_mods:
        scores = (
            mod.masked(scores, grid, allowed if attended is None else attended)
            if isinstance(mod, Selective)
            else modified(mod, scores, grid)
        )
        scores = scores.masked_fill(hidden, 0.0) if careful and hidden is not None else scores
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def _in_blocks(scoring: Scoring, q: Tensor, k: Tensor) -> Tensor:
    """Scores of a scoring's own code, which may hold head_dim values for each of them, by blocks of queries."""
    rows = max(1, BLOCK // max(1, q.shape[0] * q.shape[1] * k.shape[2] * q.shape[3]))
    if q.shape[2] <= rows or captured(q):
        return scored(scoring, q, k)
    return torch.cat([scored(scoring, part, k) for part in q.split(rows, 2)], 2)


def _own_scores(scoring: Scoring, q: Tensor, k: Tensor) -> Tensor:
    """Scores of a scoring's own code, NaN for queries and keys that are not finite, which it does not get to see."""
    clean = _in_blocks(scoring, *(t.masked_fill(~t.isfinite(), 0.0) for t in (q, k)))
    broken = ~q.isfinite().all(-1)[..., :, None] | ~k.isfinite().all(-1)[..., None, :]
    return clean + torch.zeros_like(clean).masked_fill(broken, torch.nan)  # added, so that what arrives flows on


def softmax(problem: SoftmaxProblem) -> Tensor:
    """softmax(scale * scores + bias) over the allowed keys, in float32 or wider."""
    problem = _with_laid_out_gradients(problem)
    grid, modifiers = problem.grid, problem.modifiers
    scores = problem.scores.to(stat_dtype(problem.scores.dtype)) * modifiers.scale
    for mod in modifiers.score_mods:
        scores = modified(mod, scores, grid)
    allowed = None if modifiers.mask is None else modifiers.mask.allowed(grid)
    scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, -torch.inf) if _any(empty) else scores  # nothing flows through such a row, whatever arrives at it
    if problem.log:
        # The difference first: scores may be huge and equal.
        top = _top(scores)
        total = (scores - top).exp().sum(-1, keepdim=True).masked_fill(empty, 1.0)
        result = (scores - top - total.log()).masked_fill(empty, -torch.inf)
        result = result if allowed is None else result.masked_fill(~allowed, -torch.inf)
    else:
        probs, _ = _softmax(scores, None)
        result = probs if allowed is None else probs.masked_fill(~allowed, 0.0)
    if problem.uniform_empty and grid.shape[3]:
        uniform = torch.full((), 1.0 / grid.shape[3], dtype=result.dtype, device=result.device)
        result = torch.where(empty, uniform.log() if problem.log else uniform, result)
    result = _dropped(result, modifiers.dropout.lower(grid.device) if modifiers.dropout else None, grid)
    return laid_out_like(result.to(problem.scores.dtype), problem.scores)


_Problem = TypeVar("_Problem", AttentionProblem, SoftmaxProblem)


def _with_laid_out_gradients(problem: _Problem) -> _Problem:
    """torch's autograd chooses layouts of its own; under torch's transforms they stay."""
    if problem.transform is not None or not problem.requires_grad:
        return problem
    return problem.with_inputs(with_laid_out_gradients(problem.inputs))


def _any(condition: Tensor) -> bool:
    """Whether it holds anywhere; where values cannot be looked at, it may."""
    return captured(condition) or bool(condition.any())


def _may_break(q: Tensor, k: Tensor, modifiers: Modifiers) -> bool:
    """Whether a masked score, or a derivative of it, may come out as NaN or infinite; where values cannot be looked at, it may."""
    tensors = [t for mod in modifiers.score_mods for t in mod.tensors]
    if any(map(captured, (q, k, *tensors))) or modifiers.scoring is not None or any(not mod.is_tame for mod in modifiers.score_mods):
        return True
    return not has_finite_products(q.detach(), k.detach(), modifiers.scale) or not all(bool(t.detach().isfinite().all()) for t in tensors)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and lse of rows, with zeros and -inf where nothing is allowed."""
    if scores.shape[-1] == 0 and sinks is None:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    columns = scores if sinks is None else torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    top = _top(columns)
    weights = (columns - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    probs = weights[..., : scores.shape[-1]] / total.masked_fill(empty, 1.0)
    lse = (total.masked_fill(empty, 1.0).log() + top).masked_fill(empty, -torch.inf)
    return probs, lse[..., 0]


def _plain_softmax(scores: Tensor) -> Tensor:
    return _softmax(scores, None)[0]


def _top(scores: Tensor) -> Tensor:
    """The rows' maxima without gradient, [..., 1], 0 where there is none."""
    if scores.shape[-1] == 0:
        return scores.new_zeros((*scores.shape[:-1], 1))
    top = scores.detach().amax(-1, keepdim=True)
    return top.masked_fill(top == -torch.inf, 0.0)


def _dropped(probs: Tensor, dropout: KernelDropout | None, grid: Grid) -> Tensor:
    return probs if dropout is None else probs * keep_factor(dropout, grid, probs.dtype)


def _entropy(probs: Tensor) -> Tensor:
    """-sum p log p of each row; what is 0 adds nothing and gets no gradient."""
    some = probs.masked_fill(probs == 0, 1.0)
    return -(some * some.log()).sum(-1)


def _row_max(scores: Tensor) -> Tensor:
    return scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
