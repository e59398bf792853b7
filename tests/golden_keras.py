"""Runs this package's layers on the golden cases of their namesakes."""

from __future__ import annotations

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
    rate, shape = case.spec["ctor"]["dropout"], keep.shape
    factors = keep.reshape(shape[0], -1, *shape[-2:]).to(torch.float64) / (1 - rate)

    def from_case(dropout: Any, grid: Any, dtype: torch.dtype) -> Tensor:
        return grid.crop(factors).to(dtype)

    return from_case


def make(layer_class: type[Layer], case: Case, **options: Any) -> Layer:
    """The layer with the case's weights, through Keras' list of them."""
    backend = {"backend": "eager"} if "aux/dropout_keep" in case.tensors else {}
    layer = layer_class(**{**case.spec["ctor"], **options, **backend}, dtype=case.spec["dtype"])
    layer.set_weights(list(case.below("w").values()))
    assert list(layer.keras_weights()) == list(case.below("w"))
    return layer


def run(case: Case, layer: Layer, call: Callable[[dict[str, Tensor], bool], Any]) -> dict[str, Tensor]:
    """Outputs and gradients of a layer that ``call`` runs on leaves, with or without scores."""
    leaves = {name: t.clone().requires_grad_() for name, t in case.below("in").items()}
    named = {**leaves, **{f"w/{name}": p for name, p in layer.keras_weights().items()}}
    factors = kept(case) or keep_factor
    with mock.patch("fused_attn.backends.eager.keep_factor", factors), mock.patch("fused_attn.nn.keras.seeds.keep_factor", factors):
        out, (explicit, scores) = call(leaves, False), call(leaves, True)
        dout, dscores = case.tensors["ct/out"], case.tensors["ct/scores"]
        results = {"out/out": out, "out/out_explicit": explicit, "out/scores": scores}
        results |= gradients((out * dout).sum(), named, "grad")
        results |= gradients((explicit * dout).sum(), named, "grad_explicit")
        results |= gradients((explicit * dout).sum() + (scores * dscores).sum(), named, "grad_s")
    return results


def attention(layer_class: type[Layer], case: Case) -> dict[str, Tensor]:
    masks = case.below("mask")
    mask = [masks.get("query_mask"), masks.get("value_mask")] if masks else None

    def call(leaves: dict[str, Tensor], return_scores: bool) -> Any:
        inputs = [leaves[name] for name in ("query", "value", "key") if name in leaves]
        return layer(inputs, mask, return_attention_scores=return_scores, **options)

    layer, options = make(layer_class, case), case.spec["call"]
    layer.eval()
    return run(case, layer, call)


def multi_head(layer_class: type[Layer], case: Case, **ctor: Any) -> dict[str, Tensor]:
    masks = case.below("mask")
    if "query_mask" in masks:
        ctor["honour_query_mask"] = True
    given = {name.removesuffix(EXPLICIT): mask for name, mask in masks.items()}
    layer, options = make(layer_class, case, **ctor), case.spec["call"]
    layer.eval()
    return run(case, layer, lambda leaves, scores: layer(**leaves, **given, return_attention_scores=scores, **options))


def grouped(case: Case) -> dict[str, Tensor]:
    masks = {name.removesuffix(EXPLICIT): mask for name, mask in case.below("mask").items()}
    layer, options = make(keras.GroupQueryAttention, case), case.spec["call"]
    layer.eval()
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
