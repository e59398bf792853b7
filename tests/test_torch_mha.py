"""``fused_attn.nn.MultiheadAttention`` against torch's own, in float64: values, gradients, errors, and no NaN where nobody may attend."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attn.nn import MultiheadAttention, replace_multihead_attention
from fused_attn_bench.measure import peak_bytes

BATCH, Q_LEN, KV_LEN, WIDTH, HEADS = 3, 5, 6, 16, 4
PADDING = torch.tensor([[0] * 6, [0] * 4 + [1] * 2, [0] + [1] * 5]).bool()
EMPTY = torch.tensor([[0] * 6, [0] * 4 + [1] * 2, [1] * 6]).bool()
CAUSAL = torch.ones(KV_LEN, KV_LEN, dtype=torch.bool).triu(1)


def pair(**options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's layer and ours with the same parameters."""
    theirs = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    ours = MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    for name, p in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(layer: nn.MultiheadAttention, batched: bool = True) -> list[Tensor]:
    sizes = ((Q_LEN, WIDTH), (KV_LEN, layer.kdim), (KV_LEN, layer.vdim))
    shapes = [((BATCH, n, f) if layer.batch_first else (n, BATCH, f)) if batched else (n, f) for n, f in sizes]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def mask_of(kind: str, batch: int, q_len: int = Q_LEN) -> Tensor:
    """ "bool" or "float" and the number of dimensions; every row keeps its first key."""
    shape = (q_len, KV_LEN) if kind.endswith("2") else (batch * HEADS, q_len, KV_LEN)
    if kind.startswith("float"):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return torch.rand(shape).index_fill(-1, torch.tensor([0]), 0.0) > 0.6


def hold(layers: tuple[nn.Module, ...], tensors: list[Tensor], **options: Any) -> None:
    """Both layers give the same outputs, weights, and gradients of all inputs, masks and parameters."""
    leaves = [t for t in {id(t): t for t in (*tensors, options.get("attn_mask")) if t is not None}.values() if t.requires_grad]
    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")
        for layer in layers:
            out, weights = layer(*tensors, **options)
            torch.manual_seed(1)
            loss = (out * torch.randn(out.shape, dtype=out.dtype)).sum()
            if weights is not None:
                loss = loss + (weights * torch.randn(weights.shape, dtype=out.dtype)).sum()
            grads = torch.autograd.grad(loss, [*leaves, *layer.parameters()])
            found.append((out, weights, *grads))
    assert (found[0][1] is None) == (found[1][1] is None)
    for want, got in zip(*found, strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


CONSTRUCTORS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "key and value sizes": {"kdim": 7, "vdim": 9, "batch_first": True},
    "key and value sizes, no bias": {"kdim": 7, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.quick
@pytest.mark.parametrize("weights", [None, "averaged", "per head"])
@pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=list(CONSTRUCTORS))
def test_as_torch(options: dict[str, Any], weights: str | None) -> None:
    layers = pair(**options)
    asked = {"need_weights": weights is not None, "average_attn_weights": weights != "per head"}
    for kind, padding in itertools.product((None, "bool2", "bool3", "float2", "float3"), (None, PADDING, PADDING.double())):
        mask = None if kind is None else mask_of(kind, BATCH)
        hold(layers, inputs(layers[0]), attn_mask=mask, key_padding_mask=padding, **asked)


@pytest.mark.parametrize("kind", [None, "bool2", "bool3", "float2", "float3"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "add_bias_kv": True}], ids=["plain", "batch first, bias_kv"])
def test_one_sequence_without_a_batch(options: dict[str, Any], kind: str | None) -> None:
    layers = pair(**options)
    mask = None if kind is None else mask_of(kind, 1)
    for padding, need_weights in itertools.product((None, PADDING[1]), (False, True)):
        hold(layers, inputs(layers[0], batched=False), attn_mask=mask, key_padding_mask=padding, need_weights=need_weights)


@pytest.mark.parametrize("tensors", ["one", "key is value"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_packed_projections(tensors: str, bias: bool) -> None:
    layers = pair(batch_first=True, bias=bias)
    query, key, _ = inputs(layers[0])
    hold(layers, [key, key, key] if tensors == "one" else [query, key, key])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["no padding", "padding"])
def test_the_causal_hint(padding: Tensor | None, need_weights: bool) -> None:
    layers = pair(batch_first=True)
    x = inputs(layers[0])[1]
    hold(layers, [x, x, x], attn_mask=CAUSAL, key_padding_mask=padding, is_causal=True, need_weights=need_weights)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=["bias_kv", "zero_attn"])
def test_the_causal_hint_leaves_the_added_key_open(options: dict[str, bool]) -> None:
    """torch closes it where it takes the hint and leaves it open where it looks at the mask; the hint only says what the mask is."""
    _, ours = pair(**options)
    x = torch.randn(KV_LEN, BATCH, WIDTH, dtype=torch.float64)
    hinted, _ = ours(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=False)
    torch.testing.assert_close(hinted, ours(x, x, x, attn_mask=CAUSAL)[0])


@pytest.mark.quick
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool padding", "float padding", "bool mask", "float mask"])
def test_rows_without_keys(kind: str, need_weights: bool) -> None:
    """They give the bias of the output projection, weights of 0, and gradients without a NaN."""
    _, ours = pair(batch_first=True)
    x = inputs(ours)[1]
    mask = CAUSAL | torch.eye(KV_LEN, dtype=torch.bool)
    hidden = EMPTY if "padding" in kind else mask
    given = hidden if "bool" in kind else torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, -torch.inf)
    out, weights = ours(x, x, x, **{"key_padding_mask" if "padding" in kind else "attn_mask": given}, need_weights=need_weights)
    rows = (2, slice(None)) if "padding" in kind else (slice(None), 0)
    assert out[rows].equal(ours.out_proj.bias.expand_as(out[rows]))
    assert weights is None or (not weights[rows].any() and weights.isfinite().all())
    grads = torch.autograd.grad(out.sum() + (0 if weights is None else weights.square().sum()), [x, *ours.parameters()])
    assert all(g.isfinite().all() for g in grads)


def test_returned_weights_are_those_after_dropout() -> None:
    _, ours = pair(batch_first=True, dropout=0.5)
    x = torch.randn(BATCH, 40, WIDTH, dtype=torch.float64)
    out, weights = ours(x, x, x, average_attn_weights=False)
    values = nn.functional.linear(x, ours.in_proj_weight[2 * WIDTH :], ours.in_proj_bias[2 * WIDTH :]).unflatten(-1, (HEADS, -1))
    torch.testing.assert_close(out, ours.out_proj((weights @ values.transpose(1, 2)).transpose(1, 2).flatten(2)))
    assert 0.4 < (weights == 0).double().mean() < 0.6
    assert not ours(x, x, x)[0].equal(out)
    ours.eval()
    assert ours(x, x, x)[0].equal(ours(x, x, x)[0])


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_inside_an_encoder_in_evaluation(batch_first: bool, grad: bool) -> None:
    """torch's own kernel for evaluation does not pass by the layer, nor do the nested tensors that the encoder makes of padding."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=batch_first, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = nn.TransformerEncoder(layer, 2).eval()
    ours = copy.deepcopy(theirs)
    assert replace_multihead_attention(ours) == ["layers.0.self_attn", "layers.1.self_attn"]
    calls: list[int] = []
    forward = MultiheadAttention.forward
    x = torch.randn(BATCH, KV_LEN, WIDTH, dtype=torch.float64) if batch_first else torch.randn(KV_LEN, BATCH, WIDTH, dtype=torch.float64)

    def counted(self: MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    MultiheadAttention.forward = counted  # type: ignore[method-assign]
    try:
        with torch.set_grad_enabled(grad):
            for options in ({}, {"src_key_padding_mask": PADDING}, {"mask": CAUSAL}, {"src_key_padding_mask": PADDING.flip(1)}):
                calls.clear()
                torch.testing.assert_close(ours(x, **options), theirs(x, **options))
                assert len(calls) >= 2
            assert not ours(x, src_key_padding_mask=EMPTY).isnan().any()
            assert not ours.layers[0](x, src_key_padding_mask=EMPTY).isnan().any()
    finally:
        MultiheadAttention.forward = forward  # type: ignore[method-assign]


def test_inside_a_transformer_in_training() -> None:
    theirs = nn.Transformer(WIDTH, HEADS, 1, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    names = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    assert replace_multihead_attention(ours, backend="eager") == names
    assert ours.encoder.layers[0].self_attn.backend == "eager"
    source, target = torch.randn(BATCH, KV_LEN, WIDTH, dtype=torch.float64), torch.randn(BATCH, KV_LEN, WIDTH, dtype=torch.float64)
    options = {"tgt_mask": CAUSAL, "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    outs = [model(source, target, **options) for model in (theirs, ours)]
    torch.testing.assert_close(outs[1], outs[0])
    incoming = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(o, list(m.parameters()), incoming) for o, m in zip(outs, (theirs, ours), strict=True)]
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_replacing_keeps_objects_and_leaves_subclasses() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"own": Own(8, 2), "plain": nn.MultiheadAttention(8, 2)})
    plain, state = model["plain"], {name: t.clone() for name, t in model.state_dict().items()}
    assert replace_multihead_attention(model) == ["plain"]
    assert model["plain"] is plain and type(plain) is MultiheadAttention and type(model["own"]) is Own
    assert all(t.equal(state[name]) for name, t in model.state_dict().items())
    alone = nn.MultiheadAttention(8, 2)
    assert replace_multihead_attention(alone) == [""] and type(alone) is MultiheadAttention


@pytest.mark.quick
def test_replacing_again_sets_the_backend() -> None:
    class Mine(MultiheadAttention):
        pass

    model = nn.ModuleDict({"ours": MultiheadAttention(8, 2), "mine": Mine(8, 2), "theirs": nn.MultiheadAttention(8, 2)})
    for backend in ("eager", "cpu"):
        assert replace_multihead_attention(model, backend=backend) == ["ours", "mine", "theirs"]
        assert {layer.backend for layer in model.values()} == {backend}
    assert type(model["mine"]) is Mine
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*; got 'cdua'"):
        replace_multihead_attention(model, backend="cdua")
    assert {layer.backend for layer in model.values()} == {"cpu"}
    with pytest.raises(ValueError, match="got 'cdua'"):
        MultiheadAttention(8, 2, backend="cdua")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    _, ours = pair(batch_first=True)
    parts = [torch.randn(n, WIDTH, dtype=torch.float64) for n in (3, 1, 6)]
    nested = torch.nested.nested_tensor(parts)
    out, weights = ours(nested, nested, nested, average_attn_weights=False)
    for part, got, some in zip(parts, out.unbind(), weights, strict=True):
        want, all_weights = ours(part, part, part, average_attn_weights=False)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(some[:, : len(part), : len(part)], all_weights)
    with pytest.raises(AssertionError, match="must all be nested tensors"):
        ours(nested, nested, nested, attn_mask=CAUSAL)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per head"])
def test_weights_of_nested_tensors_as_torch(average: bool) -> None:
    """Padded queries have weights of zero, with key lengths of their own."""
    theirs, ours = (layer.eval() for layer in pair(batch_first=True))
    query, key, value = (
        torch.nested.nested_tensor([torch.randn(n, WIDTH, dtype=torch.float64) for n in ns]) for ns in ((3, 1), (2, 6), (2, 6))
    )
    out, weights = ours(query, key, value, average_attn_weights=average)
    assert weights.shape == ((2, 3, 6) if average else (2, HEADS, 3, 6))
    assert not weights[1, ..., 1:, :].any() and not weights[0, ..., 2:].any()
    for i in range(2):
        want, some = theirs(query[i], key[i], value[i], average_attn_weights=average)
        torch.testing.assert_close(out[i], want)
        torch.testing.assert_close(weights[i][..., : some.shape[-2], : some.shape[-1]], some)
    with pytest.raises(AssertionError, match="key and value must have one length"):
        ours(query, key, query)


@pytest.mark.quick
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_weights_after_dropout_are_made_in_blocks(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights whatever the block; without gradient nothing of the weights' size beside them."""
    _, ours = pair(dropout=0.5, batch_first=True)
    x, found = torch.randn(2, 37, WIDTH, dtype=torch.float64), []
    for block in (1 << 18, 1, 500):
        monkeypatch.setattr("fused_attn.dropout._BLOCK", block)
        torch.manual_seed(3)
        with torch.set_grad_enabled(grad):
            found.append(ours(x, x, x, average_attn_weights=False)[1])
        assert found[-1].requires_grad == grad
    assert found[1].equal(found[0]) and found[2].equal(found[0])
    if not grad:
        layer, length = MultiheadAttention(8, 4, 0.1, batch_first=True), 1024
        q, weights = torch.randn(1, length, 8), 4 * 4 * length**2
        with torch.no_grad():
            assert peak_bytes(lambda: layer(q, q, q), q.device)[1] < 2 * weights


def test_copies_pickles_and_new_parameters() -> None:
    _, ours = pair(add_bias_kv=True)
    x = inputs(ours)[1]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is MultiheadAttention and other(x, x, x)[0].equal(ours(x, x, x)[0])
    before = ours.in_proj_weight.clone()
    ours._reset_parameters()
    assert not ours.in_proj_weight.equal(before)
    assert torch.func.functional_call(ours, dict(ours.named_parameters()), (x, x, x))[0].equal(ours(x, x, x)[0])
    assert isinstance(ours, nn.MultiheadAttention)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(BATCH, KV_LEN, WIDTH).to(dtype)
    want = theirs.to(torch.float32)(x.float(), x.float(), x.float(), key_padding_mask=PADDING)
    got = ours.to(dtype)(x, x, x, key_padding_mask=PADDING)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=0, atol=30 * torch.finfo(dtype).eps)


def test_autocast() -> None:
    ours = MultiheadAttention(WIDTH, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    x = torch.randn(BATCH, KV_LEN, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = ours(x, x, x)
    assert out.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), ours(x, x, x)[0], rtol=0, atol=0.1)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("case", ["plain", "hint", "padding and float mask", "training", "added keys"])
def test_compiled_in_one_graph(case: str, need_weights: bool) -> None:
    torch._dynamo.reset()
    extra = case == "added keys"
    ours = MultiheadAttention(WIDTH, HEADS, 0.5 if case == "training" else 0.0, add_bias_kv=extra, add_zero_attn=extra, dtype=torch.float64)
    options: dict[str, Any] = {"need_weights": need_weights}
    options |= {"attn_mask": CAUSAL, "is_causal": True} if case in ("hint", "added keys") else {}
    if case == "padding and float mask":
        options |= {"key_padding_mask": EMPTY, "attn_mask": torch.randn(KV_LEN, KV_LEN, dtype=torch.float64)}
    x = torch.randn(KV_LEN, BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(lambda x: ours(x, x, x, **options)[0], fullgraph=True, backend="aot_eager")
    out = compiled(x)
    if case != "training":
        torch.testing.assert_close(out, ours(x, x, x, **options)[0])
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_one_graph_serves_all_lengths() -> None:
    torch._dynamo.reset()
    ours, graphs = MultiheadAttention(WIDTH, HEADS, batch_first=True), []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=count)
    for batch, length in ((2, 5), (3, 7), (4, 9)):
        x, padding = torch.randn(batch, length, WIDTH), torch.arange(length) >= torch.randint(1, length, (batch, 1))
        for got, want in zip(compiled(x, x, x, padding), ours(x, x, x, padding), strict=True):
            torch.testing.assert_close(got, want)
    assert len(graphs) == 1


def test_exported_with_other_lengths() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()

        def forward(self, x: Tensor, padding: Tensor) -> Any:
            return self.attention(x, x, x, key_padding_mask=padding)

    model, sizes = Model(), {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(model, (torch.randn(BATCH, KV_LEN, WIDTH), PADDING), dynamic_shapes=(sizes, sizes))
    x, padding = torch.randn(2, 9, WIDTH), torch.arange(9) >= torch.tensor([[4], [0]])
    for got, want in zip(program.module()(x, padding), model(x, padding), strict=True):
        torch.testing.assert_close(got, want)


def test_without_weights_nothing_of_the_scores_size_is_kept() -> None:
    ours, length = MultiheadAttention(8, 2, batch_first=True, backend="cpu"), 512
    x, kept = torch.randn(1, length, 8, requires_grad=True), []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ours(x, x, x, key_padding_mask=torch.zeros(1, length, dtype=torch.bool), need_weights=False)
    assert max(kept) < length * length // 8


X = torch.zeros(6, 3, 16)
MISTAKES: dict[str, tuple[tuple[Tensor, ...], dict[str, Any], type[Exception], str]] = {
    "ranks": ((X, X[0], X), {}, AssertionError, "query, key and value must all be 2-D"),
    "4-D": ((X[None],) * 3, {}, AssertionError, "query, key and value must all be 2-D"),
    "features": ((X[..., :8], X, X), {}, AssertionError, "query must have embed_dim = 16"),
    "lengths": ((X, X, X[:5]), {}, AssertionError, "key and value must have one shape"),
    "batch": ((X, X[:, :2], X[:, :2]), {}, RuntimeError, "must share the batch size"),
    "mask dtype": ((X, X, X), {"attn_mask": CAUSAL.int()}, AssertionError, "attn_mask must be bool"),
    "padding dtype": ((X, X, X), {"key_padding_mask": PADDING.long()}, AssertionError, "key_padding_mask must be bool"),
    "mask rank": ((X, X, X), {"attn_mask": CAUSAL[0]}, AssertionError, "attn_mask must be 2-D"),
    "mask size": ((X, X, X), {"attn_mask": CAUSAL[:5]}, RuntimeError, r"attn_mask must have shape \[6, 6\]"),
    "3-D mask size": ((X, X, X), {"attn_mask": CAUSAL[None]}, RuntimeError, r"attn_mask must have shape \[12, 6, 6\]"),
    "unbatched 3-D mask": ((X[:, 0],) * 3, {"attn_mask": CAUSAL[None]}, AssertionError, r"\[num_heads, q_len, kv_len\] = \[4, 6, 6\]"),
    "padding rank": ((X, X, X), {"key_padding_mask": PADDING[0]}, AssertionError, "key_padding_mask must be 2-D"),
    "padding size": ((X, X, X), {"key_padding_mask": PADDING[:, 1:]}, AssertionError, r"key_padding_mask must be .* \[3, 6\]"),
    "key features": ((X, X[..., :8], X[..., :8]), {}, RuntimeError, "key must have kdim = 16 features; got 8"),
    "mask type": ((X, X, X), {"attn_mask": CAUSAL.tolist()}, TypeError, "attn_mask must be a tensor or None; got list"),
    "padding type": ((X, X, X), {"key_padding_mask": 1}, TypeError, "key_padding_mask must be a tensor or None; got 1"),
    "hint alone": ((X, X, X), {"is_causal": True}, RuntimeError, "attn_mask must be given with is_causal=True"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_torchs(name: str) -> None:
    tensors, options, kind, message = MISTAKES[name]
    torch.manual_seed(0)
    with pytest.raises(kind) as theirs:
        nn.MultiheadAttention(16, 4)(*tensors, **options)
    with pytest.raises(kind, match=message) as ours:
        MultiheadAttention(16, 4)(*tensors, **options)
    assert type(ours.value) is type(theirs.value)


@pytest.mark.quick
@pytest.mark.parametrize(("name", "features"), [("key", (16, 9)), ("value", (7, 16)), ("value", (7, 7))])
def test_features_of_other_sizes_are_torchs_mistakes(name: str, features: tuple[int, int]) -> None:
    tensors, options = (X, X[..., : features[0]], X[..., : features[1]]), {"kdim": 7, "vdim": 9}
    with pytest.raises(AssertionError, match=f"{name} weights"):
        nn.MultiheadAttention(16, 4, **options)(*tensors)
    with pytest.raises(AssertionError, match=f"{name} must have {name[0]}dim"):
        MultiheadAttention(16, 4, **options)(*tensors)


@pytest.mark.parametrize(("sizes", "kind"), [((0, 4), ValueError), ((16, 0), ValueError), ((16, 5), AssertionError)])
def test_sizes_are_checked_when_built(sizes: tuple[int, int], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        MultiheadAttention(*sizes)
