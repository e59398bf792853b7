"""The definition: masks' and modifications' own meaning, plain torch operations, torch's autograd.

It shares no hand-written formula with what it checks but the products over allowed pairs, whose derivatives are those of a product. It runs
in any dtype including float64, follows every torch transform, and costs O(q_len * kv_len) memory.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from fused_attn.allowed_products import differentiable_products, differentiable_sum
from fused_attn.auxiliary import NOTHING, AuxOutput, AuxRequest
from fused_attn.checks import captured, has_finite_products
from fused_attn.dropout import keep_factor
from fused_attn.kernel_dropout import KernelDropout
from fused_attn.layout import laid_out_like, with_laid_out_gradients
from fused_attn.lowering import Grid, stat_dtype
from fused_attn.masks import Mask
from fused_attn.modifiers import Modifiers
from fused_attn.problem import AttentionProblem, SoftmaxProblem
from fused_attn.score_mods import modified
from fused_attn.scoring import Scoring, scored

# Elements that a scoring's own code may need at a time: 64 MB of float32.
BLOCK = 1 << 24


def attention(problem: AttentionProblem, dtype: torch.dtype | None = None) -> tuple[Tensor, AuxOutput]:
    """Attention as its formula reads: softmax(mods(scale * q k^T), over the allowed keys) v.

    Args:
        problem: the checked call.
        dtype: what the two products are computed in; float32 for narrower inputs by default. The inputs' own dtype gives the
            error that a plain torch implementation makes, which the error rule compares with.
    """
    dtype = dtype or stat_dtype(problem.q.dtype)
    problem = _with_laid_out_gradients(problem)
    grid, modifiers = problem.grid, problem.modifiers
    groups = problem.q.shape[1] // problem.k.shape[1] if problem.k.shape[1] else 1
    q, k, v = (t.to(dtype) for t in (problem.q, problem.k, problem.v))
    k, v = (t.repeat_interleave(groups, 1) if groups != 1 else t for t in (k, v))
    allowed = _allowed(modifiers.mask, grid)
    careful = _may_break(q, k, modifiers)
    scores = _scores(problem, (q, k), allowed, careful)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    is_plain = allowed is None and len(modifiers.score_mods) == 0 and modifiers.scoring is None
    if scores.shape[-1] and not (is_plain and captured(scores)) and _any(empty):
        # A row whose scores are all -inf counts as one without keys: nothing it holds may show.
        allowed = ~empty if allowed is None else allowed & ~empty
        allowed = allowed.expand(scores.shape)
        scores = _scores(problem, (q, k), allowed, careful)
    probs, lse = _softmax(scores, modifiers.sinks)
    probs = probs if allowed is None else probs.masked_fill(~allowed, 0.0)
    weights = _dropped(probs, modifiers.dropout.lower(grid.device) if modifiers.dropout else None, grid)
    out = differentiable_sum(weights.to(dtype), v, allowed)
    return laid_out_like(out.to(problem.q.dtype), problem.q), _aux(problem.aux or NOTHING, (scores, probs, lse), problem.q.dtype)


def _scores(problem: AttentionProblem, pair: tuple[Tensor, Tensor], allowed: Tensor | None, careful: bool) -> Tensor:
    """Scores after all modifications, -inf where masked.

    ``careful`` keeps everything in a masked pair finite on the way, so that its derivative is 0 and not 0 * NaN.
    """
    q, k = pair
    hidden = None if allowed is None else ~allowed
    if problem.modifiers.scoring is not None:
        scores = _own_scores(problem.modifiers.scoring, q, k) if careful else _in_blocks(problem.modifiers.scoring, q, k)
        scores = scores if hidden is None else scores.masked_fill(hidden, 0.0)
    else:
        scores = differentiable_products(q, k, allowed) if careful else q @ k.mT
    scores = scores.to(stat_dtype(q.dtype)) * problem.modifiers.scale
    for mod in problem.modifiers.score_mods:
        scores = modified(mod, scores, problem.grid)
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
    allowed = _allowed(modifiers.mask, grid)
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


def _allowed(mask: Mask | None, grid: Grid) -> Tensor | None:
    return None if mask is None else mask.allowed(grid)


def _any(condition: Tensor) -> bool:
    """Whether it holds anywhere; where values cannot be looked at, it may."""
    return captured(condition) or bool(condition.any())


def _may_break(q: Tensor, k: Tensor, modifiers: Modifiers) -> bool:
    """Whether a masked score, or a derivative of it, may come out as NaN or infinite; where values cannot be looked at, it may."""
    if captured(q) or captured(k) or modifiers.scoring is not None or any(not mod.is_tame for mod in modifiers.score_mods):
        return True
    tensors = (t for mod in modifiers.score_mods for t in mod.tensors)
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


def _top(scores: Tensor) -> Tensor:
    """The rows' maxima without gradient, [..., 1], 0 where there is none."""
    if scores.shape[-1] == 0:
        return scores.new_zeros((*scores.shape[:-1], 1))
    top = scores.detach().amax(-1, keepdim=True)
    return top.masked_fill(top == -torch.inf, 0.0)


def _dropped(probs: Tensor, dropout: KernelDropout | None, grid: Grid) -> Tensor:
    return probs if dropout is None else probs * keep_factor(dropout, grid, probs.dtype)


def _aux(request: AuxRequest, rows: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> AuxOutput:
    scores, probs, lse = rows
    fixed, shares = scores.detach(), probs.detach()
    return AuxOutput(
        probs=probs.to(dtype).contiguous() if request.probs else None,
        scores=scores.to(request.scores_dtype or dtype).contiguous() if request.scores else None,
        lse=lse if request.lse else None,
        max_scores=_row_max(fixed) if request.max_scores else None,
        column_sums=shares.sum(-2) if request.column_sums else None,
        entropy=torch.special.entr(shares).sum(-1) if request.entropy else None,
    )


def _row_max(scores: Tensor) -> Tensor:
    return scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
