"""``MultiHeadAttention`` and ``GroupQueryAttention``: their formula, masks, rows without keys, axes, dtypes and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn as fa
from fused_attn.nn import keras
from fused_attn.nn.keras import GroupQueryAttention, MultiHeadAttention

HEADS, KEY_DIM, VALUE_DIM = 4, 5, 3
KEEP = torch.rand(2, 9, 11, generator=torch.Generator().manual_seed(1)) > 0.3
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"use_causal_mask": True},
    "padding": {"value_mask": torch.arange(11) < torch.tensor([[6], [11]]), "key_mask": torch.arange(11) > torch.tensor([[1], [0]])},
    "batched mask": {"attention_mask": KEEP},
    "one mask": {"attention_mask": KEEP[0]},
    "mask of heads": {"attention_mask": torch.stack([KEEP, KEEP.flip(2), ~KEEP, KEEP.flip(1)], 1), "use_causal_mask": True, "value_mask": KEEP[:, 3]},
    "numbers as mask": {"attention_mask": KEEP * 0.3},
    "ours as mask": {"attention_mask": fa.SlidingWindow(4, 1)},
}  # fmt: skip
CTORS: dict[str, dict[str, Any]] = {
    "default": {},
    "gate": {"use_gate": True, "use_bias": False},
    "window": {"sliding_window": 3},
}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, d, generator=made, dtype=torch.float64).to(dtype) for n, d in ((9, 6), (11, 7), (11, 8)))  # type: ignore[return-value]


def allowed(layer: Any, call: dict[str, Any]) -> Tensor:
    """Every mask of a call as [batch, heads, q, kv] of plain torch."""
    q, k = torch.arange(9)[:, None], torch.arange(11)
    keep = torch.ones(2, 1, 9, 11, dtype=torch.bool)
    if call.get("use_causal_mask"):
        keep = keep & (k <= q)
    if layer._sliding_window:
        keep = keep & ((q - k).abs() < layer._sliding_window)
    for name in ("value_mask", "key_mask"):
        if name in call:
            keep = keep & call[name][:, None, None, :]
    mask = call.get("attention_mask")
    if isinstance(mask, fa.SlidingWindow):
        mask = (k >= q - mask.left) & (k <= q + mask.right)
    if mask is not None:
        keep = keep & (mask != 0 if mask.dim() != 3 else mask[:, None] != 0)
    return keep


def formula(layer: Any, tensors: tuple[Tensor, ...], keep: Tensor, empty: str) -> tuple[Tensor, Tensor]:
    """The layer in plain torch: einsums of its weights, a fill, a softmax."""
    w = layer.keras_weights()

    def project(x: Tensor, name: str) -> Tensor:
        projected = torch.einsum("bld,dnh->bnlh", x, w[f"{name}/kernel"])
        return projected if f"{name}/bias" not in w else projected + w[f"{name}/bias"][:, None]

    q, v, k = (project(x, name) for x, name in zip(tensors, ("query", "value", "key"), strict=True))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    probs = (scores + torch.zeros_like(scores).masked_fill(~keep, -1e30)).softmax(-1)
    probs = probs.where(keep, 0.0) if empty == "zero" else probs
    out = probs @ v
    if "gate/kernel" in w:
        out = out * project(tensors[0], "gate").sigmoid()
    out = torch.einsum("bnlh,nho->blo", out, w["attention_output/kernel"])
    return (out if "attention_output/bias" not in w else out + w["attention_output/bias"]), probs


def results(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    incoming = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, incoming)]


def make(kind: str, dtype: torch.dtype = torch.float64, **ctor: Any) -> Any:
    common = {"dtype": dtype, "bias_initializer": "random_normal", **ctor}
    if kind == "grouped":
        return GroupQueryAttention(KEY_DIM, HEADS, 2, **common)
    return MultiHeadAttention(HEADS, KEY_DIM, VALUE_DIM, **common)


@pytest.mark.quick
@pytest.mark.parametrize("return_scores", [False, True], ids=["fused", "scores"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("ctor", CTORS)
@pytest.mark.parametrize("kind", ["heads", "grouped"])
def test_the_formula(kind: str, ctor: str, call: str, return_scores: bool) -> None:
    layer, tensors = make(kind, **CTORS[ctor]), [t.requires_grad_() for t in inputs()]
    got = layer(*tensors, **CALLS[call], return_attention_scores=return_scores)
    leaves = [*tensors, *layer.parameters()]
    want = formula(layer, tuple(tensors), allowed(layer, CALLS[call]), "zero" if return_scores else "softmax")
    expected = results(want if return_scores else want[:1], leaves)
    for ours, right in zip(results(got if return_scores else (got,), leaves), expected, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("runs_on", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(runs_on: str, dtype: torch.dtype) -> None:
    layer, tensors = make("grouped", dtype, backend=runs_on), inputs(dtype)
    call = CALLS["padding"]
    out, scores = layer(*tensors, **call, return_attention_scores=True)
    assert out.dtype == scores.dtype == dtype
    wide, _ = formula(layer.double(), tuple(t.double() for t in tensors), allowed(layer, call), "zero")
    plain, _ = formula(layer.to(dtype), tensors, allowed(layer, call), "zero")
    right, step = wide.abs().max(), torch.finfo(dtype).eps
    assert (out.double() - wide).abs().max() <= 2 * (plain.double() - wide).abs().max() + 4 * step * right


@pytest.mark.quick
@pytest.mark.parametrize(
    ("policy", "options", "weights", "flows"),
    [
        (None, {}, 1 / 11, True),
        (None, {"return_attention_scores": True}, 0.0, False),
        ("zero", {}, 0.0, False),
        ("uniform", {}, 1 / 11, False),
        ("softmax", {"return_attention_scores": True}, 1 / 11, True),
    ],
)
def test_rows_without_keys(policy: Any, options: dict[str, Any], weights: float, flows: bool) -> None:
    layer = make("heads", empty_rows=policy)
    query, value, key = (t.requires_grad_() for t in inputs())
    mask = KEEP.clone()
    mask[1, 2] = False
    out = layer(query, value, key, attention_mask=mask, **options)
    out = out[0] if isinstance(out, tuple) else out
    v = torch.einsum("ld,dnh->nh", value[1], layer.value.kernel) / 11 + layer.value.bias
    expected = torch.einsum("nh,nho->o", v * weights * 11, layer.attention_output.kernel) + layer.attention_output.bias
    torch.testing.assert_close(out[1, 2], expected)
    (dquery,) = torch.autograd.grad(out[1, 2].square().sum(), query)
    assert bool(dquery.abs().sum() > 0) == flows


@pytest.mark.quick
def test_unmasked_rows_are_those_of_a_layer_that_subtracts() -> None:
    layer = make("heads", empty_rows="unmasked")
    tensors, mask = inputs(), KEEP.clone()
    mask[1, 2] = False
    out, scores = layer(*tensors, attention_mask=mask, return_attention_scores=True)
    full = mask.clone()
    full[1, 2] = True
    want, probs = layer(*tensors, attention_mask=full, return_attention_scores=True)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)  # 1e9 leaves seven digits behind the point
    torch.testing.assert_close(scores, probs, rtol=1e-6, atol=1e-6)


@pytest.mark.quick
def test_flash_attention_keeps_the_fused_rows_with_scores() -> None:
    layer, tensors = make("heads", flash_attention=True), inputs()
    mask = KEEP & (torch.arange(9)[:, None] != 2)
    out, scores = layer(*tensors, attention_mask=mask, return_attention_scores=True)
    torch.testing.assert_close(out, layer(*tensors, attention_mask=mask))
    torch.testing.assert_close(scores[:, :, 2], torch.full_like(scores[:, :, 2], 1 / 11))


@pytest.mark.quick
def test_query_mask_counts_where_it_is_honoured() -> None:
    tensors, rows = inputs(), torch.arange(9) < torch.tensor([[4], [9]])
    layer = make("heads", empty_rows="zero")
    with pytest.warns(UserWarning, match="ignores query_mask, as Keras does"):
        assert torch.equal(layer(*tensors, query_mask=rows), layer(*tensors))
    honouring = make("heads", empty_rows="zero", honour_query_mask=True)
    honouring.load_state_dict(layer.state_dict())
    torch.testing.assert_close(honouring(*tensors, query_mask=rows), layer(*tensors, attention_mask=rows[:, :, None]))
    grouped = make("grouped", empty_rows="zero")
    torch.testing.assert_close(grouped(*tensors, query_mask=rows), grouped(*tensors, attention_mask=rows[:, :, None]))


@pytest.mark.quick
@pytest.mark.parametrize("axes", [(1,), (2,), (-2,), (1, 2), (2, 1), None, (0,), (3,)], ids=str)
def test_attention_axes(axes: Any) -> None:
    layer = MultiHeadAttention(2, 4, attention_axes=axes, dtype="float64", bias_initializer="ones")
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    out, scores = layer(x, x, return_attention_scores=True)
    q, k, v = (torch.einsum("abcd,dnh->abcnh", x, p.kernel) + 1 for p in (layer.query, layer.key, layer.value))
    attended = tuple(a % 4 if a >= 0 else a + 4 for a in axes or (1, 2))
    names = "abcn"
    keys = "".join(names[i].upper() if i in attended else names[i] for i in range(4))
    lead = "".join(n for i, n in enumerate(names) if i not in attended)
    order = lead + "".join(names[i] for i in attended) + "".join(keys[i] for i in attended)
    raw = torch.einsum(f"{names}h,{keys}h->{order}", q, k) / 2
    probs = raw.flatten(-len(attended)).softmax(-1).view(raw.shape)
    torch.testing.assert_close(scores, probs)
    heads = torch.einsum(f"{order},{keys}h->{names}h", probs, v)
    torch.testing.assert_close(out, torch.einsum("abcnh,nho->abco", heads, layer.attention_output.kernel) + 1)
    torch.testing.assert_close(layer(x, x), out)


@pytest.mark.quick
def test_masks_over_several_axes() -> None:
    layer = MultiHeadAttention(2, 4, attention_axes=(1, 2), dtype="float64")
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64)
    keep, pairs = torch.rand(2, 3, 2) > 0.3, torch.rand(3, 2, 3, 2) > 0.3
    _, scores = layer(x, x, value_mask=keep, attention_mask=pairs, return_attention_scores=True)
    right = keep[:, None, None, None] & pairs[None, None]
    assert not scores.masked_select(~right.expand(scores.shape)).any() and scores.masked_select(right.expand(scores.shape)).all()


@pytest.mark.quick
def test_nothing_of_masked_keys_leaks() -> None:
    layer = make("heads")
    query, value, key = inputs()
    mask = torch.arange(11).expand(2, 11) < 7
    clean = layer(query, value, key, value_mask=mask)
    value[:, 7:], key[:, 7:] = torch.nan, torch.inf
    assert torch.equal(layer(query, value, key, value_mask=mask), clean)


@pytest.mark.quick
@pytest.mark.parametrize("seed", [None, 11])
def test_dropout(seed: int | None) -> None:
    layer, tensors = make("heads", dropout=0.4, seed=seed), inputs()
    layer.build(*(t.shape for t in tensors))
    torch.manual_seed(3)
    first, second = layer(*tensors), layer(*tensors)
    assert not torch.equal(first, second)
    torch.testing.assert_close(layer(*tensors, training=False), layer.eval()(*tensors))
    assert not torch.equal(layer(*tensors, training=True), layer(*tensors))
    again = make("heads", dropout=0.4, seed=seed)
    again.set_weights(list(layer.parameters()))
    torch.manual_seed(3)
    assert torch.equal(again(*tensors), first) and torch.equal(again(*tensors), second)


@pytest.mark.quick
def test_scores_are_those_before_dropout() -> None:
    layer, tensors = make("heads", dropout=0.4, seed=1), inputs()
    _, scores = layer(*tensors, return_attention_scores=True)
    torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]))


@pytest.mark.quick
def test_the_flash_switch_is_keras_own() -> None:
    assert keras.is_flash_attention_enabled() is None
    keras.disable_flash_attention()
    try:
        assert keras.is_flash_attention_enabled() is False
        assert make("heads")._flash_attention is False and make("heads", flash_attention=True)._flash_attention is True
    finally:
        keras.enable_flash_attention()
    assert make("heads", flash_attention=False)._flash_attention is None


@pytest.mark.quick
@pytest.mark.parametrize(
    ("ctor", "message"),
    [
        ({"num_heads": 0}, "num_heads must be a positive int; got 0"),
        ({"key_dim": 2.0}, "key_dim must be a positive int"),
        ({"value_dim": -1}, "value_dim must be"),
        ({"sliding_window": 0}, "sliding_window must be"),
        ({"output_shape": 2.5}, "output_shape must be"),
        ({"attention_axes": "1"}, "attention_axes must be"),
        ({"dropout": 1.5}, "dropout must be"),
        ({"dropout": 0.5, "seed": 1.5}, "seed must be"),
        ({"kernel_initializer": "nothing"}, "an initializer must be a name"),
        ({"kernel_regularizer": 3}, "a regularizer must be"),
        ({"bias_constraint": "nothing"}, "a constraint must be"),
        ({"empty_rows": "nan"}, "empty_rows must be one of"),
        ({"windows": 3}, "got windows"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_errors_of_the_constructor(ctor: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**{"num_heads": 2, "key_dim": 4, **ctor})


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"key": torch.zeros(2, 3, 4)}, "value and key must agree"),
        ({"attention_mask": torch.ones(3, 9, 11)}, "attention_mask must broadcast to the scores"),
        ({"attention_mask": torch.ones(11)}, "attention_mask must broadcast"),
        ({"value_mask": torch.ones(2, 9)}, "value_mask must have one element for each position"),
    ],
)
def test_errors_of_the_call(call: dict[str, Any], message: str) -> None:
    query, value, _ = inputs()
    with pytest.raises(ValueError, match=message):
        make("heads")(query, value, **call)


@pytest.mark.quick
def test_what_compares_positions_takes_one_axis() -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="use_causal_mask must come with one attention axis"):
        MultiHeadAttention(1, 4)(x, x, use_causal_mask=True)
    with pytest.raises(ValueError, match="attention_axes must name different axes"):
        MultiHeadAttention(1, 4, attention_axes=(1, 1))(x, x)
    with pytest.raises(ValueError, match="query and value must be"):
        GroupQueryAttention(4, 2, 1)(x, x)
    with pytest.raises(ValueError, match="num_query_heads must be a multiple"):
        GroupQueryAttention(4, 5, 2)


def test_memory_is_that_of_the_length() -> None:
    """Nothing that autograd keeps has an element for every pair, whatever the masks."""
    length, kept = 512, [0]
    layer = MultiHeadAttention(2, 8, sliding_window=64)
    x = torch.randn(1, length, 16)

    def pack(t: Tensor) -> Tensor:
        kept[0] = max(kept[0], t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, x, use_causal_mask=True, value_mask=torch.arange(length)[None] < 300)
    assert 0 < kept[0] < length * length // 8


class Largest(TorchDispatchMode):
    """The largest storage of bools that any operation makes."""

    bools = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.bool:
            self.bools = max(self.bools, result.untyped_storage().nbytes())
        return result


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(2, 6, 6), (6, 6), (2, 1, 1, 6, 6), (1, 4, 1, 6, 6), (2, 4, 3, 6, 6), (2, 1, 3, 6, 6)], ids=str)
def test_a_mask_shared_over_an_axis_is_not_copied(shape: tuple[int, ...]) -> None:
    layer = MultiHeadAttention(3, 4, attention_axes=2, dtype="float64", backend="cpu")
    x, mask = torch.randn(2, 4, 6, 8, dtype=torch.float64), torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3
    with torch.no_grad(), Largest() as largest:
        out, scores = layer(x, x, attention_mask=mask, return_attention_scores=True)
    full = mask.expand(2, 4, 3, 6, 6) if len(shape) != 3 else mask[:, None, None].expand(2, 4, 3, 6, 6)
    each, probs = layer(x, x, attention_mask=full.contiguous(), return_attention_scores=True)
    torch.testing.assert_close(out, each)
    torch.testing.assert_close(scores, probs)
    assert len(shape) != 3 or largest.bools < full.numel()


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(2, 6), (6,), (2, 4, 6), (1, 4, 6)], ids=str)
@pytest.mark.parametrize("name", ["value_mask", "key_mask", "query_mask"])
def test_masks_of_positions_with_one_attention_axis(name: str, shape: tuple[int, ...]) -> None:
    """Keras adds dimensions before the last one."""
    layer = MultiHeadAttention(3, 4, attention_axes=2, dtype="float64", honour_query_mask=True)
    x, mask = torch.randn(2, 4, 6, 8, dtype=torch.float64), torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3
    placed = (mask[:, None] if shape == (2, 6) else mask).expand(2, 4, 6)[:, :, None]
    pairs = placed[..., :, None] if name == "query_mask" else placed[..., None, :]
    want = layer(x, x, attention_mask=pairs.expand(2, 4, 1, 6, 6))
    for given in (mask, mask.numpy(), mask.tolist()):
        torch.testing.assert_close(layer(x, x, **{name: given}), want)


@pytest.mark.quick
def test_masks_of_positions_over_the_first_of_two_axes() -> None:
    layer = MultiHeadAttention(3, 4, attention_axes=1, dtype="float64")
    x, mask = torch.randn(2, 4, 6, 8, dtype=torch.float64), torch.tensor([[True, True, False, True], [False, True, True, True]])
    torch.testing.assert_close(layer(x, x, value_mask=mask), layer(x, x, value_mask=mask[..., None].expand(2, 4, 6)))
