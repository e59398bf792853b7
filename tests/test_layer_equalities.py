"""What docs/which-layer.md says equals what: torch's and D2L's layers, and the function they all stand on, with gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fused_attn as fa
from fused_attn.nn import MultiheadAttention, d2l

pytestmark = pytest.mark.quick
BATCH, QUERIES, KEYS, WIDTH, HEADS = 2, 5, 7, 12, 3
LENGTHS = torch.tensor([7, 3])
PADDING = torch.arange(KEYS) >= LENGTHS[:, None]


def inputs() -> list[Tensor]:
    return [torch.randn(BATCH, n, WIDTH, dtype=torch.float64, requires_grad=True) for n in (QUERIES, KEYS, KEYS)]


def alike(results: list[tuple[Tensor, ...]], leaves: list[Tensor]) -> None:
    """Outputs, weights, and the gradients of both together."""
    incoming = [torch.randn(t.shape, dtype=t.dtype) for t in results[0]]
    grads = [torch.autograd.grad(outputs, leaves, incoming) for outputs in results]
    for got, want in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(got, want)


def d2l_of(layer: nn.MultiheadAttention) -> d2l.MultiHeadAttention:
    """D2L's layer with the weights of torch's."""
    has_bias = layer.in_proj_bias is not None
    other = d2l.MultiHeadAttention(layer.embed_dim, layer.num_heads, 0.0, has_bias)
    state = {f"W_{n}.weight": w for n, w in zip("qkv", layer.in_proj_weight.chunk(3), strict=True)} | {"W_o.weight": layer.out_proj.weight}
    if has_bias:
        state |= {f"W_{n}.bias": b for n, b in zip("qkv", layer.in_proj_bias.chunk(3), strict=True)} | {"W_o.bias": layer.out_proj.bias}
    other.load_state_dict(state)
    return other.double()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all keys", "valid lengths"])
def test_torchs_multi_head_attention_is_d2ls(lengths: Tensor | None, bias: bool) -> None:
    torchs = MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True, dtype=torch.float64)
    if bias:
        nn.init.normal_(torchs.in_proj_bias)
        nn.init.normal_(torchs.out_proj.bias)
    d2ls, leaves = d2l_of(torchs), inputs()
    first = torchs(*leaves, key_padding_mask=None if lengths is None else PADDING, average_attn_weights=False)
    out = d2ls(*leaves, lengths)
    alike([first, (out, d2ls.attention.attention_weights.unflatten(0, (BATCH, HEADS)))], leaves)


def test_they_part_where_a_sequence_has_no_keys() -> None:
    """torch's gives the output bias, D2L's the mean of all values."""
    torchs, leaves = MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64), inputs()
    d2ls = d2l_of(torchs)
    out = torchs(*leaves, key_padding_mask=torch.ones(BATCH, KEYS, dtype=torch.bool))[0]
    assert out.equal(torchs.out_proj.bias.expand_as(out))
    means = d2ls.W_o(d2ls.W_v(leaves[2]).mean(1, keepdim=True))
    torch.testing.assert_close(d2ls(*leaves, torch.zeros(BATCH)), means.expand(-1, QUERIES, -1))


@pytest.mark.parametrize("which", ["torch", "d2l"])
def test_one_head_with_identity_projections_is_dot_product_attention(which: str) -> None:
    torchs = MultiheadAttention(WIDTH, 1, bias=False, batch_first=True, dtype=torch.float64)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    torchs.load_state_dict({"in_proj_weight": eye.repeat(3, 1), "out_proj.weight": eye})
    base, leaves = d2l.DotProductAttention(), inputs()
    if which == "torch":
        out, weights = torchs(*leaves, key_padding_mask=PADDING)
    else:
        whole = d2l_of(torchs)
        out, weights = whole(*leaves, LENGTHS), whole.attention.attention_weights
    alike([(out, weights), (base(*leaves, LENGTHS), base.attention_weights)], leaves)


def test_multi_head_attention_is_single_heads_on_slices() -> None:
    whole, leaves = d2l.MultiHeadAttention(WIDTH, WIDTH, WIDTH, WIDTH, HEADS, 0.0, True).double(), inputs()
    heads = [d2l.DotProductAttention() for _ in range(HEADS)]
    slices = zip(*(linear(x).chunk(HEADS, -1) for linear, x in zip((whole.W_q, whole.W_k, whole.W_v), leaves, strict=True)), strict=True)
    parts = whole.W_o(torch.cat([head(*qkv, LENGTHS) for head, qkv in zip(heads, slices, strict=True)], -1))
    weights = torch.stack([head.attention_weights for head in heads], 1).flatten(0, 1)
    alike([(whole(*leaves, LENGTHS), whole.attention.attention_weights), (parts, weights)], leaves)


def test_d2ls_base_layers_are_calls_of_the_function() -> None:
    leaves, request = inputs(), fa.AuxRequest(probs=True)
    q, k, v = (t[:, None] for t in leaves)
    options = {"mask": fa.ValidLengths(LENGTHS), "empty_rows": "uniform", "return_aux": request}
    dot, additive = d2l.DotProductAttention(), d2l.AdditiveAttention(WIDTH, WIDTH, 8).double()
    out, aux = fa.attention(q, k, v, **options)
    alike([(dot(*leaves, LENGTHS), dot.attention_weights), (out[:, 0], aux.probs[:, 0])], leaves)
    scoring = fa.Additive(additive.w_v.weight[0])
    out, aux = fa.attention(additive.W_q(q), additive.W_k(k), v, scoring=scoring, **options)
    alike([(additive(*leaves, LENGTHS), additive.attention_weights), (out[:, 0], aux.probs[:, 0])], [*leaves, *additive.parameters()])


def test_sequence_mask_and_softmax_are_the_masked_softmax() -> None:
    scores = torch.randn(BATCH, QUERIES, KEYS, dtype=torch.float64)
    hidden = ~d2l.sequence_mask(torch.ones(BATCH, KEYS, dtype=torch.bool), LENGTHS, False)[:, None]
    torch.testing.assert_close(d2l.masked_softmax(scores, LENGTHS), scores.masked_fill(hidden, -torch.inf).softmax(-1))
    torch.testing.assert_close(fa.masked_softmax(scores, fa.ValidLengths(LENGTHS)), d2l.masked_softmax(scores, LENGTHS))
