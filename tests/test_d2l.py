"""D2L's attention beyond the golden cases: a float64 reference of its own formulas, signatures, weights computed when read, errors."""

from __future__ import annotations

import copy
import itertools
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fused_attn.nn import d2l

BATCH, QUERIES, KEYS = 2, 3, 6
LENGTHS: dict[str, Tensor | None] = {
    "none": None,
    "one per sequence": torch.tensor([4, 2]),
    "with an empty sequence": torch.tensor([0, 9]),
    "fractions": torch.tensor([1.5, 0.5]),
    "one per query": torch.tensor([[1, 0, 6], [3, 7, -1]]),
    "narrow ints": torch.tensor([3, 5], dtype=torch.int8),
}


def weights_of(X: Tensor, valid_lens: Tensor | None) -> Tensor:
    """The book's formula: masked scores become -1e6 before the softmax."""
    if valid_lens is None:
        return X.softmax(-1)
    lens = valid_lens[:, None].expand(-1, X.shape[1]) if valid_lens.dim() == 1 else valid_lens
    keep = torch.arange(X.shape[-1]) < lens.reshape(*X.shape[:-1], 1)
    return torch.where(keep, X, torch.tensor(-1e6, dtype=X.dtype)).softmax(-1)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def alike(got: tuple[Tensor, ...], want: tuple[Tensor, ...], leaves: list[Tensor]) -> None:
    """Outputs, and gradients by all leaves of all outputs together."""
    incoming = [torch.randn(t.shape, dtype=t.dtype) for t in want]
    grads = [torch.autograd.grad(outputs, leaves, incoming, retain_graph=True) for outputs in (got, want)]
    for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("large", [False, True], ids=["scores near 0", "scores below the fill"])
def test_masked_softmax(lengths: Tensor | None, large: bool) -> None:
    X = random(BATCH, QUERIES, KEYS)
    scores = X - 1e6 - 2 if large else X * 3
    before = scores.detach().clone()
    alike((d2l.masked_softmax(scores, lengths),), (weights_of(scores, lengths),), [X])
    assert scores.detach().equal(before)


def test_masked_softmax_of_four_dimensions() -> None:
    X, lengths = random(BATCH, 2, QUERIES, KEYS), torch.randint(0, KEYS + 1, (BATCH, 2, QUERIES))
    alike((d2l.masked_softmax(X, lengths),), (weights_of(X, lengths),), [X])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_masked_softmax_of_narrow_dtypes(dtype: torch.dtype) -> None:
    """Rows without keys give 1/keys in float16 too, where d2l's fill is an infinity."""
    X, lengths = random(BATCH, QUERIES, KEYS, dtype=dtype), torch.tensor([0, 4])
    out = d2l.masked_softmax(X, lengths)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), weights_of(X.detach().double(), lengths), rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert not torch.autograd.grad(out[0].square().sum(), X)[0].any()


def test_garbage_in_masked_scores_stays_there() -> None:
    X = torch.tensor([[[1.0, 2.0, torch.nan, torch.inf]]], requires_grad=True)
    out = d2l.masked_softmax(X, torch.tensor([2]))
    torch.testing.assert_close(out[0, 0, :2], torch.tensor([1.0, 2.0]).softmax(0))
    assert torch.autograd.grad(out.square().sum(), X)[0].isfinite().all()


@pytest.mark.quick
@pytest.mark.parametrize("value", [0, -7, -1e6, 2.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64], ids=str)
def test_sequence_mask(dtype: torch.dtype, value: float) -> None:
    X, lengths = torch.arange(24).view(3, 4, 2).to(dtype), torch.tensor([1.5, 0, 9])
    want = X.clone()
    want[~(torch.arange(4) < lengths[:, None])] = value
    before = X.clone()
    assert d2l.sequence_mask(X, lengths, value).equal(want)
    assert d2l.sequence_mask(X[..., 0], lengths, value).equal(want[..., 0])
    assert X.equal(before)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("value", [0.1, -1e300, -1e6, 300, -1, float("inf"), float("nan"), True, torch.tensor(2.5)], ids=str)
def test_sequence_mask_fills_with_what_the_dtype_holds(dtype: torch.dtype, value: Any) -> None:
    """The book's ``X[~mask] = value``: its value to the last bit, or its RuntimeError."""
    X = torch.ones(2, 3, 2).to(dtype)
    want, lengths = X.clone(), torch.tensor([1, 2])
    try:
        want[torch.arange(3) >= lengths[:, None]] = value
    except RuntimeError:
        with pytest.raises(RuntimeError, match=f"value must be what {dtype} holds"):
            d2l.sequence_mask(X, lengths, value)
        return
    torch.testing.assert_close(d2l.sequence_mask(X, lengths, value), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (2,), (3, 2)], ids=["number", "features", "one row for each hidden step"])
def test_sequence_mask_with_a_tensor_that_learns(shape: tuple[int, ...]) -> None:
    X, value, lengths = random(2, 3, 2), random(*shape), torch.tensor([1, 2])
    want = X.clone()
    want[torch.arange(3) >= lengths[:, None]] = value
    alike((d2l.sequence_mask(X, lengths, value),), (want,), [X, value])


@pytest.mark.quick
@pytest.mark.parametrize("name", ["dot product", "additive", "multi-head"])
def test_lengths_of_any_kind(name: str) -> None:
    """bool ones count, NaN keeps no key, and nothing flows to them: as in ``masked_softmax``."""
    X = torch.randn(2, 3, 8, dtype=torch.float64)
    layer: Any = {
        "dot product": d2l.DotProductAttention(),
        "additive": d2l.AdditiveAttention(8, 8, 4).double(),
        "multi-head": d2l.MultiHeadAttention(8, 8, 8, 8, 2).double(),
    }[name]
    nan, inf = torch.nan, torch.inf
    for lengths, plain in (
        (torch.tensor([True, False]), [1, 0]),
        (torch.tensor([nan, 2.0]), [0, 2]),
        (torch.tensor([inf, -inf]), [3, 0]),
        (torch.tensor([1.5, 3.0], requires_grad=True), [2, 3]),
        (torch.tensor([[1.0, nan, 2], [3, 3, 0]], requires_grad=True), [[1, 0, 2], [3, 3, 0]]),
    ):
        assert layer(X, X, X, lengths).equal(layer(X, X, X, torch.tensor(plain)))
        expected = layer.attention_weights
        layer(X, X, X, lengths)
        assert layer.attention_weights.equal(expected)
        scores = torch.randn(2, 3, 3)
        assert d2l.masked_softmax(scores, lengths).equal(d2l.masked_softmax(scores, torch.tensor(plain)))


@pytest.mark.quick
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
def test_dot_product_attention(lengths: Tensor | None) -> None:
    q, k, v = random(BATCH, QUERIES, 8), random(BATCH, KEYS, 8), random(BATCH, KEYS, 5)
    layer = d2l.DotProductAttention(dropout=0.3).eval()
    out = layer(q, k, v, lengths)
    want = weights_of(q @ k.mT / 8**0.5, lengths)
    alike((out, layer.attention_weights), (want @ v, want), [q, k, v])


@pytest.mark.quick
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("arguments", [(8,), (7, 9, 8)], ids=["sizes found out", "sizes given"])
def test_additive_attention(arguments: tuple[int, ...], lengths: Tensor | None) -> None:
    q, k, v = random(BATCH, QUERIES, 9), random(BATCH, KEYS, 7), random(BATCH, KEYS, 5)
    layer = d2l.AdditiveAttention(*arguments).double()
    out = layer(q, k, v, lengths)
    features = (layer.W_q(q)[:, :, None] + layer.W_k(k)[:, None]).tanh()
    want = weights_of(layer.w_v(features)[..., 0], lengths)
    alike((out, layer.attention_weights), (want @ v, want), [q, k, v, *layer.parameters()])


@pytest.mark.quick
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_multi_head_attention(bias: bool, lengths: Tensor | None) -> None:
    q, k, v, heads = random(BATCH, QUERIES, 7), random(BATCH, KEYS, 6), random(BATCH, KEYS, 5), 4
    layer = d2l.MultiHeadAttention(8, heads, 0.0, bias).double()
    out = layer(q, k, v, lengths)
    assert layer.W_q.in_features == 7 and (layer.W_o.bias is not None) == bias
    folded = [d2l.transpose_qkv(linear(x), heads) for linear, x in ((layer.W_q, q), (layer.W_k, k), (layer.W_v, v))]
    repeated = None if lengths is None else lengths.repeat_interleave(heads, 0)
    want = weights_of(folded[0] @ folded[1].mT / 2**0.5, repeated)
    expected = layer.W_o(d2l.transpose_output(want @ folded[2], heads))
    alike((out, layer.attention.attention_weights), (expected, want), [q, k, v, *layer.parameters()])


ADDITIVE: list[tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]] = [
    ((8,), {}, (0, 0, 8, 0.0)),
    ((8, 0.1), {}, (0, 0, 8, 0.1)),
    ((8,), {"dropout": 0.1}, (0, 0, 8, 0.1)),
    ((), {"num_hiddens": 8}, (0, 0, 8, 0.0)),
    ((2, 20, 8), {}, (2, 20, 8, 0.0)),
    ((2, 20, 8, 0.1), {}, (2, 20, 8, 0.1)),
    ((2, 20), {"num_hiddens": 8, "dropout": 0.1}, (2, 20, 8, 0.1)),
    ((), {"key_size": 2, "query_size": 20, "num_hiddens": 8}, (2, 20, 8, 0.0)),
    ((2,), {"query_size": 20, "num_hiddens": 8}, (2, 20, 8, 0.0)),
]


@pytest.mark.quick
@pytest.mark.parametrize(("args", "named", "want"), ADDITIVE, ids=lambda x: str(x))
def test_additive_signatures(args: tuple[Any, ...], named: dict[str, Any], want: tuple[Any, ...]) -> None:
    layer = d2l.AdditiveAttention(*args, **named)
    assert (layer.W_k.in_features, layer.W_q.in_features, layer.W_q.out_features, layer.dropout.p) == want


MULTI_HEAD: list[tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]] = [
    ((8, 2), {}, (0, 0, 0, 8, 2, 0.0, False)),
    ((8, 2, 0.5), {}, (0, 0, 0, 8, 2, 0.5, False)),
    ((8, 2, 0.5, True), {}, (0, 0, 0, 8, 2, 0.5, True)),
    ((8, 2), {"dropout": 0.5, "bias": True}, (0, 0, 0, 8, 2, 0.5, True)),
    ((3, 4, 5, 8, 2), {}, (3, 4, 5, 8, 2, 0.0, False)),
    ((3, 4, 5, 8, 2, 0.5), {}, (3, 4, 5, 8, 2, 0.5, False)),
    ((3, 4, 5, 8, 2, 0.5, True), {}, (3, 4, 5, 8, 2, 0.5, True)),
    ((3, 4, 5), {"num_hiddens": 8, "num_heads": 2}, (3, 4, 5, 8, 2, 0.0, False)),
    ((3, 4, 5, 8), {"num_heads": 2, "bias": True}, (3, 4, 5, 8, 2, 0.0, True)),
    ((), {"num_hiddens": 8, "num_heads": 2, "dropout": 0.5}, (0, 0, 0, 8, 2, 0.5, False)),
]


@pytest.mark.quick
@pytest.mark.parametrize(("args", "named", "want"), MULTI_HEAD, ids=lambda x: str(x))
def test_multi_head_signatures(args: tuple[Any, ...], named: dict[str, Any], want: tuple[Any, ...]) -> None:
    layer = d2l.MultiHeadAttention(*args, **named)
    sizes = [linear.in_features for linear in (layer.W_k, layer.W_q, layer.W_v)]
    assert (*sizes, layer.W_q.out_features, layer.num_heads, layer.attention.dropout.p, layer.W_o.bias is not None) == want


@pytest.mark.parametrize(
    "build",
    [
        lambda: d2l.AdditiveAttention(),
        lambda: d2l.AdditiveAttention(1, 2, 3, 0.1, 5),
        lambda: d2l.AdditiveAttention(8, heads=2),
        lambda: d2l.MultiHeadAttention(8),
        lambda: d2l.MultiHeadAttention(1, 2, 3, num_heads=4),
        lambda: d2l.MultiHeadAttention(1, 2, 3, 4, 2, 0.5, True, 7),
        lambda: d2l.MultiHeadAttention(8, 2, 0.5, key_size=3),
        lambda: d2l.MultiHeadAttention(8, 2, units=3),
    ],
)
def test_signatures_that_do_not_exist(build: Any) -> None:
    with pytest.raises(TypeError, match="must be built as"):
        build()


def test_parameters_have_d2ls_names() -> None:
    names = ["W_k.weight", "W_q.weight", "w_v.weight"]
    assert sorted(d2l.AdditiveAttention(2, 20, 8).state_dict()) == sorted(names)
    lazy = d2l.AdditiveAttention(8)
    lazy.load_state_dict(d2l.AdditiveAttention(2, 20, 8).state_dict())
    assert lazy(torch.ones(1, 1, 20), torch.ones(1, 4, 2), torch.ones(1, 4, 3)).shape == (1, 1, 3)
    assert sorted(d2l.MultiHeadAttention(8, 2, 0.0, True).state_dict()) == sorted(
        f"W_{x}.{kind}" for x in "qkvo" for kind in ("weight", "bias")
    )


def test_weights_are_those_before_dropout() -> None:
    q, k, v = (torch.randn(1, 40, 8, dtype=torch.float64) for _ in range(3))
    layer = d2l.DotProductAttention(dropout=0.5)
    out = layer(q, k, v)
    torch.testing.assert_close(layer.attention_weights, weights_of(q @ k.mT / 8**0.5, None))
    assert not torch.allclose(out, layer.attention_weights @ v)
    layer.dropout.eval()  # what nn.Dropout obeys
    torch.testing.assert_close(layer(q, k, v), layer.attention_weights @ v)


@pytest.mark.quick
def test_nothing_of_the_scores_size_before_somebody_reads() -> None:
    layer, length, kept = d2l.MultiHeadAttention(8, 2, 0.0, backend="cpu"), 512, []
    x = torch.randn(1, length, 8, requires_grad=True)

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, x, x, torch.tensor([100]))
    assert max(kept) < length * length // 8
    assert layer.attention.attention_weights is layer.attention_weights
    assert layer.attention.attention_weights.shape == (2, length, length)


def test_weights_follow_the_calls_grad_mode() -> None:
    q, layer = torch.randn(1, 3, 8, requires_grad=True), d2l.DotProductAttention()
    with torch.no_grad():
        layer(q, q, q)
    assert not layer.attention_weights.requires_grad
    layer(q, q, q)
    with torch.no_grad():
        assert layer.attention_weights.requires_grad
    with torch.inference_mode():
        layer(q.detach().clone(), q, q)
    assert layer.attention_weights.shape == (1, 3, 3)


def test_weights_of_tensors_that_have_changed_are_refused() -> None:
    x, lengths, layer = torch.randn(1, 3, 8), torch.tensor([2]), d2l.DotProductAttention()
    for changed in (x, lengths):
        layer(x, x, x, lengths)
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified in place since"):
            _ = layer.attention_weights
    additive = d2l.AdditiveAttention(8, 8, 8)
    additive(x, x, x)
    before = copy.deepcopy(additive)
    with torch.no_grad():
        for p in additive.parameters():
            p.add_(1.0)
    before(x, x, x)
    torch.testing.assert_close(additive.attention_weights, before.attention_weights)


@pytest.mark.quick
@pytest.mark.parametrize("how", ["inference", "compiled", "under a mode"])
def test_weights_are_those_of_the_call_where_nothing_counts_changes(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = d2l.DotProductAttention()
    run: Any = layer
    if how == "compiled":
        monkeypatch.undo()  # as in test_compiled_in_one_graph
        torch._dynamo.trace_rules.get_torch_obj_rule_map.cache_clear()
        torch._dynamo.reset()
        run = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.inference_mode(how == "inference"), FlopCounterMode(display=False) if how == "under a mode" else nullcontext():
        q, k, v, lengths = torch.randn(1, 3, 8), torch.randn(1, 4, 8), torch.randn(1, 4, 8), torch.tensor([2])
        want = weights_of(q @ k.mT / 8**0.5, lengths)
        run(q, k, v, lengths)
        for t in (q, k, lengths):
            t.add_(1)
    torch.testing.assert_close(layer.attention_weights, want)


@pytest.mark.quick
def test_weights_are_read_in_any_mode() -> None:
    layer, x = d2l.AdditiveAttention(8, 8, 4), torch.randn(1, 3, 8, requires_grad=True)
    layer(x, x, x)
    want = layer.attention_weights
    layer(x, x, x)
    with torch.inference_mode():
        assert layer.attention_weights.equal(want)
    (grad,) = torch.autograd.grad(layer.attention_weights.square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(want.square().sum(), x)[0])


@pytest.mark.quick
@pytest.mark.parametrize("name", ["dot product", "additive"])
def test_weights_are_those_of_the_calls_autocast(name: str) -> None:
    """float32, as torch's softmax makes them under autocast, of queries and keys in its dtype, whatever is on when they are read."""
    layer: Any = d2l.DotProductAttention() if name == "dot product" else d2l.AdditiveAttention(8, 8, 4)
    x = torch.randn(1, 3, 8, requires_grad=True)
    found = []
    for at_call, at_read in itertools.product((True, False), (True, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=at_call):
            out = layer(x, x, x)
        assert out.dtype == (torch.bfloat16 if at_call else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=at_read):
            found.append(layer.attention_weights)
    assert found[0].equal(found[1]) and found[2].equal(found[3]) and not found[0].equal(found[2])
    assert all(weights.dtype == torch.float32 and weights.requires_grad for weights in found)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=0.05)
    if name == "dot product":
        rounded = x.bfloat16().float()
        torch.testing.assert_close(found[0], weights_of(rounded @ rounded.mT / 8**0.5, None))
    with torch.autocast("cpu", torch.bfloat16):
        scores = torch.randn(1, 2, 3, dtype=torch.bfloat16)
        torch.testing.assert_close(d2l.masked_softmax(scores, torch.tensor([2])), weights_of(scores.float(), torch.tensor([2])))


class Own(d2l.DotProductAttention):
    """The book's layer, written down again."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, valid_lens: Tensor | None = None) -> Tensor:
        self.shapes = [None if t is None else tuple(t.shape) for t in (queries, keys, values, valid_lens)]
        scores = torch.bmm(queries, keys.transpose(1, 2)) / queries.shape[-1] ** 0.5
        self.attention_weights = d2l.masked_softmax(scores, valid_lens)
        return torch.bmm(self.dropout(self.attention_weights), values)


@pytest.mark.quick
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
def test_layers_written_as_in_the_book_stand_in(lengths: Tensor | None) -> None:
    x, layer = random(BATCH, QUERIES, 8), d2l.MultiHeadAttention(8, 4, 0.0).double()
    keys = random(BATCH, KEYS, 8)
    want = layer(x, keys, keys, lengths), layer.attention_weights
    layer.attention = Own(0.0)
    got = layer(x, keys, keys, lengths), layer.attention_weights
    alike(got, want, [x, keys, *layer.parameters()])
    of_lengths = None if lengths is None else (BATCH * 4, *lengths.shape[1:])
    assert layer.attention.shapes == [(8, QUERIES, 2), (8, KEYS, 2), (8, KEYS, 2), of_lengths]
    layer.attention_weights = torch.ones(1)
    assert layer.attention.attention_weights.equal(torch.ones(1))


@pytest.mark.quick
@pytest.mark.parametrize("name", ["dot product", "additive", "multi-head"])
def test_dropout_is_a_module_that_others_may_stand_in_for(name: str) -> None:
    x, lengths = random(2, 5, 8), torch.tensor([3, 0])
    layer: Any = {
        "dot product": d2l.DotProductAttention(0.5),
        "additive": d2l.AdditiveAttention(8, 8, 4, 0.5).double(),
        "multi-head": d2l.MultiHeadAttention(8, 8, 8, 8, 2, 0.5).double(),
    }[name]
    holder = getattr(layer, "attention", layer)
    plain = layer.eval()(x, x, x, lengths), holder.attention_weights
    layer.train()
    holder.dropout = nn.Identity()
    alike((layer(x, x, x, lengths), holder.attention_weights), plain, [x, *layer.parameters()])

    class Twice(nn.Module):
        def forward(self, weights: Tensor) -> Tensor:
            self.shape = tuple(weights.shape)
            return 2 * weights

    holder.dropout = Twice()
    alike((layer(x, x, x, lengths), holder.attention_weights), (2 * plain[0], plain[1]), [x, *layer.parameters()])
    assert holder.dropout.shape == ((4, 5, 5) if name == "multi-head" else (2, 5, 5))
    holder.dropout = nn.Dropout1d(0.5)  # whole queries
    torch.manual_seed(0)
    kept = holder.dropout(torch.ones(2, 5, 5, dtype=x.dtype))
    if name != "multi-head":
        torch.manual_seed(0)
        torch.testing.assert_close(layer(x, x, x, lengths), kept @ torch.eye(5, dtype=x.dtype)[:, :1] * plain[0])


def test_no_weights_before_a_call_nor_in_copies() -> None:
    x, layer = torch.randn(1, 3, 8), d2l.MultiHeadAttention(8, 2, 0.0)
    for other in (layer, layer.attention, d2l.AdditiveAttention(8)):
        with pytest.raises(AttributeError, match="attention_weights must be read after a call; got none yet"):
            _ = other.attention_weights
        with pytest.raises(AttributeError, match="has no attribute 'attention_wieghts'"):
            _ = other.attention_wieghts
    layer(x, x, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(AttributeError, match="attention_weights"):
            _ = other.attention.attention_weights
        assert other(x, x, x).equal(layer(x, x, x))


@pytest.mark.peers
@pytest.mark.parametrize("name", ["dot product", "additive", "multi-head"])
def test_compiled_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # Dynamo knows torch's functions by identity, and looked at poisoned memory's the first time
    torch._dynamo.trace_rules.get_torch_obj_rule_map.cache_clear()
    torch._dynamo.reset()
    layer: Any = {
        "dot product": d2l.DotProductAttention,
        "additive": lambda: d2l.AdditiveAttention(8, 8, 8),
        "multi-head": lambda: d2l.MultiHeadAttention(8, 8, 8, 8, 2),
    }[name]()
    x, lengths = torch.randn(2, 5, 8, requires_grad=True), torch.tensor([0, 3])
    eager, holder = layer(x, x, x, lengths), getattr(layer, "attention", layer)
    weights = holder.attention_weights
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, x, x, lengths)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(holder.attention_weights, weights)
    within = torch.compile(lambda: (layer(x, x, x, lengths), holder.attention_weights), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(within, (eager, weights))
    got, want = (torch.autograd.grad(a.sum() + b.square().sum(), x)[0] for a, b in ((compiled, holder.attention_weights), (eager, weights)))
    torch.testing.assert_close(got, want)
    holder.dropout = nn.Dropout1d(0.0)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, x, x, lengths), eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    x, lengths = torch.randn(BATCH, KEYS, 8), torch.tensor([0, 4])
    for layer in (d2l.MultiHeadAttention(8, 8, 8, 8, 2), d2l.AdditiveAttention(8, 8, 8)):
        want = layer(x, x, x, lengths)
        got = layer.to(dtype)(*(x.to(dtype),) * 3, lengths)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=0, atol=30 * torch.finfo(dtype).eps)


X = torch.zeros(2, 3, 8)
MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "lengths of another batch": (lambda: d2l.DotProductAttention()(X, X, X, torch.ones(3)), IndexError, "valid_lens must hold one length"),
    "lengths of other queries": (
        lambda: d2l.DotProductAttention()(X, X, X, torch.ones(2, 4)),
        IndexError,
        "valid_lens must hold one length",
    ),
    "one length per sequence, 4-D": (lambda: d2l.masked_softmax(X[:, None], torch.ones(3)), IndexError, "valid_lens must hold one length"),
    "2-D scores": (lambda: d2l.masked_softmax(X[0], torch.ones(3)), IndexError, "valid_lens must hold one length"),
    "sequence lengths": (lambda: d2l.sequence_mask(X, torch.ones(3)), IndexError, r"valid_len must be \[batch\]"),
    "key size": (
        lambda: d2l.DotProductAttention()(X, X[..., :4], X),
        RuntimeError,
        "queries and keys must have as many features as each other; got 8 and 4",
    ),
    "batch": (lambda: d2l.DotProductAttention()(X, X[:1], X[:1]), RuntimeError, "queries, keys and values must share the batch size"),
    "dtype": (
        lambda: d2l.DotProductAttention()(X.double(), X, X),
        RuntimeError,
        "queries, keys and values must share one floating-point dtype",
    ),
    "2-D queries": (lambda: d2l.DotProductAttention()(X[0], X[0], X[0]), RuntimeError, "queries, keys and values must all be 3-D"),
    "2-D queries, additive": (lambda: d2l.AdditiveAttention(8)(X[0], X, X), RuntimeError, "queries, keys and values must all be 3-D"),
    "4-D queries, multi-head": (
        lambda: d2l.MultiHeadAttention(8, 2)(*(X[None],) * 3),
        RuntimeError,
        "queries, keys and values must all be 3-D",
    ),
    "steps": (lambda: d2l.MultiHeadAttention(8, 2)(X, X, X[:, 1:]), RuntimeError, "keys and values must have as many steps"),
    "query_size": (lambda: d2l.AdditiveAttention(8, 7, 4)(X, X, X), RuntimeError, "queries must have query_size = 7 features; got 8"),
    "value_size": (lambda: d2l.MultiHeadAttention(8, 8, 7, 8, 2)(X, X, X), RuntimeError, "values must have value_size = 7 features; got 8"),
    "a list": (lambda: d2l.DotProductAttention()(X, [1], X), TypeError, "keys must be a tensor; got list"),
    "ints": (lambda: d2l.DotProductAttention()(*(X.long(),) * 3), RuntimeError, "must share one floating-point dtype"),
    "no heads": (lambda: d2l.MultiHeadAttention(8, 0), ValueError, "MultiHeadAttention num_heads must be >= 1; got 0"),
    "sizes and dropout mixed up": (
        lambda: d2l.MultiHeadAttention(8, 2, 0.5, False, 4),
        TypeError,
        "MultiHeadAttention value_size must be an int; got 0.5",
    ),
    "a size of text": (lambda: d2l.AdditiveAttention("8"), TypeError, "AdditiveAttention num_hiddens must be an int; got '8'"),
    "heads": (lambda: d2l.MultiHeadAttention(8, 3, 0.0)(X, X, X), RuntimeError, "that num_heads = 3 divides"),
    "heads of the functions": (lambda: d2l.transpose_output(X, 3), RuntimeError, r"\[batch \* heads, steps, size\] for num_heads = 3"),
    "dropout": (lambda: d2l.DotProductAttention(2.0), ValueError, "between 0 and 1"),
    "heatmaps": (lambda: d2l.show_heatmaps(X, "Keys", "Queries"), ValueError, "matrices must be 4-D"),
    "titles": (lambda: d2l.show_heatmaps(X[None], "Keys", "Queries", ["one"]), IndexError, "one entry per column"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_d2ls(name: str) -> None:
    call, kind, message = MISTAKES[name]
    if name in ("heatmaps", "titles"):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install fused-attn[viz])")
    with pytest.raises(kind, match=message):
        call()


def test_attention_is_a_module_that_others_may_stand_in_for() -> None:
    class Recorder(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, valid_lens: Tensor | None) -> Tensor:
            self.shapes = [tuple(t.shape) for t in (q, k, v)]
            return q

    layer = d2l.MultiHeadAttention(8, 2, 0.0)
    layer.attention = Recorder()
    assert layer(X, X, X).shape == X.shape
    assert layer.attention.shapes == [(4, 3, 4)] * 3
