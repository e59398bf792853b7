"""What attention can give out besides its output, and how to ask for it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from fused_attn.checks import described
from fused_attn.pytrees import register


@dataclass(frozen=True)
class AuxRequest:
    """What to return besides the output; asking for more never changes the output.

    Args:
        probs: probabilities after the softmax and before dropout, [batch, heads, q_len, kv_len], inputs' dtype, differentiable.
        scores: scores after all modifications, -inf where masked, [batch, heads, q_len, kv_len], inputs' dtype, differentiable.
        lse: natural log of the softmax denominator (sinks included), [batch, heads, q_len], float32 (float64 for float64), differentiable.
        max_scores: largest allowed score of each row, [batch, heads, q_len], like lse but without gradient.
        column_sums: probabilities summed over the queries, [batch, heads, kv_len], like lse but without gradient.
        entropy: -sum p log p of each row, [batch, heads, q_len], like lse but without gradient.

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

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), bool):
                raise TypeError(f"AuxRequest {field.name} must be a bool; got {described(getattr(self, field.name))}. Pass True or False.")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f.name for f in fields(self) if getattr(self, f.name))

    @property
    def flags(self) -> tuple[bool, ...]:
        """The six switches in the order of the fields."""
        return tuple(getattr(self, f.name) for f in fields(self))  # dataclasses.astuple copies, which Dynamo of torch 2.10 refuses

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
