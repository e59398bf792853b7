"""Layers of ``fused_attn.nn.keras`` under torch's compilers and transforms: results, penalties and gradients of the layer itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.utils.checkpoint

from fused_attn.nn.keras import AdditiveAttention, Attention, GroupQueryAttention, MultiHeadAttention
from fused_attn.nn.keras.layer import Layer

pytestmark = [pytest.mark.slow, pytest.mark.peers]
LAYERS: dict[str, Any] = {
    "everything": lambda: MultiHeadAttention(2, 4, 3, 0.2, sliding_window=3, use_gate=True, seed=7, activity_regularizer="l2"),
    "fused": lambda: MultiHeadAttention(2, 4),
    "grouped": lambda: GroupQueryAttention(4, 4, 2, empty_rows="zero"),
    "dot": lambda: Attention(use_scale=True, dropout=0.2, seed=1),
    "concat": lambda: Attention(score_mode="concat", use_scale=True),
    "additive": lambda: AdditiveAttention(),
}
KEEP = torch.tensor([[False] * 2 + [True] * 3, [False] * 5])  # with a causal mask: rows without keys


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Memory as it comes: Dynamo cannot see through the poisoned torch.empty_like, and knows the real one only if it looks for it now."""
    torch._dynamo.trace_rules.get_torch_obj_rule_map.cache_clear()


@pytest.mark.parametrize("return_scores", [False, True], ids=["out", "scores"])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_graph(kind: str, return_scores: bool) -> None:
    x = torch.randn(2, 5, 6)

    def call(layer: Layer) -> Any:
        options = {"use_causal_mask": True, "return_attention_scores": return_scores}
        return layer([x, x], [None, KEEP], **options) if isinstance(layer, Attention) else layer(x, x, value_mask=KEEP, **options)

    layer = LAYERS[kind]()
    call(layer)
    other = copy.deepcopy(layer)
    torch._dynamo.reset()
    found = []
    for run, owner in ((call, layer), (torch.compile(call, fullgraph=True, backend="aot_eager"), other)):
        outputs = run(owner)
        outputs = outputs if return_scores else (outputs,)
        total = sum(t.square().sum() for t in (*outputs, *owner.losses()))
        found.append([*outputs, *owner.losses(), *torch.autograd.grad(total, list(owner.parameters()))])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


class Wrapped(torch.nn.Module):
    """A layer as a function of one tensor."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        if isinstance(self.layer, Attention):
            return self.layer([x, x], [None, KEEP], use_causal_mask=True)
        return self.layer(x, x, value_mask=KEEP, use_causal_mask=True)


@pytest.mark.parametrize("kind", LAYERS)
def test_export_and_vmap(kind: str) -> None:
    x, model = torch.randn(2, 5, 6), Wrapped(LAYERS[kind]()).eval()
    want = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want)
    stacked = {name: torch.stack([p, 2 * p]).detach() for name, p in model.named_parameters()}
    several = torch.func.vmap(lambda weights: torch.func.functional_call(model, weights, (x,)))(stacked)
    torch.testing.assert_close(several[0], want)
    model.layer.set_weights([2 * p for p in model.layer.parameters()])
    torch.testing.assert_close(several[1], model(x))


def test_checkpointing_drops_the_same_twice() -> None:
    layer, x = MultiHeadAttention(2, 4, dropout=0.5), torch.randn(2, 5, 6, requires_grad=True)
    layer(x, x)
    grads = []
    for run in (layer, lambda *a: torch.utils.checkpoint.checkpoint(layer, *a, use_reentrant=False)):
        torch.manual_seed(1)
        grads += torch.autograd.grad(run(x, x).square().sum(), x)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 3, 1, 5, 5)], ids=str)
def test_one_graph_of_any_size_over_a_chosen_axis(shape: tuple[int, ...]) -> None:
    layer, x, mask = MultiHeadAttention(2, 4, attention_axes=2), torch.randn(2, 3, 5, 6), torch.ones(shape).tril()
    want = layer(x, x, attention_mask=mask)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x, x, attention_mask=mask), want)
