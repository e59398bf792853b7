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
        query: bool [batch, *lengths], the query's shape without its last dimension; with one attention axis also fewer dimensions, of which
            the last is that axis and those before are the first of the others.
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

    def merged(self, axes: Axes, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> tuple[Axes, Mask | None]:
        """All at once, over queries and keys of projected shapes, folded by the axes that come back; None where nothing is masked.

        Raises:
            ValueError: a mask does not fit, or positions are compared over several axes.
        """
        count = len(axes.attended)
        placed: list[Tensor] = []
        for name, mask, side in (("query_mask", self.query, 0), ("value_mask", self.value, 1), ("key_mask", self.key, 1)):
            if mask is not None:
                one = _placed(name, torch.as_tensor(mask, device=device), axes, (queries, keys)[side])
                before = len(axes.lead) + (0 if side else count)
                shape = (*one.shape[:before], *[1] * count, *one.shape[before:])
                placed.append(axes.placed(name, one.reshape(shape), queries, keys))
        is_ours = isinstance(self.attention, Mask)  # which may count on the batch and the heads that there are
        if self.attention is not None and not is_ours:
            placed.append(axes.placed("attention_mask", torch.as_tensor(self.attention, device=device), queries, keys))
        axes = axes if is_ours else axes.sharing(placed, queries)
        parts: list[Mask] = [Dense(axes.fold_mask(mask, queries, keys)) for mask in placed] + ([self.attention] if is_ours else [])
        if count > 1 and (self.causal or self.window is not None):
            name = "use_causal_mask" if self.causal else "sliding_window"
            raise ValueError(
                f"{name} must come with one attention axis; got {count}, {axes.attended}. Give attention_mask, which may say anything about pairs."
            )
        parts += [Causal()] if self.causal else []
        parts += [] if self.window is None else [Band(self.window)]
        return axes, reduce(lambda a, b: a & b, parts) if parts else None

    @classmethod
    def of(cls, attention_mask: Any, use_causal_mask: bool = False) -> Masks:
        """From what a layer's ``_compute_attention`` is given: these, a tensor, a mask of this package, or None."""
        masks = attention_mask if isinstance(attention_mask, Masks) else cls(attention=attention_mask)
        return masks._replace(causal=True) if use_causal_mask else masks


def _placed(name: str, mask: Tensor, axes: Axes, shape: Sequence[int]) -> Tensor:
    """A mask of inputs with a dimension of size 1 for the heads, leading dimensions first, attended ones last."""
    wanted = tuple(shape[: axes.rank - 2])
    if 0 < mask.dim() < len(wanted) and len(axes.attended) == 1:
        others = mask.dim() - 1
        mask = mask.reshape(*mask.shape[:others], *[1] * (len(wanted) - mask.dim()), mask.shape[-1]).movedim(-1, axes.attended[0])
    if mask.dim() != len(wanted) or any(n not in (1, full) for n, full in zip(mask.shape, wanted, strict=True)):
        raise ValueError(
            f"{name} must have one element for each position, {list(wanted)}; got {described(mask)}. Leave it out where all count."
        )
    return mask[..., None].permute(*axes.lead, *axes.attended)


def materialized(masks: Masks, axes: Axes, query: Tensor, key: Tensor) -> Tensor | None:
    """A bool tensor of the scores' rank, without heads where it is the same for all: what an overridden method of Keras expects."""
    query, key, _ = axes.broadcast(query, key, key)
    axes, mask = masks.merged(axes, query.shape, key.shape, query.device)
    if mask is None:
        return None
    folded = axes.folded(query.shape, key.shape)
    allowed = mask.allowed(Grid(folded, query.device))
    if axes.scores_rank == 4 and allowed.shape[1] == 1:
        return allowed[:, 0]
    return axes.unfold_scores(allowed.expand(folded), query.shape, key.shape)
