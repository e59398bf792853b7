"""Attention by the CPU library: one parallel region for the forward with all that is given out besides, and one for the backward.

What the library knows is the normal form of ``csrc/cpu/params.h``; ``takes`` says of which calls that is all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.auxiliary import NOTHING, AuxRequest
from fused_attn.backends.base import AuxTensors, Forward, Gradients, Incoming, gradients_without_scores, sink_gradient
from fused_attn.backends.cpu import library
from fused_attn.backends.cpu.arguments import (
    NO_MATRIX,
    addressable,
    double,
    dropout_fields,
    ints,
    keeps_of,
    mask_fields,
    matrix,
)
from fused_attn.kernel_score import KernelScore
from fused_attn.layout import empty_out
from fused_attn.lowering import LoweredAttention
from fused_attn.normalizers import Sigmoid
from fused_attn.score_mods import ALiBi, Bias, Level, SoftCap
from fused_attn.scoring import Additive

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 512
# ``kMaxMods`` and ``enum ModKind``.
MAX_MODS = 8
KINDS = {Bias.name: 0, SoftCap.name: 1, ALiBi.name: 2, Level.name: 3}
_MOD = ints[2](0, 0) + 2 * NO_MATRIX + ints[2](0, 0)
_NO_MODS = MAX_MODS * _MOD


def takes(call: LoweredAttention) -> bool:
    """Whether the library computes the call; nothing that a compiler's fake tensors could not answer is asked."""
    terms, q = call.terms, call.q
    if not library.isa() or q.dtype not in DTYPES:
        return False
    sizes = (q.shape[3], call.v.shape[3])
    if not (1 <= min(sizes) and max(sizes) <= MAX_HEAD_DIM) or len(terms.mods) > MAX_MODS:
        return False
    if terms.normalizer is not None and terms.normalizer.name != Sigmoid.name:
        return False
    if terms.scoring is not None and terms.scoring.name != Additive.name:
        return False
    return all(mod.name in KINDS and mod.layout is None for mod in terms.mods) and keeps_of(terms.mask) is not None


def stats_shape(call: LoweredAttention) -> tuple[int, ...]:
    """Of the rows' maxima and sums, and where 16-bit outputs would cost the sinks' gradient its accuracy, the float32 output as well."""
    wide = call.terms.sinks is not None and call.q.dtype.itemsize < 4
    return (2 + call.v.shape[3] * wide, *call.shape[:3])


def _wide(forward: Forward) -> Tensor | None:
    """The float32 output [batch, heads, q_len, value_dim] in the statistics."""
    stats = forward.stats
    return stats[2:].view(*stats.shape[1:], -1) if stats.shape[0] > 2 else None


def attention_fwd(call: LoweredAttention, request: AuxRequest = NOTHING) -> tuple[Forward, AuxTensors]:
    """The output, lse, the rows' statistics, and what the request asks for."""
    q, (batch, heads, q_len, kv_len) = call.q, call.shape
    forward = Forward(
        empty_out(q, call.v.shape[3]),
        q.new_empty((batch, heads, q_len), dtype=torch.float32),
        q.new_empty(stats_shape(call), dtype=torch.float32),
    )
    aux = AuxTensors(
        q.new_empty(call.shape) if request.probs else None,
        q.new_empty(call.shape, dtype=request.scores_dtype) if request.scores else None,
        q.new_empty((batch, heads, q_len), dtype=torch.float32) if request.max_scores else None,
        q.new_empty((batch, heads, kv_len), dtype=torch.float32) if request.column_sums else None,
        q.new_empty((batch, heads, q_len), dtype=torch.float32) if request.entropy else None,
    )
    if q.numel() == 0 or kv_len == 0:
        return _without_scores(call, forward), AuxTensors(*(_blank(t, i) for i, t in enumerate(aux)))
    fields = _Fields(call)
    fields.run("attention_fwd", _Outputs(forward, aux, Incoming(None)))
    return forward, aux


def attention_bwd(call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of q, k, v, the sinks and the modifications' tensors; None where not needed."""
    if 0 in call.shape:
        return gradients_without_scores(call, incoming, needs)
    dq, dk, dv = (torch.empty_like(t) if need else None for t, need in zip((call.q, call.k, call.v), needs[:3], strict=True))
    delta = torch.empty_like(forward.lse) if needs[3] else None
    left = iter(needs[4:])
    grads = [_Gradient.of(call, entry, next(left) if entry.tensors else False) for entry in call.terms.entries]
    fields = _Fields(call, grads)
    outputs = _Outputs(forward, AuxTensors(), incoming, (dq, dk, dv), delta)
    if any(t is not None for t in (dq, dk, dv, delta)) or any(g.is_own for g in grads):
        fields.run("attention_bwd", outputs)
    for place, grad in enumerate(grads[len(grads) - len(call.terms.mods) :]):
        if grad.shared is not None:
            fields.run("attention_bwd_bias", outputs, place)
    dsinks = sink_gradient(call, forward.stats, delta) if delta is not None else None
    return dq, dk, dv, dsinks, *(grad.finished() for grad in grads if grad.tensor is not None)


def _without_scores(call: LoweredAttention, forward: Forward) -> Forward:
    forward.out.zero_()
    forward.lse.fill_(-torch.inf)
    forward.stats[0].fill_(-torch.inf)
    forward.stats[1].zero_()
    if call.terms.sinks is not None:
        forward.lse.copy_(call.terms.sinks[:, None])
        forward.stats[0].copy_(call.terms.sinks[:, None])
        forward.stats[1].fill_(1.0)
    return forward


def _blank(tensor: Tensor | None, place: int) -> Tensor | None:
    """An auxiliary output of a call without scores; max_scores are -inf."""
    return None if tensor is None else tensor.fill_(-torch.inf if place == 2 else 0.0)


@dataclass(slots=True)
class _Gradient:
    """Room for the gradient of one entry's tensor: of every pair, shared between heads or batches, or summed over keys or queries."""

    tensor: Tensor | None
    pairs: Tensor | None = None  # like the tensor
    shared: Tensor | None = None  # float32, in the tensor's shape
    rows: Tensor | None = None  # float32 [batch, heads, q_len, 1]
    columns: Tensor | None = None  # float32 [batch, heads, 1, kv_len]; of a weight [batch, heads, 1, head_dim]

    @classmethod
    def of(cls, call: LoweredAttention, entry: KernelScore, wanted: bool) -> _Gradient:
        tensor = entry.tensors[0] if entry.tensors else None
        if tensor is None or not wanted:
            return cls(tensor)
        batch, heads, q_len, kv_len = call.shape
        if entry.name == Additive.name:
            return cls(tensor, columns=call.q.new_empty((batch, heads, 1, call.q.shape[3]), dtype=torch.float32))
        if entry.name == ALiBi.name or tensor.shape[3] == 1:
            return cls(tensor, rows=call.q.new_zeros((batch, heads, q_len, 1), dtype=torch.float32))
        if tensor.shape[2] == 1:
            return cls(tensor, columns=call.q.new_empty((batch, heads, 1, kv_len), dtype=torch.float32))
        if tensor.shape[:2] == (batch, heads):
            return cls(tensor, pairs=torch.empty_like(tensor))
        return cls(tensor, shared=torch.empty_like(tensor, dtype=torch.float32, memory_format=torch.contiguous_format))

    @property
    def is_own(self) -> bool:
        """Whether attention_bwd makes it."""
        return any(t is not None for t in (self.pairs, self.rows, self.columns))

    def finished(self) -> Tensor | None:
        """The gradient in the tensor's shape, dtype and layout; None where it is not wanted."""
        if self.pairs is not None or self.tensor is None:
            return self.pairs
        sums = next((t for t in (self.shared, self.rows, self.columns) if t is not None), None)
        return None if sums is None else torch.empty_like(self.tensor).copy_(sums.sum_to_size(self.tensor.shape))

    @property
    def fields(self) -> bytes:
        """What ``struct Mod`` says of it."""
        pairs = self.shared if self.pairs is None else self.pairs
        return (NO_MATRIX if pairs is None else matrix(pairs)) + ints[2](_address(self.rows), _address(self.columns))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _optional(tensor: Tensor | None) -> bytes:
    return NO_MATRIX if tensor is None else matrix(tensor)


@dataclass(slots=True)
class _Outputs:
    """What a pass writes, and what it reads besides the call."""

    forward: Forward
    aux: AuxTensors
    incoming: Incoming
    grads: tuple[Tensor | None, ...] = (None, None, None)
    delta: Tensor | None = None


class _Fields:
    """``struct Attention`` of a call, whose tensors stay alive with it."""

    def __init__(self, call: LoweredAttention, grads: list[_Gradient] | None = None) -> None:
        terms, (batch, heads, q_len, kv_len) = call.terms, call.shape
        self.alive = [addressable(t) for t in (call.q, call.k, call.v)]
        q, k, v = self.alive
        sizes = ints[8](batch, heads, k.shape[1], q_len, kv_len, q.shape[3], v.shape[3], torch.get_num_threads())
        mask = mask_fields(terms.mask, terms.q_offset, keeps_of(terms.mask) or (), self.alive)
        mods = self._mods(terms.mods, None if grads is None else grads[len(terms.entries) - len(terms.mods) :])
        weight_grad = grads[0].columns if grads and terms.scoring is not None else None
        sigmoid = terms.normalizer
        sinks = None if terms.sinks is None else self._held(terms.sinks.view(1, heads, 1, 1))
        self.head = b"".join(
            (
                sizes,
                mask,
                double(terms.scale),
                mods,
                NO_MATRIX if terms.scoring is None else matrix(self._held(terms.scoring.tensors[0].float().contiguous())),
                ints[2](_address(weight_grad), sigmoid is not None) + double(sigmoid.scalars[0] if sigmoid else 0.0),
                _optional(sinks),
                dropout_fields(terms.dropout, call.shape),
                matrix(q),
                matrix(k),
                matrix(v),
            )
        )

    def _held(self, tensor: Tensor) -> Tensor:
        self.alive.append(addressable(tensor))
        return self.alive[-1]

    def _mods(self, mods: tuple[KernelScore, ...], grads: list[_Gradient] | None) -> bytes:
        if not mods:
            return ints[1](0) + _NO_MODS
        written = [ints[1](len(mods))]
        for i, mod in enumerate(mods):
            tensor = NO_MATRIX if not mod.tensors else matrix(self._held(mod.tensors[0]))
            scalar = double(mod.scalars[0] if mod.scalars else 0.0)
            written += [ints[1](KINDS[mod.name]), scalar, tensor, _MOD[-len(NO_MATRIX) - 16 :] if grads is None else grads[i].fields]
        return b"".join(written) + (MAX_MODS - len(mods)) * _MOD

    def run(self, name: str, outputs: _Outputs, place: int = 0) -> None:
        """Runs a pass of the library on the call."""
        (out, lse, stats), aux, incoming = outputs.forward, outputs.aux, outputs.incoming
        wide = _wide(outputs.forward)
        is_backward = name != "attention_fwd"
        arriving = [
            None if t is None else addressable(t)
            for t in (incoming.dout, None if incoming.dlse is None else incoming.dlse[..., None], incoming.dprobs, incoming.dscores)
        ]
        saved = incoming.probs
        packed = b"".join(
            (
                self.head,
                matrix(out if wide is None or not is_backward else wide),
                NO_MATRIX if is_backward else _optional(wide),
                ints[3](lse.data_ptr(), stats.data_ptr(), stats[1].data_ptr()),
                _optional(aux.probs),
                _optional(aux.scores),
                ints[3](_address(aux.max_scores), _address(aux.entropy), _address(aux.column_sums)),
                *map(_optional, arriving),
                _optional(saved),
                *map(_optional, outputs.grads),
                ints[2](_address(outputs.delta), place),
            )
        )
        library.run(name, packed)
