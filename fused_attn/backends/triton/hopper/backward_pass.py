"""The one-pass backward on the host: what is allocated, launched and done again by the plain kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fused_attn.backends.base import Forward, Gradients, Incoming, sink_gradient
from fused_attn.backends.triton import arguments
from fused_attn.backends.triton import launch as plain
from fused_attn.backends.triton.attention_bwd import _Arriving
from fused_attn.lowering import LoweredAttention

from .backward import _attention_bwd_hopper_kernel
from .backward_rows import _backward_dq_kernel, _backward_rows_kernel
from .backward_tile import Arriving
from .descriptors import Tiles
from .eligible import strides_reason
from .launch import launch


class BackwardConfig(NamedTuple):
    """Queries per tile, stages of their ring, registers of the second consumer's threads."""

    block_q: int
    stages: int
    registers: int


# By padded head size, and whether anything but a mask is between product and exponent: tiles of 128 queries spill then (up to 109 local
# accesses per trip at head size 64).
BACKWARD = {
    (64, False): BackwardConfig(128, 2, 240),
    (64, True): BackwardConfig(64, 2, 240),
    (128, False): BackwardConfig(64, 2, 240),
    (128, True): BackwardConfig(64, 2, 240),
}
KEYS = 128


def padded(dim: int) -> int:
    """The power of two from 64 on that a head size becomes."""
    return max(64, 1 << (dim - 1).bit_length())


def attention_bwd(call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of (q, k, v, sinks, *modification tensors), None where not needed, by ``incoming.dout`` and whatever else arrives."""
    arriving = _Arriving(call, forward, incoming)
    one = _OnePass(call, forward, incoming, arriving)
    dq, dk, dv = one.run()
    dsinks = sink_gradient(call, forward.stats, arriving.delta) if needs[3] else None
    return dq, dk, dv, dsinks


class _OnePass:
    """Buffers and arguments of one call."""

    def __init__(self, call: LoweredAttention, forward: Forward, incoming: Incoming, arriving: Any) -> None:
        self.call, self.forward, self.incoming, self.arriving = call, forward, incoming, arriving
        batch, heads, q_len, _ = call.shape
        self.d, self.dv = padded(call.q.shape[-1]), padded(call.v.shape[-1])
        special = bool(call.terms.mods) or call.terms.dropout is not None or arriving.more_tiles
        self.config = BACKWARD[max(self.d, self.dv), special]
        rows = -(-q_len // KEYS) * KEYS
        self.lse, self.minus = call.q.new_empty((2, batch, heads, rows), dtype=torch.float32).unbind()
        self.sums = call.q.new_empty(call.q.shape, dtype=torch.float32)
        # Heads that the pass leaves to others, and heads in which it found a NaN: apart, so that no CTA of a head decides differently.
        self.skipped, self.broke = call.q.new_zeros((2, batch, call.k.shape[1]), dtype=torch.int32).unbind()
        self.score = arguments.scores(call.terms, call.grid, call.q.dtype)

    def tile(self, block_q: int, block_kv: int) -> arguments.Tile:
        call = self.call
        values = (block_q, block_kv, self.d, self.dv, call.q.shape[-1], call.v.shape[-1], 0, False)
        return arguments.Tile(*(tl.constexpr(v) for v in values))

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        call = self.call
        dq, dk, dv = (torch.empty_like(t) for t in (call.q, call.k, call.v))
        self._per_row(_backward_rows_kernel, KEYS, (self.forward.stats, self.arriving.delta[..., None], self.lse[..., None], self.minus[..., None], self.sums), (self.skipped,))
        self._main(dk, dv)
        self._per_row(_backward_dq_kernel, 64, (self.sums, dq), (self.skipped, self.broke))
        return dq, dk, dv

    def _per_row(self, kernel: Any, block: int, matrices: tuple[Tensor, ...], flags: tuple[Tensor, ...]) -> None:
        batch, heads, q_len, _ = self.call.shape
        args = (*(arguments.matrix(t) for t in matrices), *flags, self.score, arguments.sizes(self.call), self.tile(block, KEYS))
        plain.run(kernel, -(-q_len // block) * batch * heads, self.call.q.device, args, {"num_warps": 4})

    def _main(self, dk: Tensor, dv: Tensor) -> None:
        call, (bm, stages, registers) = self.call, self.config
        batch, heads, q_len, kv_len = call.shape
        dout = self.incoming.dout
        assert dout is not None
        if strides_reason(dout):
            dout = dout.contiguous()
        turns = ticket = None
        if torch.are_deterministic_algorithms_enabled():
            turns = call.q.new_zeros((batch, heads, -(-q_len // bm)), dtype=torch.int32)
            ticket = call.q.new_zeros(1, dtype=torch.int32)
        d, v = self.d, self.dv
        descriptors = (
            Tiles(call.q, (1, 1, bm, d)), Tiles(call.k, (1, 1, KEYS, d)), Tiles(call.v, (1, 1, KEYS, v)), Tiles(dout, (1, 1, bm, v)),
            Tiles(self.sums, (1, 1, bm, d // 2)), Tiles(dk, (1, 1, 64, d)), Tiles(dv, (1, 1, 64, v)),
            Tiles(self.lse, (1, 1, bm), swizzled=False), Tiles(self.minus, (1, 1, bm), swizzled=False),
        )  # fmt: skip
        given = Arriving(*(arguments.matrix(t) for t in (self.incoming.dprobs, self.incoming.dscores)), None, tl.constexpr(-1))
        terms = (arguments.mask(call.terms, None), self.score, arguments.dropout(call.terms, call.shape), arguments.sizes(call), self.tile(bm, KEYS))
        args = (*descriptors, self.skipped, self.broke, None, turns, ticket, given, *terms, stages, registers)
        launch(_attention_bwd_hopper_kernel, (-(-kv_len // KEYS) * batch * call.k.shape[1],), args)
