"""What attention can give out besides its output, and how to ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.checks import FLOATS, described
from fused_attn.pytrees import register

_SWITCHES = ("probs", "scores", "lse", "max_scores", "column_sums", "entropy")


@dataclass(frozen=True)
class AuxRequest:
    """What to return besides the output; asking for more never changes the output.

    Args:
        probs: probabilities after the softmax and before dropout, [batch, heads, q_len, kv_len], inputs' dtype, differentiable.
        scores: scores after all modifications, -inf where masked, [batch, heads, q_len, kv_len], differentiable. As the ``Bias`` of the
            next layer they make residual attention over depth (RealFormer, arXiv 2012.11747).
        lse: natural log of the softmax denominator (sinks included), [batch, heads, q_len], float32 (float64 for float64), differentiable.
        max_scores: largest allowed score of each row, [batch, heads, q_len], like lse but without gradient.
        column_sums: probabilities summed over the queries, [batch, heads, kv_len], like lse but without gradient.
        entropy: -sum p log p of each row, [batch, heads, q_len], like lse but without gradient.
        scores_dtype: a floating-point dtype of the scores; the inputs' by default.

    Raises:
        TypeError: a switch is no bool, or scores_dtype no dtype.
        ValueError: scores_dtype is no floating-point dtype, or scores are not asked for.

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

    def __post_init__(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"AuxRequest {name} must be a bool; got {described(getattr(self, name))}. Pass True or False.")
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

    @property
    def names(self) -> tuple[str, ...]:
        return tuple([name for name in _SWITCHES if getattr(self, name)])

    @property
    def flags(self) -> tuple[bool, ...]:
        """The six switches in the order of the fields."""
        return tuple([getattr(self, name) for name in _SWITCHES])

    @property
    def numbers(self) -> tuple[int, ...]:
        """The request as an op's arguments hold it: the switches, and the place of the scores' dtype among ``FLOATS``, from 1; 0 for None."""
        return (*map(int, self.flags), 0 if self.scores_dtype is None else 1 + FLOATS.index(self.scores_dtype))

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> AuxRequest:
        """The inverse of ``numbers``; the dtype may be left out."""
        probs, scores, lse, max_scores, column_sums, entropy, *dtype = numbers
        kind = FLOATS[dtype[0] - 1] if dtype and dtype[0] else None
        return cls(bool(probs), bool(scores), bool(lse), bool(max_scores), bool(column_sums), bool(entropy), kind)

    @property
    def needs_pass(self) -> bool:
        """Whether anything is asked for that the forward kernel does not leave behind anyway."""
        return self.probs or self.scores or self.max_scores or self.column_sums or self.entropy


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


register(AuxOutput)
