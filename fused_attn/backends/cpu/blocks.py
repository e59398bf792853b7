"""Blocks of query rows for masks that have to be written out before the library reads them: one block's bytes are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from fused_attn.lowering import Grid, KernelMask, Range, Terms
from fused_attn.mask_rules import Pairs, extent, filled
from fused_attn.parts import terms_of

# Bytes of a block's mask for one batch: with 2^18 elements, of which a rule's own temporaries are made, 16 evaluations a call of the library.
WRITTEN = 1 << 22


def terms_of_rows(terms: Terms, grid: Grid, rows: Range, keep: Tensor) -> Terms:
    """The terms as a call on some query rows has them.

    Args:
        terms: of the whole call.
        grid: of the whole call.
        rows: first and one-past-last query.
        keep: what the mask's stored tensor and its rules allow of those rows.
    """
    batches, heads, _, keys = grid.ranges
    part = terms_of(replace(terms, mask=replace(terms.mask, keep=None, rules=())), grid, (batches, heads, rows, keys))
    return replace(part, mask=replace(part.mask, keep=keep))


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
