"""What attention can give out besides its output, and how to ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_attn.checks import FLOATS, INTS, described, require_tensor
from fused_attn.pytrees import is_same, register, state


@dataclass(frozen=True, eq=False)
class AuxRequest:
    """What to return besides the output; asking for more never changes the output.

    Args:
        probs: probabilities after the softmax and before dropout, [batch, heads, q_len, kv_len], inputs' dtype, differentiable.
        scores: scores after all modifications, -inf where masked, [batch, heads, q_len, kv_len], differentiable. As the ``Bias`` of the
            next layer they make residual attention over depth (RealFormer, arXiv 2012.11747).
        lse: natural log of the softmax denominator (sinks included), [batch, heads, q_len], float32 (float64 for float64), differentiable.
        max_scores: largest allowed score of each row, [batch, heads, q_len], like lse; equal ones share its gradient.
        column_sums: probabilities summed over the queries, [batch, heads, kv_len], like lse.
        entropy: -sum p log p of each row, [batch, heads, q_len], like lse.
        scores_dtype: a floating-point dtype of the scores; the inputs' by default.
        rows: int tensor [n] of queries, from the end where negative: probs and scores are of these alone, [batch, heads, n, kv_len].
        heads: int tensor [n] of query heads, likewise.

    Raises:
        TypeError: a switch is no bool, scores_dtype no dtype, or rows or heads no int tensor.
        ValueError: scores_dtype is no floating-point dtype or scores are not asked for; rows or heads are not [n], or of nothing.

    Example:
        >>> AuxRequest(probs=True, lse=True).names
        ('probs', 'lse')
    """

    probs: bool = False
    scores: bool = False
    lse: bool = False
    max_scores: bool = False
    column_sums: bool = False
    entropy: bool = False
    scores_dtype: torch.dtype | None = None
    rows: Tensor | None = None
    heads: Tensor | None = None

    def __post_init__(self) -> None:
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"AuxRequest {name} must be a bool; got {described(getattr(self, name))}. Pass True or False.")
        self._check_dtype()
        for name in ("rows", "heads"):
            self._check_indices(name, getattr(self, name))

    def _check_dtype(self) -> None:
        if self.scores_dtype is None:
            return
        advice = "Pass torch.float32, or leave it out for the inputs' dtype."
        if not isinstance(self.scores_dtype, torch.dtype):
            raise TypeError(f"AuxRequest scores_dtype must be a torch.dtype; got {described(self.scores_dtype)}. {advice}")
        if self.scores_dtype not in FLOATS:
            raise ValueError(f"AuxRequest scores_dtype must be float16, bfloat16, float32 or float64; got {self.scores_dtype}. {advice}")
        if not self.scores:
            raise ValueError(
                f"AuxRequest scores must be asked for with a scores_dtype; got scores_dtype={self.scores_dtype} alone. Add scores=True."
            )

    def _check_indices(self, name: str, value: Tensor | None) -> None:
        if value is None:
            return
        require_tensor(f"AuxRequest {name}", value, INTS, "an int tensor [n]", f"Write torch.tensor([0, 5]) for two {name}.")
        if value.dim() != 1:
            raise ValueError(f"AuxRequest {name} must have shape [n]; got {list(value.shape)}. Flatten it.")
        if not (self.probs or self.scores):
            raise ValueError(f"AuxRequest {name} must come with probs=True or scores=True; got neither. They alone are cut by it.")

    def __eq__(self, other: object) -> bool:
        return is_same(state(self), state(other)) if isinstance(other, AuxRequest) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.flags)

    @classmethod
    def of(cls, flags: Iterable[bool], scores_dtype: torch.dtype | None = None) -> AuxRequest:
        """The inverse of ``flags``."""
        switches: dict[str, Any] = dict(zip(SWITCHES, flags, strict=True))
        return cls(**switches, scores_dtype=scores_dtype)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple([name for name in SWITCHES if getattr(self, name)])

    @property
    def flags(self) -> tuple[bool, ...]:
        """The six switches in the order of the fields."""
        return tuple([getattr(self, name) for name in SWITCHES])

    @property
    def numbers(self) -> tuple[int, ...]:
        """The request as an op's arguments hold it: the switches, and the place of the scores' dtype among ``FLOATS``, from 1; 0 for None."""
        return (*map(int, self.flags), 0 if self.scores_dtype is None else 1 + FLOATS.index(self.scores_dtype))

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> AuxRequest:
        """The inverse of ``numbers``; the dtype may be left out."""
        flags, dtype = numbers[: len(SWITCHES)], numbers[len(SWITCHES) :]
        return cls.of(map(bool, flags), FLOATS[dtype[0] - 1] if dtype and dtype[0] else None)

    @property
    def needs_pass(self) -> bool:
        """Whether anything is asked for that the forward kernel does not leave behind anyway."""
        return self.probs or self.scores or self.max_scores or self.column_sums or self.entropy

    @property
    def is_picked(self) -> bool:
        """Whether probs and scores are of some rows or heads only."""
        return self.rows is not None or self.heads is not None

    def indices(self, heads: int, q_len: int) -> tuple[Tensor | None, Tensor | None]:
        """The heads and rows asked for as int64 indices from 0 on, None for all of them."""
        head, row = (
            None if t is None else torch.where(t < 0, t.to(torch.int64) + size, t.to(torch.int64))
            for t, size in ((self.heads, heads), (self.rows, q_len))
        )
        return head, row


register(AuxRequest)
SWITCHES = ("probs", "scores", "lse", "max_scores", "column_sums", "entropy")
NOTHING = AuxRequest()


@dataclass(frozen=True)
class AuxOutput:
    """What was asked for in an ``AuxRequest``; everything else is None."""

    probs: Tensor | None = None
    scores: Tensor | None = None
    lse: Tensor | None = None
    max_scores: Tensor | None = None
    column_sums: Tensor | None = None
    entropy: Tensor | None = None

    def mapped(self, function: Callable[[str, Tensor], Tensor]) -> AuxOutput:
        """What a function makes of the name and the tensor of each output that was asked for.

        Example:
            >>> AuxOutput(lse=torch.zeros(2)).mapped(lambda name, tensor: tensor + 1).lse
            tensor([1., 1.])
        """
        found = [(name, getattr(self, name)) for name in SWITCHES]
        return AuxOutput(**{name: None if t is None else function(name, t) for name, t in found})


register(AuxOutput)
