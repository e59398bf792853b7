"""What attention gives out besides its output, on Hopper: rows of probabilities and scores at the speed of the memory they are written to."""

from __future__ import annotations

from typing import Any, NamedTuple

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
from .keep import mask_arguments
from .launch import launch
from .order import processors
from .rows_kernel import rows_kernel
from .tiles import ROWS, padded


class Choice(NamedTuple):
    """Which rows and heads of a call its outputs hold: int32 indices, None for all of them, and how many they are."""

    rows: Any
    heads: Any
    row_count: int
    head_count: int


def attention_aux(call: LoweredAttention, forward: Forward, request: AuxRequest) -> AuxTensors:
    """The requested tensors, as the plain kernels' ``attention_aux``; sums over queries are theirs here too."""
    of_rows = request.probs or request.scores or request.max_scores or request.entropy
    if not of_rows or modifications.reasons(arguments.scores(call.terms, call.grid, call.q.dtype)):
        return plain.attention_aux(call, forward, request)
    batch, heads, q_len, _ = call.shape
    result = _room(call, Choice(None, None, q_len, heads), request)
    result = result._replace(
        max_scores=call.q.new_empty((batch, heads, q_len), dtype=torch.float32) if request.max_scores else None,
        entropy=call.q.new_empty((batch, heads, q_len), dtype=torch.float32) if request.entropy else None,
    )
    _launch(call, call.q, forward.stats, Choice(None, None, q_len, heads), result)
    if not request.column_sums:
        return result
    return result._replace(column_sums=plain.attention_aux(call, forward, AuxRequest(column_sums=True)).column_sums)


def attention_picked(call: LoweredAttention, lse: Tensor, request: AuxRequest) -> AuxTensors | None:
    """Probabilities and scores of the rows and heads that a request picks; None where these kernels do not compute them.

    Args:
        call: the whole call.
        lse: of its rows, float32 [batch, heads, q_len].
        request: with ``rows`` or ``heads``.
    """
    if modifications.reasons(arguments.scores(call.terms, call.grid, call.q.dtype)):
        return None
    _, heads, q_len, _ = call.shape
    head_index, row_index = request.indices(heads, q_len)
    choice = Choice(
        None if row_index is None else row_index.int(),
        None if head_index is None else head_index.int(),
        q_len if row_index is None else len(row_index),
        heads if head_index is None else len(head_index),
    )
    q = call.q if head_index is None else call.q.index_select(1, head_index)
    q = q if row_index is None else q.index_select(2, row_index)
    # A base and a sum per row, of which the sum says whether there is a key.
    unit = call.terms.scale if arguments.unit_is_raw(call.terms) else 1.0
    stats = torch.stack((lse / unit, (lse != -torch.inf).to(lse.dtype)))
    result = _room(call, choice, request)
    if 0 not in q.shape:
        _launch(call, q.contiguous(), stats, choice, result)
    return result


def _room(call: LoweredAttention, choice: Choice, request: AuxRequest) -> AuxTensors:
    """Empty probabilities and scores where they are asked for."""
    shape = (call.shape[0], choice.head_count, choice.row_count, call.shape[3])
    return AuxTensors(
        call.q.new_empty(shape) if request.probs else None,
        call.q.new_empty(shape, dtype=request.scores_dtype or call.q.dtype) if request.scores else None,
    )


def _launch(call: LoweredAttention, q: Tensor, stats: Tensor, choice: Choice, result: AuxTensors) -> None:
    size = padded(call.q.shape[-1])
    chosen = ROWS[size, "plain"]
    score = arguments.scores(call.terms, call.grid, call.q.dtype)
    # Scores that are given out must be right relative to themselves, however small they are.
    if result.scores is None and result.max_scores is None:
        score = modifications.fast(score)
    per_row = (None if t is None else arguments.matrix(t[..., None]) for t in (result.max_scores, result.entropy))
    args = (
        Tiles(q, (1, 1, 64, size)),
        Tiles(call.k, (1, 1, chosen.keys, size)),
        _by_tma(result.probs, chosen.keys),
        _by_tma(result.scores, chosen.keys),
        arguments.matrix(stats), arguments.matrix(result.probs), arguments.matrix(result.scores), *per_row,
        q.shape[0] * choice.head_count, mask_arguments(call.terms), score, choice, arguments.sizes(call), *chosen,
    )  # fmt: skip
    work = q.shape[0] * choice.head_count * -(-choice.row_count // (64 * chosen.consumers))
    launch(rows_kernel, (min(work, processors(call.q.device)),), args)


def _by_tma(output: Tensor | None, keys: int) -> Tiles | None:
    """An output's tiles, where its rows are multiples of TMA's unit; float64 is not among its elements here."""
    if output is None or output.dtype == torch.float64 or output.stride(2) * output.element_size() % UNIT:
        return None
    return Tiles(output, (1, 1, 64, keys))
