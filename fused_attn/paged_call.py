"""A decoding step in normal form: few queries, and keys that lie in one piece or in pages that a table names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fused_attn.lowering import Grid, Range, Terms

# Elements of keys that are gathered from a sequence's pages at a time: 2 MB in float32, which a core's caches hold beside the values.
GATHERED = 1 << 19
# Keys at least, so that wide rows make no parts of a page of one key.
_FEWEST = 128


@dataclass(frozen=True, slots=True)
class LoweredPaged:
    """An attention call whose keys may lie in pages (PagedAttention, arXiv 2309.06180).

    Args:
        q: [batch, heads, q_len, head_dim].
        k: [pages, kv_heads, page_size, head_dim].
        v: [pages, kv_heads, page_size, value_dim].
        block_table: int [batch, most pages]: the pages of each sequence in order; entries that no row reaches may be anything. None where
            the pages are the sequences themselves.
        terms: of the call on keys [batch, kv_heads, most pages * page_size]. A row whose ``kv_end`` lies beyond them is NaN.
        num_splits: parts of the keys; 0 to choose by sizes.

    Example:
        >>> from fused_attn.lowering import KernelMask
        >>> pages = torch.zeros(7, 2, 16, 8)
        >>> LoweredPaged(torch.zeros(3, 4, 1, 8), pages, pages, torch.zeros(3, 5, dtype=torch.int32), Terms(KernelMask(), 1.0)).shape
        (3, 4, 1, 80)
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block_table: Tensor | None
    terms: Terms
    num_splits: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, q_len, keys that a sequence may have)."""
        batch, heads, q_len, _ = self.q.shape
        return batch, heads, q_len, self.k.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, self.q.device, self.terms.q_offset)

    @property
    def beyond(self) -> Tensor | None:
        """Rows whose keys end beyond those that there are, bool [batch|1, q_len|1]; None where nobody needs to ask."""
        end = self.terms.mask.kv_end
        return None if end is None else end > self.shape[3]

    def parts_of_keys(self, keys: Range, most: int = GATHERED) -> Iterator[Range]:
        """A range of keys in parts of whole pages, each of at most ``most`` elements of k or v per sequence, or of 128 keys.

        It depends on no other sequence, so that a batch's slice is a batch of one.
        """
        first, end = keys
        page = 1 if self.block_table is None else self.k.shape[2]
        row = self.k.shape[1] * max(1, self.q.shape[3], self.v.shape[3])
        step = -(-max(_FEWEST, most // max(1, row)) // page) * page
        first, last = first // page * page, -(-end // page) * page
        for start in range(first, last, step):
            yield start, min(start + step, last)

    def of_keys(self, stored: Tensor, keys: Range) -> Tensor:
        """k or v of a range of keys that begins with a page, [batch, kv_heads, n, dim]: a view in one piece, gathered from pages."""
        if self.block_table is None:
            return stored[:, :, slice(*keys)]
        size = stored.shape[2]
        return gathered(stored, self.block_table[:, keys[0] // size : -(-keys[1] // size)])


def gathered(pages: Tensor, block_table: Tensor) -> Tensor:
    """Pages [pages, kv_heads, page_size, dim] as [batch, kv_heads, columns * page_size, dim]; NaN where an entry names no page.

    Example:
        >>> pages = torch.arange(3.0).view(3, 1, 1, 1)
        >>> gathered(pages, torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)).flatten(1)
        tensor([[2., 0.],
                [1., nan]])
    """
    (count, kv_heads, size, dim), (batch, columns) = pages.shape, block_table.shape
    shape = (batch, kv_heads, columns * size, dim)
    if count == 0 or prod(shape) == 0:
        return pages.new_full(shape, torch.nan)
    inside = (block_table >= 0) & (block_table < count)
    found = pages.index_select(0, block_table.clamp(0, count - 1).reshape(-1)).view(batch, columns, kv_heads, size, dim)
    found = found.masked_fill(~inside[:, :, None, None, None], torch.nan)
    return found.transpose(1, 2).reshape(shape)
