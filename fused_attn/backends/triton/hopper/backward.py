"""The one-pass backward on the host: what is allocated, launched and done again by the plain kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fused_attn.backends.base import Forward, Gradients, Incoming
from fused_attn.backends.triton import arguments
from fused_attn.backends.triton import attention_bwd as plain
from fused_attn.backends.triton.attention_bwd import Arriving, Rows
from fused_attn.backends.triton.launch import Through, itself, run
from fused_attn.layout import laid_out_like
from fused_attn.lowering import LoweredAttention
from fused_attn.score_mods import in_own_shape, on_device

from . import modifications
from .backward_kernel import _attention_bwd_hopper_kernel, dq_shape
from .backward_redo import redo_bias
from .backward_rows import FOLD, PANEL, _backward_dq_kernel, _backward_rows_kernel
from .backward_tile import Given
from .descriptors import Tiles
from .eligible import MAX_BACKWARD_DIM, UNIT, strides_reason
from .forward import kind
from .keep import mask_arguments
from .launch import launch
from .replay import Recording, again
from .tiles import BACKWARD, padded
from .visits import lists

KEYS = 128


def reasons(call: LoweredAttention) -> list[str]:
    """Why the backward of an eligible call runs on the plain kernels; empty if it does not."""
    found = modifications.reasons(arguments.scores(call.terms, call.grid, call.q.dtype))
    if max(call.q.shape[-1], call.v.shape[-1]) > MAX_BACKWARD_DIM:
        found.append(f"the one-pass backward has head sizes up to {MAX_BACKWARD_DIM}")
    return found


def attention_bwd(call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of (q, k, v, sinks, *modification tensors), None where not needed."""
    if incoming.dout is None or reasons(call):
        return plain.attention_bwd(call, forward, incoming, needs)
    if strides_reason(incoming.dout):
        incoming = replace(incoming, dout=incoming.dout.contiguous())
    key = _kind(call, forward, incoming)
    others: list[Tensor | None] = [None] * len(needs[3:])
    if key is not None:
        of_inputs = _started_again(call, forward, incoming, key)
    else:
        buffers = Buffers.of(call)
        arriving = Arriving.of(call, forward, incoming, buffers.rows)
        place, number = _written_bias(call, needs)
        dbias, *of_inputs = _OnePass(call, forward, incoming, arriving, buffers, place).run()
        others = list(plain.other_gradients(arriving, forward, (*needs[:number], False, *needs[number + 1 :])))
        if dbias is not None:
            (bias,) = on_device(call.terms.mods[place], call.grid).tensors
            others[number - 3] = in_own_shape((laid_out_like(dbias, bias),), call.terms.mods[place], call.grid)[0]
    dq, dk, dv = (t if need else None for t, need in zip(of_inputs, needs, strict=False))
    return dq, dk, dv, *others


class Buffers(NamedTuple):
    """What a backward writes: ``Rows``, and see ``_attention_bwd_hopper_kernel``."""

    delta: Tensor
    statistics: Tensor
    lse: Tensor
    minus: Tensor
    sums: Tensor
    # Heads that the pass leaves to others, and heads in which it found a NaN: apart, so that no CTA of a head decides differently.
    skipped: Tensor
    broke: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    @classmethod
    def of(cls, call: LoweredAttention) -> Buffers:
        """Room for a call's."""
        batch, heads, q_len, _ = call.shape
        rows = -(-q_len // KEYS) * KEYS

        def room(*sizes: int) -> Tensor:
            return call.q.new_empty(sizes, dtype=torch.float32)

        lse, minus = room(2, batch, heads, rows).unbind()
        sums = room(batch, heads, call.q.shape[-1] // PANEL.value, rows, PANEL.value)
        skipped, broke = call.q.new_zeros((2, batch, call.k.shape[1]), dtype=torch.int32).unbind()
        dq, dk, dv = (torch.empty_like(t) for t in (call.q, call.k, call.v))
        return cls(*Rows.of(call), lse, minus, sums, skipped, broke, dq, dk, dv)

    @property
    def rows(self) -> Rows:
        """What the plain passes read of each row."""
        return Rows(self.delta, self.statistics)


# As the forward's.
_kept: dict[tuple[Any, ...], Recording] = {}


def _kind(call: LoweredAttention, forward: Forward, incoming: Incoming) -> tuple[Any, ...] | None:
    """As ``forward.kind``, for a backward to which nothing but the output's gradient arrives and whose dq may be summed in any order."""
    key, dout = kind(call), incoming.dout
    more = (incoming.dlse, incoming.dprobs, incoming.dscores)
    if key is None or dout is None or any(t is not None for t in more) or torch.are_deterministic_algorithms_enabled():
        return None
    # What was saved may come back from elsewhere, at any address.
    aligned = forward.out.data_ptr() % UNIT == 0, forward.stats.data_ptr() % UNIT == 0
    given = (forward.out.stride(), forward.stats.stride(), dout.stride(), aligned)
    return *key, given, BACKWARD[max(padded(call.q.shape[-1]), padded(call.v.shape[-1])), "plain"]


def _started_again(call: LoweredAttention, forward: Forward, incoming: Incoming, key: tuple[Any, ...]) -> list[Tensor]:
    """dq, dk and dv of a call whose kind has a key."""
    assert incoming.dout is not None
    buffers = Buffers.of(call)

    def start(recording: Recording) -> None:
        arriving = Arriving.of(call, forward, incoming, buffers.rows, recording.of)
        _OnePass(call, forward, incoming, arriving, buffers, -1, recording).run()

    again(_kept, key, (call.q, call.k, call.v, incoming.dout, forward.out, forward.stats, *buffers), start)
    return [buffers.dq, buffers.dk, buffers.dv]


def _written_bias(call: LoweredAttention, needs: tuple[bool, ...]) -> tuple[int, int]:
    """The first bias with a gradient for every pair, which the pass writes as it goes: its place among modifications and in ``needs``.

    (-1, the number of needs) without one. All others are sums over batches, heads, rows or columns, in a fixed order by a pass of their own.
    """
    number = 4
    for place, mod in enumerate(call.terms.mods):
        tensors = on_device(mod, call.grid).tensors
        if len(tensors) == 1 and tensors[0].shape == call.shape and needs[number]:
            return place, number
        number += len(tensors)
    return -1, len(needs)


class _OnePass:
    """Buffers and arguments of one call."""

    def __init__(
        self,
        call: LoweredAttention,
        forward: Forward,
        incoming: Incoming,
        arriving: Arriving,
        room: Buffers,
        written: int,
        recording: Recording | None = None,
    ) -> None:
        self.call, self.forward, self.incoming, self.arriving, self.written = call, forward, incoming, arriving, written
        self.room = room
        self.launch: Any = launch if recording is None else recording.start
        self.through: Through = itself if recording is None else recording.of
        self.d, self.dv = padded(call.q.shape[-1]), padded(call.v.shape[-1])
        special = bool(call.terms.mods) or call.terms.dropout is not None or arriving.more_tiles
        self.config = BACKWARD[max(self.d, self.dv), "modified" if special else "plain"]
        self.score = modifications.fast(arguments.scores(call.terms, call.grid, call.q.dtype))
        # Tiles that nobody visits have no gradient.
        self.dbias = None if written < 0 else torch.zeros_like(on_device(call.terms.mods[written], call.grid).tensors[0])

    def run(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """The gradients of the bias that the pass writes, q, k and v."""
        room, sums = self.room, self.room.sums.flatten(2, 3)
        before = (self.forward.stats, self.arriving.delta[..., None], room.lse[..., None], room.minus[..., None], sums)
        self._per_row(_backward_rows_kernel, KEYS, before, (room.skipped,))
        self._main(room.dk, room.dv)
        self._per_row(_backward_dq_kernel, 64, (sums, room.dq), (room.skipped, room.broke))
        plain.products(self.arriving, (room.dq, room.dk, room.dv), room.skipped, self.through)
        if self.dbias is not None:
            redo_bias(self.arriving, room.skipped, self.dbias, self.written)
        return self.dbias, room.dq, room.dk, room.dv

    def _tile(self, block_q: int) -> arguments.Tile:
        call = self.call
        values = (block_q, KEYS, self.d, self.dv, call.q.shape[-1], call.v.shape[-1], 0, False)
        return arguments.Tile(*(tl.constexpr(v) for v in values))

    def _per_row(self, kernel: Any, block: int, matrices: tuple[Tensor, ...], flags: tuple[Tensor, ...]) -> None:
        batch, heads, q_len, _ = self.call.shape
        args = (*(arguments.matrix(t) for t in matrices), *flags, self.score, arguments.sizes(self.call), self._tile(block))
        run(self.through(kernel), -(-q_len // block) * batch * heads, self.call.q.device, args, {"num_warps": 4})

    def _main(self, dk: Tensor, dv: Tensor) -> None:
        call, (bm, stages, registers, early, held) = self.call, self.config
        batch, heads, q_len, kv_len = call.shape
        tile, form = self._tile(bm), call.terms.mask
        turns = ticket = met = None
        rows: tuple[Tiles, ...] | tuple[None, ...] = (None, None)
        mask = mask_arguments(call.terms, transposed=True)
        if torch.are_deterministic_algorithms_enabled():
            turns = call.q.new_zeros((batch, heads, -(-q_len // bm)), dtype=torch.int32)
            ticket = call.q.new_zeros(1, dtype=torch.int32)
        if form.kv_start is not None or form.kv_end is not None or form.keep is not None:
            met, spans = lists(call, mask, tile, turns is not None)
            if form.kv_start is not None or form.kv_end is not None:
                rows = tuple(Tiles(t, (1, bm), swizzled=False) for t in spans.unbind())
        in_tiles, bias = modifications.loaded_bias(call)
        biases: list[Tiles | None] = [None if t is None else Tiles(t, (1, 1, bm, KEYS)) for t in (bias, self.dbias)]
        read = any(mod.name == "bias" and place != in_tiles for place, mod in enumerate(call.terms.mods))
        leaves_in_tiles = self.dbias is not None and in_tiles == self.written and not strides_reason(self.dbias)
        if not leaves_in_tiles:
            biases[1] = None
        dprobs, dscores, dbias = (
            arguments.matrix(t) for t in (self.incoming.dprobs, self.incoming.dscores, None if leaves_in_tiles else self.dbias)
        )
        given = Given(dprobs, dscores, dbias, tl.constexpr(self.written))
        terms = (mask, self.score, arguments.dropout(call.terms, call.shape), arguments.sizes(call), tile)
        args = (self.room.skipped, self.room.broke, met, turns, ticket, given, *terms, stages, registers, early, held, read)
        self.launch(
            _attention_bwd_hopper_kernel,
            (-(-kv_len // KEYS) * batch * call.k.shape[1],),
            (*self._descriptors(dk, dv), *rows, *biases, *args),
            4,
        )

    def _sums_in_tiles(self) -> Tiles:
        """Panels of dq in lines of FOLD rows."""
        rows, columns = dq_shape(self.config.block_q, self.d)
        fold, panel = FOLD.value, PANEL.value
        return Tiles(self.room.sums.unflatten(3, (-1, fold)).flatten(4), (1, 1, columns // panel, rows // fold, fold * panel))

    def _descriptors(self, dk: Tensor, dv: Tensor) -> tuple[Tiles, ...]:
        call, bm, d, v = self.call, self.config.block_q, self.d, self.dv
        dout = self.incoming.dout
        assert dout is not None
        return (
            Tiles(call.q, (1, 1, bm, d)), Tiles(call.k, (1, 1, KEYS, d)), Tiles(call.v, (1, 1, KEYS, v)), Tiles(dout, (1, 1, bm, v)),
            self._sums_in_tiles(), Tiles(dk, (1, 1, 64, d)), Tiles(dv, (1, 1, 64, v)),
            Tiles(self.room.lse, (1, 1, bm), swizzled=False), Tiles(self.room.minus, (1, 1, bm), swizzled=False),
        )  # fmt: skip
