"""Attention of projected tensors over any of their axes, under Keras' masks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_attn.nn.keras.axes import Axes
from fused_attn.nn.keras.masks import Masks
from fused_attn.nn.keras.rows import attend


def attend_over(
    axes: Axes, tensors: tuple[Tensor, Tensor, Tensor], masks: Masks, *, return_probs: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention over some axes of projected query, key and value [..., heads, dim], with what ``rows.attend`` takes besides.

    Returns:
        (out, shaped like the query, probabilities [*others, heads, *queries, *keys] or None).

    Raises:
        ValueError: a mask or the tensors' shapes do not fit.

    Example:
        >>> import torch
        >>> q = torch.zeros(2, 5, 3, 4, 8)
        >>> masks = Masks(attention=torch.ones(3, 3).tril())
        >>> out, probs = attend_over(Axes((2,), 5), (q, q, q), masks, return_probs=True, empty_rows="zero")
        >>> out.shape, probs.shape
        (torch.Size([2, 5, 3, 4, 8]), torch.Size([2, 5, 4, 3, 3]))
    """
    query, key, value = axes.broadcast(*tensors)
    axes, mask = masks.merged(axes, query.shape, key.shape, query.device)
    out, probs = attend(axes.fold(query), axes.fold(key), axes.fold(value), mask=mask, q_offset=0, return_probs=return_probs, **options)
    return axes.unfold(out, query.shape), None if probs is None else axes.unfold_scores(probs, query.shape, key.shape)
