"""Keys and values of tokens seen so far: in one piece per sequence, or in pages that a table names (PagedAttention, arXiv 2309.06180).

Both are filled in place and never look at a device's values. Names are torch's: ``seqused_k``, ``block_table``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.checks import FLOATS, can_look, described, require_device, require_shape, require_tensor
from fused_attn.paged_call import gathered
from fused_attn.pytrees import register

_COUNTS = (torch.int32, torch.int64)
_ADVICE = "Make a longer cache, or start the sequence anew (cache.seqused_k[i] = 0)."


@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values in one piece per sequence.

    Args:
        k: [batch, kv_heads, capacity, head_dim]; float16, bfloat16, float32 or float64, any strides.
        v: [batch, kv_heads, capacity, value_dim], k's dtype.
        seqused_k: int32 or int64 [batch], how many tokens each sequence holds. What lies behind them may be anything.

    Raises:
        TypeError: a tensor is of another kind or dtype.
        ValueError: shapes or devices do not agree.

    Example:
        >>> cache = KVCache.empty((2, 4, 16, 8))
        >>> cache.append(torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8))
        >>> cache.seqused_k.tolist(), cache.capacity
        ([3, 3], 16)
    """

    k: Tensor
    v: Tensor
    seqused_k: Tensor

    def __post_init__(self) -> None:
        _require_pair(self.k, self.v, "[batch, kv_heads, capacity, head_dim]")
        _require_counts("seqused_k", self.seqused_k, self.k)
        require_shape("seqused_k", self.seqused_k, ((self.k.shape[0],),), self.k.device)

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        *,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """Room for ``capacity`` tokens of each sequence.

        Args:
            shape: (batch, kv_heads, capacity, head_dim).
            value_dim: of the values; head_dim by default.
            dtype: of keys and values; torch's default by default.
            device: where they are; torch's default device by default.
        """
        batch, kv_heads, capacity, head_dim = shape
        device = torch.get_default_device() if device is None else device
        k = torch.empty((batch, kv_heads, capacity, head_dim), dtype=dtype, device=device)
        v = torch.empty((batch, kv_heads, capacity, head_dim if value_dim is None else value_dim), dtype=dtype, device=device)
        return cls(k, v, torch.zeros(batch, dtype=torch.int32, device=device))

    @property
    def capacity(self) -> int:
        """Tokens that a sequence has room for."""
        return self.k.shape[2]

    @property
    def block_table(self) -> Tensor | None:
        """None: no pages."""
        return None

    def append(self, k: Tensor, v: Tensor) -> None:
        """Puts tokens behind those of every sequence, in place and without waiting for a device; nothing flows back through a cache.

        A sequence without room for all of them gets none, and ``seqused_k`` says more than there is, so that attention gives NaN for it.

        Args:
            k: [batch, kv_heads, n, head_dim], the cache's dtype.
            v: [batch, kv_heads, n, value_dim].

        Raises:
            TypeError, ValueError: they do not fit the cache; on the CPU also where a sequence has no room.
        """
        position = _positions(self, k, v)
        page = torch.arange(self.k.shape[0], device=self.k.device)[:, None].expand_as(position)
        _store(self, (page, position, (position >= 0) & (position < self.capacity)), (k, v))


@dataclass(frozen=True, eq=False)
class PagedKV:
    """Keys and values in pages of equal size, which sequences share as the table says.

    Args:
        k: [pages, kv_heads, page_size, head_dim]; any strides, so that pages [pages, page_size, kv_heads, head_dim] are ``.transpose(1, 2)``.
        v: [pages, kv_heads, page_size, value_dim], k's dtype.
        block_table: int32 or int64 [batch, most pages], each sequence's pages in order. Entries that no key needs may be anything.
        seqused_k: int32 or int64 [batch], how many tokens each sequence holds.

    Raises:
        TypeError: a tensor is of another kind or dtype.
        ValueError: shapes or devices do not agree.

    Example:
        >>> pages, table = torch.zeros(5, 4, 2, 8), torch.tensor([[3, 0], [4, -1]], dtype=torch.int32)
        >>> cache = PagedKV(pages, pages.clone(), table, torch.tensor([2, 0], dtype=torch.int32))
        >>> cache.append(torch.ones(2, 4, 1, 8), torch.ones(2, 4, 1, 8))
        >>> cache.k[:, 0, :, 0].tolist()
        [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    """

    k: Tensor
    v: Tensor
    block_table: Tensor
    seqused_k: Tensor

    def __post_init__(self) -> None:
        _require_pair(self.k, self.v, "[pages, kv_heads, page_size, head_dim]")
        if not self.k.shape[2]:
            raise ValueError(
                f"a page must have room for a token; got pages {list(self.k.shape)}. Give page_size, the third size, at least 1."
            )
        _require_counts("block_table", self.block_table, self.k)
        _require_counts("seqused_k", self.seqused_k, self.k)
        if self.block_table.dim() != 2:
            raise ValueError(
                f"block_table must be [batch, most pages]; got {described(self.block_table)}. Give each sequence a row of pages."
            )
        require_shape("seqused_k", self.seqused_k, ((self.block_table.shape[0],),), self.k.device)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence has room for."""
        return self.block_table.shape[1] * self.k.shape[2]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Puts tokens behind those of every sequence, as ``KVCache.append``; the table must name the pages that they go to.

        Where it does not, or the sequence is full, nothing is written for it.
        """
        position = _positions(self, k, v)
        page, fits = torch.zeros_like(position), torch.zeros_like(position, dtype=torch.bool)
        if self.capacity:
            entry = position.clamp(0, self.capacity - 1) // self.page_size
            page = self.block_table.to(torch.int64).gather(1, entry)
            fits = (position >= 0) & (position < self.capacity) & (page >= 0) & (page < self.k.shape[0])
        _store(self, (page, position % max(1, self.page_size), fits), (k, v))

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Copies of keys and values in one piece, [batch, kv_heads, capacity, dim]; NaN where the table names no page."""
        return gathered(self.k, self.block_table), gathered(self.v, self.block_table)


register(KVCache)
register(PagedKV)


def _require_pair(k: object, v: object, layout: str) -> None:
    for name, tensor in (("k", k), ("v", v)):
        found = require_tensor(f"a cache's {name}", tensor, FLOATS, f"a floating-point tensor {layout}", "Write KVCache.empty((...)).")
        if found.dim() != 4:
            raise ValueError(
                f"a cache's {name} must be 4-D {layout}; got {described(found)}. Insert the missing dimensions with unsqueeze."
            )
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    if k.dtype != v.dtype:
        raise TypeError(f"a cache's k and v must share one dtype; got {k.dtype} and {v.dtype}. Convert one with .to({k.dtype}).")
    require_device("a cache's v", v, k.device)
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"a cache's k and v must agree but in their last dimension; got {list(k.shape)} and {list(v.shape)}. Make them alike."
        )


def _require_counts(name: str, value: object, k: Tensor) -> None:
    tensor = require_tensor(name, value, _COUNTS, "an int32 or int64 tensor", "Convert it with .to(torch.int32).")
    require_device(name, tensor, k.device)


def _positions(cache: KVCache | PagedKV, k: Tensor, v: Tensor) -> Tensor:
    """Where new tokens go, int64 [batch, n], once they fit the cache's tensors."""
    for name, new, old in (("k", k, cache.k), ("v", v, cache.v)):
        require_tensor(name, new, (old.dtype,), f"a {old.dtype} tensor", f"Convert it with .to({old.dtype}), the cache's dtype.")
        require_device(name, new, old.device)
        wanted = (cache.seqused_k.shape[0], old.shape[1], k.shape[-2] if k.dim() > 1 else 1, old.shape[3])
        if tuple(new.shape) != wanted:
            raise ValueError(f"{name} must be [batch, kv_heads, n, dim] = {list(wanted)}; got {list(new.shape)}. Reshape it, or the cache.")
    return cache.seqused_k.to(torch.int64)[:, None] + torch.arange(k.shape[2], device=k.device)


def _store(cache: KVCache | PagedKV, place: tuple[Tensor, Tensor, Tensor], new: tuple[Tensor, Tensor]) -> None:
    """Writes what fits, sequence by sequence, and counts all of it; ``place`` is page, row and whether there is one, [batch, n] each."""
    page, row, fits = place
    all_fit = can_look(fits) and bool(fits.all())
    if can_look(fits) and not all_fit:
        full = [i for i, fine in enumerate(fits.all(1).tolist()) if not fine]
        raise ValueError(
            f"a cache must have room for what is appended; got {page.shape[1]} more tokens for sequences {full[:8]}, which hold "
            f"{cache.seqused_k[full[:8]].tolist()} of at most {cache.capacity}. {_ADVICE}"
        )
    fits = fits.all(1, keepdim=True).expand_as(fits)
    with torch.no_grad():
        for into, values in zip((cache.k, cache.v), new, strict=True):
            if into.numel() and values.numel():
                _write(into, (page.reshape(-1), row.reshape(-1), fits.reshape(-1)), values.transpose(1, 2).flatten(0, 1), all_fit)
        cache.seqused_k.add_(page.shape[1])


def _write(into: Tensor, place: tuple[Tensor, Tensor, Tensor], values: Tensor, all_fit: bool) -> None:
    """values [n, kv_heads, dim] into rows of pages. A write that has no place repeats the first one that has: the same value, twice."""
    page, row, fits = place
    if not all_fit:
        some, first = fits.any(), fits.to(torch.uint8).argmax(0, keepdim=True)
        # Where nothing has a place, the first row of all is written to itself.
        page, row = (torch.where(fits, t, torch.where(some, t.index_select(0, first), 0)) for t in (page, row))
        values = torch.where(fits[:, None, None], values, torch.where(some, values.index_select(0, first), into[:1, :, 0]))
    into[page, :, row] = values
