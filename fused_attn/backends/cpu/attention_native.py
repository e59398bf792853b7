"""Attention by the CPU library: one parallel region for the forward with all that is given out besides, and one for the backward.

What the library knows is the normal form of ``csrc/cpu/params.h``; ``takes`` says of which calls that is all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from struct import Struct

import torch
from torch import Tensor

from fused_attn.auxiliary import NOTHING, AuxRequest
from fused_attn.backends.base import AuxTensors, Forward, Gradients, Incoming, gradients_without_scores, sink_gradient
from fused_attn.backends.cpu import library
from fused_attn.backends.cpu.arguments import (
    DTYPES,
    NO_DROPOUT,
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
from fused_attn.lowering import KernelMask, LoweredAttention
from fused_attn.normalizers import Normalizer, Sigmoid
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import ALiBi, Bias, Level, SoftCap
from fused_attn.scoring import Additive, Scoring

MAX_HEAD_DIM = 512
LIMITS = f"the CPU library takes float32, float16 and bfloat16, head sizes to {MAX_HEAD_DIM}, and modifications, scorings and normalizers of the package"
# ``kMaxMods`` and ``enum ModKind``.
MAX_MODS = 8
KINDS = {Bias.name: 0, SoftCap.name: 1, ALiBi.name: 2, Level.name: 3}
_NO_GRADIENT = NO_MATRIX + ints[2](0, 0)
_MOD = ints[2](0, 0) + NO_MATRIX + _NO_GRADIENT
_NO_MODS = MAX_MODS * _MOD
_NOTHING = AuxTensors()


def takes(call: LoweredAttention) -> bool:
    """Whether the library computes the call; nothing that a compiler's fake tensors could not answer is asked."""
    terms = call.terms
    owners = (terms.scoring, terms.normalizer)
    if (
        not library.isa()
        or not _takes_sizes(call.q, call.v)
        or len(terms.mods) > MAX_MODS
        or (owners != (None, None) and not _takes_owners(*owners))
    ):
        return False
    return all(mod.name in KINDS and mod.layout is None for mod in terms.mods)


def takes_problem(problem: AttentionProblem) -> bool:
    """Whether it would compute a problem that is not in normal form yet, here or where it is built."""
    modifiers = problem.modifiers
    scoring = modifiers.scoring if modifiers.scoring is not None and not modifiers.scoring.lowers else None
    kernels = [name for mod in modifiers.score_mods for name in mod.kernels or (mod.name,)]
    kernels += [] if modifiers.scoring is None else modifiers.scoring.kernels
    return (
        _takes_sizes(problem.q, problem.v)
        and _takes_owners(scoring, modifiers.normalizer)
        and len(kernels) < MAX_MODS
        and all(name in KINDS for name in kernels)
    )


def _takes_sizes(q: Tensor, v: Tensor) -> bool:
    return q.dtype != torch.float64 and 1 <= q.shape[3] <= MAX_HEAD_DIM and 1 <= v.shape[3] <= MAX_HEAD_DIM


def _takes_owners(scoring: Scoring | KernelScore | None, normalizer: Normalizer | KernelScore | None) -> bool:
    """Of what is no dot product and no softmax."""
    return (scoring is None or scoring.name == Additive.name) and (normalizer is None or normalizer.name == Sigmoid.name)


def stats_shape(call: LoweredAttention) -> tuple[int, ...]:
    """Of the rows' maxima and sums, and where 16-bit outputs would cost the sinks' gradient its accuracy, the float32 output as well."""
    wide = call.terms.sinks is not None and call.q.dtype.itemsize < 4
    return (2 + call.v.shape[3] * wide, *call.shape[:3])


def wide_out(forward: Forward) -> Tensor | None:
    """The float32 output [batch, heads, q_len, value_dim] in the statistics."""
    stats = forward.stats
    return stats[2:].view(*stats.shape[1:], -1) if stats.shape[0] > 2 else None


def rooms(call: LoweredAttention, request: AuxRequest) -> tuple[Forward, AuxTensors]:
    """Room for what a forward leaves and for what is asked for besides."""
    q, (batch, heads, q_len, kv_len) = call.q, call.shape

    def room(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    forward = Forward(empty_out(q, call.v.shape[3]), room(batch, heads, q_len), room(*stats_shape(call)))
    if not request.needs_pass:
        return forward, _NOTHING
    return forward, AuxTensors(
        q.new_empty(call.shape) if request.probs else None,
        q.new_empty(call.shape, dtype=request.scores_dtype) if request.scores else None,
        room(batch, heads, q_len) if request.max_scores else None,
        room(batch, heads, kv_len) if request.column_sums else None,
        room(batch, heads, q_len) if request.entropy else None,
    )


def attention_out(call: LoweredAttention) -> Tensor:
    """The output alone; on the smallest problems room for statistics costs half as much as the kernel."""
    out = empty_out(call.q, call.v.shape[3])
    if 0 in call.shape:
        return out.zero_()
    held = _Fields(call)
    library.run("attention_fwd", held.head + matrix(out) + _OUTPUT_ALONE)
    return out


def attention_fwd(call: LoweredAttention, request: AuxRequest = NOTHING) -> tuple[Forward, AuxTensors]:
    """The output, lse, the rows' statistics, and what the request asks for."""
    forward, aux = rooms(call, request)
    if 0 in call.shape:
        return _without_scores(call, forward), AuxTensors(*(_blank(t, i) for i, t in enumerate(aux)))
    _Fields(call).run_forward(forward, aux)
    return forward, aux


def attention_bwd(
    call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...], is_part: bool = False
) -> Gradients:
    """Gradients of q, k, v, the sinks and the modifications' tensors; None where not needed.

    Args:
        call: the call.
        forward: what its forward left.
        incoming: what arrives.
        needs: which gradients are wanted, see ``base.Backend``.
        is_part: whether the call is one of several whose gradients are summed: they are float32, then.
    """
    if 0 in call.shape:
        return gradients_without_scores(call, incoming, needs)
    dtype = torch.float32 if is_part else None
    dq, dk, dv = (torch.empty_like(t, dtype=dtype) if need else None for t, need in zip((call.q, call.k, call.v), needs[:3], strict=True))
    delta = torch.empty_like(forward.lse) if needs[3] else None
    left = iter(needs[4:])
    grads = [_Gradient.of(call, entry, next(left) if entry.tensors else False) for entry in call.terms.entries]
    held = _Fields(call, grads)
    fields = held.with_backward(forward, incoming, (dq, dk, dv), delta)
    if any(needs[:4]) or any(g.is_own for g in grads):
        library.run("attention_bwd", fields + ints[1](0))
    for place, grad in enumerate(grads[len(grads) - len(call.terms.mods) :]):
        if grad.shared is not None:
            library.run("attention_bwd_bias", fields + ints[1](place))
    dsinks = sink_gradient(call, forward.stats, delta) if delta is not None else None
    return dq, dk, dv, dsinks, *(grad.finished(dtype) for grad in grads if grad.tensor is not None)


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

    def finished(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """The gradient in the tensor's shape, layout and dtype, or another one; None where it is not wanted."""
        if self.pairs is not None or self.tensor is None:
            return self.pairs
        sums = next((t for t in (self.shared, self.rows, self.columns) if t is not None), None)
        return None if sums is None else torch.empty_like(self.tensor, dtype=dtype).copy_(sums.sum_to_size(self.tensor.shape))

    @property
    def fields(self) -> bytes:
        """What ``struct Mod`` says of it."""
        pairs = self.shared if self.pairs is None else self.pairs
        return (NO_MATRIX if pairs is None else matrix(pairs)) + ints[2](_address(self.rows), _address(self.columns))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _optional(tensor: Tensor | None) -> bytes:
    return NO_MATRIX if tensor is None else matrix(tensor)


# What ``struct Attention`` says of auxiliary outputs, and of the backward, where there are none.
_NO_AUX = NO_MATRIX * 2 + ints[3](0, 0, 0)
_NO_BACKWARD = NO_MATRIX * 8 + ints[2](0, 0)
_OUTPUT_ALONE = NO_MATRIX + ints[3](0, 0, 0) + _NO_AUX + _NO_BACKWARD
_three = Struct("18q").pack


@lru_cache(maxsize=256)
def _fields_without_tensors(left: int | None, right: int | None, offset: int, scale: float) -> bytes:
    """Mask to dropout of ``struct Attention``; packed once, for it takes as long as the smallest problems."""
    mask = mask_fields(KernelMask(left, right), offset, (), [])
    return b"".join((mask, double(scale), ints[1](0), _NO_MODS, NO_MATRIX, ints[2](0, 0), double(0.0), NO_MATRIX, NO_DROPOUT))


class _Fields:
    """``struct Attention`` of a call, whose tensors stay alive with it."""

    def __init__(self, call: LoweredAttention, grads: list[_Gradient] | None = None) -> None:
        terms = call.terms
        q, k, v = self.alive = [addressable(call.q), addressable(call.k), addressable(call.v)]
        batch, heads, q_len, head_dim = q.shape
        _, kv_heads, kv_len, value_dim = v.shape
        dtype = DTYPES[q.dtype]
        sizes = ints[8](batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim, torch.get_num_threads())
        if terms.holds_tensors:
            of_terms = self._fields_of_terms(call, grads)
        else:
            assert isinstance(terms.q_offset, int)
            of_terms = _fields_without_tensors(terms.mask.left, terms.mask.right, terms.q_offset, terms.scale)
        inputs = _three(
            q.data_ptr(), *q.stride(), dtype, k.data_ptr(), *k.stride(), dtype, v.data_ptr(), *v.stride(), dtype,
        )  # fmt: skip
        self.head = sizes + of_terms + inputs

    def _fields_of_terms(self, call: LoweredAttention, grads: list[_Gradient] | None) -> bytes:
        terms = call.terms
        mods = self._mods(terms.mods, None if grads is None else grads[len(terms.entries) - len(terms.mods) :])
        weight_grad = grads[0].columns if grads and terms.scoring is not None else None
        sigmoid = terms.normalizer
        return b"".join(
            (
                mask_fields(terms.mask, terms.q_offset, keeps_of(terms.mask) or (), self.alive),
                double(terms.scale),
                mods,
                NO_MATRIX if terms.scoring is None else matrix(self._held(terms.scoring.tensors[0].float().contiguous())),
                ints[2](_address(weight_grad), sigmoid is not None),
                double(sigmoid.scalars[0] if sigmoid else 0.0),
                NO_MATRIX if terms.sinks is None else matrix(self._held(terms.sinks.view(1, -1, 1, 1))),
                dropout_fields(terms.dropout, call.shape),
            )
        )

    def _held(self, tensor: Tensor) -> Tensor:
        self.alive.append(addressable(tensor))
        return self.alive[-1]

    def _mods(self, mods: tuple[KernelScore, ...], grads: list[_Gradient] | None) -> bytes:
        written = [ints[1](len(mods))]
        for i, mod in enumerate(mods):
            tensor = NO_MATRIX if not mod.tensors else matrix(self._held(mod.tensors[0]))
            scalar = double(mod.scalars[0] if mod.scalars else 0.0)
            written += [ints[1](KINDS[mod.name]), scalar, tensor, _NO_GRADIENT if grads is None else grads[i].fields]
        return b"".join(written) + (MAX_MODS - len(mods)) * _MOD

    def _statistics(self, forward: Forward) -> bytes:
        lse, stats = forward.lse.data_ptr(), forward.stats.data_ptr()
        return ints[3](lse, stats, stats + 4 * forward.lse.numel())

    def run_forward(self, forward: Forward, aux: AuxTensors) -> None:
        """Fills the output, lse, statistics and what is asked for besides."""
        more = _NO_AUX
        if aux is not _NOTHING:
            addresses = (_address(aux.max_scores), _address(aux.entropy), _address(aux.column_sums))
            more = _optional(aux.probs) + _optional(aux.scores) + ints[3](*addresses)
        outputs = matrix(forward.out) + _optional(wide_out(forward)) + self._statistics(forward)
        library.run("attention_fwd", self.head + outputs + more + _NO_BACKWARD)

    def with_backward(self, forward: Forward, incoming: Incoming, grads: tuple[Tensor | None, ...], delta: Tensor | None) -> bytes:
        """All fields of a backward but the last, the place of a modification."""
        wide = wide_out(forward)
        dlse = None if incoming.dlse is None else incoming.dlse[..., None]
        arriving = [None if t is None else self._held(t) for t in (incoming.dout, dlse, incoming.dprobs, incoming.dscores, incoming.probs)]
        return b"".join(
            (
                self.head,
                matrix(forward.out if wide is None else wide),
                NO_MATRIX,
                self._statistics(forward),
                _NO_AUX,
                *map(_optional, arriving),
                *map(_optional, grads),
                ints[1](_address(delta)),
            )
        )
