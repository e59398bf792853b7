"""What layers of "Dive into Deep Learning" are built with and called with, checked, in the layers' own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.checks import FLOATS, described, require_integer

_SIZES = ("key_size", "query_size", "value_size", "num_hiddens", "num_heads")


def by_name(owner: str, orders: Sequence[tuple[str, ...]], args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments by name, from the first signature that they fit.

    Raises:
        TypeError: they fit none, or a size is missing or no int.
        ValueError: a size is not positive.

    Example:
        >>> by_name("Layer", (("num_hiddens", "dropout"), ("key_size", "num_hiddens", "dropout")), (2, 8, 0.1), {})
        {'key_size': 2, 'num_hiddens': 8, 'dropout': 0.1}
    """
    for order in orders:
        given = dict(zip(order, args, strict=False))
        if len(args) <= len(order) and not given.keys() & named.keys() and named.keys() <= set(order):
            given = {**given, **named}
            if all(name in given for name in orders[0] if name.startswith("num_")):
                return {name: require_integer(f"{owner} {name}", value, 1) if name in _SIZES else value for name, value in given.items()}
    readings = " or ".join(f"{owner}({', '.join(order)})" for order in orders)
    raise TypeError(
        f"{owner} must be built as {readings}; got {len(args)} positional arguments and the names {sorted(named)}. "
        "Give every argument of one of them once, by name where in doubt."
    )


def check_inputs(queries: Tensor, keys: Tensor, values: Tensor, ranks: tuple[int, ...] = (3,)) -> None:
    """Raises TypeError or RuntimeError, as the book's products do, unless queries, keys and values fit one another."""
    tensors = {"queries": queries, "keys": keys, "values": values}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {described(tensor)}. Convert it with torch.tensor.")
    got = " and ".join((", ".join(map(described, (queries, keys))), described(values)))
    if queries.dim() not in ranks or not queries.dim() == keys.dim() == values.dim():
        raise RuntimeError(f"queries, keys and values must all be 3-D [batch, steps, features]; got {got}. Insert or merge dimensions.")
    if not queries.shape[:-2] == keys.shape[:-2] == values.shape[:-2]:
        raise RuntimeError(f"queries, keys and values must share the batch size; got {got}. Expand or slice them to one batch.")
    if keys.shape[-2] != values.shape[-2]:
        raise RuntimeError(f"keys and values must have as many steps as each other; got {got}. Slice them alike.")
    free = not queries.is_meta and torch.is_autocast_enabled(queries.device.type)
    if queries.dtype not in FLOATS or not (free or queries.dtype == keys.dtype == values.dtype):
        raise RuntimeError(f"queries, keys and values must share one floating-point dtype; got {got}. Convert them with .to.")


def check_features(linears: Mapping[str, tuple[Tensor, nn.Module]], option: Mapping[str, str]) -> None:
    """Raises RuntimeError unless each tensor has as many features as its map takes; ``option`` names what says so."""
    for name, (tensor, linear) in linears.items():
        if type(linear) is nn.Linear and tensor.shape[-1] != linear.in_features:
            raise RuntimeError(
                f"{name} must have {option[name]} = {linear.in_features} features; got {tensor.shape[-1]}. Build the layer for that size."
            )
