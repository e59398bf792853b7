"""D2L's attention beyond the golden cases: a float64 reference of its own formulas, signatures, weights computed when read, errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def test_no_weights_before_a_call_nor_in_copies() -> None:
    x, layer = torch.randn(1, 3, 8), d2l.MultiHeadAttention(8, 2, 0.0)
    with pytest.raises(AttributeError, match="attention_weights"):
        _ = layer.attention.attention_weights
    layer(x, x, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(AttributeError, match="attention_weights"):
            _ = other.attention.attention_weights
        assert other(x, x, x).equal(layer(x, x, x))


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
    got, want = (torch.autograd.grad(a.sum() + b.square().sum(), x)[0] for a, b in ((compiled, holder.attention_weights), (eager, weights)))
    torch.testing.assert_close(got, want)


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
    "key size": (lambda: d2l.DotProductAttention()(X, X[..., :4], X), RuntimeError, "must share head_dim"),
    "batch": (lambda: d2l.DotProductAttention()(X, X[:1], X[:1]), RuntimeError, "must share the batch size"),
    "dtype": (lambda: d2l.DotProductAttention()(X.double(), X, X), RuntimeError, "must share one dtype"),
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
    assert layer.attention.shapes == [(2, 2, 3, 4)] * 3
