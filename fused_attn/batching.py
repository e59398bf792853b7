"""How the ops behave under vmap: the mapped dimension is folded into the batch, or the op runs once per slice where that is impossible.

Folding fails where the mapped slices must not share what belongs to no batch element: one dropout mask (its counter holds the batch
index), gradients that are sums over the batch (sinks, a modification's tensors), mapped sinks and modifications, tensors of the user's
modifications, whose batch may be anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Tensors that may have a batch of 1 and then serve every element; row statistics have their batch in the second place.
_BROADCAST = ("kv_start", "kv_end", "keep", "mod_tensors")
_OUTSIDE_THE_BATCH = ("seed", "sinks", "mod_tensors")


def vmap_rule(op: Any, folds: bool = True) -> Callable[..., Any]:
    """The rule that ``torch.library.register_vmap`` wants for one of the package's ops; without ``folds`` it runs once per slice."""
    names = tuple(argument.name for argument in op._schema.arguments)

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        given = {name: (value, dim) for name, value, dim in zip(names, args, in_dims, strict=True)}
        if folds and _is_foldable(given):
            return _folded(op, given, info.batch_size)
        return _looped(op, given, info.batch_size)

    return rule


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether any tensor is mapped over, by ``torch.vmap`` or by the older vmap behind ``torch.autograd.grad(is_grads_batched=True)``."""
    return any(t is not None and (_is_of_older_vmap(t) or torch._C._functorch.is_functorch_wrapped_tensor(t)) for t in tensors)


_is_of_older_vmap = torch._C._functorch.is_legacy_batchedtensor


def older_vmap_kernel(op: Any) -> Callable[..., Any]:
    """The kernel of an op for dispatch key ``Batched``: the same rule for torch's older vmap, which knows none."""
    rule = vmap_rule(op)

    def kernel(*args: Any) -> Any:
        level = max(_level(t) for t in tree_leaves(args) if isinstance(t, Tensor) and _is_of_older_vmap(t))
        count = next(size for t in tree_leaves(args) if (size := _size_at(t, level)))

        def unwrapped(value: Any) -> tuple[Any, Any]:
            if isinstance(value, (list, tuple)):
                parts = [unwrapped(v) for v in value]
                return [v for v, _ in parts], [d for _, d in parts]
            return (torch._remove_batch_dim(value, level, count, 0), 0) if _size_at(value, level) else (value, None)

        values, dims = zip(*(unwrapped(value) for value in args), strict=True)
        results, out_dims = rule(_Info(count), dims, *values)
        pairs = zip(results, out_dims, strict=True)
        return _like(results, [t if dim is None else torch._add_batch_dim(t, dim, level) for t, dim in pairs])

    return kernel


class _Info(NamedTuple):
    batch_size: int


# torch numbers nested levels from 1, at most 64.
_MOST_LEVELS = 64


def _level(tensor: Tensor) -> int:
    """The innermost level at which a tensor of the older vmap is batched."""
    return next(level for level in range(_MOST_LEVELS, 0, -1) if _size_at(tensor, level))


def _size_at(value: Any, level: int) -> int:
    """How many slices a tensor has at a level, 0 where it has none; torch says it only by what removing the level gives."""
    if not isinstance(value, Tensor) or not _is_of_older_vmap(value):
        return 0
    one, two = (torch._remove_batch_dim(value, level, size, 0).shape[0] for size in (1, 2))
    return one if one == two else 0


def _is_foldable(given: dict[str, tuple[Any, Any]]) -> bool:
    if given["seed"][0] is not None or any(_is_mapped(given[name][1]) for name in _OUTSIDE_THE_BATCH):
        return False
    if any(entry.count(":") > 2 for entry in given["mods"][0].split(",")):
        return False
    own_inputs = 3 if "q" in given else 1
    return not any(given["needs"][0][own_inputs:]) if "needs" in given else True


def _is_mapped(dim: Any) -> bool:
    return any(d is not None for d in dim) if isinstance(dim, (list, tuple)) else dim is not None


def _folded(op: Any, given: dict[str, tuple[Any, Any]], count: int) -> Any:
    """One call on a batch ``count`` times as large, slice by slice."""
    first, dim = given.get("q") or given["scores"]
    batch = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]

    def fold(name: str, value: Any, dim: Any) -> Any:
        if isinstance(value, list):
            return [fold(name, v, d) for v, d in zip(value, dim or [None] * len(value), strict=True)]
        if not isinstance(value, Tensor) or (dim is None and (_is_absent(value) or (name in _BROADCAST and value.shape[0] == 1))):
            return value
        place = 1 if name == "stats" else 0
        value = (
            value.unsqueeze(place).expand(*value.shape[:place], count, *value.shape[place:]) if dim is None else value.movedim(dim, place)
        )
        if name in _BROADCAST and value.shape[1] == 1:
            value = value.expand(-1, batch, *value.shape[2:])
        sizes = (*value.shape[:place], count * batch, *value.shape[place + 2 :])
        folded = value.reshape(sizes)  # not flatten, which the older vmap does not know
        # A batch of 1 is folded into a view of one slice, and kernels read their statistics without strides.
        return folded.contiguous() if name == "stats" else folded

    results = op(*(fold(name, value, dim) for name, (value, dim) in given.items()))
    # Only row statistics have four dimensions of which the first is not the batch; they come third.
    places = [1 if i == 2 and "fwd" in op.__name__ else 0 for i in range(len(results))]
    pairs = list(zip(results, places, strict=True))
    unfolded = [t if _is_absent(t) else t.reshape(*t.shape[:p], count, batch, *t.shape[p + 1 :]) for t, p in pairs]
    return _like(results, unfolded), _like(results, [None if _is_absent(t) else p for t, p in pairs])


def _looped(op: Any, given: dict[str, tuple[Any, Any]], count: int) -> Any:
    """One call per slice."""

    def select(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, list):
            return [select(v, d, i) for v, d in zip(value, dim or [None] * len(value), strict=True)]
        return value.select(dim, i) if isinstance(value, Tensor) and dim is not None else value

    slices = [op(*(select(value, dim, i) for value, dim in given.values())) for i in range(count)]
    return _like(slices[0], [torch.stack(parts) for parts in zip(*slices, strict=True)]), _like(slices[0], [0] * len(slices[0]))


def _is_absent(tensor: Tensor) -> bool:
    """A result that was not asked for, or row statistics of a backend that keeps none."""
    return tensor.dim() == 1 and tensor.shape[0] == 0


def _like(container: Any, values: list[Any]) -> Any:
    return values if isinstance(container, list) else tuple(values)
