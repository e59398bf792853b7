"""``Attention`` and ``AdditiveAttention``: their formula, masks, rows without keys, and how the layers relate to one another."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.nn.keras import AdditiveAttention, Attention, MultiHeadAttention

LAYERS: dict[str, tuple[type[Attention], dict[str, Any]]] = {
    "dot": (Attention, {}),
    "scaled dot": (Attention, {"use_scale": True}),
    "concat": (Attention, {"score_mode": "concat"}),
    "scaled concat": (Attention, {"score_mode": "concat", "use_scale": True}),
    "additive": (AdditiveAttention, {}),
    "unscaled additive": (AdditiveAttention, {"use_scale": False}),
}
KEEP = torch.tensor([[False, False, True, True, False, True, True], [False] * 7])


def inputs(lead: tuple[int, ...] = (2,), factor: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    return [(torch.randn(*lead, n, d, generator=made, dtype=torch.float64) * factor).to(dtype) for n, d in ((5, 6), (7, 4), (7, 6))]


def make(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Attention:
    layer_class, ctor = LAYERS[kind]
    layer = layer_class(**ctor, **options, dtype=dtype)
    layer.build([(None, None, 6), (None, None, 4), (None, None, 6)])
    with torch.no_grad():
        for number, weight in enumerate(layer.parameters(), 1):
            weight.copy_(torch.linspace(0.5, 1.5, weight.numel()).view(weight.shape) / number)
    return layer


def formula(layer: Attention, tensors: list[Tensor], keep: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor]:
    """What Keras writes: scores, 1e9 taken off masked ones, a softmax."""
    query, value, key = tensors
    pairs = query[..., :, None, :] + key[..., None, :, :]
    scale: Any = 1.0 if layer.scale is None else layer.scale
    if isinstance(layer, AdditiveAttention):
        scores = (scale * pairs.tanh()).sum(-1)
    elif layer.score_mode == "concat":
        scores = layer.concat_score_weight * (scale * pairs).tanh().sum(-1)
    else:
        scores = scale * (query @ key.mT)
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool)
    allowed = allowed.tril() if is_causal else allowed
    allowed = allowed if keep is None else allowed & keep[..., None, :]
    probs = torch.where(allowed, scores, scores - 1e9).softmax(-1)
    return probs @ value, probs


def results(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    incoming = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, incoming)]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("keep", "is_causal"), list(itertools.product((None, KEEP), (False, True))), ids=["plain", "causal", "padding", "causal padding"]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_formula(kind: str, keep: Tensor | None, is_causal: bool) -> None:
    layer, tensors = make(kind), [t.requires_grad_() for t in inputs()]
    leaves = [*tensors, *layer.parameters()]
    got = layer(tensors, None if keep is None else [None, keep], use_causal_mask=is_causal, return_attention_scores=True)
    for ours, right in zip(results(got, leaves), results(formula(layer, tensors, keep, is_causal), leaves), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-6)  # rows without keys: 1e9 leaves seven digits behind the point
    torch.testing.assert_close(layer(tensors, None if keep is None else [None, keep], use_causal_mask=is_causal), got[0])


@pytest.mark.quick
def test_large_scores_without_keys_are_rounded_as_keras_rounds_them() -> None:
    """In float32 s - 1e9 is a multiple of 64."""
    layer, tensors = make("dot", torch.float32), inputs(factor=30, dtype=torch.float32)
    got = layer(tensors, [None, KEEP], return_attention_scores=True)
    for ours, right in zip(got, formula(layer, tensors, KEEP, False), strict=True):
        torch.testing.assert_close(ours, right)
    assert got[1][1].max() > 0.9


@pytest.mark.quick
def test_rows_without_keys_under_a_policy() -> None:
    tensors = inputs()
    for policy, weight in (("zero", 0.0), ("uniform", 1 / 7), ("softmax", 1 / 7)):
        _, scores = make("additive", empty_rows=policy)(tensors, [None, KEEP], return_attention_scores=True)
        torch.testing.assert_close(scores[1], torch.full_like(scores[1], weight))


@pytest.mark.quick
def test_query_mask_takes_rows_of_the_output_alone() -> None:
    layer, tensors = make("dot"), inputs()
    rows = torch.arange(5) < torch.tensor([[3], [5]])
    out, scores = layer(tensors, [rows, None], return_attention_scores=True)
    plain, same = layer(tensors, return_attention_scores=True)
    assert torch.equal(out, plain * rows[..., None]) and torch.equal(scores, same)
    assert layer.compute_mask(tensors, [rows, None]) is rows


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["dot", "scaled concat", "additive"])
def test_further_leading_dimensions(kind: str) -> None:
    layer, tensors = make(kind), inputs((2, 3))
    keep = KEEP[0].expand(2, 7)
    out, scores = layer(tensors, [None, keep], use_causal_mask=True, return_attention_scores=True)
    assert out.shape == (2, 3, 5, 4) and scores.shape == (2, 3, 5, 7)
    single = layer([t[1] for t in tensors], [None, keep[:1].expand(3, 7)], use_causal_mask=True)
    torch.testing.assert_close(out[1], single)
    torch.testing.assert_close(layer([t[0, 0] for t in tensors]), layer([t[0] for t in tensors])[0])


@pytest.mark.quick
@pytest.mark.parametrize("seed", [None, 5])
def test_scores_are_those_after_dropout(seed: int | None) -> None:
    layer, tensors = make("scaled dot", dropout=0.5, seed=seed), inputs()
    out, scores = layer(tensors, return_attention_scores=True)
    _, plain = layer(tensors, training=False, return_attention_scores=True)
    dropped = scores == 0
    assert dropped.any() and not dropped.all()
    torch.testing.assert_close(scores, plain.masked_fill(dropped, 0.0) * 2)
    torch.testing.assert_close(out, scores @ tensors[1])


@pytest.mark.parametrize("runs_on", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("kind", ["scaled dot", "scaled concat", "additive"])
def test_dtypes(kind: str, runs_on: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer, tensors = make(kind, dtype, backend=runs_on), inputs(dtype=dtype)
        out = layer(tensors, [None, KEEP], use_causal_mask=True)
        wide, _ = formula(make(kind, torch.float64), [t.double() for t in tensors], KEEP, True)
        reference, _ = formula(layer, tensors, KEEP, True)
        attended = KEEP[0].cumsum(0)[:5] > 0  # other rows depend on how s - 1e9 is rounded
        error, plain = ((t.double() - wide)[0, attended].abs().max() for t in (out, reference))
        assert out.dtype == dtype and out.isfinite().all()
        assert error <= 2 * plain + 4 * torch.finfo(dtype).eps * wide.abs().max()


@pytest.mark.quick
def test_nothing_of_masked_keys_leaks() -> None:
    layer, tensors = make("scaled dot"), inputs()
    keep = torch.arange(7).expand(2, 7) < 4
    clean = layer(tensors, [None, keep])
    for t in tensors[1:]:
        t[:, 4:] = torch.nan
    leaves = [t.requires_grad_() for t in tensors]
    out = layer(leaves, [None, keep])
    assert torch.equal(out, clean)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [leaves[0], *layer.parameters()]))


@pytest.mark.quick
def test_additive_is_concat_without_scales_and_with_a_weight_of_one() -> None:
    tensors = inputs()
    additive, concat = AdditiveAttention(use_scale=False, dtype="float64"), Attention(score_mode="concat", dtype="float64")
    torch.testing.assert_close(additive(tensors), concat(tensors))
    assert concat.concat_score_weight is not None
    with torch.no_grad():
        concat.concat_score_weight.fill_(2.0)
    scaled = AdditiveAttention(dtype="float64")
    scaled.set_weights([torch.full((6,), 2.0)])
    torch.testing.assert_close(scaled(tensors), concat(tensors))
    inside = Attention(score_mode="concat", use_scale=True, dtype="float64")
    inside.set_weights([torch.tensor(2.0), torch.tensor(1.0)])
    assert not torch.allclose(scaled(tensors), inside(tensors), atol=1e-3), "one scale stands outside tanh, the other inside"


@pytest.mark.quick
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_head_with_identity_projections_is_attention(is_causal: bool) -> None:
    query, value, key = (t[..., :4] for t in inputs())
    one = MultiHeadAttention(1, 4, use_bias=False, dtype="float64")
    eye = torch.eye(4)
    one.set_weights([eye[:, None], eye[:, None], eye[:, None], eye[None]])
    attention = Attention(use_scale=True, dtype="float64")
    attention.set_weights([torch.tensor(0.5)])  # 1 / sqrt(4): Attention has no scale of its own
    options = {"use_causal_mask": is_causal, "return_attention_scores": True}
    out, scores = one(query, value, key, value_mask=KEEP[:1].expand(2, 7) | True, **options)
    want, probs = attention([query, value, key], **options)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(scores[:, 0], probs)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer, t: layer(t[0]), "Attention inputs must be a list"),
        (lambda layer, t: layer(t[:1]), "Attention inputs must be a list of 2 or 3"),
        (lambda layer, t: layer(t, KEEP), "Attention mask must be a list"),
        (lambda layer, t: layer(t, [KEEP]), "Attention mask must be a list of 2 or 3"),
        (lambda layer, t: layer(t, [KEEP, None]), "query_mask must have one element for each position"),
        (lambda layer, t: layer(t, [None, KEEP[:, :5]]), "value_mask must have one element"),
        (lambda layer, t: Attention(score_mode="product"), "score_mode must be 'dot' or 'concat'"),
        (lambda layer, t: Attention(dropout=-1), "dropout must be"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Attention(), inputs())


def test_memory_is_that_of_the_length() -> None:
    length, kept = 2048, [0]  # on shorter ones the dense path is faster, and taken
    x = torch.randn(1, length, 4)

    def pack(t: Tensor) -> Tensor:
        kept[0] = max(kept[0], t.numel())
        return t

    mask = [None, torch.arange(length)[None] >= 300]  # with use_causal_mask: 300 rows without keys
    for layer in (Attention(use_scale=True), Attention(score_mode="concat"), AdditiveAttention()):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer([x, x], mask, use_causal_mask=True)
    assert 0 < kept[0] < length * length // 8
