"""Which axes of a projected tensor are attended over: any of Keras' ``attention_axes``, folded into [batch, heads, length, dim]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_attn.checks import described


@dataclass(frozen=True)
class Axes:
    """Attended axes of projected tensors [..., heads, dim] of one rank; all others but the last lead, in order.

    Args:
        attended: in the order in which scores list them.
        rank: of the projected tensors.
        batched: how many leading axes fold into the batch, the others into the heads; None for all but the last.

    Example:
        >>> axes = Axes((1, 2), 5)
        >>> folded = axes.fold(torch.zeros(2, 3, 5, 4, 8))
        >>> folded.shape, axes.unfold(folded, (2, 3, 5, 4)).shape
        (torch.Size([2, 4, 15, 8]), torch.Size([2, 3, 5, 4, 8]))
    """

    attended: tuple[int, ...]
    rank: int
    batched: int | None = None

    @classmethod
    def of(cls, attention_axes: Sequence[int] | None, rank: int) -> Axes:
        """Keras' argument for projected tensors of a rank: None for all but batch and heads, negative ones count from the input's last.

        Raises:
            ValueError: there are none, one is not there or the features', or one comes twice.
        """
        axes = tuple(range(1, rank - 2)) if attention_axes is None else tuple(a if a >= 0 else rank - 1 + a for a in attention_axes)
        if not axes or len(set(axes)) < len(axes) or not all(0 <= a < rank - 1 for a in axes):
            raise ValueError(
                f"attention_axes must name different axes of inputs of rank {rank - 1}, at least one and not the features; got {attention_axes}. "
                "For [batch, length, features] it is 1."
            )
        return cls(axes, rank)

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes that are not attended over: batch, others, heads."""
        return tuple([a for a in range(self.rank - 1) if a not in self.attended])

    @property
    def split(self) -> int:
        """How many leading axes fold into the batch."""
        return max(len(self.lead) - 1, 0) if self.batched is None else self.batched

    @property
    def scores_rank(self) -> int:
        """Of scores [*lead, *queries, *keys]."""
        return len(self.lead) + 2 * len(self.attended)

    def sizes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The leading and the attended sizes of a tensor's shape, with or without its last dimension."""
        return tuple([shape[a] for a in self.lead]), tuple([shape[a] for a in self.attended])

    def broadcast(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """All three with the same sizes on axes that are not attended over, but for the heads, where some may have a size of 1.

        Raises:
            ValueError: sizes differ otherwise, or ranks do.
        """
        tensors, shared = [query, key, value], [a for a in self.lead if a != self.rank - 2]
        full = [-1] * self.rank
        is_fitting = all(t.dim() == self.rank for t in tensors)
        for a in shared if is_fitting else ():
            sizes = [t.shape[a] for t in tensors]
            full[a] = next((n for n in sizes if n != 1), 1)
            is_fitting = is_fitting and all(n in (1, full[a]) for n in sizes)
        if not is_fitting:
            shapes = ", ".join(str(list(t.shape[:-2])) for t in tensors)
            raise ValueError(
                "query, key and value must have as many dimensions, and the same sizes of the batch and of what is not attended over; "
                f"got {shapes} before the features. A size of 1 serves all."
            )
        return [t.expand(full) if any(t.shape[a] != full[a] for a in shared) else t for t in tensors]

    def fold(self, tensor: Tensor) -> Tensor:
        """A projected tensor as [batch, heads, length, dim]; a view where one axis is attended, and the batch and the heads are one axis each."""
        ordered = tensor.permute(*self.lead, *self.attended, self.rank - 1)
        return ordered.reshape(*self.folded(tensor.shape, tensor.shape)[:3], tensor.shape[-1])

    def folded(self, queries: Sequence[int], keys: Sequence[int]) -> tuple[int, int, int, int]:
        """(batch, heads, q_len, kv_len) of folded queries and keys of these shapes."""
        (lead, q_sizes), k_sizes = self.sizes(queries), self.sizes(keys)[1]
        return math.prod(lead[: self.split]), math.prod(lead[self.split :]), math.prod(q_sizes), math.prod(k_sizes)

    def unfold(self, out: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of ``fold`` for a tensor whose shape began so."""
        lead, length = self.sizes(shape)
        order = (*self.lead, *self.attended, self.rank - 1)
        return out.reshape(*lead, *length, out.shape[-1]).permute([order.index(a) for a in range(self.rank)])

    def unfold_scores(self, scores: Tensor, queries: Sequence[int], keys: Sequence[int]) -> Tensor:
        """Scores [batch, heads, q_len, kv_len] as [*lead, *queries, *keys], given the shapes of both."""
        lead, q_sizes = self.sizes(queries)
        return scores.reshape(*lead, *q_sizes, *self.sizes(keys)[1])

    def placed(self, name: str, mask: Tensor, queries: Sequence[int], keys: Sequence[int]) -> Tensor:
        """A mask of Keras' as bool [*lead, *queries, *keys], with sizes of 1 where it repeats.

        Its last dimensions are the attended ones of queries and keys; those before lead, without the last of ``lead`` where its rank is short.

        Raises:
            ValueError: its rank or a size does not fit.
        """
        lead, q_sizes = self.sizes(queries)
        k_sizes, count = self.sizes(keys)[1], 2 * len(self.attended)
        missing = self.scores_rank - mask.dim()
        wanted = (*lead, *q_sizes, *k_sizes)
        if mask.dim() >= count and missing >= 0:
            split = mask.dim() - count
            mask = mask.reshape(*mask.shape[:split], *[1] * missing, *mask.shape[split:])
        if mask.dim() != len(wanted) or any(n not in (1, full) for n, full in zip(mask.shape, wanted, strict=True)):
            raise ValueError(
                f"{name} must broadcast to the scores' {list(wanted)}; got {described(mask)}. "
                f"Give the last {count} dimensions, or all; each is full or 1."
            )
        return mask.to(torch.bool)

    def sharing(self, masks: Sequence[Tensor], queries: Sequence[int]) -> Axes:
        """Folds as many leading axes into the batch as keeps placed masks smallest, so that one that is shared is not copied."""
        lead = self.sizes(queries)[0]

        best, fewest = self.split, -1
        for split in range(self.split, 0, -1) if self.split > 1 else ():
            folds, count = (slice(split), slice(split, len(lead))), len(lead)
            elements = sum(
                math.prod([math.prod(_joined(m.shape[:count][at], lead[at])) for at in folds]) * math.prod(m.shape[count:]) for m in masks
            )
            best, fewest = (split, elements) if fewest < 0 or elements < fewest else (best, fewest)
        return replace(self, batched=best)

    def fold_mask(self, mask: Tensor, queries: Sequence[int], keys: Sequence[int]) -> Tensor:
        """A placed mask as [batch|1, heads|1, q_len|1, kv_len|1]."""
        lead, q_sizes = self.sizes(queries)
        wanted, first, last = (*lead, *q_sizes, *self.sizes(keys)[1]), len(lead), len(lead) + len(q_sizes)
        bounds = ((0, self.split), (self.split, first), (first, last), (last, len(wanted)))
        groups = [_joined(mask.shape[a:b], wanted[a:b]) for a, b in bounds]
        return mask.expand([n for group in groups for n in group]).reshape([math.prod(group) for group in groups])


def _joined(sizes: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """Sizes of dimensions that become one: all 1, or all full."""
    return tuple(sizes) if all(n == 1 for n in sizes) else tuple(wanted)
