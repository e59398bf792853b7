"""Decoding's ops, and what they do on a backend that reads no pages: parts of the keys one after another, O(1) memory beside the results.

A backend with ``attention_paged`` reads keys where they lie. For any other, parts of bounded size are gathered from the pages, run as calls
of their own (``parts``) and put together by their lse (``merging``); what lies in one piece is one call and no copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_attn import backends, flops
from fused_attn.auxiliary import AuxRequest
from fused_attn.backends.base import AuxTensors
from fused_attn.batching import vmap_rule
from fused_attn.checks import can_look, captured
from fused_attn.layout import empty_out
from fused_attn.lowering import LoweredAttention, Range, Terms, stat_dtype
from fused_attn.merging import Merged
from fused_attn.ops import N_TERMS, backend_name, filled, library, optional, traced_name
from fused_attn.paged_aux import attention_aux_of_keys
from fused_attn.paged_call import LoweredPaged
from fused_attn.parts import terms_of

library.define(
    f"paged_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? block_table, {Terms.SCHEMA}, int num_splits, str backend) -> (Tensor out, Tensor lse)"
)
library.define(
    f"paged_attention_aux(Tensor q, Tensor k, Tensor? block_table, {Terms.SCHEMA}, Tensor? rows, Tensor? heads, int[] request, str backend)"
    " -> (Tensor probs, Tensor scores, Tensor max_scores, Tensor column_sums, Tensor entropy)"
)


def attention_fwd(call: LoweredPaged, backend: str) -> tuple[Tensor, Tensor]:
    """out [batch, heads, q_len, value_dim] and lse [batch, heads, q_len]; rows whose keys end beyond those that there are give NaN.

    Where values may be looked at the caller has looked, so that there are none such.
    """
    if captured(call.q):
        flops.announce()
        op = torch.ops.fused_attn.paged_attention_fwd
        out, lse = op(call.q, call.k, call.v, call.block_table, *_storable(call).flatten(), call.num_splits, traced_name(backend))
        return out, lse
    return _forward(call, backend)


def attention_aux(call: LoweredPaged, request: AuxRequest) -> AuxTensors:
    """What is asked for besides, of the rows and heads asked for: by the definition in parts of the keys, whatever the backend."""
    if not captured(call.q):
        return _auxiliary(call, request)
    flags, terms = request.flags, _storable(call).flatten()
    op, numbers = torch.ops.fused_attn.paged_attention_aux, list(request.numbers)
    tensors = op(call.q, call.k, call.block_table, *terms, request.rows, request.heads, numbers, traced_name(backends.EAGER))
    return AuxTensors(*optional(tensors, (*flags[:2], *flags[3:])))


def _storable(call: LoweredPaged) -> Terms:
    """The terms as an op's arguments can say them: the mask's rules written out."""
    return replace(call.terms, mask=call.terms.mask.as_tensors(call.grid))


def _forward(call: LoweredPaged, backend: str) -> tuple[Tensor, Tensor]:
    if call.terms.mask.rules and not getattr(backends.get(backend), "evaluates_rules", False):
        call = replace(call, terms=_storable(call))
    own = getattr(backends.get(backend), "attention_paged", None)
    if own is not None:
        out, lse = own(call)
        return out, lse
    if call.block_table is None and not chooses_by_values(call, backend):
        forward = backends.get(backend).attention_fwd(LoweredAttention(call.q, call.k, call.v, call.terms))
        return marked(call, forward.out, forward.lse)
    out, lse = empty_out(call.q, call.v.shape[-1]), call.q.new_zeros(call.shape[:3], dtype=stat_dtype(call.q.dtype))
    for batches, part in _sequences(call):
        merged = _merged(part, backend)
        out[batches] = merged.out  # type: ignore[assignment]
        if merged.lse is not None:
            lse[batches] = merged.lse
    return marked(call, out, lse)


def chooses_by_values(call: LoweredPaged, backend: str) -> bool:
    """Whether a call runs in plain torch operations on the CPU, which take another way where anything that they are given is not finite.

    What lies behind one sequence's keys would then change the last bits of the others. Such a backend keeps no row statistics.
    """
    return can_look(call.q) and backends.get(backend).stats_shape(LoweredAttention(call.q, call.k, call.v, call.terms)) == (0,)


def _auxiliary(call: LoweredPaged, request: AuxRequest) -> AuxTensors:
    found = [attention_aux_of_keys(part, request, _reach(part)) for _, part in _sequences(call)]
    return AuxTensors(*(None if ts[0] is None else torch.cat(ts) if len(ts) > 1 else ts[0] for ts in zip(*found, strict=True)))


def _sequences(call: LoweredPaged) -> Iterator[tuple[slice, LoweredPaged]]:
    """On the CPU each sequence by itself: it gathers what it reaches, whatever others do, and has the bits of a batch of one.

    All at once on devices, whose launches are what costs, and where a user's code wants its tensors whole.
    """
    batch, *rest = call.shape
    if not can_look(call.q) or batch < 2 or any(mod.layout is not None for mod in call.terms.mods):
        yield slice(0, batch), call
        return
    heads, queries, keys = ((0, n) for n in rest)
    for b in range(batch):
        one, table = slice(b, b + 1), call.block_table
        k, v = (call.k[one], call.v[one]) if table is None else (call.k, call.v)
        terms = terms_of(call.terms, call.grid, ((b, b + 1), heads, queries, keys))
        yield one, replace(call, q=call.q[one], k=k, v=v, block_table=None if table is None else table[one], terms=terms)


def _merged(call: LoweredPaged, backend: str) -> Merged:
    """The parts of the keys put together, in their order."""
    parts = list(_parts(call))
    # Parts round to the inputs' dtype what the whole would round once, so that several are computed in float32.
    dtype = stat_dtype(call.q.dtype) if len(parts) > 1 else call.q.dtype
    merged, bare = Merged(), replace(call.terms, sinks=None)
    if not parts:
        rows = call.shape[:3]
        lse = None if bare.normalizer is not None else call.q.new_full(rows, -torch.inf, dtype=stat_dtype(dtype))
        merged.add(call.q.new_zeros((*rows, call.v.shape[-1])), lse)
    for keys in parts:
        region = (*((0, n) for n in call.shape[:3]), keys)
        terms = bare if keys == (0, call.shape[3]) else terms_of(bare, call.grid, region)
        q, k, v = (t.to(dtype) for t in (call.q, call.of_keys(call.k, keys), call.of_keys(call.v, keys)))
        forward = backends.get(backend).attention_fwd(LoweredAttention(q, k, v, terms))
        merged.add(forward.out, None if bare.normalizer is not None else forward.lse)
    if call.terms.sinks is not None:
        merged.add_sinks(call.terms.sinks)
    return merged


def _parts(call: LoweredPaged) -> Any:
    """Parts of the keys that a row reaches; all of them at once where a user's code wants its tensors whole."""
    if any(mod.layout is not None for mod in call.terms.mods):
        return [(0, call.shape[3])] if call.shape[3] else []
    return call.parts_of_keys(_reach(call))


def _reach(call: LoweredPaged) -> Range:
    """The keys that any row may attend to by its interval; all of them where that would have to be looked up on a device."""
    if not can_look(call.q):
        return 0, call.shape[3]
    start, end = torch.broadcast_tensors(*call.terms.mask.row_intervals(call.grid))
    some = start < end
    return (int(start[some].min()), int(end[some].max())) if bool(some.any()) else (0, 0)


def marked(call: LoweredPaged, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh results with NaN in the rows of ``LoweredPaged.beyond``."""
    where = call.beyond
    if where is None:
        return out, lse
    return out.masked_fill_(where[:, None, :, None], torch.nan), lse.masked_fill_(where[:, None], torch.nan)


def _call(q: Tensor, k: Tensor, v: Tensor, rest: tuple[Any, ...]) -> tuple[LoweredPaged, tuple[Any, ...]]:
    """The call of an op's arguments, and those after its terms."""
    block_table, *flat = rest
    return LoweredPaged(q, k, v, block_table, Terms.unflatten(tuple(flat[:N_TERMS]))), tuple(flat[N_TERMS:])


def _paged_attention_fwd_impl(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    call, (num_splits, backend) = _call(q, k, v, rest)
    return _forward(replace(call, num_splits=num_splits), backend_name(backend))


def _paged_attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_out(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=stat_dtype(q.dtype))


def _paged_attention_aux_impl(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    call, (rows, heads, numbers, _) = _call(q, k, k, rest)
    request = replace(AuxRequest.from_numbers(numbers), rows=rows, heads=heads)
    return tuple(filled(q, _auxiliary(call, request)))


def _paged_attention_aux_fake(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    call, (rows, heads, numbers, _) = _call(q, k, k, rest)
    (batch, n_heads, q_len, kv_len), wanted = call.shape, AuxRequest.from_numbers(numbers)
    picked = (batch, n_heads if heads is None else heads.shape[0], q_len if rows is None else rows.shape[0], kv_len)
    dtype = stat_dtype(q.dtype)
    shapes = {
        "probs": (picked, q.dtype), "scores": (picked, wanted.scores_dtype or q.dtype), "max_scores": ((batch, n_heads, q_len), dtype),
        "column_sums": ((batch, n_heads, kv_len), dtype), "entropy": ((batch, n_heads, q_len), dtype),
    }  # fmt: skip
    return tuple(filled(q, tuple(q.new_empty(shape, dtype=kind) if getattr(wanted, n) else None for n, (shape, kind) in shapes.items())))


for _name in ("paged_attention_fwd", "paged_attention_aux"):
    library.impl(_name, globals()[f"_{_name}_impl"], "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_attn::{_name}", globals()[f"_{_name}_fake"], lib=library)
    _op = getattr(torch.ops.fused_attn, _name).default
    # Pages belong to no batch element, so that mapped slices do not fold into one.
    torch.library.register_vmap(f"fused_attn::{_name}", vmap_rule(_op, folds=False), lib=library)
