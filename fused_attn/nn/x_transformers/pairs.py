"""Which pairs may attend, from what a layer is told: padding of keys, a mask of pairs, a window, and keys without position in front."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_attn.lowering import Grid
from fused_attn.masks import And, Band, Causal, Dense, KeyPadding, Mask, Not, Or, PrefixLM, SlidingWindow, ValidLengths
from fused_attn.nn.x_transformers.refusals import needs


@dataclass(frozen=True, eq=False)
class Pairs:
    """What limits the pairs of one call.

    Args:
        grid: all pairs, keys in front included, the last query at the last key.
        front: keys without position before those of the sequence; everybody attends to them.
        keys: bool [batch, kv_len] or None.
        pairs: bool [q_len, kv_len], [heads, q_len, kv_len] or [batch, heads, q_len, kv_len], a mask of this package, or None; keys in front
            may be left out of an array, and are not counted by a mask: those of distances, prefixes and lengths stay what they are,
            others become an array where there are keys in front.
        past: positions before the query that count, or None.
        causal: whether causality comes besides.

    Example:
        >>> grid = Grid((1, 1, 2, 3), torch.device("cpu"), 1)
        >>> Pairs(grid, 1, None, torch.eye(2, dtype=torch.bool), None, False).mask()
        tensor([[[[ True,  True, False],
                  [ True, False,  True]]]])
    """

    grid: Grid
    front: int
    keys: Tensor | None
    pairs: Tensor | Mask | None
    past: int | None
    causal: bool

    def mask(self) -> Tensor | Mask | None:
        """As ``Attend`` takes it: a mask of this package where no array of pairs is needed for it, or a bool tensor."""
        if self.keys is not None:
            needs(self.keys.dtype == torch.bool, "masks of keys (mask, context_mask, mem_mask, self_attn_kv_mask) must be bool",
                  str(self.keys.dtype), "Convert them with .bool(), True where a key counts")  # fmt: skip
        if self.pairs is None and self.past is None:
            return self.keys
        window, pairs = self._window(), self._pairs()
        if self.pairs is None and self.keys is None:
            return window
        # Rows that only such a mask empties are zeroed, those that causality empties are not: this needs the array.
        if not self.causal and not isinstance(pairs, Tensor):
            keys = None if self.keys is None else KeyPadding(self.keys.expand(self.grid.shape[0], self.grid.shape[3]))
            parts = [m for m in (pairs, window, keys) if m is not None]
            return parts[0] if len(parts) == 1 else parts[0] & parts[1] if len(parts) == 2 else parts[0] & parts[1] & parts[2]
        arrays = [m.allowed(self.grid) if isinstance(m, Mask) else m for m in (pairs, window) if m is not None]
        arrays += [] if self.keys is None else [self.keys[:, None, None]]
        keep = arrays[0]
        for other in arrays[1:]:
            keep = keep & other
        return keep

    def _window(self) -> Mask | None:
        return None if self.past is None else self._with_front(SlidingWindow(self.past, None))

    def _pairs(self) -> Tensor | Mask | None:
        pairs = self.pairs
        if isinstance(pairs, Tensor):
            needs(2 <= pairs.dim() <= 4, "attn_mask must have 2 to 4 dimensions", f"{pairs.dim()}", "Pass [q_len, kv_len]")
            needs(
                pairs.dtype == torch.bool,
                "attn_mask must be bool, True where a pair may attend",
                str(pairs.dtype),
                "Convert it with .bool()",
            )
            return before_keys(pairs[(None,) * (4 - pairs.dim())], self.grid.shape[3], True)
        return None if pairs is None else self._with_front(pairs)

    def _with_front(self, mask: Mask) -> Mask:
        """A mask of the keys behind those in front, which are open."""
        if not self.front:
            return mask
        behind = self._behind(mask)
        if isinstance(behind, (PrefixLM, ValidLengths)):
            return behind  # one interval, that of the front included
        return behind | ValidLengths(torch.full((self.grid.shape[0],), self.front, device=self.grid.device))

    def _behind(self, mask: Mask) -> Mask:
        """A mask that says of the keys behind the front what this one says of keys counted from there; anything of those in front."""
        if type(mask) in (Causal, SlidingWindow, Band):  # of distances alone
            return mask
        if isinstance(mask, (And, Or)):
            return type(mask)(tuple(self._behind(part) for part in mask.masks))
        if isinstance(mask, Not):
            return Not(self._behind(mask.mask))
        if isinstance(mask, PrefixLM):
            return PrefixLM(mask.prefix + self.front)
        if isinstance(mask, ValidLengths):
            return ValidLengths(mask.lens.clamp(min=0) + self.front)
        batch, heads, q_len, kv_len = self.grid.shape
        inner = Grid((batch, heads, q_len, kv_len - self.front), self.grid.device, self.grid.q_offset - self.front)
        mask.check(inner)
        return Dense(before_keys(mask.allowed(inner), kv_len, True))


def before_keys(array: Tensor, kv_len: int, value: float | bool) -> Tensor:
    """An array over keys with a value for those in front that it leaves out.

    Example:
        >>> before_keys(torch.tensor([False]), 1, True), before_keys(torch.tensor([1.0, 2.0]), 3, 0.0)
        (tensor([False]), tensor([0., 1., 2.]))
    """
    missing = kv_len - array.shape[-1]
    return pad(array, (missing, 0), value=value) if missing > 0 and array.shape[-1] != 1 else array


def keys_of_call(given: tuple[Tensor | None, Tensor | None, Tensor | None], has_context: bool, mem_len: int, length: int) -> Tensor | None:
    """Which keys of memories and sequence count, bool [batch, mem_len + length] or None.

    Args:
        given: the masks of queries, of the context (or of the keys), and of the memories.
        has_context: whether keys come from elsewhere, so that the queries' mask does not concern them.
        mem_len: how many memories.
        length: how many queries.
    """
    mask, context_mask, mem_mask = given
    if context_mask is not None or has_context:
        return context_mask
    if not mem_len or (mask is None and mem_mask is None):
        return mask
    if mem_mask is None:
        assert mask is not None
        return pad(mask, (mem_len, 0), value=True)
    return pad(mem_mask, (0, length), value=True) if mask is None else torch.cat((mem_mask, mask), -1)
