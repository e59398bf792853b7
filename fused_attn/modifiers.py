"""What a caller may add to the plain operation, checked: mask, scale, alignment, score modifications, sinks, dropout."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_attn import pytrees
from fused_attn.auxiliary import AuxRequest
from fused_attn.checks import (
    FLOATS,
    INTS,
    MAX_OFFSET,
    as_integer,
    as_number,
    described,
    is_traced,
    require_device,
    require_own_data,
    require_shape,
    require_tensor,
    require_true,
)
from fused_attn.dropout import Dropout
from fused_attn.kernel_score import KernelScore
from fused_attn.lowering import Grid, KernelMask, Terms
from fused_attn.masks import Mask, as_mask
from fused_attn.normalizers import Normalizer
from fused_attn.score_mods import ScoreMod
from fused_attn.scoring import Scoring, as_product
from fused_attn.selective import Selective

if TYPE_CHECKING:
    from fused_attn.problem import AttentionProblem, SoftmaxProblem


def as_scale(value: object) -> float:
    """A finite factor of the scores."""
    return as_number("scale", value, "Pass a float; a tensor, learned or not, is scoring=DotProduct(tensor).")


def _require_offset(value: object, batch: int, device: torch.device) -> int | Tensor:
    advice = "0 aligns top-left, kv_len - q_len bottom-right, an int tensor [batch] each sequence on its own."
    if isinstance(value, Tensor):
        require_tensor("q_offset", value, INTS, f"an int or an int tensor [batch] = [{batch}]", advice)
        if value.dim() == 0 and is_traced():  # lengths are tensors to torch.jit.trace
            return value.to(device).expand(batch)
        require_shape("q_offset", value, ((batch,),), device)
        return value
    offset = as_integer("q_offset", value, advice)
    if not -MAX_OFFSET <= offset <= MAX_OFFSET:
        raise ValueError(f"q_offset must lie within 2**29 of 0; got {offset}. {advice}")
    return offset


def resolve_offset(value: object, positional: bool, shape: tuple[int, int, int, int], device: torch.device) -> int | Tensor:
    """The key position of query 0; needed where positions are compared and the lengths differ, 0 otherwise."""
    batch, _, q_len, kv_len = shape
    if value is not None:
        return _require_offset(value, batch, device)
    if positional and q_len != kv_len:
        raise ValueError(
            f"q_offset must be given when positions are compared and q_len != kv_len; got q_len={q_len}, kv_len={kv_len}. "
            f"Pass q_offset=0 (top-left) or q_offset={kv_len - q_len} (bottom-right, kv_len - q_len)."
        )
    return 0


def _reject_grad(owner: object) -> None:
    for value in pytrees.state(owner).values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Tensor) and item.requires_grad:
                raise ValueError(
                    f"a mask must not require grad; got {type(owner).__name__} holding a tensor that does. Pass a learned term as score_mods=(Bias(tensor),)."
                )
            if isinstance(item, Mask):
                _reject_grad(item)


def checked_mask(mask: object, grid: Grid) -> Mask | None:
    """A mask that fits the grid and holds nothing that wants a gradient."""
    if mask is None:
        return None
    result = as_mask(mask)
    _reject_grad(result)
    result.check(grid)
    return result


def require_dropout(value: object, shape: tuple[int, int, int, int]) -> Dropout | None:
    """A dropout that removes anything and whose whole problem holds the call, or None."""
    if value is not None and not isinstance(value, Dropout):
        raise TypeError(f"dropout must be a fused_attn.Dropout; got {described(value)}. Write Dropout(0.1) for a chance of removal of 0.1.")
    if value is not None:
        value.check(shape)
        require_own_data("Dropout seed", value.seed)
    # A chance of 0 is no dropout: nothing may be drawn from torch's generator for it.
    return value if value is not None and value.p > 0 else None


def _require_dataclass(value: object) -> None:
    if not is_dataclass(value):
        raise TypeError(
            f"{type(value).__name__} must be a dataclass; got a plain class. Decorate it with @dataclass(frozen=True, eq=False)."
        )


def checked_mods(mods: object, grid: Grid) -> tuple[ScoreMod, ...]:
    """Score modifications that fit the grid."""
    if isinstance(mods, ScoreMod):
        raise TypeError(
            f"score_mods must be a tuple of modifications; got {type(mods).__name__} alone. Write score_mods=({type(mods).__name__}(...),)."
        )
    if not isinstance(mods, (tuple, list)):
        raise TypeError(f"score_mods must be a tuple of modifications; got {described(mods)}. Write score_mods=(SoftCap(30.0), Bias(b)).")
    for mod in mods:
        if not isinstance(mod, ScoreMod):
            raise TypeError(
                f"score_mods must hold fused_attn score modifications; got {described(mod)}. A dense tensor is written Bias(tensor)."
            )
        _require_dataclass(mod)
        mod.check(grid)
    if any(isinstance(mod, Selective) for mod in mods[:-1]):
        raise ValueError(
            "Selective must be the last modification, once; got others after it. It needs the scores that they leave: put it at the end."
        )
    return tuple(mods)


def checked_scoring(scoring: object, scale: object, grid: Grid) -> Scoring:
    """A scoring that fits the grid, alone: it says the scale itself."""
    if not isinstance(scoring, Scoring):
        got = f"the class {scoring.__name__} itself" if isinstance(scoring, type) else described(scoring)
        raise TypeError(f"scoring must be a fused_attn scoring; got {got}. Write DotProduct(0.5) or NegativeL2(), or subclass Scoring.")
    _require_dataclass(scoring)
    if scale is not None:
        raise ValueError(
            f"scale and scoring must not be combined; got scale={described(scale)}. Give the scoring its scale, as in DotProduct(scale)."
        )
    scoring.check(grid)
    return scoring


def checked_normalizer(normalizer: object, grid: Grid) -> Normalizer:
    """A normaliser that fits the grid."""
    if not isinstance(normalizer, Normalizer):
        got = f"the class {normalizer.__name__} itself" if isinstance(normalizer, type) else described(normalizer)
        raise TypeError(f"normalizer must be a fused_attn normaliser; got {got}. Write Sigmoid(), or None for the softmax.")
    _require_dataclass(normalizer)
    normalizer.check(grid)
    return normalizer


def require_softmax(normalizer: Normalizer, others: dict[str, bool]) -> None:
    """What belongs to the softmax is not asked of another normaliser; ``others`` says what is asked for."""
    asked = [name for name, is_asked in others.items() if is_asked]
    if asked:
        raise ValueError(
            f"{asked[0]} belongs to the softmax's denominator and must not be combined with another normalizer; got {type(normalizer).__name__}. "
            "Leave one of them out."
        )


def require_sinks(sinks: object, heads: int, device: torch.device) -> None:
    """One logit per query head."""
    tensor = require_tensor("sinks", sinks, FLOATS, "a floating-point tensor [heads]", "Give one logit per query head.")
    require_shape("sinks", tensor, ((heads,),), device)


def require_request(aux: object, grid: Grid) -> None:
    """A request whose rows and heads are among the call's."""
    if not isinstance(aux, AuxRequest):
        raise TypeError(f"return_aux must be a fused_attn.AuxRequest; got {described(aux)}. Write AuxRequest(probs=True).")
    for name, indices, size in (("rows", aux.rows, grid.shape[2]), ("heads", aux.heads, grid.shape[1])):
        if indices is not None:
            require_device(f"AuxRequest {name}", indices, grid.device)
            require_true(
                ((indices.to(torch.int64) >= -size) & (indices.to(torch.int64) < size)).all(),
                f"AuxRequest {name} must lie in [-{size}, {size}); got others. Count from 0, or from the end with negative numbers.",
                indices,
            )


_EVERYTHING = KernelMask()


@dataclass(frozen=True, slots=True)
class Modifiers:
    """What a caller may add to the plain operation; shared by attention and softmax problems."""

    mask: Mask | None
    scale: float
    q_offset: int | Tensor
    score_mods: tuple[ScoreMod, ...] = ()
    sinks: Tensor | None = None
    dropout: Dropout | None = None
    scoring: Scoring | None = None
    normalizer: Normalizer | None = None

    def as_product(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Modifiers]:
        """q, k and modifiers of the same call with a scoring that lowers turned into a dot product, and any other folded."""
        if self.scoring is None:
            return q, k, self
        if not self.scoring.lowers:
            q, k, scoring = self.scoring.fold(q, k)
            return q, k, replace(self, scoring=scoring)
        product = as_product(self.scoring, q, k)
        return product.q, product.k, replace(self, scale=product.scale, score_mods=(*product.mods, *self.score_mods), scoring=None)

    def lower(self, problem: AttentionProblem | SoftmaxProblem) -> Terms:
        """The normal form on the problem's grid."""
        if self.mask is None and not self.score_mods and self.dropout is None and self.scoring is None and self.normalizer is None:
            return Terms(_EVERYTHING, self.scale, self.q_offset, (), self.sinks)
        grid = problem.grid
        mask = _EVERYTHING if self.mask is None else self.mask.lower(grid).settled(grid)
        mods: tuple[KernelScore, ...] = tuple(score for mod in self.score_mods for score in mod.lower(grid))
        dropout = self.dropout.lower(grid.device) if self.dropout is not None else None
        scoring = None if self.scoring is None else self.scoring.to_kernel()
        normalizer = None if self.normalizer is None else self.normalizer.to_kernel()
        return Terms(mask, self.scale, self.q_offset, mods, self.sinks, dropout, scoring, normalizer)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Tensors that may want a gradient: the sinks, then those of the scoring, of the modifications and of the normaliser."""
        if self.scoring is None and self.normalizer is None and not self.score_mods:
            return () if self.sinks is None else (self.sinks,)
        scoring = () if self.scoring is None else self.scoring.tensors
        normalizer = () if self.normalizer is None else self.normalizer.tensors
        return (*(() if self.sinks is None else (self.sinks,)), *scoring, *(t for m in self.score_mods for t in m.tensors), *normalizer)

    def with_parameters(self, tensors: tuple[Tensor, ...]) -> Modifiers:
        """A copy on other tensors, in the order of ``parameters``."""
        left = list(tensors)
        sinks = None if self.sinks is None else left.pop(0)
        scoring = None if self.scoring is None else self.scoring.with_tensors(tuple([left.pop(0) for _ in self.scoring.tensors]))
        mods = tuple([m.with_tensors(tuple([left.pop(0) for _ in m.tensors])) for m in self.score_mods])
        normalizer = None if self.normalizer is None else self.normalizer.with_tensors(tuple(left))
        return replace(self, sinks=sinks, score_mods=mods, scoring=scoring, normalizer=normalizer)
