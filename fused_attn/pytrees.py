"""Masks, modifications, dropout and auxiliary outputs as pytrees, so that export, vmap and whatever else walks over arguments finds their tensors.

Tensors (and whatever a ``tree_map`` puts in their place) are children; numbers, None, names and functions belong to the structure.
"""

from __future__ import annotations

import functools
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from fused_attn.checks import captured

_STATIC = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


class _Structure(NamedTuple):
    children: tuple[str, ...]
    static: tuple[tuple[str, Any], ...]


def register(cls: type) -> None:
    """Makes a class a pytree node; rebuilding an object runs none of its checks.

    Example:
        >>> class Pair:
        ...     def __init__(self, tensor, width):
        ...         self.tensor, self.width = tensor, width
        >>> register(Pair)
        >>> _pytree.tree_map(lambda t: t.shape, Pair(torch.zeros(2), 5)).tensor
        torch.Size([2])
    """
    _pytree.register_pytree_node(
        cls,
        _flatten,
        functools.partial(_unflatten, cls),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        to_dumpable_context=lambda context: [list(part) for part in context],
        from_dumpable_context=lambda parts: _Structure(
            tuple(parts[0]), tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in parts[1])
        ),
        flatten_with_keys_fn=_flatten_with_keys,
    )
    if cls.__module__.split(".")[0] == "fused_attn":  # so that an exported program that takes one loads
        torch.serialization.add_safe_globals([cls])


# Where a rebuilt object remembers which of its attributes are children: a tree_map may have put numbers there, as vmap does.
_CHILDREN = "_pytree_children"


def state(value: Any) -> dict[str, Any]:
    """The attributes that make up an object. A dataclass is asked for its fields: Dynamo of torch 2.10 follows those, not ``vars``.

    Example:
        >>> from fused_attn import SlidingWindow
        >>> state(SlidingWindow(2, 0))
        {'left': 2, 'right': 0}
    """
    if is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return {name: item for name, item in vars(value).items() if name != _CHILDREN}


class HoldsTensors:
    """A dataclass some of whose fields are tensors, all of them known by their own names and shapes.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Pair(HoldsTensors):
        ...     tensor: Tensor
        ...     width: int
        >>> Pair(torch.zeros(2), 5).with_tensors((torch.ones(2),))
        Pair(tensor=tensor([1., 1.]), width=5)
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that may want a gradient."""
        return tuple([v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)])  # type: ignore[arg-type]

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Any:
        """A copy that holds other tensors in the same places; its constructor is not run again, for it may convert what it is given."""
        left, copy = list(tensors), object.__new__(type(self))
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            object.__setattr__(copy, f.name, left.pop(0) if isinstance(value, Tensor) else value)
        return copy


def _is_static(item: Any) -> bool:
    if isinstance(item, tuple) and len(item) > 0:  # of numbers; an empty one may be room for tensors
        return all(_is_static(x) for x in item)
    return isinstance(item, _STATIC) or callable(item)


def is_same(a: Any, b: Any) -> bool:
    """Whether two attributes hold the same values; tensors whose values cannot be looked at are the same only where they are one.

    Example:
        >>> is_same((torch.ones(2), 3), (torch.ones(2), 3)), is_same(torch.ones(2), torch.ones(2, dtype=torch.int64))
        (True, False)
    """
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.device != b.device or a.shape != b.shape or captured(a) or captured(b):
            return False
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    equal = a == b
    return isinstance(equal, bool) and equal


def fingerprint(value: Any) -> Any:
    """Something hashable that is equal for values that are the same: a tensor gives its dtype and rank.

    Example:
        >>> fingerprint({"lens": torch.ones(2), "width": 3})
        (('lens', (torch.float32, 1)), ('width', 3))
    """
    if isinstance(value, torch.Tensor):
        return value.dtype, value.dim()
    if isinstance(value, (tuple, list)):
        return tuple(map(fingerprint, value))
    if isinstance(value, dict):
        return tuple((name, fingerprint(item)) for name, item in sorted(value.items()))
    try:
        hash(value)
    except TypeError:
        return type(value)
    return value


def _flatten(value: Any) -> tuple[list[Any], _Structure]:
    parts = state(value)
    known = getattr(value, _CHILDREN, None)
    names = tuple(name for name, item in parts.items() if not _is_static(item)) if known is None else known
    return [parts[name] for name in names], _Structure(names, tuple((n, x) for n, x in parts.items() if n not in names))


def _flatten_with_keys(value: Any) -> tuple[list[Any], _Structure]:
    children, context = _flatten(value)
    return [(_pytree.GetAttrKey(name), child) for name, child in zip(context.children, children, strict=True)], context


def _unflatten(cls: type, children: Any, context: _Structure) -> Any:
    value: Any = object.__new__(cls)
    for name, item in (*zip(context.children, children, strict=True), *context.static):
        object.__setattr__(value, name, item)
    if hasattr(value, "__dict__"):
        object.__setattr__(value, _CHILDREN, context.children)
    return value
