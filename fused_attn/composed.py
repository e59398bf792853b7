"""Calls that are made of several: rows and heads picked out of the probabilities, what empty rows give, selective attention.

Each is differentiable torch around calls of a backend's kernels, so that every backend has it, and its gradients are those of its parts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fused_attn import autograd, backends, ops, query_blocks
from fused_attn.auxiliary import AuxOutput, AuxRequest
from fused_attn.backends import eager
from fused_attn.checks import captured
from fused_attn.layout import laid_out_like
from fused_attn.masks import Dense
from fused_attn.modifiers import Modifiers
from fused_attn.picked import picked
from fused_attn.problem import AttentionProblem, SoftmaxProblem
from fused_attn.score_mods import Level
from fused_attn.selective import is_selective


def attention(problem: AttentionProblem, backend: str, is_free: bool = False) -> tuple[Tensor, AuxOutput]:
    """Runs a problem, differentiably; ``is_free`` says that the backend was not asked for by name, so that it may be left where it is slow."""
    if backend == backends.EAGER:
        has_kernels = is_free and problem.transform is None and not captured(problem.q)
        return eager.attention(problem, softmax=_fused_softmax if has_kernels else None)
    if problem.aux is not None and problem.aux.is_picked:
        return _with_picked_rows(problem, problem.aux, backend)
    if problem.empty_rows != "zero" and problem.shape[3]:
        return _with_empty_rows(problem, backend)
    if is_selective(problem.modifiers.score_mods):
        return query_blocks.attention(problem, backend)
    return autograd.attention(problem, backend)


def _fused_softmax(scores: Tensor) -> Tensor:
    """The masked softmax of the dense path, on whatever backend takes it; masked scores are -inf."""
    problem = SoftmaxProblem(scores, Modifiers(None, 1.0, 0))
    name = backends.resolve(problem, "auto")
    return eager.softmax(problem) if name == backends.EAGER else autograd.softmax(problem, name)


def _with_picked_rows(problem: AttentionProblem, request: AuxRequest, backend: str) -> tuple[Tensor, AuxOutput]:
    rest = replace(request, probs=False, scores=False, scores_dtype=None, rows=None, heads=None)
    kernel = getattr(backends.get(backend), "attention_picked", None)
    if kernel is None or problem.requires_grad or captured(problem.q) or problem.empty_rows != "zero":
        out, aux = attention(replace(problem, aux=rest if rest.names else None), backend)
        rows = picked(problem, request)
        return out, replace(aux, probs=rows.probs, scores=rows.scores)
    out, aux = attention(replace(problem, aux=replace(rest, lse=True)), backend)
    # Probabilities are those before dropout, which would draw a seed here.
    call = ops.fitted(replace(problem, modifiers=replace(problem.modifiers, dropout=None)).lower(), backend)
    found = kernel(call, aux.lse, request) or picked(problem, request)
    return out, replace(aux, probs=found.probs, scores=found.scores, lse=aux.lse if request.lse else None)


def _with_empty_rows(problem: AttentionProblem, backend: str) -> tuple[Tensor, AuxOutput]:
    """The call with zeros in rows without keys, and one in which those rows alone have keys: all of them, with equal scores."""
    uniform = problem.empty_rows == "uniform"
    problem = replace(problem, modifiers=_with_seed(problem.modifiers, problem.device), empty_rows="zero")
    request = problem.aux or AuxRequest()
    out, aux = attention(replace(problem, aux=replace(request, lse=True)), backend)
    assert aux.lse is not None
    empty = (aux.lse.detach() == -torch.inf)[..., None]
    aux = replace(aux, lse=aux.lse if request.lse else None)
    if not captured(out) and problem.device.type == "cpu" and not bool(empty.any()):
        return out, aux
    return _joined(empty, (out, aux), autograd.attention(_of_empty_rows(problem, empty, uniform), backend), problem.q)


def _of_empty_rows(problem: AttentionProblem, empty: Tensor, uniform: bool) -> AttentionProblem:
    """The call of the rows without keys: they attend to all of them alike, whatever the scores are."""
    request = problem.aux or AuxRequest()
    wanted = AuxRequest(probs=request.probs, column_sums=request.column_sums, entropy=request.entropy)
    modifiers = replace(problem.modifiers, mask=Dense(empty), sinks=None)
    if uniform:  # nothing flows to the scores, so there need not be any: products of one column of zeros
        # Contiguous: a last dimension of one element says nothing about q's order in memory, which the output follows.
        q, k = (t.new_zeros((*t.shape[:-1], min(1, t.shape[-1]))) for t in (problem.q, problem.k))
        modifiers = replace(modifiers, scale=1.0, score_mods=(), scoring=None)
        return replace(problem, q=q, k=k, modifiers=modifiers, aux=wanted)
    return replace(problem, modifiers=replace(modifiers, score_mods=(*modifiers.score_mods, Level())), aux=wanted)


def _joined(empty: Tensor, full: tuple[Tensor, AuxOutput], bare: tuple[Tensor, AuxOutput], q: Tensor) -> tuple[Tensor, AuxOutput]:
    """Results of the rows with keys and of those without; ``empty`` is [batch, heads, q_len, 1]."""
    (out, aux), (others, of_others) = full, bare

    def chosen(a: Tensor | None, b: Tensor | None, where: Tensor) -> Tensor | None:
        return a if a is None or b is None else torch.where(where, b, a)

    sums, more = aux.column_sums, of_others.column_sums
    return laid_out_like(torch.where(empty, others, out), q), replace(
        aux,
        probs=chosen(aux.probs, of_others.probs, empty),
        entropy=chosen(aux.entropy, of_others.entropy, empty[..., 0]),
        column_sums=sums if sums is None or more is None else sums + more,
    )


def _with_seed(modifiers: Modifiers, device: torch.device) -> Modifiers:
    """Modifiers whose dropout draws nothing any more, so that several calls remove the same probabilities."""
    if modifiers.dropout is None or modifiers.dropout.seed is not None:
        return modifiers
    return replace(modifiers, dropout=replace(modifiers.dropout, seed=modifiers.dropout.lower(device).seed))
