"""Keras' masks as one mask of this package: each in its own shape, so that they meet in the kernels instead of in a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attn.checks import described
from fused_attn.lowering import Grid
from fused_attn.masks import Band, Causal, Dense, Mask
from fused_attn.nn.keras.axes import Axes


class Masks(NamedTuple):
    """What a call says about which pairs may attend; None or False where it says nothing.

    Attributes:
        query: bool [batch, *lengths], the query's shape without its last dimension.
        value: likewise of values.
        key: likewise of keys.
        attention: a tensor that broadcasts to the scores, nonzero where a pair may attend, or a mask of this package.
        causal: keys at or before the query, both counted from 0.
        window: keys nearer than this on either side.
    """

    query: Tensor | None = None
    value: Tensor | None = None
    key: Tensor | None = None
    attention: Any = None
    causal: bool = False
    window: int | None = None

    def merged(self, axes: Axes, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Mask | None:
        """All at once, over folded queries and keys of projected shapes; None where nothing is masked.

        Raises:
            ValueError: a mask does not fit, or positions are compared over several axes.
        """
        count = len(axes.attended)
        parts: list[Mask] = []
        for name, mask, side in (("query_mask", self.query, 0), ("value_mask", self.value, 1), ("key_mask", self.key, 1)):
            if mask is not None:
                placed = _placed(name, torch.as_tensor(mask, device=device), axes, (queries, keys)[side])
                before = len(axes.lead) + (0 if side else count)
                shape = (*placed.shape[:before], *[1] * count, *placed.shape[before:])
                parts.append(Dense(axes.fold_mask(name, placed.reshape(shape), queries, keys)))
        if self.attention is not None:
            parts.append(as_mask(self.attention, axes, queries, keys, device))
        if count > 1 and (self.causal or self.window is not None):
            name = "use_causal_mask" if self.causal else "sliding_window"
            raise ValueError(
                f"{name} must come with one attention axis; got {count}, {axes.attended}. Give attention_mask, which may say anything about pairs."
            )
        parts += [Causal()] if self.causal else []
        parts += [] if self.window is None else [Band(self.window)]
        return reduce(lambda a, b: a & b, parts) if parts else None


def as_mask(attention_mask: Any, axes: Axes, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Mask:
    """Keras' ``attention_mask`` over folded queries and keys; a mask of this package stays itself."""
    if isinstance(attention_mask, Mask):
        return attention_mask
    return Dense(axes.fold_mask("attention_mask", torch.as_tensor(attention_mask, device=device), queries, keys))


def _placed(name: str, mask: Tensor, axes: Axes, shape: Sequence[int]) -> Tensor:
    """A mask of inputs with a dimension of size 1 for the heads, leading dimensions first, attended ones last."""
    wanted = tuple(shape[: axes.rank - 2])
    if (
        not isinstance(mask, Tensor)
        or mask.dim() != len(wanted)
        or any(n not in (1, full) for n, full in zip(mask.shape, wanted, strict=True))
    ):
        raise ValueError(
            f"{name} must have one element for each position, {list(wanted)}; got {described(mask)}. Leave it out where all count."
        )
    return mask[..., None].permute(*axes.lead, *axes.attended)


def materialized(mask: Mask | None, axes: Axes, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Tensor | None:
    """A bool tensor of the scores' rank, without heads where it is the same for all: what an overridden method of Keras expects."""
    if mask is None:
        return None
    folded = axes.folded(queries, keys)
    allowed = mask.allowed(Grid(folded, device))
    if axes.scores_rank == 4 and allowed.shape[1] == 1:
        return allowed[:, 0]
    return axes.unfold_scores(allowed.expand(folded), queries, keys)
