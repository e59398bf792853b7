"""Calls on DTensors: every rank computes the batches, heads and queries that it holds, and nothing is gathered for them.

Where q, k or v is divided decides who computes what; everything else of the call is brought there: cut where it is whole, left where it lies
where it is divided alike. Keys are whole on every rank, and so is what the plain tensors of a call hold, which must be the same on all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fused_attn.auxiliary import AuxOutput
from fused_attn.checks import is_sharded
from fused_attn.dropout import Dropout
from fused_attn.lowering import Grid, KernelMask, Range, Terms
from fused_attn.masks import And, Dense, Mask, as_mask
from fused_attn.modifiers import Modifiers
from fused_attn.parts import Region, terms_of
from fused_attn.placements import Axes, Layout, drawn, sharded_dim
from fused_attn.problem import AttentionProblem, SoftmaxProblem, UnsupportedError, softmax_dim
from fused_attn.score_mods import SCORE_MODS, Bias, ScoreMod, is_authored
from fused_attn.selective import is_selective

_NAMES = ("batch", "heads", "queries")


class _Part(Mask):
    """A part of a call's mask, in normal form."""

    def __init__(self, form: KernelMask, positional: bool = False) -> None:
        self.form, self.positional = form, positional  # type: ignore[misc]

    def keep(self, grid: Grid) -> Tensor:
        return self.form.allowed(grid)

    def lower(self, grid: Grid) -> KernelMask:
        return self.form


class Part:
    """This rank's part of an attention call on DTensors: its ``problem``, and how results become DTensors again.

    Args:
        tensors: q, k and v of the whole call.
        options: those of ``AttentionProblem.check``.

    Raises:
        TypeError, ValueError: the tensors are not all DTensors of one mesh, or the whole call contradicts itself.
        UnsupportedError: a part of the call cannot be computed by itself.
    """

    def __init__(self, tensors: tuple[Any, Any, Any], options: dict[str, Any]) -> None:
        q, k, v = tensors
        self.layout = Layout.of(q, (k, v))
        checked = {name: self._checked(name, value) for name, value in options.items()}
        whole = AttentionProblem.check(_stand_in(q), _stand_in(k), _stand_in(v), checked)
        self.shape = whole.shape
        self._refuse(whole)
        own_q, own_k, own_v = self.layout.local(q, {0: 0, 1: 1, 2: 2}), self._keys(k), self._keys(v)
        if self._divided:
            self.problem = replace(whole, q=own_q, k=own_k, v=own_v, modifiers=self._cut(options, whole, q))
        else:
            dropout = drawn(whole.modifiers.dropout, q)
            self.problem = AttentionProblem.check(own_q, own_k, own_v, self.layout.everywhere(options) | {"dropout": dropout})

    @property
    def region(self) -> Region:
        """What of the call is this rank's."""
        batches, heads, queries = (self.layout.range_of(dim, self.shape[dim]) for dim in range(3))
        return batches, heads, queries, (0, self.shape[3])

    @property
    def _divided(self) -> list[str]:
        return [_NAMES[dim] for dim in range(3) if self.layout.count(dim) > 1]

    def _checked(self, name: str, value: Any) -> Any:
        """An option as the whole call is checked with it: tensors whole on this rank, but for those that a rank needs its own part of alone."""
        if name == "mask" and isinstance(value, (Mask, Tensor)):
            return And(
                tuple([_Part(KernelMask(), m.positional) if self._is_apart(m) else self.layout.everywhere(m) for m in _conjuncts(value)])
            )
        if name == "score_mods" and isinstance(value, (tuple, list)):
            return tuple([Bias(_stand_in(m.bias)) if type(m) is Bias else self.layout.everywhere(m) for m in value])
        return self.layout.everywhere(value)

    def _is_apart(self, mask: Mask) -> bool:
        """Whether a rank's part of a mask is made of its part of the mask's tensors."""
        from torch.distributed.tensor import Replicate, Shard

        if type(mask) is Dense:
            return True
        tensors: list[Any] = [t for t in tree_leaves(mask) if isinstance(t, Tensor)]
        of_batch = tuple([Shard(0) if d == 0 else Replicate() for d in self.layout.divides])
        return 0 in self.layout.divides and bool(tensors) and all(is_sharded(t) and tuple(t.placements) == of_batch for t in tensors)

    def _refuse(self, problem: AttentionProblem) -> None:
        modifiers, request, divided, reasons = problem.modifiers, problem.aux, self._divided, []
        apart = [name for name in divided if name != "batch"]
        if apart and is_selective(modifiers.score_mods):
            reasons.append("Selective needs head 0 and all earlier queries")
        normalizer = modifiers.normalizer
        if normalizer is not None and "heads" in divided and normalizer.mixes_heads:
            reasons.append(f"{type(normalizer).__name__} mixes heads")
        if normalizer is not None and normalizer.draws and self.layout.mesh.size() > 1:
            reasons.append(f"{type(normalizer).__name__} draws from each rank's own generator")
        authored = [*[m for m in modifiers.score_mods if is_authored(m)], *[modifiers.scoring] * (not _is_divisible(problem))]
        reasons += [f"{type(m).__name__} has code of its own, which wants the whole call" for m in authored if divided]
        if request is not None:
            picked = {"heads": request.heads is not None, "queries": request.rows is not None}
            reasons += [f"probabilities of some {name} are asked for" for name in apart if picked[name]]
        if reasons:
            raise UnsupportedError(
                f"each rank must be able to compute its own {' and '.join(divided) or 'copy'}; got a call where {'; '.join(reasons)}. "
                "Redistribute q, k and v along another dimension."
            )

    def _keys(self, tensor: Any) -> Tensor:
        """Keys or values of this rank's heads."""
        heads, kv_heads = self.shape[1], tensor.shape[1]
        group = heads // kv_heads if kv_heads else 1
        if group == 1 or kv_heads % self.layout.count(1) == 0:
            return self.layout.local(tensor, {0: 0, 1: 1})
        whole, (first, end) = self.layout.local(tensor, {0: 0}), self.region[1]
        if first // group == (end - 1) // group or (first % group == 0 and end % group == 0):
            return whole[:, first // group : -(-end // group)]
        return whole[:, torch.arange(first, end, device=whole.device) // group]

    def _cut(self, options: dict[str, Any], whole: AttentionProblem, q: Any) -> Modifiers:
        """The modifiers of this rank's part; ``options`` are the caller's, ``whole`` is the checked call."""
        modifiers, grid = whole.modifiers, whole.grid
        plain = replace(modifiers, score_mods=(), scoring=None, normalizer=None, dropout=drawn(modifiers.dropout, q))
        terms = terms_of(plain.lower(whole), grid, self.region)
        mask = None if modifiers.mask is None else And((_Part(terms.mask), *self._masks_apart(options["mask"], grid)))
        pairs = zip(options["score_mods"], modifiers.score_mods, strict=True)
        mods = tuple([part for given, checked in pairs for part in self._mods(given, checked, grid)])
        dropout = None if terms.dropout is None else Dropout(*terms.dropout)
        scoring = None if modifiers.scoring is None else modifiers.scoring.part(grid.at(*self.region))
        return Modifiers(mask, modifiers.scale, terms.q_offset, mods, terms.sinks, dropout, scoring, modifiers.normalizer)

    def _masks_apart(self, mask: Any, grid: Grid) -> list[Mask]:
        result: list[Mask] = []
        batches, heads, queries, keys = self.region
        for conjunct in filter(self._is_apart, _conjuncts(mask)):
            if isinstance(conjunct, Dense):
                Dense(_stand_in(conjunct.keep_pairs)).check(grid)
                result.append(Dense(self.layout.local(conjunct.keep_pairs, _axes(conjunct.keep_pairs))))
            else:
                batch = batches[1] - batches[0]
                own = replace(grid, shape=(batch, *grid.shape[1:]), q_offset=_of_batches(grid.q_offset, batches))
                part = tree_map_only(Tensor, lambda t: t.to_local(), conjunct)
                part.check(own)
                terms = Terms(part.lower(own).settled(own), 1.0, own.q_offset)
                result.append(_Part(terms_of(terms, own, ((0, batch), heads, queries, keys)).mask))
        return result

    def _mods(self, given: ScoreMod, whole: ScoreMod, grid: Grid) -> list[ScoreMod]:
        if type(given) is Bias:
            return [Bias(self.layout.local(given.bias, _axes(given.bias)))]
        part = grid.at(*self.region)
        scores = [replace(score, tensors=tuple([part.crop(t) for t in score.tensors])) for score in whole.lower(grid)]
        return [SCORE_MODS[score.name].from_kernel(score) for score in scores]

    def whole(self, out: Tensor, aux: AuxOutput) -> tuple[Tensor, AuxOutput]:
        """The results of all ranks' parts as DTensors."""
        return self._result(out, 3), aux.mapped(lambda name, t: self._result(t, 2 if name == "column_sums" else 3))

    def _result(self, local: Tensor, dims: int) -> Tensor:
        """A result whose first dimensions are those of the call."""
        shape = [self.shape[d] if d < dims and d in self.layout.divides else n for d, n in enumerate(local.shape)]
        return self.layout.whole(local, tuple(shape), {d: d for d in range(dims)})


class SoftmaxPart:
    """This rank's part of a masked softmax of a DTensor: ``scores`` and ``options``, and how the result becomes a DTensor again.

    Args:
        scores: of the whole call; of any rank. What divides the dimension that is summed over, or some of those that are merged where
            there are more than four, is gathered.
        options: those of ``SoftmaxProblem.check``.
    """

    def __init__(self, scores: Any, options: dict[str, Any]) -> None:
        self.shape, self.axes = tuple(scores.shape), _softmax_axes(scores, softmax_dim(scores, options["dim"]))
        dims: dict[int | None, int] = {axis: dim for dim, axis in self.axes.items()}
        self.layout = Layout(scores.device_mesh, tuple([dims.get(axis) for axis in map(sharded_dim, scores.placements)]))
        aside = {name: options[name] for name in ("mask", "bias") if isinstance(options[name], Tensor)}
        checked = self.layout.everywhere(options | dict.fromkeys(aside)) | {name: _stand_in(t) for name, t in aside.items()}
        whole = SoftmaxProblem.check(_stand_in(scores), checked)
        self.scores = self.layout.local(scores, self.axes)
        self.options = (
            checked | self._cut(whole, scores, is_masked="mask" not in aside) | {name: self._aligned(t) for name, t in aside.items()}
        )

    def _cut(self, whole: SoftmaxProblem, scores: Any, is_masked: bool) -> dict[str, Any]:
        """What positions in the whole decide: mask, alignment and dropout."""
        given = whole.modifiers
        plain = Modifiers(given.mask if is_masked else None, 1.0, given.q_offset, dropout=drawn(given.dropout, scores))
        first, middle, queries = (self.layout.range_of(dim, whole.shape[dim]) for dim in range(3))
        terms = terms_of(plain.lower(whole), whole.grid, (first, middle, queries, (0, whole.shape[3])))
        dropout = None if terms.dropout is None else Dropout(*terms.dropout)
        return {"mask": None if plain.mask is None else _Part(terms.mask), "q_offset": terms.q_offset, "dropout": dropout}

    def _aligned(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that broadcasts to the scores."""
        axes = {dim: axis - len(self.shape) + tensor.dim() for dim, axis in self.axes.items()}
        return self.layout.local(tensor, {dim: axis for dim, axis in axes.items() if axis >= 0 and tensor.shape[axis] != 1})

    def whole(self, result: Tensor) -> Tensor:
        """The results of all ranks' parts as a DTensor."""
        return self.layout.whole(result, self.shape, self.axes)


def _softmax_axes(scores: Any, axis: int) -> Axes:
    """Which dimension of the scores is which of [batch, middle, q_len], where one is one."""
    rest = [d for d in range(scores.dim()) if d != axis]
    dims = {1: (2,), 2: (0, 2), 3: (0, 1, 2)}.get(len(rest), (0, *[None] * (len(rest) - 2), 2))
    return {dim: d for dim, d in zip(dims, rest, strict=False) if dim is not None}


def _stand_in(tensor: Any) -> Tensor:
    """A view of a tensor's shape that takes no memory: what is checked is the whole."""
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _conjuncts(mask: Any) -> tuple[Mask, ...]:
    mask = as_mask(mask)
    return mask.masks if isinstance(mask, And) else (mask,)


def _axes(tensor: Tensor) -> Axes:
    """Dimensions of a tensor that broadcasts to the call's."""
    axes = {dim: tensor.dim() - 4 + dim for dim in range(3)}
    return {dim: axis for dim, axis in axes.items() if axis >= 0 and tensor.shape[axis] != 1}


def _of_batches(offset: int | Tensor, batches: Range) -> int | Tensor:
    return offset[slice(*batches)] if isinstance(offset, Tensor) else offset


def _is_divisible(problem: AttentionProblem) -> bool:
    """Whether the scoring, if any, has a part for some batches and heads."""
    scoring = problem.modifiers.scoring
    return scoring is None or scoring.part(problem.grid) is not None
