"""Whole rows of keys on every rank (all-gather), or whole sequences of some heads (Ulysses, arXiv 2309.14509): plain attention in between."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fused_attn import autograd, query_blocks
from fused_attn.auxiliary import NOTHING, AuxOutput
from fused_attn.distributed.plan import Plan
from fused_attn.distributed.traffic import all_to_all, gathered
from fused_attn.layout import laid_out_like
from fused_attn.lowering import LoweredAttention, stat_dtype
from fused_attn.parts import terms_of
from fused_attn.problem import UnsupportedError


class _Gathered(torch.autograd.Function):
    """[ranks, ...] of a tensor that each rank has another of; a gradient's parts go to their owners, who add them up in rank order."""

    @staticmethod
    def forward(ctx: Any, group: Any, tensor: Tensor) -> Tensor:
        ctx.group, ctx.dtype = group, tensor.dtype
        return torch.stack(gathered(group, tensor))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        parts = all_to_all(ctx.group, list(grad.unbind()))
        return None, torch.stack(parts).to(stat_dtype(ctx.dtype)).sum(0).to(ctx.dtype)


class _Exchanged(torch.autograd.Function):
    """The i-th of [ranks, ...] to rank i; gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, group: Any, tensor: Tensor) -> Tensor:
        ctx.group = group
        return torch.stack(all_to_all(group, list(tensor.unbind())))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        return None, torch.stack(all_to_all(ctx.group, list(grad.unbind())))


def _whole(plan: Plan, tensor: Tensor) -> Tensor:
    """All ranks' rows [..., length, dim] of a tensor, in order."""
    parts: Tensor = _Gathered.apply(plan.group, tensor)  # type: ignore[no-untyped-call]
    return plan.shards.whole(list(parts.unbind()))


def gather_attention(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, AuxOutput]:
    """Own queries against all keys, which are gathered first."""
    k, v = _whole(plan, k), _whole(plan, v)
    parts = []
    for rows, terms in zip(q.tensor_split(len(plan.chunk_terms), 2), plan.chunk_terms, strict=True):
        out, aux = _attended(plan, LoweredAttention(rows, k, v, terms))
        parts.append([out, *(getattr(aux, f.name) for f in fields(aux))])
    return query_blocks.joined(parts, q)


def _attended(plan: Plan, call: LoweredAttention) -> tuple[Tensor, AuxOutput]:
    inputs = (call.q, call.k, call.v, *call.terms.parameters)
    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return autograd.attended(call, plan.request or NOTHING, plan.backend, wants)


def heads_attention(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, AuxOutput]:
    """Some heads on whole sequences: heads and rows change places before and after.

    Raises:
        UnsupportedError: heads cannot be shared out among the ranks.
    """
    ranks, (batch, heads, length, _) = plan.shards.ranks, plan.grid.shape
    kv_heads = k.shape[1]
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise UnsupportedError(
            f"method='heads' needs heads that {ranks} ranks divide, and key heads that they divide or that divide them; got {heads} and {kv_heads}. "
            "Use method='ring' or 'gather'."
        )
    if plan.request is not None and plan.request.column_sums:
        raise UnsupportedError(
            "method='heads' does not give column_sums, whose rows are on other ranks; got a request for them. Use 'gather'."
        )
    if kv_heads % ranks:
        k, v = (t.repeat_interleave(ranks // kv_heads, 1) for t in (k, v))
    size = heads // ranks
    mine = (plan.rank * size, (plan.rank + 1) * size)
    kept = iter(plan.own_rows)
    mods = [replace(m, tensors=tuple([_whole(plan, t) if next(kept) else t for t in m.tensors])) for m in plan.terms.mods]
    terms = terms_of(replace(plan.terms, mods=tuple(mods)), plan.grid, ((0, batch), mine, (0, length), (0, length)))
    out, aux = _attended(plan, LoweredAttention(_to_heads(plan, q), _to_heads(plan, k), _to_heads(plan, v), terms))
    return laid_out_like(_to_rows(plan, out), q), aux.mapped(lambda _, t: _to_rows(plan, t))


def _to_heads(plan: Plan, tensor: Tensor) -> Tensor:
    """[batch, heads, own rows, dim] to [batch, heads / ranks, length, dim]."""
    parts: Tensor = _Exchanged.apply(plan.group, torch.stack(tensor.chunk(plan.shards.ranks, 1)))  # type: ignore[no-untyped-call]
    return plan.shards.whole(list(parts.unbind()))


def _to_rows(plan: Plan, tensor: Tensor) -> Tensor:
    """[batch, heads / ranks, length, ...] to [batch, heads, own rows, ...]."""
    rows = torch.stack([plan.shards.of(tensor, rank) for rank in range(plan.shards.ranks)])
    parts: Tensor = _Exchanged.apply(plan.group, rows)  # type: ignore[no-untyped-call]
    return torch.cat(list(parts.unbind()), 1)
