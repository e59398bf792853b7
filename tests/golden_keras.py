"""Runs this package's layers on the golden cases of their namesakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fused_attn.dropout import keep_factor
from fused_attn.nn import keras
from fused_attn.nn.keras.layer import Layer
from tests.golden_cases import Case, Runner, gradients

# What Keras keeps on the tensors themselves has no prefix in a case; what its call was given ends so.
EXPLICIT = "_explicit"


def kept(case: Case) -> Callable[..., Tensor] | None:
    """The factors that the case's keep mask makes of dropout, in place of those that a seed makes."""
    keep = case.tensors.get("aux/dropout_keep")
    if keep is None:
        return None
    rate, axes = case.spec["ctor"]["dropout"], len(case.spec.get("attention_axes", [1]))
    lead, queries, keys = keep.shape[: -2 * axes], keep.shape[-2 * axes : -axes], keep.shape[-axes:]
    batch, heads = (lead[:-1], lead[-1]) if "attention_axes" in case.spec or len(lead) > 1 else (lead, 1)
    factors = keep.reshape(math.prod(batch), heads, math.prod(queries), math.prod(keys)).to(torch.float64) / (1 - rate)

    def from_case(dropout: Any, grid: Any, dtype: torch.dtype) -> Tensor:
        return grid.crop(factors).to(dtype)

    return from_case


def make(layer_class: type[Layer], case: Case, **options: Any) -> Layer:
    """The layer with the case's weights, by Keras' names."""
    backend = {"backend": "eager"} if "aux/dropout_keep" in case.tensors else {}
    layer = layer_class(**{**case.spec["ctor"], "dtype": case.spec["dtype"], **options, **backend}).eval()
    layer.set_weights(case.below("w"))
    return layer


def run(case: Case, layer: Layer, call: Callable[[dict[str, Tensor], bool], Any]) -> dict[str, Tensor]:
    """Outputs and gradients of a layer that ``call`` runs on leaves, with or without scores."""
    leaves = {name: t.clone().requires_grad_() for name, t in case.below("in").items()}
    named = {**leaves, **{f"w/{name}": p for name, p in layer.keras_weights().items()}}
    factors = kept(case) or keep_factor
    with mock.patch("fused_attn.backends.eager.keep_factor", factors), mock.patch("fused_attn.dropout.keep_factor", factors):
        out, (explicit, scores) = call(leaves, False), call(leaves, True)
    zero = torch.zeros((), dtype=out.dtype)
    dout, dscores = (case.tensors.get(f"ct/{name}", zero) for name in ("out", "scores"))
    sums = {
        "grad": (out * dout).sum(),
        "grad_explicit": (explicit * dout).sum(),
        "grad_s": (explicit * dout).sum() + (scores * dscores).sum(),
    }
    results = {"out/out": out, "out/out_explicit": explicit, "out/scores": scores}
    for name, total in sums.items():
        results |= gradients(total, named, name)
    return results


def options_of(case: Case) -> dict[str, Any]:
    """The call's keywords; scores are asked for both ways."""
    return {name: value for name, value in case.spec["call"].items() if name != "return_attention_scores"}


def attention(layer_class: type[Layer], case: Case) -> dict[str, Tensor]:
    masks = case.below("mask")
    mask = [masks.get("query_mask"), masks.get("value_mask")] if masks else None

    def call(leaves: dict[str, Tensor], return_scores: bool) -> Any:
        inputs = [leaves[name] for name in ("query", "value", "key") if name in leaves]
        return layer(inputs, mask, return_attention_scores=return_scores, **options)

    layer, options = make(layer_class, case), options_of(case)
    return run(case, layer, call)


def multi_head(layer_class: type[Layer], case: Case, **ctor: Any) -> dict[str, Tensor]:
    masks = case.below("mask")
    if "query_mask" in masks:
        ctor["honour_query_mask"] = True
    given = {name.removesuffix(EXPLICIT): mask for name, mask in masks.items()}
    layer, options = make(layer_class, case, **ctor), options_of(case)
    return run(case, layer, lambda leaves, scores: layer(**leaves, **given, return_attention_scores=scores, **options))


def grouped(case: Case) -> dict[str, Tensor]:
    masks = {name.removesuffix(EXPLICIT): mask for name, mask in case.below("mask").items()}
    layer, options = make(keras.GroupQueryAttention, case), options_of(case)
    return run(case, layer, lambda leaves, scores: layer(**leaves, **masks, return_attention_scores=scores, **options))


RUNNERS: dict[str, Runner] = {
    "keras.layers.MultiHeadAttention": partial(multi_head, keras.MultiHeadAttention),
    "keras.layers.GroupQueryAttention": grouped,
    "keras.layers.Attention": partial(attention, keras.Attention),
    "keras.layers.AdditiveAttention": partial(attention, keras.AdditiveAttention),
    "tf.keras.layers.MultiHeadAttention": partial(multi_head, keras.MultiHeadAttention, empty_rows="unmasked"),
    "tf.keras.layers.Attention": partial(attention, keras.Attention),
    "tf.keras.layers.AdditiveAttention": partial(attention, keras.AdditiveAttention),
}
