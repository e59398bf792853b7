"""The definition: masks' and modifications' own meaning, plain torch operations, torch's autograd.

It shares no hand-written formula with what it checks, runs in any dtype including float64, and follows every torch transform.
It costs O(q_len * kv_len) memory.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from fused_attn.auxiliary import NOTHING, AuxOutput, AuxRequest
from fused_attn.checks import captured
from fused_attn.dropout import keep_factor
from fused_attn.layout import laid_out_like, with_laid_out_gradients
from fused_attn.lowering import Grid, KernelDropout, stat_dtype
from fused_attn.masks import Mask
from fused_attn.problem import AttentionProblem, SoftmaxProblem
from fused_attn.score_mods import modified
from fused_attn.scoring import scored


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
    scores = _scores(problem, q, k, allowed).to(stat_dtype(dtype))
    if allowed is not None and modifiers.score_mods:  # a modification may give NaN where nobody attends: nothing must flow back from there
        scores = scores.masked_fill(~allowed, 0.0)
    for mod in modifiers.score_mods:
        scores = modified(mod, scores, grid)
    scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    probs, lse = _softmax(scores, modifiers.sinks)
    probs = probs if allowed is None else probs.masked_fill(~allowed, 0.0)
    weights = _dropped(probs, modifiers.dropout.lower(grid.device) if modifiers.dropout else None, grid)
    out = _weighted_values(weights.to(dtype), v, allowed)
    return laid_out_like(out.to(problem.q.dtype), problem.q), _aux(problem.aux or NOTHING, (scores, probs, lse), problem.q.dtype)


def softmax(problem: SoftmaxProblem) -> Tensor:
    """softmax(scale * scores + bias) over the allowed keys, in float32 or wider."""
    problem = _with_laid_out_gradients(problem)
    grid, modifiers = problem.grid, problem.modifiers
    scores = problem.scores.to(stat_dtype(problem.scores.dtype)) * modifiers.scale
    for mod in modifiers.score_mods:
        scores = modified(mod, scores, grid)
    allowed = _allowed(modifiers.mask, grid)
    scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    probs, lse = _softmax(scores, None)
    empty = (lse == -torch.inf)[..., None]
    if problem.log:
        result = (scores - lse.masked_fill(empty[..., 0], 0.0)[..., None]).masked_fill(empty, -torch.inf)
        result = result if allowed is None else result.masked_fill(~allowed, -torch.inf)
    else:
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


def _is_finite(tensor: Tensor) -> bool:
    """Whether the plain product is safe; under a transform or compilation, where values cannot be looked at, it is not."""
    if captured(tensor) or torch._C._are_functorch_transforms_active():
        return False
    return bool(tensor.detach().isfinite().all())


def _scores(problem: AttentionProblem, q: Tensor, k: Tensor, allowed: Tensor | None) -> Tensor:
    """Scores before the modifications, where a NaN or infinity in a key reaches only the rows that may attend to it."""
    scoring = problem.modifiers.scoring
    if scoring is None:
        return _products(q, k, allowed).to(stat_dtype(q.dtype)) * problem.modifiers.scale
    if allowed is None or _is_finite(k):
        return scored(scoring, q, k)
    clean = scored(scoring, q, k.masked_fill(~k.isfinite(), 0.0))
    return clean.masked_fill(~k.isfinite().all(-1)[..., None, :], torch.nan)


def _products(q: Tensor, k: Tensor, allowed: Tensor | None) -> Tensor:
    """q k^T where a NaN or infinity in a key reaches only the rows that may attend to it, forward and backward."""
    if allowed is None or _is_finite(k):
        return q @ k.mT
    broken = ~k.isfinite().all(-1)[..., None, :]
    clean = q @ k.masked_fill(~k.isfinite(), 0.0).mT
    return clean + torch.zeros_like(clean).masked_fill(broken, torch.nan)


def _weighted_values(weights: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """weights v where a NaN or infinity in a value reaches only the rows that may attend to it, forward and backward."""
    if allowed is None or _is_finite(v):
        return weights @ v
    clean = weights @ v.masked_fill(~v.isfinite(), 0.0)
    reached = allowed.expand(weights.shape).to(v.dtype) @ (~v.isfinite()).to(v.dtype) > 0
    return torch.where(reached, weights @ v, clean)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and lse of rows, with zeros and -inf where nothing is allowed."""
    if scores.shape[-1] == 0 and sinks is None:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    columns = scores if sinks is None else torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    top = columns.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (columns - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    probs = weights[..., : scores.shape[-1]] / total.masked_fill(empty, 1.0)
    lse = (total.masked_fill(empty, 1.0).log() + top).masked_fill(empty, -torch.inf)
    return probs, lse[..., 0]


def _dropped(probs: Tensor, dropout: KernelDropout | None, grid: Grid) -> Tensor:
    return probs if dropout is None else probs * keep_factor(dropout, grid, probs.dtype)


def _aux(request: AuxRequest, rows: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> AuxOutput:
    scores, probs, lse = rows
    fixed, shares = scores.detach(), probs.detach()
    return AuxOutput(
        probs=probs.to(dtype).contiguous() if request.probs else None,
        scores=scores.to(dtype).contiguous() if request.scores else None,
        lse=lse if request.lse else None,
        max_scores=_row_max(fixed) if request.max_scores else None,
        column_sums=shares.sum(-2) if request.column_sums else None,
        entropy=torch.special.entr(shares).sum(-1) if request.entropy else None,
    )


def _row_max(scores: Tensor) -> Tensor:
    return scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
