"""Masked softmax: chunks of rows that stay in cache while they are scaled, masked and normalised in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fused_attn.backends.cpu import devices
from fused_attn.backends.cpu.mask_tiles import Limits, MaskTiles
from fused_attn.dropout import keep_factor
from fused_attn.lowering import LoweredSoftmax, Range, stat_dtype
from fused_attn.score_mods import SCORE_MODS

# Elements of a chunk: 1 MB of float32, one core's L2 or a share of it (chosen by the size of the cache, not by a sweep).
CHUNK = 1 << 18

Region = tuple[Range, Range, Range, Range]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows and the columns that any of them may attend to; ``limits`` as in ``tiles.Tile``."""

    region: Region
    limits: Limits

    @property
    def rows(self) -> tuple[slice, slice, slice]:
        return slice(*self.region[0]), slice(*self.region[1]), slice(*self.region[2])

    @property
    def index(self) -> tuple[slice, slice, slice, slice]:
        return (*self.rows, slice(*self.region[3]))


def softmax_fwd(call: LoweredSoftmax) -> tuple[Tensor, Tensor | None]:
    """The result, and the probabilities before dropout where there is dropout."""
    out = torch.empty_like(call.scores)
    probs = call.scores.new_empty(call.shape) if call.terms.dropout else None
    for chunk in _chunks(call):
        target = (out if probs is None else probs)[chunk.rows]
        values = _normalised(call, chunk, target)
        dropout = call.terms.dropout
        if dropout is not None:
            _write(call, chunk, out[chunk.rows], values * keep_factor(dropout, call.grid.at(*chunk.region), values.dtype))
        _write(call, chunk, target, values)
    return out, probs


def softmax_bwd(call: LoweredSoftmax, result: Tensor, dout: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of the scores and of the bias, from the probabilities before dropout (or their logarithms)."""
    dscores = torch.empty_like(call.scores) if needs[0] else None
    biases = [t for m in call.terms.mods for t in m.tensors]
    dtype = stat_dtype(call.scores.dtype)
    dbiases = [
        torch.zeros_like(t, dtype=t.dtype if t.shape == call.shape else dtype) if need else None
        for t, need in zip(biases, needs[1:], strict=True)
    ]
    for chunk in _chunks(call):
        grad = _gradient(call, chunk, (result[chunk.index], dout[chunk.index]), None if dscores is None else dscores[chunk.rows])
        for dbias in dbiases:
            if dbias is not None:
                part = call.grid.at(*chunk.region).crop(dbias)
                part.add_(grad.sum_to_size(part.shape))
        if dscores is not None:
            grad = grad.mul_(call.terms.scale) if call.terms.scale != 1 else grad
            _fill(chunk, dscores[chunk.rows], grad, 0.0)
    return dscores, *(g if g is None else g.to(t.dtype) for g, t in zip(dbiases, biases, strict=True))


def _chunks(call: LoweredSoftmax) -> Iterator[Chunk]:
    """Blocks of rows: several batches, several middles or several queries, whichever fits; the cut never depends on the number of batches."""
    batch, middle, q_len, kv_len = call.shape
    if 0 in call.shape:
        return
    mask = call.terms.mask
    masks = None if mask.is_trivial else MaskTiles(mask, call.grid, stat_dtype(call.scores.dtype))
    # A row longer than a chunk is worked on by one thread, so there are as many rows as threads.
    rows = max(CHUNK // kv_len, torch.get_num_threads(), 1)
    steps = max(1, rows // (middle * q_len)), max(1, rows // q_len), min(rows, q_len)
    bounds = masks.bounds(steps[2]) if masks is not None and steps[0] == 1 else []
    for b, m, q in product(*(range(0, n, step) for n, step in zip((batch, middle, q_len), steps, strict=True))):
        region: Region = ((b, min(b + steps[0], batch)), (m, min(m + steps[1], middle)), (q, min(q + steps[2], q_len)), (0, kv_len))
        if masks is None:
            yield Chunk(region, ())
        else:
            # An empty row that becomes uniform reaches all columns.
            is_whole = not bounds or call.uniform_empty
            yield _masked_chunk(masks, region, None if is_whole else bounds[b if len(bounds) > 1 else 0][q // steps[2]])


def _masked_chunk(masks: MaskTiles, region: Region, bounds: list[int] | None) -> Chunk:
    kv_len = region[3][1]
    if bounds is None:
        return Chunk(region, masks.limits(region, (kv_len, 0)))
    first, last, *full = bounds
    # A narrow part costs two copies, which the rest must pay for.
    if 4 * (last - first) <= 3 * kv_len:
        region = (*region[:3], (first, last) if first < last else (0, 1))
    open_to_all = (full[0], full[1]) if not masks.mask.has_pairs else (kv_len, 0)
    return Chunk(region, masks.limits(region, open_to_all))


def _room(call: LoweredSoftmax, chunk: Chunk, target: Tensor | None) -> Tensor:
    """Contiguous room for the chunk in the dtype of arithmetic: the target itself where it can be."""
    b, m, q, k = (end - start for start, end in chunk.region)
    if target is not None and target.shape[3] == k and target.dtype == stat_dtype(call.scores.dtype) and target.is_contiguous():
        return target
    return call.scores.new_empty((b, m, q, k), dtype=stat_dtype(call.scores.dtype))


def _modified(call: LoweredSoftmax, chunk: Chunk, room: Tensor) -> tuple[Tensor, bool]:
    """scale * scores + bias, in ``room`` unless nothing is to be done; whether it may be written to."""
    scores, is_mine = call.scores[chunk.index], False
    if call.terms.scale != 1:
        scores, is_mine = (
            torch.mul(scores, call.terms.scale, out=room) if scores.dtype == room.dtype else room.copy_(scores).mul_(call.terms.scale),
            True,
        )
    elif scores.dtype != room.dtype:
        scores, is_mine = room.copy_(scores), True
    for score in call.terms.mods:
        scores, is_mine = SCORE_MODS[score.name].from_kernel(score).apply(scores, call.grid.at(*chunk.region)), True
    return scores, is_mine


def _normalised(call: LoweredSoftmax, chunk: Chunk, target: Tensor) -> Tensor:
    """Probabilities of the chunk, or their logarithms."""
    room = _room(call, chunk, target)
    scores, is_mine = _modified(call, chunk, room)
    for columns, limit in chunk.limits:
        if columns == slice(0, scores.shape[3]):
            scores, is_mine = torch.minimum(scores, limit, out=room), True
        else:
            scores, is_mine = (scores if is_mine else room.copy_(scores)), True
            torch.minimum(scores[..., columns], limit, out=scores[..., columns])
    normalise = torch.log_softmax if call.log else torch.softmax
    if devices.at_hand(room):
        normalise(scores, -1, out=room)
    else:
        room.copy_(normalise(scores, -1))
    # An empty row, and a NaN wherever it came from, make the whole row NaN: only then is there more to do.
    if bool(room[..., 0].sum().isnan()):
        _normalise_carefully(call, chunk, room)
    return room


def _masked_scores(call: LoweredSoftmax, chunk: Chunk, room: Tensor) -> Tensor:
    """Modified scores, -inf where masked whatever stood there, in ``room``."""
    room.copy_(_modified(call, chunk, room)[0])
    for columns, limit in chunk.limits:
        room[..., columns].masked_fill_(limit < 0, -torch.inf)
    return room


def _normalise_carefully(call: LoweredSoftmax, chunk: Chunk, room: Tensor) -> None:
    scores = _masked_scores(call, chunk, room)
    top = scores.amax(-1, keepdim=True)
    empty = top == -torch.inf
    scores.masked_fill_(empty, 0.0)
    scores.copy_((torch.log_softmax if call.log else torch.softmax)(scores, -1))
    scores.masked_fill_(empty, _of_empty_rows(call))
    for columns, limit in chunk.limits:
        scores[..., columns].masked_fill_((limit < 0) & ~empty, -torch.inf if call.log else 0.0)


def _of_empty_rows(call: LoweredSoftmax) -> float:
    """What every element of a row without keys becomes."""
    share = call.scores.new_full((), 1.0 / call.shape[3] if call.uniform_empty else 0.0, dtype=stat_dtype(call.scores.dtype))
    return float(share.log() if call.log else share)


def _write(call: LoweredSoftmax, chunk: Chunk, target: Tensor, values: Tensor) -> None:
    """Puts the chunk's columns into whole rows of the target."""
    if values.data_ptr() == target.data_ptr() and values.shape == target.shape:
        return
    _fill(chunk, target, values, -torch.inf if call.log else 0.0)


def _fill(chunk: Chunk, target: Tensor, values: Tensor, outside: float) -> None:
    start, end = chunk.region[3]
    if values.data_ptr() != target.data_ptr() or values.shape != target.shape:
        target[..., start:end] = values
    target[..., :start] = outside
    target[..., end:] = outside


def _gradient(call: LoweredSoftmax, chunk: Chunk, pair: tuple[Tensor, Tensor], target: Tensor | None) -> Tensor:
    """Gradient of scale * scores + bias in the chunk, from its (result, arriving gradient)."""
    room = _room(call, chunk, target)
    result, dout = (t.to(room.dtype) for t in pair)
    if call.terms.dropout is not None:
        dout = dout * keep_factor(call.terms.dropout, call.grid.at(*chunk.region), room.dtype)
    if call.log:
        torch._log_softmax_backward_data(_allowed_part(chunk, dout), result, -1, room.dtype, out=room)
    else:
        torch._softmax_backward_data(dout, result, -1, room.dtype, grad_input=room)
    is_broken = not bool(room[..., 0].sum().isfinite())
    if chunk.limits and is_broken:
        _differentiate_carefully(call, chunk, (result, dout), room)
    # Nothing flows through an empty row, scores of -inf alone among them. A uniform one looks like one whose scores are equal.
    blank = pair[0][..., :1] == pair[0].new_full((), _of_empty_rows(call))
    if bool(blank.any()) and (call.log or call.uniform_empty or is_broken):
        scores = _masked_scores(call, chunk, torch.empty_like(room)) if call.uniform_empty else None
        level = result if scores is None else scores
        room.masked_fill_(level.amax(-1, keepdim=True) == (-torch.inf if call.log or scores is not None else 0.0), 0.0)
    return room


def _allowed_part(chunk: Chunk, dout: Tensor) -> Tensor:
    """The arriving gradient with zeros where masked; by a product, which is four times faster than masked_fill."""
    dout = dout.clone() if chunk.limits else dout
    for columns, limit in chunk.limits:
        dout[..., columns].mul_(limit.clamp(0.0, 1.0))
    return dout


def _differentiate_carefully(call: LoweredSoftmax, chunk: Chunk, pair: tuple[Tensor, Tensor], room: Tensor) -> None:
    """Again where a NaN came up: one that arrives at a masked element goes nowhere."""
    result, dout = pair[0], pair[1].clone()
    for columns, limit in chunk.limits:
        dout[..., columns].masked_fill_(limit < 0, 0.0)
    if call.log:
        torch._log_softmax_backward_data(dout, result, -1, room.dtype, out=room)
    else:
        torch._softmax_backward_data(dout, result, -1, room.dtype, grad_input=room)
    for columns, limit in chunk.limits:
        room[..., columns].masked_fill_(limit < 0, 0.0)
