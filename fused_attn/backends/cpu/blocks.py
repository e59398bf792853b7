"""Blocks of query rows for masks that have to be written out before the library reads them: one block's bytes are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fused_attn.kernel_dropout import of_later_queries
from fused_attn.lowering import Grid, KernelMask, Range, Terms
from fused_attn.mask_rules import Pairs, extent, filled

# Bytes of a block's mask for one batch: with 2^18 elements, of which a rule's own temporaries are made, 16 evaluations a call of the library.
WRITTEN = 1 << 22


def _rows_of(tensor: Tensor, dim: int, rows: Range) -> Tensor:
    return tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, rows[0], rows[1] - rows[0])


def terms_of_rows(terms: Terms, grid: Grid, rows: Range, keep: Tensor) -> Terms:
    """The terms as a call on some query rows has them.

    Args:
        terms: of the whole call.
        grid: of the whole call.
        rows: first and one-past-last query.
        keep: what the mask's stored tensor and its rules allow of those rows.
    """
    mask, (start, _) = terms.mask, rows
    offset = terms.q_offset.to(torch.int64) if isinstance(terms.q_offset, Tensor) else terms.q_offset
    limits = [None if t is None else _rows_of(t, 1, rows) for t in (mask.kv_start, mask.kv_end)]
    return replace(
        terms,
        mask=KernelMask(mask.left, mask.right, limits[0], limits[1], keep),
        q_offset=offset + start,
        mods=tuple([replace(m, tensors=tuple([_rows_of(t, 2, rows) for t in m.tensors])) for m in terms.mods]),
        dropout=of_later_queries(terms.dropout, start, grid.shape),
    )


def written_blocks(mask: KernelMask, grid: Grid) -> Iterator[tuple[Range, Tensor]]:
    """Query rows, and what the mask's stored tensor and rules allow of them, bool [batch|1, heads|1, rows|1, keys|1].

    The cut does not depend on the number of batches, so neither do bits of what is summed over blocks.
    """
    rules = mask.rules if mask.keep is None else (Pairs(mask.keep), *mask.rules)
    batches, heads, (_, q_len), keys = grid.ranges
    shape = extent(rules, grid)
    step = max(1, WRITTEN // (shape[1] * shape[3])) if shape[2] != 1 else q_len
    for start in range(0, q_len, step):
        rows = (start, min(start + step, q_len))
        block = grid.at(batches, heads, rows, keys)
        yield rows, filled(rules, block, (*shape[:2], 1 if shape[2] == 1 else rows[1] - rows[0], shape[3]))
