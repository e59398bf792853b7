"""What attention gives out besides its output, on Hopper: rows of probabilities and scores at the speed of the memory they are written to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.backends.base import AuxTensors, Forward
from fused_attn.backends.triton import arguments
from fused_attn.backends.triton import attention_aux as plain
from fused_attn.lowering import LoweredAttention

from . import modifications
from .descriptors import Tiles
from .eligible import UNIT
from .forward import padded, processors
from .keep import mask_arguments
from .launch import launch
from .rows_kernel import rows_kernel


class RowTiles(NamedTuple):
    """Consumers of 64 query rows, keys per tile, stages of K, registers of a consumer."""

    consumers: int
    keys: int
    stages: int
    registers: int


# By the padded head size; outputs of 32 bits take 64 KB beside Q and K.
_TILES = {64: RowTiles(2, 128, 2, 240), 128: RowTiles(2, 128, 2, 240), 256: RowTiles(2, 64, 2, 240)}


def attention_aux(call: LoweredAttention, forward: Forward, request: AuxRequest) -> AuxTensors:
    """The requested tensors, as the plain kernels' ``attention_aux``; sums over queries are theirs here too."""
    score = arguments.scores(call.terms, call.grid, call.q.dtype)
    of_rows = request.probs or request.scores or request.max_scores or request.entropy
    if not of_rows or modifications.reasons(score):
        return plain.attention_aux(call, forward, request)
    batch, heads, q_len, _ = call.shape
    shape = (batch, heads, q_len)
    result = AuxTensors(
        call.q.new_empty(call.shape) if request.probs else None,
        call.q.new_empty(call.shape, dtype=request.scores_dtype or call.q.dtype) if request.scores else None,
        call.q.new_empty(shape, dtype=torch.float32) if request.max_scores else None,
        None,
        call.q.new_empty(shape, dtype=torch.float32) if request.entropy else None,
    )
    # Scores that are given out must be right relative to themselves, however small they are.
    exact = request.scores or request.max_scores
    _launch(call, forward.stats, score if exact else modifications.fast(score), result)
    if not request.column_sums:
        return result
    return result._replace(column_sums=plain.attention_aux(call, forward, AuxRequest(column_sums=True)).column_sums)


def _launch(call: LoweredAttention, stats: Tensor, score: arguments.ScoreArgs, result: AuxTensors) -> None:
    batch, heads, q_len, _ = call.shape
    size = padded(call.q.shape[-1])
    chosen = _TILES[size]
    per_row = (None if t is None else arguments.matrix(t[..., None]) for t in (result.max_scores, result.entropy))
    args = (
        Tiles(call.q, (1, 1, 64, size)),
        Tiles(call.k, (1, 1, chosen.keys, size)),
        _by_tma(result.probs, chosen.keys),
        _by_tma(result.scores, chosen.keys),
        arguments.matrix(stats), arguments.matrix(result.probs), arguments.matrix(result.scores), *per_row, batch * heads,
        mask_arguments(call.terms), score, arguments.sizes(call), *chosen,
    )  # fmt: skip
    work = batch * heads * -(-q_len // (64 * chosen.consumers))
    launch(rows_kernel, (min(work, processors(call.q.device)),), args)


def _by_tma(output: Tensor | None, keys: int) -> Tiles | None:
    """An output's tiles, where its rows are multiples of TMA's unit; float64 is not among its elements here."""
    if output is None or output.dtype == torch.float64 or output.stride(2) * output.element_size() % UNIT:
        return None
    return Tiles(output, (1, 1, 64, keys))
