"""Masked softmax on the CPU library: what it takes, and its calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fused_attn.backends.cpu import library
from fused_attn.backends.cpu.arguments import (
    DTYPES,
    NO_MATRIX,
    addressable,
    double,
    dropout_fields,
    ints,
    keeps_of,
    mask_fields,
    matrix,
)
from fused_attn.backends.cpu.blocks import terms_of_rows, written_blocks
from fused_attn.lowering import LoweredSoftmax, Range

LIMITS = "the CPU library takes float32, float16 and bfloat16"


def takes(call: LoweredSoftmax) -> bool:
    """Whether the library is there and computes the call: in float32, so neither scores nor bias may be float64."""
    if library.load() is None or 0 in call.scores.shape:
        return False
    return all(t.dtype in DTYPES and t.dtype != torch.float64 for t in (call.scores, *_biases(call)))


def softmax_fwd(call: LoweredSoftmax) -> tuple[Tensor, Tensor | None]:
    """The result, and the probabilities before dropout where there is dropout; see ``base.Backend``."""
    out = torch.empty_like(call.scores)
    probs = call.scores.new_empty(call.shape) if call.terms.dropout else None
    for rows, part in _parts(call):
        x = addressable(part.scores)
        results = matrix(x) + matrix(_rows(out, rows)) + (NO_MATRIX if probs is None else matrix(_rows(probs, rows)))
        _run("fwd", part, results + NO_MATRIX * 4, [x])
    return out, probs


def softmax_bwd(call: LoweredSoftmax, result: Tensor, dout: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of the scores and of the bias, from the probabilities before dropout (or their logarithms)."""
    dscores = torch.empty_like(call.scores) if needs[0] else None
    biases = _biases(call)
    dbias = _room_of(biases[0], call) if any(needs[1:]) else None
    dout, result = addressable(dout), addressable(result)
    for rows, part in _parts(call):
        x, summed = addressable(part.scores), _room_of_part(dbias, rows)
        fields = (
            matrix(x), NO_MATRIX * 2, matrix(_rows(result, rows)), matrix(_rows(dout, rows)),
            NO_MATRIX if dscores is None else matrix(_rows(dscores, rows)),
            NO_MATRIX if summed is None else matrix(summed),
        )  # fmt: skip
        _run("bwd", part, b"".join(fields), [x])
        if summed is not None and rows is not None and dbias is not None and dbias.shape[2] == 1:
            dbias = summed if rows[0] == 0 else dbias.add_(summed)
    return dscores, *(None if dbias is None else dbias.to(t.dtype) for t in biases)


def _biases(call: LoweredSoftmax) -> list[Tensor]:
    return [t for m in call.terms.mods for t in m.tensors]


def _room_of(bias: Tensor, call: LoweredSoftmax) -> Tensor:
    """Room for the bias' gradient: in float32 where several scores share an element."""
    return torch.empty_like(bias, dtype=bias.dtype if bias.shape == call.shape else torch.float32)


def _room_of_part(dbias: Tensor | None, rows: Range | None) -> Tensor | None:
    """Where a block of rows puts the bias' gradient: its rows, or a room of its own where blocks share it."""
    if dbias is None or rows is None:
        return dbias
    return torch.empty_like(dbias) if dbias.shape[2] == 1 else _rows(dbias, rows)


def _rows(tensor: Tensor, rows: Range | None) -> Tensor:
    return tensor if rows is None else tensor[:, :, rows[0] : rows[1]]


def _parts(call: LoweredSoftmax) -> Iterator[tuple[Range | None, LoweredSoftmax]]:
    """The call, or blocks of its rows where its mask has to be written out."""
    if keeps_of(call.terms.mask) is not None:
        yield None, call
        return
    grid = call.grid
    for rows, keep in written_blocks(call.terms.mask, grid):
        yield rows, replace(call, scores=_rows(call.scores, rows), terms=terms_of_rows(call.terms, grid, rows, keep))


def _run(name: str, call: LoweredSoftmax, matrices: bytes, alive: list[Tensor]) -> None:
    """One pass on ``struct Softmax``, of which ``matrices`` are what stands last: x, out, probs, result, dout, dx, dbias."""
    terms, biases = call.terms, _biases(call)
    keeps = keeps_of(terms.mask)
    assert keeps is not None
    batch, heads, q_len, kv_len = call.scores.shape
    bias = addressable(biases[0]) if biases else None
    fields = (
        ints[8](batch, heads, heads, q_len, kv_len, 0, 0, torch.get_num_threads()),
        mask_fields(terms.mask, terms.q_offset, keeps, alive),
        double(terms.scale),
        NO_MATRIX if bias is None else matrix(bias),
        dropout_fields(terms.dropout, (batch, heads, q_len, kv_len)),
        ints[2](call.log, call.uniform_empty),
        matrices,
    )
    library.run(f"softmax_{name}", b"".join(fields))
