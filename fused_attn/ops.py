"""The compiler boundary: torch.library ops whose schemas carry the normal form, with fakes.

Kernels run behind these ops where a graph is being captured; plain eager calls go to the backend directly, because a Python op
costs about 13 us per call (measured on 2 CPU cores; torch SDPA: 7.5 us).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_attn import backends, fingerprint, flops, statistics
from fused_attn.auxiliary import AuxRequest
from fused_attn.backends.base import AuxTensors, Forward, Gradients, Incoming
from fused_attn.batching import is_batched, older_vmap_kernel, vmap_rule
from fused_attn.checks import captured
from fused_attn.layout import empty_out
from fused_attn.lowering import LoweredAttention, LoweredSoftmax, Terms, stat_dtype

N_TERMS = 10
# Switches are int[]: torch.jit.trace takes no list of bool.
library = torch.library.Library("fused_attn", "DEF")
library.define(f"attention_fwd(Tensor q, Tensor k, Tensor v, {Terms.SCHEMA}, str backend) -> (Tensor out, Tensor lse, Tensor stats)")
library.define(
    f"attention_aux(Tensor q, Tensor k, Tensor v, {Terms.SCHEMA}, Tensor out, Tensor lse, Tensor stats, int[] request, str backend)"
    " -> (Tensor probs, Tensor scores, Tensor max_scores, Tensor column_sums, Tensor entropy)"
)
library.define(
    f"attention_bwd(Tensor q, Tensor k, Tensor v, {Terms.SCHEMA}, Tensor out, Tensor lse, Tensor stats,"
    " Tensor? dout, Tensor? dlse, Tensor? dprobs, Tensor? dscores, Tensor? probs,"
    " Tensor? dmax_scores, Tensor? dcolumn_sums, Tensor? dentropy, int[] needs, str backend) -> Tensor[]"
)
library.define(f"softmax_fwd(Tensor scores, {Terms.SCHEMA}, int[] switches, str backend) -> (Tensor out, Tensor probs)")
library.define(
    f"softmax_bwd(Tensor scores, {Terms.SCHEMA}, Tensor result, Tensor dout, int[] switches, int[] needs, str backend) -> Tensor[]"
)


def traced_name(backend: str) -> str:
    """A backend's name as a graph holds it: with the code that captured it, so that no cache on disk gives other code's graph to this."""
    return f"{backend}@{fingerprint.PACKAGE}"


def backend_name(traced: str) -> str:
    """The backend that an op's last argument names."""
    return traced.partition("@")[0]


def _attention(args: tuple[Any, ...]) -> tuple[LoweredAttention, tuple[Any, ...]]:
    q, k, v, *rest, backend = args
    call = LoweredAttention(q, k, v, Terms.unflatten(tuple(rest[:N_TERMS])))
    return call, (*rest[N_TERMS:], backend_name(backend))


def _softmax(args: tuple[Any, ...], switches: Any) -> LoweredSoftmax:
    return LoweredSoftmax(args[0], Terms.unflatten(args[1 : 1 + N_TERMS]), *map(bool, switches))


def filled(like: Tensor, tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Op results cannot be None; a size-0 tensor stands for it."""
    return [like.new_empty(0) if t is None else t for t in tensors]


def optional(tensors: Any, wanted: Any) -> Gradients:
    """The inverse of ``filled``."""
    return tuple(t if want else None for t, want in zip(tensors, wanted, strict=True))


def _attention_fwd_impl(*args: Any) -> tuple[Tensor, ...]:
    call, (backend,) = _attention(args)
    out, lse, stats = backends.get(backend).attention_fwd(call)
    return out, lse, stats


def _attention_fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    call, (backend,) = _attention(args)
    dtype = stat_dtype(call.q.dtype)
    stats = call.q.new_empty(backends.get(backend).stats_shape(call), dtype=dtype)
    return empty_out(call.q, call.v.shape[-1]), call.q.new_empty(call.shape[:3], dtype=dtype), stats


def _attention_aux_impl(*args: Any) -> tuple[Tensor, ...]:
    call, (out, lse, stats, request, backend) = _attention(args)
    return tuple(filled(call.q, backends.get(backend).attention_aux(call, Forward(out, lse, stats), AuxRequest.from_numbers(request))))


def _attention_aux_fake(*args: Any) -> tuple[Tensor, ...]:
    call, (_, _, _, request, _) = _attention(args)
    (batch, heads, q_len, kv_len), wanted = call.shape, AuxRequest.from_numbers(request)
    rows = stat_dtype(call.q.dtype)
    return tuple(
        filled(
            call.q,
            AuxTensors(
                call.q.new_empty(call.shape) if wanted.probs else None,
                call.q.new_empty(call.shape, dtype=wanted.scores_dtype) if wanted.scores else None,
                call.q.new_empty((batch, heads, q_len), dtype=rows) if wanted.max_scores else None,
                call.q.new_empty((batch, heads, kv_len), dtype=rows) if wanted.column_sums else None,
                call.q.new_empty((batch, heads, q_len), dtype=rows) if wanted.entropy else None,
            ),
        )
    )


@contextmanager
def _differentiable() -> Iterator[None]:
    """A backend may differentiate a modification inside a tile, but a compiled graph runs its ops with autograd switched off."""
    with torch.no_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        yield


def _attention_bwd_impl(*args: Any) -> list[Tensor]:
    call, (out, lse, stats, *arriving, needs, backend) = _attention(args)
    with _differentiable():
        return filled(call.q, _gradients(call, Forward(out, lse, stats), Incoming(*arriving), tuple(map(bool, needs)), backend))


def _gradients(call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...], backend: str) -> Gradients:
    """The backend's gradients, and those of statistics that something arrives at."""
    if all(t is None for t in incoming.statistics):
        return backends.get(backend).attention_bwd(call, forward, incoming, needs)
    through_statistics = statistics.gradients(call, incoming, needs)
    if not incoming.reaches_kernels:
        return through_statistics
    through_kernels = backends.get(backend).attention_bwd(call, forward, incoming, needs)
    return tuple([a if b is None else b if a is None else a + b for a, b in zip(through_kernels, through_statistics, strict=True)])


def _attention_bwd_fake(*args: Any) -> list[Tensor]:
    call, (*_, needs, _) = _attention(args)
    inputs = (call.q, call.k, call.v, *call.terms.parameters)
    return filled(call.q, tuple(torch.empty_like(t) if need and t is not None else None for t, need in zip(inputs, needs, strict=True)))


def _softmax_fwd_impl(*args: Any) -> tuple[Tensor, ...]:
    call = _softmax(args, args[-2])
    return tuple(filled(call.scores, backends.get(backend_name(args[-1])).softmax_fwd(call)))


def _softmax_fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    call = _softmax(args, args[-2])
    return torch.empty_like(call.scores), call.scores.new_empty(call.shape if call.terms.dropout else 0)


def _softmax_bwd_impl(*args: Any) -> list[Tensor]:
    result, dout, switches, needs, backend = args[-5:]
    call = _softmax(args, switches)
    with _differentiable():
        return filled(call.scores, backends.get(backend_name(backend)).softmax_bwd(call, result, dout, tuple(map(bool, needs))))


def _softmax_bwd_fake(*args: Any) -> list[Tensor]:
    _, _, switches, needs, _ = args[-5:]
    call = _softmax(args, switches)
    inputs = (call.scores, *call.terms.parameters[1:])
    return filled(
        call.scores, tuple(torch.empty_like(t) if need and t is not None else None for t, need in zip(inputs, needs, strict=True))
    )


for _name in ("attention_fwd", "attention_aux", "attention_bwd", "softmax_fwd", "softmax_bwd"):
    library.impl(_name, globals()[f"_{_name}_impl"], "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_attn::{_name}", globals()[f"_{_name}_fake"], lib=library)
    _op = getattr(torch.ops.fused_attn, _name).default
    torch.library.register_vmap(f"fused_attn::{_name}", vmap_rule(_op), lib=library)
    library.impl(_name, older_vmap_kernel(_op), "Batched")


def _counted(name: str) -> Any:
    """An op whose work a FlopCounterMode in force counts."""
    flops.announce()
    return getattr(torch.ops.fused_attn, name)


_Call = TypeVar("_Call", LoweredAttention, LoweredSoftmax)


def _storable(call: _Call) -> _Call:
    """The call as an op's arguments can say it: the mask's rules written out."""
    mask = call.terms.mask
    return replace(call, terms=replace(call.terms, mask=mask.as_tensors(call.grid))) if mask.rules else call


def fitted(call: _Call, backend: str) -> _Call:
    """The call as the backend takes it: the mask's rules written out but for one that evaluates them."""
    return call if not call.terms.mask.rules or getattr(backends.get(backend), "evaluates_rules", False) else _storable(call)


def attention_fwd(call: LoweredAttention, backend: str) -> Forward:
    """Output, lse and row statistics."""
    if captured(call.q):
        call = _storable(call)
        return Forward(*_counted("attention_fwd")(call.q, call.k, call.v, *call.terms.flatten(), traced_name(backend)))
    return backends.get(backend).attention_fwd(call)


def attention_aux(call: LoweredAttention, forward: Forward, request: AuxRequest, backend: str) -> AuxTensors:
    """What else was asked for."""
    if not captured(call.q):
        return backends.get(backend).attention_aux(call, forward, request)
    call, flags = _storable(call), request.flags
    tensors = _counted("attention_aux")(
        call.q, call.k, call.v, *call.terms.flatten(), *forward, list(request.numbers), traced_name(backend)
    )
    return AuxTensors(*optional(tensors, (*flags[:2], *flags[3:])))


def attention_out(call: LoweredAttention, backend: str) -> Tensor:
    """The output alone."""
    alone = None if captured(call.q) else getattr(backends.get(backend), "attention_out", None)
    if alone is None:
        return attention_fwd(call, backend).out
    out: Tensor = alone(call)
    return out


def attention_fwd_aux(call: LoweredAttention, request: AuxRequest, backend: str) -> tuple[Forward, AuxTensors]:
    """Both; in one pass where the backend has such a pass and no graph is being captured, whose ops are one for each."""
    together = None if captured(call.q) else getattr(backends.get(backend), "attention_fwd_aux", None)
    if together is not None:
        found: tuple[Forward, AuxTensors] = together(call, request)
        return found
    forward = attention_fwd(call, backend)
    return forward, attention_aux(call, forward, request, backend)


def attention_bwd(call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...], backend: str) -> Gradients:
    """Gradients of q, k, v, the sinks and the modifications' tensors, None where not needed."""
    arriving = (incoming.dout, incoming.dlse, incoming.dprobs, incoming.dscores, incoming.probs, *incoming.statistics)
    if not captured(call.q) and not is_batched(*arriving):
        return _gradients(call, forward, incoming, needs, backend)
    call = _storable(call)
    tensors = _counted("attention_bwd")(
        call.q, call.k, call.v, *call.terms.flatten(), *forward, *arriving, list(map(int, needs)), traced_name(backend)
    )
    return optional(tensors, needs)


def softmax_fwd(call: LoweredSoftmax, backend: str) -> tuple[Tensor, Tensor | None]:
    """The result, and the probabilities before dropout where there is dropout."""
    if not captured(call.scores):
        return backends.get(backend).softmax_fwd(call)
    call, switches = _storable(call), [int(call.log), int(call.uniform_empty)]
    out, probs = torch.ops.fused_attn.softmax_fwd(call.scores, *call.terms.flatten(), switches, traced_name(backend))
    return out, probs if call.terms.dropout else None


def softmax_bwd(call: LoweredSoftmax, result: Tensor, dout: Tensor, needs: tuple[bool, ...], backend: str) -> Gradients:
    """Gradients of the scores and the bias, None where not needed."""
    if not captured(call.scores) and not is_batched(dout):
        return backends.get(backend).softmax_bwd(call, result, dout, needs)
    call, switches = _storable(call), [int(call.log), int(call.uniform_empty)]
    tensors = torch.ops.fused_attn.softmax_bwd(
        call.scores, *call.terms.flatten(), result, dout, switches, list(map(int, needs)), traced_name(backend)
    )
    return optional(tensors, needs)
