"""Frozen problems: everything a call says, checked once. All validation and all error text for calls live here.

Errors follow one pattern: what must hold, what was got, what to do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.checks import FLOATS, as_integer, described, require_device, require_own_data, require_tensor
from fused_attn.layout import with_laid_out_gradients
from fused_attn.lowering import Grid, LoweredAttention, LoweredSoftmax
from fused_attn.masks import Mask
from fused_attn.modifiers import (
    Modifiers,
    as_scale,
    checked_mask,
    checked_mods,
    checked_normalizer,
    checked_scoring,
    require_dropout,
    require_request,
    require_sinks,
    require_softmax,
    resolve_offset,
)
from fused_attn.score_mods import Bias
from fused_attn.targets import Target

DTYPES = FLOATS
EmptyRows = Literal["zero", "uniform", "softmax"]
_EMPTY_ROWS = get_args(EmptyRows)


class UnsupportedError(RuntimeError):
    """An explicitly requested backend cannot run this problem; the message lists every reason."""


def require_input(name: str, value: object) -> Tensor:
    """A floating-point tensor that attention or softmax can work on."""
    return require_tensor(
        name, value, DTYPES, "a float16, bfloat16, float32 or float64 tensor", "Convert it with torch.as_tensor(...) or .to(torch.float32)."
    )


def active_transform() -> str | None:
    """The torch transform that a call runs under and that only plain torch operations can follow, in words."""
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform"
    return None


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """One attention call, checked. Build it with ``AttentionProblem.check``.

    Args:
        q: [batch, heads, q_len, head_dim].
        k: [batch, kv_heads, kv_len, head_dim].
        v: [batch, kv_heads, kv_len, value_dim].
        modifiers: mask, scale or scoring, alignment, score modifications, sinks, dropout, normaliser.
        aux: what to return besides the output, or None.
        transform: the torch transform it runs under, or None.
        empty_rows: what rows without keys give: "zero", "uniform" or "softmax".
        target: where it would run; None for the machine at hand.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    modifiers: Modifiers
    aux: AuxRequest | None = None
    transform: str | None = None
    empty_rows: EmptyRows = "zero"
    target: Target | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, q_len, kv_len)."""
        batch, heads, q_len, _ = self.q.shape
        return batch, heads, q_len, self.k.shape[2]

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, self.q.device, self.modifiers.q_offset)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Every tensor that may want a gradient: q, k, v, then the modifiers' parameters."""
        return (self.q, self.k, self.v, *self.modifiers.parameters)

    @property
    def requires_grad(self) -> bool:
        """Whether grad mode is on and any input wants a gradient."""
        if not torch.is_grad_enabled():
            return False
        if self.q.requires_grad or self.k.requires_grad or self.v.requires_grad:
            return True
        parameters = self.modifiers.parameters
        return bool(parameters) and any(t.requires_grad for t in parameters)

    def with_inputs(self, tensors: tuple[Tensor, ...]) -> AttentionProblem:
        """A copy on other tensors, in the order of ``inputs``."""
        q, k, v, *rest = tensors
        return replace(self, q=q, k=k, v=v, modifiers=self.modifiers.with_parameters(tuple(rest)))

    def lower(self) -> LoweredAttention:
        if self.modifiers.scoring is None:
            return LoweredAttention(self.q, self.k, self.v, self.modifiers.lower(self))
        q, k = with_laid_out_gradients((self.q, self.k)) if self.requires_grad else (self.q, self.k)
        q, k, modifiers = self.modifiers.as_product(q, k)
        return LoweredAttention(q, k, self.v, modifiers.lower(self))

    @classmethod
    def check(cls, q: Any, k: Any, v: Any, options: dict[str, Any]) -> AttentionProblem:
        """Validates a call; ``options`` are the keyword arguments of ``fused_attn.attention`` but for the backend."""
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            require_own_data(name, require_input(name, tensor))
            if tensor.dim() != 4:
                raise ValueError(
                    f"{name} must be 4-D [batch, heads, length, dim]; got {tensor.dim()}-D {list(tensor.shape)}. Insert the missing dimensions with unsqueeze."
                )
        _check_agreement(q, k, v)
        batch, heads, q_len, head_dim = q.shape
        shape = (batch, heads, q_len, k.shape[2])
        scale = options["scale"]
        scale = (head_dim**-0.5 if head_dim else 1.0) if scale is None else as_scale(scale)
        mask, mods, offset = options["mask"], options["score_mods"], options["q_offset"]
        if mask is not None or offset is not None or not (isinstance(mods, tuple) and not mods):
            positional = isinstance(mask, Mask) and mask.positional
            positional = positional or (isinstance(mods, (tuple, list)) and any(getattr(m, "positional", False) for m in mods))
            offset = resolve_offset(offset, positional, shape, q.device)
            grid = Grid(shape, q.device, offset)
            mask, mods = checked_mask(mask, grid), checked_mods(mods, grid)
        offset = 0 if offset is None else offset
        scoring, normalizer, aux = options.get("scoring"), options.get("normalizer"), options["return_aux"]
        empty_rows = options.get("empty_rows", "zero")
        if scoring is not None or normalizer is not None or aux is not None:
            grid = Grid(shape, q.device, offset)
        if scoring is not None:
            scoring, scale = checked_scoring(scoring, options["scale"], grid), 1.0
        sinks = options["sinks"]
        if sinks is not None:
            require_sinks(sinks, heads, q.device)
        if aux is not None:
            require_request(aux, grid)
        if not isinstance(empty_rows, str) or empty_rows not in _EMPTY_ROWS:
            raise ValueError(f"empty_rows must be 'zero', 'uniform' or 'softmax'; got {described(empty_rows)}. 'zero' is the default.")
        if normalizer is not None:
            normalizer = checked_normalizer(normalizer, grid)
            statistics = {f"the {name} of a row": aux is not None and getattr(aux, name) for name in ("lse", "entropy")}
            require_softmax(normalizer, {"sinks": sinks is not None, "empty_rows": empty_rows != "zero", **statistics})
        modifiers = Modifiers(mask, scale, offset, tuple(mods), sinks, require_dropout(options["dropout"], shape), scoring, normalizer)
        return cls(q, k, v, modifiers, aux, active_transform(), cast(EmptyRows, empty_rows))


def _check_agreement(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (q.dtype == k.dtype == v.dtype):
        raise TypeError(f"q, k and v must share one dtype; got {q.dtype}, {k.dtype}, {v.dtype}. Convert them with .to(q.dtype).")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}. Move them with .to(q.device).")
    batch, heads, _, head_dim = q.shape
    kv_batch, kv_heads, kv_len, k_dim = k.shape
    v_batch, v_heads, v_len, _ = v.shape
    if kv_batch != batch or v_batch != batch:
        raise ValueError(
            f"q, k and v must share the batch size; got {batch}, {kv_batch}, {v_batch}. Expand the smaller one with .expand(...)."
        )
    if k_dim != head_dim:
        raise ValueError(f"q and k must share head_dim; got {head_dim} and {k_dim}. Only v may have another one.")
    if v_heads != kv_heads or v_len != kv_len:
        raise ValueError(
            f"k and v must share kv_heads and kv_len; got {list(k.shape[1:3])} and {list(v.shape[1:3])}. Slice or project them alike."
        )
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            f"kv_heads must divide heads; got {heads} query heads and {kv_heads} key/value heads. Query head n uses key head n // (heads // kv_heads)."
        )


@dataclass(frozen=True, slots=True)
class SoftmaxProblem:
    """One masked softmax, checked; ``scores`` is the caller's tensor viewed as [batch, middle, q_len, kv_len].

    Args:
        scores: 4-D view, any strides.
        modifiers: mask, scale, alignment, at most one ``Bias``, dropout.
        log: logarithms of the probabilities instead.
        uniform_empty: rows without keys give 1 / kv_len instead of 0.
        transform: the torch transform it runs under, or None.
        target: where it would run; None for the machine at hand.
    """

    scores: Tensor
    modifiers: Modifiers
    log: bool = False
    uniform_empty: bool = False
    transform: str | None = None
    target: Target | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, middle, q_len, kv_len = self.scores.shape
        return batch, middle, q_len, kv_len

    @property
    def device(self) -> torch.device:
        return self.scores.device

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, self.scores.device, self.modifiers.q_offset)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.scores, *self.modifiers.parameters)

    @property
    def requires_grad(self) -> bool:
        """Whether grad mode is on and any input wants a gradient."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in self.inputs)

    def with_inputs(self, tensors: tuple[Tensor, ...]) -> SoftmaxProblem:
        return replace(self, scores=tensors[0], modifiers=self.modifiers.with_parameters(tuple(tensors[1:])))

    def lower(self) -> LoweredSoftmax:
        return LoweredSoftmax(self.scores, self.modifiers.lower(self), self.log, self.uniform_empty)

    @classmethod
    def check(cls, scores: Any, options: dict[str, Any]) -> SoftmaxProblem:
        """Validates a call; ``options`` are the keyword arguments of ``fused_attn.masked_softmax`` but for the backend."""
        require_own_data("scores", require_input("scores", scores))
        dim = softmax_dim(scores, options["dim"])
        moved = scores.movedim(dim, -1)
        rows = as_rows(moved)
        shape = (rows.shape[0], rows.shape[1], rows.shape[2], rows.shape[3])
        mask, offset = options["mask"], options["q_offset"]
        positional = isinstance(mask, Mask) and mask.positional
        offset = resolve_offset(offset, positional, shape, scores.device)
        grid = Grid(shape, scores.device, offset)
        if isinstance(mask, Tensor):
            mask = _aligned("mask", mask, scores, dim, (torch.bool,))
        bias = options["bias"]
        if bias is not None:
            bias = _aligned("bias", bias, scores, dim, DTYPES)
        if not isinstance(options["empty_rows"], str) or options["empty_rows"] not in ("zero", "uniform"):
            raise ValueError(
                f"empty_rows must be 'zero' or 'uniform'; got {described(options['empty_rows'])}. 'zero' gives 0, 'uniform' 1/kv_len."
            )
        if not isinstance(options["log"], bool):
            raise TypeError(f"log must be a bool; got {described(options['log'])}. Pass True or False.")
        dropout = require_dropout(options["dropout"], shape)
        if options["log"] and dropout is not None:
            raise ValueError(
                "log and dropout must not be combined; got both. The logarithm of a removed probability is -inf; apply dropout to exp(result)."
            )
        mods = (Bias(bias),) if bias is not None else ()
        modifiers = Modifiers(checked_mask(mask, grid), as_scale(options["scale"]), offset, checked_mods(mods, grid), None, dropout)
        return cls(rows, modifiers, options["log"], options["empty_rows"] == "uniform", active_transform())


def softmax_dim(scores: Tensor, dim: object) -> int:
    """``dim`` as a non-negative index, checked against the rank."""
    axis = as_integer("dim", dim, "Use -1 for the last dimension.")
    if scores.dim() == 0:
        raise ValueError("scores must have at least one dimension; got a 0-D tensor. Use scores.reshape(1).")
    if not -scores.dim() <= axis < scores.dim():
        raise ValueError(
            f"dim must be in [-{scores.dim()}, {scores.dim() - 1}] for {scores.dim()}-D scores; got {dim}. Use -1 for the last dimension."
        )
    return axis % scores.dim()


def as_rows(moved: Tensor) -> Tensor:
    """[..., kv_len] as [batch, middle, q_len, kv_len]: the first dimension is the batch, the last two are (query, key)."""
    if moved.dim() <= 2:
        return moved[(None,) * (4 - moved.dim())]
    if moved.dim() == 3:
        return moved[:, None]
    return moved.flatten(1, -3)


def _aligned(name: str, tensor: object, scores: Tensor, dim: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A tensor that broadcasts to ``scores``, as a 4-D tensor in the layout of ``as_rows`` that keeps size-1 dimensions."""
    kind = "a bool tensor" if dtypes == (torch.bool,) else "a floating-point tensor"
    tensor = require_tensor(name, tensor, dtypes, kind, "Booleans go to mask=, numbers to bias=.")
    require_device(name, tensor, scores.device)
    got = tuple(tensor.shape)
    if len(got) > scores.dim() or any(not (n == 1 or n == full) for n, full in zip(reversed(got), reversed(scores.shape), strict=False)):
        padding = dtypes == (torch.bool,) and got == (scores.shape[0], scores.shape[dim])
        advice = "Write KeyPadding(mask) for [batch, kv_len]." if padding else "Insert size-1 dimensions where it should repeat."
        raise ValueError(f"{name} must broadcast to the scores {list(scores.shape)}; got {list(got)}. {advice}")
    moved = tensor[(None,) * (scores.dim() - tensor.dim())].movedim(dim, -1)
    full = scores.movedim(dim, -1).shape
    middle = range(1, scores.dim() - 2)
    if any(moved.shape[i] != 1 for i in middle):
        moved = moved.expand([full[i] if i in middle else n for i, n in enumerate(moved.shape)])
    return as_rows(moved)
