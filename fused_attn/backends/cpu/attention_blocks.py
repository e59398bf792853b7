"""Attention by the CPU library, in blocks of query rows where the mask has to be written out before the library reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from fused_attn.auxiliary import NOTHING, AuxRequest
from fused_attn.backends.base import AuxTensors, Forward, Gradients, Incoming
from fused_attn.backends.cpu import attention_native
from fused_attn.backends.cpu.arguments import keeps_of
from fused_attn.backends.cpu.blocks import terms_of_rows, written_blocks
from fused_attn.layout import laid_out_like
from fused_attn.lowering import LoweredAttention


def attention_out(call: LoweredAttention) -> Tensor:
    """The output alone."""
    return attention_native.attention_out(call) if _is_readable(call) else attention_fwd(call)[0].out


def attention_fwd(call: LoweredAttention, request: AuxRequest = NOTHING) -> tuple[Forward, AuxTensors]:
    """See ``attention_native.attention_fwd``."""
    if _is_readable(call):
        return attention_native.attention_fwd(call, request)
    forward, aux = attention_native.rooms(call, request)
    for rows, part in _parts(call):
        some, more = attention_native.attention_fwd(part, request)
        forward.out[:, :, rows] = some.out
        forward.lse[:, :, rows] = some.lse
        if forward.stats.shape[0] == 2:
            forward.stats[..., rows] = some.stats
        else:
            forward.stats[:2, ..., rows] = some.stats[:2]
            wide, part_wide = attention_native.wide_out(forward), attention_native.wide_out(some)
            assert wide is not None
            assert part_wide is not None
            wide[:, :, rows] = part_wide
        for name, whole, here in zip(AuxTensors._fields, aux, more, strict=True):
            if whole is None or here is None:
                continue
            if name != "column_sums":
                whole[:, :, rows] = here
            elif rows.start == 0:
                whole.copy_(here)
            else:
                whole += here
    return forward, aux


def attention_bwd(call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
    """See ``attention_native.attention_bwd``; what blocks share is summed in float32, in their order."""
    if _is_readable(call):
        return attention_native.attention_bwd(call, forward, incoming, needs)
    inputs = (call.q, call.k, call.v, *call.terms.parameters)
    by_rows = [True, False, False, False, *(t.shape[2] != 1 for entry in call.terms.entries for t in entry.tensors)]
    found = [_Joined(t, has_rows) for t, has_rows in zip(inputs, by_rows, strict=True)]
    for rows, part in _parts(call):
        grads = attention_native.attention_bwd(part, _forward_of(forward, rows), _incoming_of(incoming, rows), needs, is_part=True)
        for whole, grad in zip(found, grads, strict=True):
            whole.add(grad)
    return tuple(whole.finished() for whole in found)


class _Joined:
    """A gradient from those of the blocks: their rows one after another, or their sum."""

    def __init__(self, tensor: Tensor | None, has_rows: bool) -> None:
        self.tensor, self.has_rows, self.parts = tensor, has_rows, list[Tensor]()

    def add(self, grad: Tensor | None) -> None:
        if grad is None:
            return
        if self.has_rows or not self.parts:
            self.parts.append(grad)
        else:
            self.parts[0] += grad

    def finished(self) -> Tensor | None:
        """In the tensor's dtype and layout; None where nobody wants it."""
        if not self.parts or self.tensor is None:
            return None
        whole = torch.cat(self.parts, 2) if self.has_rows else self.parts[0]
        return laid_out_like(whole.to(self.tensor.dtype), self.tensor)


def _is_readable(call: LoweredAttention) -> bool:
    return keeps_of(call.terms.mask) is not None or 0 in call.shape


def _parts(call: LoweredAttention) -> Iterator[tuple[slice, LoweredAttention]]:
    grid = call.grid
    for rows, keep in written_blocks(call.terms.mask, grid):
        yield slice(*rows), replace(call, q=call.q[:, :, slice(*rows)], terms=terms_of_rows(call.terms, grid, rows, keep))


def _forward_of(forward: Forward, rows: slice) -> Forward:
    """Rows of what a forward left, as the forward of those rows alone would have left them."""
    stats, wide = forward.stats[:2, ..., rows], attention_native.wide_out(forward)
    if wide is not None:
        part = wide[:, :, rows]
        stats = torch.cat((stats, part.reshape(-1, *stats.shape[1:])))
    return Forward(forward.out[:, :, rows], forward.lse[:, :, rows].contiguous(), stats.contiguous())


def _incoming_of(incoming: Incoming, rows: slice) -> Incoming:
    arriving = [getattr(incoming, f.name) for f in fields(Incoming)]
    return Incoming(*(None if t is None else t[:, :, rows] for t in arriving))
