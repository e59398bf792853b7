"""Autograd Functions around the ops: what is saved, what is recomputed.

Saved: the inputs, the output, lse and row statistics, O(length) in all, and the probabilities only where the caller asked for them.
Double backward recomputes through eager on the same normal form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fused_attn import ops
from fused_attn.auxiliary import NOTHING, AuxOutput, AuxRequest
from fused_attn.backends import eager
from fused_attn.backends.base import AuxTensors, Forward, Incoming
from fused_attn.checks import is_traced
from fused_attn.lowering import LoweredAttention, LoweredSoftmax, Terms
from fused_attn.mask_rules import Pairs, Rule
from fused_attn.masks import Dense
from fused_attn.modifiers import Modifiers
from fused_attn.problem import AttentionProblem, SoftmaxProblem, UnsupportedError
from fused_attn.vocabulary import modifiers_of, with_parameters

_NO_OUTPUT = AuxOutput()


def attention(problem: AttentionProblem, backend: str) -> tuple[Tensor, AuxOutput]:
    """Runs a problem on a kernel backend, differentiably."""
    return attended(problem.lower(), problem.aux or NOTHING, backend, problem.requires_grad)


def attended(call: LoweredAttention, request: AuxRequest, backend: str, requires_grad: bool) -> tuple[Tensor, AuxOutput]:
    """Runs a call on a kernel backend, differentiably where a gradient is wanted."""
    call = ops.fitted(call, backend)
    if requires_grad and not _outlives_functions():
        given = _Attention.apply(request, backend, *_distinct(call.q, call.k, call.v, *_split(call.terms)))  # type: ignore[no-untyped-call]
        return (given, _NO_OUTPUT) if request is NOTHING else (given[0], AuxOutput(*given[1:]))
    if request is NOTHING:
        return ops.attention_out(call, backend), _NO_OUTPUT
    forward, extra = _forward(call, request, backend)
    return forward.out, _aux_output(forward, extra, request)


def _forward(call: LoweredAttention, request: AuxRequest, backend: str) -> tuple[Forward, AuxTensors]:
    return ops.attention_fwd_aux(call, request, backend) if request.needs_pass else (ops.attention_fwd(call, backend), AuxTensors())


def softmax(problem: SoftmaxProblem, backend: str) -> Tensor:
    """Runs a problem on a kernel backend, differentiably."""
    call = ops.fitted(problem.lower(), backend)
    if problem.requires_grad and not _outlives_functions():
        result: Tensor = _Softmax.apply((call.log, call.uniform_empty), backend, *_distinct(call.scores, *_split(call.terms)))  # type: ignore[no-untyped-call]
        return result
    return ops.softmax_fwd(call, backend)[0]


def _outlives_functions() -> bool:
    """Whether the call is recorded into a graph that keeps ops and forgets Functions; the ops differentiate themselves there."""
    # The flag and not ``is_exporting()``: Dynamo of torch 2.10 answers that with True whenever it compiles.
    return torch.compiler._is_exporting_flag or is_traced()


# Terms without tensors as they are, or the scalars of others and their mask's rules with the versions of the rules' tensors.
Static = Terms | tuple[tuple[int, ...], tuple[float, ...], str, tuple[Rule, ...], tuple[int, ...]]


def _split(terms: Terms) -> tuple[Any, ...]:
    """Terms as (static, sinks, q_offset, kv_start, kv_end, keep, seed, *mod tensors), static being what autograd need not see.

    Terms that hold no tensor stay whole, (static, None): taking them apart and putting them together again is a third of the host's time
    on the smallest problems (14 of 43 us at [1, 4, 32, 32]). A compiler wants scalars. The mask's rules are static: they hold tensors, but
    none that gets a gradient.
    """
    if not terms.holds_tensors and not torch.compiler.is_compiling():
        return terms, None
    rules = terms.mask.rules
    stored = replace(terms, mask=replace(terms.mask, rules=())) if rules else terms
    q_offset, kv_start, kv_end, keep, seed, sinks, mod_tensors, ints, floats, mods = stored.flatten()
    return (tuple(ints), tuple(floats), mods, rules, versions(held_by(rules))), sinks, q_offset, kv_start, kv_end, keep, seed, *mod_tensors


def held_by(rules: tuple[Rule, ...]) -> list[Any]:
    """What a mask's rules hold, tensors among it."""
    return tree_leaves([rule.keep if isinstance(rule, Pairs) else rule for rule in rules]) if rules else []


def versions(held: Sequence[Any]) -> tuple[int, ...]:
    """How often each tensor among these was modified: autograd looks after those that it saves, and these it does not."""
    return tuple([t._version for t in held if isinstance(t, Tensor) and not t.is_inference()])


def _distinct(*arguments: Any) -> tuple[Any, ...]:
    """The arguments, tensors as views while a compiler looks: it refuses one tensor in two places of a Function."""
    if not torch.compiler.is_compiling():
        return arguments
    return tuple(t.view_as(t) if isinstance(t, Tensor) else t for t in arguments)


def _join(static: Static, tensors: tuple[Tensor | None, ...]) -> Terms:
    if isinstance(static, Terms):
        return static
    sinks, q_offset, kv_start, kv_end, keep, seed, *mod_tensors = tensors
    *scalars, rules, seen = static
    if versions(held_by(rules)) != seen:
        raise RuntimeError(
            "a mask's tensors must be the same in forward and backward; got one that was modified in place in between. Pass a clone to the mask."
        )
    terms = Terms.unflatten((q_offset, kv_start, kv_end, keep, seed, sinks, mod_tensors, *scalars))
    return replace(terms, mask=replace(terms.mask, rules=rules)) if rules else terms


def _place(static: Static, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of (sinks, *mod tensors) in the places of ``_split``'s results."""
    return (None, None) if isinstance(static, Terms) else (None, grads[0], None, None, None, None, None, *grads[1:])


def _needs(wanted: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which of (sinks, *mod tensors) want a gradient, from that of every tensor of ``_split``."""
    return (wanted[0], *wanted[6:])


def _aux_output(forward: Forward, extra: AuxTensors, request: AuxRequest) -> AuxOutput:
    return AuxOutput(extra.probs, extra.scores, forward.lse if request.lse else None, extra.max_scores, extra.column_sums, extra.entropy)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, request: AuxRequest, backend: str, q: Tensor, k: Tensor, v: Tensor, static: Static, *tensors: Any) -> Any:
        call = LoweredAttention(q, k, v, _join(static, tensors))
        forward, extra = _forward(call, request, backend)
        ctx.static, ctx.backend = static, backend
        ctx.set_materialize_grads(False)
        if request is NOTHING:
            ctx.save_for_backward(q, k, v, *tensors, *forward, None)
            return forward.out
        aux = _aux_output(forward, extra, request)
        ctx.save_for_backward(q, k, v, *tensors, *forward, aux.probs)
        return forward.out, aux.probs, aux.scores, aux.lse, aux.max_scores, aux.column_sums, aux.entropy

    @staticmethod
    def backward(ctx: Any, dout: Any, dprobs: Any = None, dscores: Any = None, dlse: Any = None, *statistics: Any) -> Any:
        needs = (*ctx.needs_input_grad[2:5], *_needs(ctx.needs_input_grad[6:]))
        grads = _attention_gradients(ctx, (dout, dlse, dprobs, dscores, *statistics), needs)
        return None, None, *grads[:3], *_place(ctx.static, grads[3:])


def _attention_gradients(ctx: Any, arriving: tuple[Any, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """From the gradients of (out, lse, probs, scores, and maybe max_scores, column_sums, entropy) to those of (q, k, v, sinks, *mod tensors)."""
    first = next((g for g in arriving if g is not None), None)
    if first is None:
        return (None,) * len(needs)
    device = first.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _attention_gradients(ctx, arriving, needs)
    q, k, v, *tensors, out, lse, stats, probs = ctx.saved_tensors
    call = LoweredAttention(q, k, v, _join(ctx.static, tensors))
    dout, dlse, dprobs, dscores, *statistics = arriving
    incoming = Incoming(dout, dlse, dprobs, dscores, probs if dprobs is not None else None, *statistics)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _attention_through_eager(call, incoming, needs)
    return ops.attention_bwd(call, Forward(out, lse, stats), incoming, needs, ctx.backend)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, switches: tuple[bool, bool], backend: str, scores: Tensor, static: Static, *tensors: Any) -> Tensor:
        call = LoweredSoftmax(scores, _join(static, tensors), *switches)
        out, probs = ops.softmax_fwd(call, backend)
        ctx.save_for_backward(scores, *tensors, out if probs is None else probs)
        ctx.static, ctx.switches, ctx.backend = static, switches, backend
        return out

    @staticmethod
    def backward(ctx: Any, dout: Any) -> Any:
        needs = (ctx.needs_input_grad[2], *_needs(ctx.needs_input_grad[4:])[1:])
        grads = _softmax_gradients(ctx, dout, needs)
        return None, None, grads[0], *_place(ctx.static, (None, *grads[1:]))


def _softmax_gradients(ctx: Any, dout: Any, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """From the gradient of the result to those of (scores, *mod tensors)."""
    scores, *tensors, result = ctx.saved_tensors
    call = LoweredSoftmax(scores, _join(ctx.static, tensors), *ctx.switches)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _softmax_through_eager(call, dout, needs)
    return ops.softmax_bwd(call, result, dout, needs, ctx.backend)


# The ops by themselves: whoever runs a graph that holds one (torch.jit.trace, torch.export, make_fx) gets gradients too. Their arguments are
# the inputs, the flattened terms (sinks and modifications' tensors sixth and seventh), and what each op needs besides.


def _attention_fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *flat, backend = inputs
    ctx.backend = ops.backend_name(backend)
    ctx.static, *tensors = _split(Terms.unflatten(tuple(flat)))
    ctx.save_for_backward(q, k, v, *tensors, *output, None)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _attention_fwd_backward(ctx: Any, dout: Any, dlse: Any, _: Any) -> tuple[Any, ...]:
    return *_op_gradients(ctx, (dout, dlse, None, None)), None


def _attention_aux_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *flat, out, lse, stats, _, backend = inputs
    ctx.backend = ops.backend_name(backend)
    ctx.static, *tensors = _split(Terms.unflatten(tuple(flat)))
    ctx.save_for_backward(q, k, v, *tensors, out, lse, stats, output[0])
    ctx.set_materialize_grads(False)


def _attention_aux_backward(ctx: Any, dprobs: Any, dscores: Any, *statistics: Any) -> tuple[Any, ...]:
    return *_op_gradients(ctx, (None, None, dprobs, dscores, *statistics)), None, None, None, None, None


def _op_gradients(ctx: Any, arriving: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of q, k, v and the flattened terms."""
    wants = ctx.needs_input_grad
    dq, dk, dv, dsinks, *dmods = _attention_gradients(ctx, arriving, (*wants[:3], wants[8], *(wants[9] or ())))
    return dq, dk, dv, None, None, None, None, None, dsinks, dmods, None, None, None


def _softmax_fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, *flat, switches, backend = inputs
    ctx.backend = ops.backend_name(backend)
    terms = Terms.unflatten(tuple(flat))
    ctx.static, *tensors = _split(terms)
    ctx.switches = tuple(map(bool, switches))
    ctx.save_for_backward(scores, *tensors, output[1] if terms.dropout else output[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _softmax_fwd_backward(ctx: Any, dout: Any, _: Any) -> tuple[Any, ...]:
    wants = ctx.needs_input_grad
    needs = (wants[0], *(wants[7] or ()))
    dscores, *dmods = (None,) * len(needs) if dout is None else _softmax_gradients(ctx, dout, needs)
    return dscores, None, None, None, None, None, None, dmods, None, None, None, None, None


for _name in ("attention_fwd", "attention_aux", "softmax_fwd"):
    torch.library.register_autograd(
        f"fused_attn::{_name}", globals()[f"_{_name}_backward"], setup_context=globals()[f"_{_name}_setup"], lib=ops.library
    )


def _once_only(ctx: Any, *_: Any) -> Any:
    raise UnsupportedError(
        "a backward op must not be differentiated itself; got a gradient for what it returned. "
        "Call fused_attn.attention with create_graph=True, which recomputes through eager."
    )


for _name in ("attention_bwd", "softmax_bwd"):
    torch.library.register_autograd(f"fused_attn::{_name}", _once_only, lib=ops.library)


def _grad(
    outputs: tuple[Any, ...], arriving: tuple[Any, ...], inputs: tuple[Any, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of the outputs that something arrives at, None for the inputs that want none."""
    pairs = [(o, g) for o, g in zip(outputs, arriving, strict=True) if g is not None]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    grads = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    found = iter(grads)
    return tuple(next(found) if need else None for need in needs)


def _aliased(terms: Terms) -> Terms:
    """The same terms on fresh views of their parameters: one tensor passed twice must get its gradient once per place."""
    return with_parameters(terms, [None if t is None else t.view_as(t) for t in terms.parameters])


def _vocabulary(call: LoweredAttention | LoweredSoftmax) -> Modifiers:
    keep = call.terms.mask.dense(call.grid)
    return modifiers_of(call.terms, None if keep is None else Dense(keep))


def _attention_through_eager(call: LoweredAttention, incoming: Incoming, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    q, k, v = (t.view_as(t) for t in (call.q, call.k, call.v))
    call = LoweredAttention(q, k, v, _aliased(call.terms))
    arriving = (incoming.dprobs, incoming.dscores, incoming.dlse, *incoming.statistics)
    request = AuxRequest.of([t is not None for t in arriving], None if incoming.dscores is None else incoming.dscores.dtype)
    out, aux = eager.attention(AttentionProblem(call.q, call.k, call.v, _vocabulary(call), request))
    outputs = (out, aux.probs, aux.scores, aux.lse, aux.max_scores, aux.column_sums, aux.entropy)
    return _grad(outputs, (incoming.dout, *arriving), (call.q, call.k, call.v, *call.terms.parameters), needs)


def _softmax_through_eager(call: LoweredSoftmax, dout: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    call = replace(call, scores=call.scores.view_as(call.scores), terms=_aliased(call.terms))
    problem = SoftmaxProblem(call.scores, _vocabulary(call), call.log, call.uniform_empty)
    return _grad((eager.softmax(problem),), (dout,), (call.scores, *call.terms.parameters[1:]), needs)
