"""The score-modification vocabulary: what happens to scores between the scaled product and the softmax, in the order given.

Every class holds its whole concept: its meaning in plain torch (``apply``), its normal form (``lower``) and examples that the tests
discover. The cpu and eager backends run ``apply`` itself; Triton and CUDA resolve the normal form's name to a pair of device functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_attn.checks import FLOATS, as_number, described, require_broadcast, require_tensor
from fused_attn.kernel_score import KernelScore, unlowerable
from fused_attn.lowering import Grid
from fused_attn.pytrees import HoldsTensors, register


class ScoreMod(HoldsTensors):
    """Base of all score modifications; subclasses are dataclasses with a unique ``name``, whose fields are tensors, numbers, bools or None.

    ``apply`` finds the fields as the author filled them: tensors in their own shapes, whatever the backend and the size.

    Attributes:
        name: what backends resolve; registered when the class is defined.
        positional: True where positions are compared, so that calls with q_len != kv_len must say ``q_offset``.
        kernels: names its normal form uses, where they differ from ``name``.
        is_tame: True where finite scores and finite tensors give finite scores with finite derivatives, in pairs that may not attend too.
        by_parts: whether ``apply`` answers for any part of the batches and heads. It then takes every tensor as ``view`` shapes it,
            through ``grid.crop``, and its numbers are floats; the cpu backend has smaller tiles for it.

    Example:
        >>> @dataclass(frozen=True)
        ... class Halve(ScoreMod):
        ...     name = "halve"
        ...
        ...     def apply(self, scores, grid):
        ...         return scores / 2
        >>> SCORE_MODS["halve"]().apply(torch.tensor([4.0]), None)
        tensor([2.])
    """

    name: ClassVar[str] = ""
    positional: ClassVar[bool] = False
    kernels: ClassVar[tuple[str, ...]] = ()
    is_tame: ClassVar[bool] = False
    by_parts: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        register(cls)
        if cls.name:
            SCORE_MODS[cls.name] = cls

    def apply(self, scores: Tensor, grid: Grid) -> Tensor:
        """The meaning: scores [batch, heads, q, kv] of the grid's region to modified scores of the same shape.

        The region is some queries and keys of all heads, and of all batches where a tensor has a dimension of the batch's size. Positions
        are ``grid.q_pos``, indices ``grid.q_idx`` and ``grid.kv_idx``; ``grid.crop`` cuts a 4-D tensor that has a query or key dimension.
        """
        raise TypeError(
            f"{type(self).__name__} must define apply(scores, grid); got a modification without it. Return a tensor shaped like scores."
        )

    def lower(self, grid: Grid) -> tuple[KernelScore, ...]:
        """The normal form; by default one entry with the dataclass fields in order."""
        reason = "" if self.by_parts else unlowerable(self, SCORE_MODS)
        if reason:
            raise TypeError(f"{reason}.")
        if not self.by_parts:
            return (KernelScore.of(self, self.name),)
        values = [getattr(self, f.name) for f in fields(self)]  # type: ignore[arg-type]
        scalars = tuple(float(v) for v in values if not isinstance(v, Tensor))
        return (KernelScore(self.name, scalars, tuple(self.view(v, grid) for v in values if isinstance(v, Tensor))),)

    @classmethod
    def from_kernel(cls, score: KernelScore) -> Any:
        """The inverse of ``lower``; on the 4-D views where ``apply`` answers for parts."""
        if score.layout is not None:
            return score.rebuilt(cls)
        scalars, tensors = iter(score.scalars), iter(score.tensors)
        return cls(*[next(tensors) if is_tensor else next(scalars) for is_tensor in _are_tensors(cls)])

    def view(self, tensor: Tensor, grid: Grid) -> Tensor:
        """A tensor of the modification as device functions read it: 4-D, by default with dimensions of size 1 in front."""
        return tensor[(None,) * (4 - tensor.dim())]

    def check(self, grid: Grid) -> None:
        """Raises ValueError or TypeError when the modification does not fit a grid of this shape."""

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[ScoreMod]:
        """Instances for a grid of this shape; the test-suite runs every backend on each of them."""
        yield from ()


SCORE_MODS: dict[str, type[ScoreMod]] = {}


def _are_tensors(cls: type[ScoreMod]) -> tuple[bool, ...]:
    return tuple("Tensor" in str(f.type) for f in fields(cls))  # type: ignore[arg-type]


# torch.compile runs it while tracing: Dynamo knows the fields of objects, but not those of classes.
_are_tensors._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_authored(mod: ScoreMod) -> bool:
    """Whether a modification's own code takes its tensors whole, as the author shaped them, and finds all heads together."""
    return not mod.by_parts and type(mod).lower is ScoreMod.lower


def modified(mod: ScoreMod, scores: Tensor, grid: Grid) -> Tensor:
    """The scores after ``mod.apply``, in their own dtype.

    Raises:
        TypeError: it returned something of another shape.
    """
    result = mod.apply(scores, grid)
    if not isinstance(result, Tensor) or result.shape != scores.shape:
        raise TypeError(
            f"{type(mod).__name__}.apply must return scores shaped like those it was given, {list(scores.shape)}; got {described(result)}. "
            "Give its tensors dimensions that broadcast to [batch, heads, q, kv], and cut those with queries or keys by grid.crop."
        )
    return result.to(scores.dtype)


def on_device(score: KernelScore, grid: Grid) -> KernelScore:
    """The normal form as device functions take it: numbers and bools as floats, None left out, tensors as ``view`` shapes them."""
    if score.layout is None:
        return score
    mod = SCORE_MODS[score.name].from_kernel(score)
    values = [getattr(mod, f.name) for f in fields(mod)]
    numbers = tuple(float(v) for v in values if v is not None and not isinstance(v, Tensor))
    return KernelScore(score.name, numbers, tuple(mod.view(t, grid) for t in score.tensors))


def in_own_shape(grads: tuple[Tensor | None, ...], score: KernelScore, grid: Grid) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors of ``on_device`` as gradients of the modification's own."""
    if score.layout is None:
        return grads
    mod = SCORE_MODS[score.name].from_kernel(score)
    result: list[Tensor | None] = []
    for grad, tensor in zip(grads, score.tensors, strict=True):
        with torch.enable_grad():
            leaf = tensor.detach().requires_grad_(grad is not None)
            view = mod.view(leaf, grid)
        result.append(None if grad is None else torch.autograd.grad(view, leaf, grad.to(view.dtype))[0])
    return tuple(result)


def _require_float_tensor(name: str, value: object) -> Tensor:
    return require_tensor(
        name, value, FLOATS, "a floating-point tensor", "Use torch.tensor(...); a bool mask belongs in mask=, not in score_mods."
    )


@dataclass(frozen=True)
class SoftCap(ScoreMod):
    """Squashes scores smoothly into (-cap, cap): cap * tanh(s / cap) (Gemma 2, arXiv 2408.00118).

    Args:
        cap: a positive finite number.

    Example:
        >>> SoftCap(2.0).apply(torch.tensor([0.0, 1.0, 100.0]), None)
        tensor([0.0000, 0.9242, 2.0000])
    """

    cap: float
    name: ClassVar[str] = "softcap"
    is_tame: ClassVar[bool] = True
    by_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if as_number("SoftCap cap", self.cap, "Pass a Python float; leave SoftCap out for no cap.") <= 0:
            raise ValueError(f"SoftCap cap must be positive and finite; got {self.cap}. Leave SoftCap out for no cap.")

    def apply(self, scores: Tensor, grid: Grid) -> Tensor:
        return self.cap * torch.tanh(scores / self.cap)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[ScoreMod]:
        yield cls(1.5)


@dataclass(frozen=True, eq=False)
class ALiBi(ScoreMod):
    """Subtracts a penalty linear in distance: s - slope_h * |q_pos - k| (arXiv 2108.12409).

    Args:
        slopes: float tensor [heads] or [batch, heads].

    Example:
        >>> grid = Grid((1, 1, 2, 2), torch.device("cpu"))
        >>> ALiBi(torch.tensor([0.5])).apply(torch.zeros(1, 1, 2, 2), grid)
        tensor([[[[ 0.0000, -0.5000],
                  [-0.5000,  0.0000]]]])
    """

    slopes: Tensor
    name: ClassVar[str] = "alibi"
    is_tame: ClassVar[bool] = True
    by_parts: ClassVar[bool] = True
    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        slopes = _require_float_tensor("ALiBi slopes", self.slopes)
        if slopes.dim() not in (1, 2, 4):
            raise ValueError(
                f"ALiBi slopes must have shape [heads] or [batch, heads]; got {list(slopes.shape)}. Give one slope per query head."
            )

    def view(self, tensor: Tensor, grid: Grid) -> Tensor:
        return tensor if tensor.dim() == 4 else tensor[(None,) * (2 - tensor.dim())][..., None, None]

    def apply(self, scores: Tensor, grid: Grid) -> Tensor:
        distance = (grid.q_pos - grid.kv_idx).abs()
        return scores - grid.crop(self.view(self.slopes, grid)).to(scores.dtype) * distance

    def check(self, grid: Grid) -> None:
        batch, heads = grid.shape[:2]
        if self.slopes.shape[-1] != heads:
            raise ValueError(
                f"ALiBi slopes must have shape [heads] or [batch, heads] = {[batch, heads]}; got {list(self.slopes.shape)}. Give one slope per query head."
            )
        require_broadcast("ALiBi slopes", self.slopes, (batch, heads), "[batch, heads]", grid.device)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[ScoreMod]:
        yield cls(2.0 ** -(torch.arange(grid.shape[1], device=grid.device) + 1.0))


@dataclass(frozen=True, eq=False)
class Bias(ScoreMod):
    """Adds a tensor to the scores: any shape that broadcasts to [batch, heads, q_len, kv_len], with gradient in that shape.

    Example:
        >>> Bias(torch.tensor([1.0, 2.0])).apply(torch.zeros(1, 1, 1, 2), Grid((1, 1, 1, 2), torch.device("cpu")))
        tensor([[[[1., 2.]]]])
    """

    bias: Tensor
    name: ClassVar[str] = "bias"
    is_tame: ClassVar[bool] = True
    by_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_float_tensor("Bias", self.bias)

    def apply(self, scores: Tensor, grid: Grid) -> Tensor:
        return scores + grid.crop(self.view(self.bias, grid)).to(scores.dtype)

    def check(self, grid: Grid) -> None:
        require_broadcast("Bias", self.bias, grid.shape, "[batch, heads, q_len, kv_len]", grid.device)

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[ScoreMod]:
        batch, heads, q_len, kv_len = grid.shape
        for shape in ((batch, heads, q_len, kv_len), (1, heads, q_len, kv_len), (batch, 1, 1, kv_len), (1, heads, q_len, 1), (1, 1, 1, 1)):
            size = torch.Size(shape).numel()
            yield cls(torch.sin(torch.arange(size, device=grid.device, dtype=torch.float32) * 0.7).view(shape))


# The modifications of one tensor that add to the scores: the tensor itself, or its multiple of the distance.
ADDED = (Bias.name, ALiBi.name)


@dataclass(frozen=True, eq=False)
class DecayBias(ScoreMod):
    """Adds c_i - c_j for query position i and key j: a learned forgetting curve (Forgetting Transformer, arXiv 2503.02130).

    Args:
        c: float tensor [batch|1, heads|1, kv_len] indexed by key position, with gradient; queries read it at ``q_pos``.

    Example:
        >>> DecayBias(torch.tensor([[[0.0, -1.0]]])).apply(torch.zeros(1, 1, 2, 2), Grid((1, 1, 2, 2), torch.device("cpu")))
        tensor([[[[ 0.,  1.],
                  [-1.,  0.]]]])
    """

    c: Tensor
    name: ClassVar[str] = "decay"
    is_tame: ClassVar[bool] = True
    positional: ClassVar[bool] = True
    kernels: ClassVar[tuple[str, ...]] = ("bias",)

    def __post_init__(self) -> None:
        _require_float_tensor("DecayBias c", self.c)

    def lower(self, grid: Grid) -> tuple[KernelScore, ...]:
        keys = self.view(self.c, grid)
        return KernelScore("bias", (), (self._of_queries(keys, grid),)), KernelScore("bias", (), (-keys,))

    def view(self, tensor: Tensor, grid: Grid) -> Tensor:
        return tensor[(None,) * (3 - tensor.dim())][:, :, None, :]

    def _of_queries(self, keys: Tensor, grid: Grid) -> Tensor:
        """c at the queries' positions, [batch|1, heads|1, q_len, 1]; NaN where a query lies beyond the keys, so that it shows."""
        position = grid.q_pos[(None,) * (4 - grid.q_pos.dim())][:, :, :, 0]
        heads, length = keys.shape[1], keys.shape[3]
        batch = keys.shape[0] if position.shape[0] == 1 else position.shape[0]
        per_batch = keys[:, :, 0].expand(batch, -1, -1)
        position = position.expand(per_batch.shape[0], heads, -1)
        if length == 0:
            return per_batch.new_full((*position.shape, 1), torch.nan)
        inside = (position >= 0) & (position < length)
        return per_batch.gather(2, position.clamp(0, length - 1)).where(inside, torch.nan)[..., None]

    def apply(self, scores: Tensor, grid: Grid) -> Tensor:
        keys = self.view(self.c, grid).to(scores.dtype)
        whole = Grid(grid.shape, grid.device, grid.q_offset)
        return scores + grid.crop(self._of_queries(keys, whole)) - grid.crop(keys)

    def check(self, grid: Grid) -> None:
        batch, heads, q_len, kv_len = grid.shape
        if self.c.dim() == 0 or self.c.shape[-1] != kv_len:
            raise ValueError(
                f"DecayBias c must have shape [batch|1, heads|1, kv_len] with kv_len = {kv_len}; got {list(self.c.shape)}. Give one value per key."
            )
        require_broadcast("DecayBias c", self.c, (batch, heads, kv_len), "[batch, heads, kv_len]", grid.device)
        if not isinstance(grid.q_offset, Tensor) and not 0 <= grid.q_offset <= kv_len - q_len:
            raise ValueError(
                f"q_offset must place every query on a key for DecayBias (0 <= q_offset <= {kv_len - q_len}); got {grid.q_offset}. Extend c and the keys or shift the queries."
            )

    @classmethod
    def examples(cls, grid: Grid) -> Iterator[ScoreMod]:
        steps = torch.arange(grid.shape[1] * grid.shape[3], device=grid.device, dtype=torch.float32).view(1, grid.shape[1], -1)
        yield cls(-0.05 * steps)


@dataclass(frozen=True)
class Level(ScoreMod):
    """Zeros with the gradient of the scores, but of those that are not finite: what an additive fill leaves of a row without keys.

    Example:
        >>> Level().apply(torch.tensor([3.0, -torch.inf]), None)
        tensor([0., 0.])
    """

    name: ClassVar[str] = "level"
    is_tame: ClassVar[bool] = True
    by_parts: ClassVar[bool] = True

    def apply(self, scores: Tensor, grid: Grid) -> Tensor:
        finite = scores.masked_fill(~scores.isfinite(), 0.0)
        return finite - finite.detach()
