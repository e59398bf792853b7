"""Selective attention on any backend: blocks of queries one after another, each with what earlier ones took off the scores as a bias.

Between blocks only the sums over earlier queries stay, [batch, 1, 1, kv_len] each; backward recomputes a block at a time, the last first.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_attn import autograd
from fused_attn.auxiliary import NOTHING, AuxOutput, AuxRequest
from fused_attn.backends import eager
from fused_attn.checks import captured
from fused_attn.kernel_score import KernelScore
from fused_attn.layout import laid_out_like
from fused_attn.lowering import Grid, LoweredAttention, Terms, stat_dtype
from fused_attn.parts import terms_of
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import Bias
from fused_attn.selective import Selective, before
from fused_attn.vocabulary import modifiers_of, with_parameters

RESULTS = tuple(f.name for f in fields(AuxOutput))
# Queries of a block: its bias is 1/heads of the scores of as many rows, and the sums between blocks are 1/BLOCK of one head's scores.
BLOCK = 256


def attention(problem: AttentionProblem, backend: str) -> tuple[Tensor, AuxOutput]:
    """Runs a selective problem on a kernel backend, differentiably."""
    modifiers, request = problem.modifiers, problem.aux or NOTHING
    call = replace(problem, modifiers=replace(modifiers, score_mods=modifiers.score_mods[:-1])).lower()
    q_len, wants = call.shape[2], problem.requires_grad
    # A graph holds one block, so that it is right at other lengths.
    queries = (call.q,) if captured(call.q) else call.q.split(BLOCK, 2)
    parameters = [_split(t, q_len, len(queries)) for t in call.terms.parameters]
    carry = call.k.new_zeros((call.shape[0], 1, 1, call.shape[3]), dtype=stat_dtype(call.q.dtype))
    parts = []
    for index, q in enumerate(queries):
        block = _Block(call, index * BLOCK, q.shape[2], request, backend, wants)
        inputs = (q, call.k, call.v, carry, *(p[index] for p in parameters))
        if wants and len(queries) > 1:
            *results, carry = checkpoint(_Unmodified(block, inputs), *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            *results, carry = block.run(*inputs)
        parts.append(results)
    return joined(parts, call.q)


class _Unmodified:
    """A block that says so where any of its tensors was modified before backward runs it again; a checkpoint itself looks at none of them."""

    def __init__(self, block: _Block, inputs: tuple[Tensor | None, ...]) -> None:
        terms = block.call.terms
        dropout = None if terms.dropout is None else terms.dropout.seed
        held = (terms.q_offset, terms.mask.kv_start, terms.mask.kv_end, terms.mask.keep, dropout)
        self.block = block
        self.tensors = (*inputs, *held, *autograd.held_by(terms.mask.rules))
        self.versions = autograd.versions(self.tensors)

    def __call__(self, *inputs: Tensor | None) -> tuple[Any, ...]:
        if autograd.versions(self.tensors) != self.versions:
            raise RuntimeError(
                "the tensors of a Selective call must be the same in forward and backward; got one that was modified in place in between. Pass a clone."
            )
        return self.block.run(*inputs)


def _split(tensor: Tensor | None, q_len: int, count: int) -> tuple[Tensor | None, ...]:
    """A parameter's part of every block; one without a dimension of queries serves all of them."""
    if tensor is None or tensor.dim() != 4 or tensor.shape[2] != q_len or count == 1:
        return (tensor,) * count
    parts: tuple[Tensor, ...] = tensor.split(BLOCK, 2)
    return parts


def joined(parts: list[list[Any]], q: Tensor) -> tuple[Tensor, AuxOutput]:
    """Results of blocks of queries, [out, *auxiliary outputs] each: one after another along the queries, but for sums over them."""
    outs, *aux = zip(*parts, strict=True)
    of = dict(zip(RESULTS, aux, strict=True))
    joined: dict[str, Tensor] = {
        name: torch.stack(found).sum(0) if name == "column_sums" else torch.cat(found, 2)
        for name, found in of.items()
        if found[0] is not None
    }
    return laid_out_like(torch.cat(outs, 2), q), AuxOutput(**joined)


@dataclass(frozen=True)
class _Block:
    """The queries from ``start`` on, ``rows`` of them, of a call without its last modification."""

    call: LoweredAttention
    start: int
    rows: int
    request: AuxRequest
    backend: str
    requires_grad: bool

    def run(self, *inputs: Any) -> tuple[Any, ...]:
        """Output, auxiliary outputs and the sums that the next block begins with."""
        q, k, v, carry, *parameters = inputs
        terms = with_parameters(self._terms, parameters)
        part = LoweredAttention(q, k, v, terms)
        taken = self._taken(part)
        bias = KernelScore(Bias.name, (), (-(carry + before(taken)),))
        part = replace(part, terms=replace(terms, mods=(*terms.mods, bias)))
        out, aux = autograd.attended(part, self.request, self.backend, self.requires_grad)
        return out, *(getattr(aux, name) for name in RESULTS), carry + taken.sum(2, keepdim=True)

    @property
    def _terms(self) -> Terms:
        """The call's terms for these queries alone, which count from 0."""
        batches, heads, _, keys = self.call.grid.ranges
        return terms_of(self.call.terms, self.call.grid, (batches, heads, (self.start, self.start + self.rows), keys))

    def _taken(self, part: LoweredAttention) -> Tensor:
        """What each query takes off later ones, [batch, 1, rows, kv_len], by the definition on head 0 alone."""
        dtype, grid = stat_dtype(part.q.dtype), Grid((part.shape[0], 1, *part.shape[2:]), part.q.device, part.terms.q_offset)
        parameters = [t if t is None else t[:, :1] if t.dim() == 4 else t[:1] for t in part.terms.parameters]
        modifiers = modifiers_of(with_parameters(part.terms, parameters))
        allowed = part.terms.mask.dense(part.grid)
        first = None if allowed is None else allowed[:, :1]
        scores = eager.masked_scores((part.q[:, :1].to(dtype), part.k[:, :1].to(dtype)), modifiers, grid, first)
        return Selective().taken(
            scores, self.call.grid.at(*part.grid.ranges[:2], (self.start, self.start + self.rows), part.grid.ranges[3]), first
        )
