"""Runs this package's layers on the golden cases of their namesakes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fused_attn.nn import d2l
from tests.golden_cases import Case, Runner, gradients


def masked_softmax(case: Case) -> dict[str, Tensor]:
    X = case.tensors["in/X"].clone().requires_grad_()
    out = d2l.masked_softmax(X, case.tensors.get("mask/valid_lens"))
    assert X.detach().equal(case.tensors["in/X"]), "the input was written to"
    return {"out/out": out, **_gradients(case, {"out": out}, {"X": X})}


def sequence_mask(case: Case) -> dict[str, Tensor]:
    X = case.tensors["in/X"].clone()
    out = d2l.sequence_mask(X, case.tensors["mask/valid_len"], **case.spec["call"])
    assert X.equal(case.tensors["in/X"]), "the input was written to"
    return {"out/out": out}


def transpose(case: Case) -> dict[str, Tensor]:
    """By the functions and by the methods, which d2l has one of each."""
    X, heads = case.tensors["in/X"], case.spec["ctor"]["num_heads"]
    folded = d2l.transpose_qkv(X, heads)
    layer = d2l.MultiHeadAttention(num_hiddens=X.shape[-1], num_heads=heads, dropout=0.0)
    assert layer.transpose_qkv(X).equal(folded) and layer.transpose_output(folded).equal(d2l.transpose_output(folded, heads))
    return {"out/transpose_qkv": folded, "out/transpose_output": d2l.transpose_output(folded, heads)}


def show_heatmaps(case: Case) -> dict[str, Tensor]:
    """The structure on record: labels, titles, colour maps, sizes, one scale per panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for drawn in case.spec["description"]:
        torch.manual_seed(1)  # as the recorded panels were drawn
        matrices = torch.rand(drawn["shape"])
        images = [a["image"] for a in drawn["axes"] if a["image"]]
        options = {"titles": drawn["titles"], "figsize": drawn["figsize"], "cmap": images[0]}
        assert str(d2l.show_heatmaps(matrices, "Keys", "Queries", **options)) == drawn["returns"]
        figure = pyplot.gcf()
        assert figure.get_size_inches().tolist() == drawn["figsize"] and len(figure.axes) == drawn["n_axes"]
        for i, (panel, want) in enumerate(zip(figure.axes, drawn["axes"], strict=True)):
            assert [panel.get_xlabel(), panel.get_ylabel(), panel.get_title()] == [want["xlabel"], want["ylabel"], want["title"]]
            assert [image.get_cmap().name for image in panel.images] == ([want["image"]] if want["image"] else [])
            if want["image"]:
                matrix = matrices.flatten(0, 1)[i]
                assert list(panel.images[0].get_array().shape) == want["array_shape"] == list(matrix.shape)
                assert panel.images[0].get_clim() == tuple(want["clim"])
        pyplot.close(figure)
    return {}


def layer_of(name: str) -> Runner:
    def run(case: Case) -> dict[str, Tensor]:
        keep = case.tensors.get("aux/dropout_keep")
        layer = getattr(d2l, name)(**case.spec["ctor"], backend="auto" if keep is None else "eager")
        inputs = {n: t.clone().requires_grad_() for n, t in case.below("in").items()}
        layer.to(getattr(torch, case.spec["dtype"])).load_state_dict(case.below("w"))
        layer.train(case.spec["call"]["training"])
        with _kept(keep):
            out = layer(inputs["queries"], inputs["keys"], inputs["values"], case.tensors.get("mask/valid_lens"))
        scores = getattr(layer, "attention", layer).attention_weights
        leaves = inputs | {f"w/{n}": p for n, p in layer.named_parameters()}
        return {"out/out": out, "out/scores": scores, **_gradients(case, {"out": out, "scores": scores}, leaves)}

    return run


def _kept(keep: Tensor | None) -> Any:
    """Dropout that keeps what a case says, on the definition, [batch, queries, keys] or [batch * heads, queries, keys]."""

    def factor(dropout: Any, grid: Any, dtype: torch.dtype) -> Tensor:
        assert keep is not None
        return keep.reshape(grid.sizes).to(dtype) / (1 - dropout.p)

    return nullcontext() if keep is None else mock.patch("fused_attn.backends.eager.keep_factor", factor)


def _gradients(case: Case, outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    cotangents = case.below("ct")
    if "out" not in cotangents:
        return {}
    loss = (outputs["out"] * cotangents["out"]).sum()
    found = gradients(loss, leaves, "grad")
    if "scores" in cotangents:
        found |= gradients(loss + (outputs["scores"] * cotangents["scores"]).sum(), leaves, "grad_s")
    return found


RUNNERS: dict[str, Runner] = {
    "d2l.masked_softmax": masked_softmax,
    "d2l.sequence_mask": sequence_mask,
    "d2l.DotProductAttention": layer_of("DotProductAttention"),
    "d2l.AdditiveAttention": layer_of("AdditiveAttention"),
    "d2l.MultiHeadAttention": layer_of("MultiHeadAttention"),
    "d2l.MultiHeadAttention.transpose_qkv": transpose,
    "d2l.MultiHeadAttention.transpose_output": transpose,
    "d2l.show_heatmaps": show_heatmaps,
}
