"""The normaliser vocabulary: how a row of scores becomes weights of the values. Softmax is the default and has no class.

Every class holds its whole concept: its meaning in plain torch (``weights``) and, where kernels compute it, their name for it. One without
such a name works on whole rows, or across heads: it runs on the dense path (``eager``), O(q_len * kv_len) memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from fused_attn.checks import FLOATS, as_integer, as_number, described, require_device, require_tensor
from fused_attn.kernel_score import KernelScore
from fused_attn.lowering import Grid
from fused_attn.pytrees import HoldsTensors, register

Softmax = Callable[[Tensor], Tensor]


class Normalizer(HoldsTensors):
    """Base of all normalisers; subclasses are dataclasses.

    Attributes:
        name: what kernel backends resolve; empty for the dense path.
        mixes_heads: whether a head's values may get weights of other heads.
        draws: whether the weights are random, drawn from torch's generator.

    Example:
        >>> @dataclass(frozen=True, eq=False)
        ... class Squared(Normalizer):
        ...     def weights(self, scores, softmax):
        ...         return scores.clamp(min=0).square()
        >>> Squared().weights(torch.tensor([-torch.inf, 2.0]), None)
        tensor([0., 4.])
    """

    name: ClassVar[str] = ""
    mixes_heads: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        register(cls)
        if cls.name:
            NORMALIZERS[cls.name] = cls

    def weights(self, scores: Tensor, softmax: Softmax) -> Tensor:
        """The meaning: scores [batch, heads, q_len, kv_len], -inf where masked, to weights of that shape, which count only where allowed.

        ``softmax`` normalises the last dimension and gives zeros in rows of nothing but -inf.
        """
        raise TypeError(
            f"{type(self).__name__} must define weights(scores, softmax); got a normaliser without it. Return a tensor shaped like scores."
        )

    def mix(self, weights: Tensor) -> Tensor:
        """What becomes of the weights after dropout, on their way to the values."""
        return weights

    def check(self, grid: Grid) -> None:
        """Raises ValueError or TypeError when the normaliser does not fit a grid of this shape."""

    def to_kernel(self) -> KernelScore:
        """The normal form of one that kernels compute: its numbers in order."""
        return KernelScore(self.name, tuple([float(getattr(self, f.name)) for f in fields(self)]))  # type: ignore[arg-type]

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Normalizer]:
        """Instances for a grid of this shape."""
        yield from ()


NORMALIZERS: dict[str, type[Normalizer]] = {}


def weighed(normalizer: Normalizer, scores: Tensor, softmax: Softmax) -> Tensor:
    """``normalizer.weights``, held to its contract.

    Raises:
        TypeError: it returned something of another shape.
    """
    weights = normalizer.weights(scores, softmax)
    if not isinstance(weights, Tensor) or weights.shape != scores.shape:
        raise TypeError(
            f"{type(normalizer).__name__}.weights must return weights shaped like the scores, {list(scores.shape)}; got {described(weights)}. "
            "Return one weight per pair."
        )
    return weights.to(scores.dtype)


@dataclass(frozen=True, eq=False)
class Sigmoid(Normalizer):
    """Every pair by itself: 1 / (1 + exp(-(s + bias))), nothing summed over the row (arXiv 2409.04431).

    Args:
        bias: added to every score; the paper takes -log(kv_len). A learned one is ``score_mods=(Bias(tensor),)``.

    Example:
        >>> Sigmoid().weights(torch.tensor([0.0, -torch.inf]), None)
        tensor([0.5000, 0.0000])
    """

    bias: float = 0.0
    name: ClassVar[str] = "sigmoid"

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "bias", as_number("Sigmoid bias", self.bias, "Pass a float; a learned bias is score_mods=(Bias(tensor),).")
        )

    def weights(self, scores: Tensor, softmax: Softmax) -> Tensor:
        return torch.sigmoid(scores + self.bias)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Normalizer]:
        yield cls()
        yield cls(-2.5)


@dataclass(frozen=True, eq=False)
class TopK(Normalizer):
    """Softmax over the k largest scores of each row; whatever equals the k-th stays too.

    Args:
        k: at most kv_len.
        straight_through: whether gradients are those of the softmax over the whole row.

    Example:
        >>> softmax = lambda scores: scores.softmax(-1)
        >>> TopK(2).weights(torch.tensor([1.0, 0.0, 1.0]), softmax)
        tensor([0.5000, 0.0000, 0.5000])
    """

    k: int
    straight_through: bool = False

    def __post_init__(self) -> None:
        if as_integer("TopK k", self.k, "Pass how many keys stay.") < 1:
            raise ValueError(f"TopK k must be at least 1; got {self.k}. Pass how many keys stay.")
        if not isinstance(self.straight_through, bool):
            raise TypeError(f"TopK straight_through must be a bool; got {described(self.straight_through)}. Pass True or False.")

    def check(self, grid: Grid) -> None:
        if self.k > grid.shape[3]:
            raise ValueError(f"TopK k must be at most kv_len = {grid.shape[3]}; got {self.k}. Leave TopK out to keep every key.")

    def weights(self, scores: Tensor, softmax: Softmax) -> Tensor:
        smallest = scores.detach().topk(self.k, -1).values[..., -1:]
        sparse = softmax(scores.masked_fill(scores < smallest, -torch.inf))
        return _straight_through(sparse, softmax(scores)) if self.straight_through else sparse

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Normalizer]:
        if grid.shape[3]:
            yield cls(max(1, grid.shape[3] // 2))
            yield cls(1, straight_through=True)


@dataclass(frozen=True, eq=False)
class Hard(Normalizer):
    """The largest score of each row takes all the weight (the first of equals), with the gradient of the softmax.

    Example:
        >>> Hard().weights(torch.tensor([1.0, 3.0, 2.0]), lambda scores: scores.softmax(-1))
        tensor([0., 1., 0.])
    """

    def weights(self, scores: Tensor, softmax: Softmax) -> Tensor:
        soft = softmax(scores)
        first = torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0) if scores.shape[-1] else soft
        return _straight_through(first.masked_fill(scores == -torch.inf, 0.0), soft)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Normalizer]:
        yield cls()


@dataclass(frozen=True, eq=False)
class Gumbel(Normalizer):
    """Softmax of (scores + Gumbel noise) / temperature, the noise drawn from torch's generator (arXiv 1611.01144).

    Args:
        temperature: positive.
        hard: whether the largest takes all the weight, with the gradient of the softmax.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> Gumbel(hard=True).weights(torch.tensor([0.0, 30.0, -torch.inf]), lambda scores: scores.softmax(-1))
        tensor([0., 1., 0.])
    """

    temperature: float = 1.0
    hard: bool = False
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if as_number("Gumbel temperature", self.temperature, "Pass a positive float.") <= 0:
            raise ValueError(f"Gumbel temperature must be positive; got {self.temperature}. Pass 1.0 for plain Gumbel noise.")
        if not isinstance(self.hard, bool):
            raise TypeError(f"Gumbel hard must be a bool; got {described(self.hard)}. Pass True or False.")

    def weights(self, scores: Tensor, softmax: Softmax) -> Tensor:
        noise = -torch.empty_like(scores).exponential_().log()
        noisy = (scores + noise) / self.temperature
        return Hard().weights(noisy, softmax) if self.hard else softmax(noisy)


@dataclass(frozen=True, eq=False)
class TalkingHeads(Normalizer):
    """Mixes the weights of all heads before they meet the values: head h uses sum_g weight[h, g] * weights_g (arXiv 2003.02436).

    Mixing scores before the softmax is a score modification of your own, which finds all heads together. A value counts in every head
    where its key may be attended in any: a NaN reaches heads whose weight for it is 0.

    Args:
        weight: float tensor [heads, heads], with gradient.
        normalizer: what makes the weights; softmax for None.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> TalkingHeads(swap).mix(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)).flatten()
        tensor([2., 1.])
    """

    weight: Tensor
    normalizer: Normalizer | None = None
    mixes_heads: ClassVar[bool] = True

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.normalizer is not None and self.normalizer.draws

    def __post_init__(self) -> None:
        require_tensor("TalkingHeads weight", self.weight, FLOATS, "a floating-point tensor [heads, heads]", "Use torch.eye(heads).")
        if self.normalizer is not None and not isinstance(self.normalizer, Normalizer):
            raise TypeError(f"TalkingHeads normalizer must be a fused_attn normaliser; got {described(self.normalizer)}. Write Sigmoid().")

    def check(self, grid: Grid) -> None:
        heads = grid.shape[1]
        if tuple(self.weight.shape) != (heads, heads):
            raise ValueError(
                f"TalkingHeads weight must have shape [heads, heads] = {[heads, heads]}; got {list(self.weight.shape)}. Give one row per head."
            )
        require_device("TalkingHeads weight", self.weight, grid.device)
        if self.normalizer is not None:
            self.normalizer.check(grid)

    def weights(self, scores: Tensor, softmax: Softmax) -> Tensor:
        return softmax(scores) if self.normalizer is None else self.normalizer.weights(scores, softmax)

    def mix(self, weights: Tensor) -> Tensor:
        mixed = torch.einsum("hg,bgqk->bhqk", self.weight.to(weights.dtype), weights)
        return mixed if self.normalizer is None else self.normalizer.mix(mixed)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[Normalizer]:
        heads = grid.shape[1]
        yield cls(torch.eye(heads, device=grid.device) + 0.1 * torch.arange(heads * heads, device=grid.device).view(heads, heads).cos())


def _straight_through(values: Tensor, gradients: Tensor) -> Tensor:
    """The values of one with the gradient of another."""
    return values.detach() + (gradients - gradients.detach())
