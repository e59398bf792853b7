"""What every layer of ``fused_attn.nn.keras`` has: weights in Keras' order, building, configs, penalties, constraints, torch's own tools."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attn.nn import keras
from fused_attn.nn.keras import (
    AdditiveAttention,
    Attention,
    GroupQueryAttention,
    MultiHeadAttention,
    constraints,
    initializers,
    regularizers,
)
from fused_attn.nn.keras.layer import Layer

X, Y = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
LAYERS: dict[str, Any] = {
    "heads": lambda **o: MultiHeadAttention(2, 4, **o),
    "everything": lambda **o: MultiHeadAttention(2, 4, 3, 0.2, True, (2, 3), 1, 3, use_gate=True, seed=7, activity_regularizer="l2", **o),
    "grouped": lambda **o: GroupQueryAttention(4, 4, 2, dropout=0.1, seed=3, **o),
    "dot": lambda **o: Attention(use_scale=True, **o),
    "concat": lambda **o: Attention(score_mode="concat", use_scale=True, dropout=0.2, seed=1, **o),
    "additive": lambda **o: AdditiveAttention(**o),
    "no weights": lambda **o: Attention(**o),
}


def run(layer: Layer, x: Tensor = X, y: Tensor = Y, **options: Any) -> Any:
    options.setdefault("use_causal_mask", True)
    return layer([x, y], **options) if isinstance(layer, Attention) else layer(x, y, **options)


@pytest.fixture(params=LAYERS)
def make(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param]


@pytest.mark.quick
def test_weights_have_the_names_shapes_and_order_of_keras() -> None:
    layer = MultiHeadAttention(2, 4, 3, output_shape=(5, 2), use_gate=True)
    assert layer.keras_weights() == {} and layer.get_weights() == []
    layer.build((2, 5, 6), (2, 7, 8), (2, 7, 9))
    assert {name: list(w.shape) for name, w in layer.keras_weights().items()} == {
        "query/kernel": [6, 2, 4], "query/bias": [2, 4], "key/kernel": [9, 2, 4], "key/bias": [2, 4], "gate/kernel": [6, 2, 3], "gate/bias": [2, 3],
        "value/kernel": [8, 2, 3], "value/bias": [2, 3], "attention_output/kernel": [2, 3, 5, 2], "attention_output/bias": [5, 2],
    }  # fmt: skip
    assert list(layer.keras_weights()) == layer._weight_names()
    assert layer.query_dense is layer.query and layer.output_dense is layer.attention_output
    assert layer.compute_output_shape((2, 5, 6), (2, 7, 8)) == (2, 5, 5, 2)


@pytest.mark.quick
def test_weights_move_into_a_layer_that_is_not_built(make: Any) -> None:
    layer = make()
    out = run(layer, training=False)
    for fill in (
        lambda new: new.load_state_dict(layer.state_dict()),
        lambda new: new.set_weights(layer.get_weights()),
        lambda new: new.set_weights(layer.keras_weights()),
    ):
        new = make()
        fill(new)
        assert new.built and torch.equal(run(new, training=False), out)
    holder = nn.Sequential(make())
    holder.load_state_dict({f"0.{name}": t for name, t in layer.state_dict().items()})
    assert torch.equal(run(holder[0], training=False), out)


@pytest.mark.quick
def test_wrong_weights_are_refused() -> None:
    layer = LAYERS["heads"]()
    with pytest.raises(ValueError, match="must get 8 weights"):
        layer.set_weights([torch.ones(1)])
    with pytest.raises(ValueError, match="must get weights named query/kernel"):
        layer.set_weights({"query/kernel": torch.ones(6, 2, 4)})
    run(layer)
    with pytest.raises(ValueError, match=r"key/bias must have shape \[2, 4\]; got \[2, 5\]"):
        layer.set_weights([w if w.dim() > 2 else torch.zeros(2, 5 if n == 3 else 4) for n, w in enumerate(layer.parameters())])
    with pytest.raises(ValueError, match="output_shape must be given"):
        MultiHeadAttention(2, 4).load_state_dict(_built(MultiHeadAttention(2, 4, output_shape=9)).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        AdditiveAttention(use_scale=False).load_state_dict({"scale": torch.ones(6)})


def _built(layer: Layer) -> Layer:
    run(layer)
    return layer


@pytest.mark.quick
def test_config_makes_the_same_layer(make: Any) -> None:
    layer = make()
    config = json.loads(json.dumps(layer.get_config()))
    again = type(layer).from_config(config)
    assert json.loads(json.dumps(again.get_config())) == config
    run(layer), run(again)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(run(again), run(layer))


@pytest.mark.quick
def test_config_keeps_choices_of_this_package_and_callables() -> None:
    layer = MultiHeadAttention(2, 4, empty_rows="zero", honour_query_mask=True, kernel_initializer=_halves)
    config = layer.get_config()
    assert config["empty_rows"] == "zero" and config["honour_query_mask"] and config["kernel_initializer"] is _halves
    assert "backend" not in config and "flash_attention" not in config
    assert config["bias_initializer"] == {"module": "keras.initializers", "class_name": "Zeros", "config": {}, "registered_name": None}


def _halves(shape: Any, dtype: Any = None) -> Tensor:
    return torch.full(shape, 0.5, dtype=dtype, device="cpu")


@pytest.mark.quick
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_copies(make: Any, copied: Any) -> None:
    layer = make()
    assert run(copied(layer)).shape == run(layer).shape
    other = copied(layer)
    assert torch.equal(run(other), run(layer)), "with the same count of calls"


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to(make: Any, dtype: torch.dtype) -> None:
    built = _built(make()).to(dtype)
    before = make().to(dtype)
    for layer in (built, before):
        assert run(layer).dtype == dtype and {p.dtype for p in layer.parameters()} <= {dtype}


@pytest.mark.quick
def test_dtype_policies(make: Any) -> None:
    assert run(make(), X.double(), Y.double()).dtype == torch.float32, "inputs are cast, as Keras does"
    mixed = make(dtype="mixed_bfloat16")
    assert run(mixed).dtype == torch.bfloat16 and {p.dtype for p in mixed.parameters()} <= {torch.float32}
    assert run(make(dtype=torch.float64)).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert run(make()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be one of"):
        make(dtype="int8")


@pytest.mark.quick
def test_names() -> None:
    first, second = Attention(), Attention()
    assert first.name != second.name and second.name.startswith("attention_")
    assert Attention(name="mine").name == "mine"
    for name in ("a/b", 3):
        with pytest.raises(ValueError, match="name must be a str without '/'"):
            Attention(name=name)  # type: ignore[arg-type]


@pytest.mark.quick
def test_trainable() -> None:
    layer = _built(MultiHeadAttention(2, 4, trainable=False))
    assert not any(p.requires_grad for p in layer.parameters())
    layer.trainable = True
    assert all(p.requires_grad for p in layer.parameters()) and layer.get_config()["trainable"]
    late = MultiHeadAttention(2, 4)
    late.trainable = False
    assert not any(p.requires_grad for p in _built(late).parameters())


@pytest.mark.quick
@pytest.mark.parametrize(
    "shapes", [((0, 5, 6), (0, 3, 6)), ((2, 0, 6), (2, 3, 6)), ((2, 5, 6), (2, 0, 6))], ids=["batch", "queries", "keys"]
)
def test_sizes_of_zero(make: Any, shapes: Any) -> None:
    x, y = (torch.randn(shape) for shape in shapes)
    layer = make()
    mask = {"mask": [None, torch.ones(y.shape[:2])]} if isinstance(layer, Attention) else {"value_mask": torch.ones(y.shape[:2])}
    out, scores = run(layer, x, y, **mask, return_attention_scores=True)
    assert out.shape[:2] == x.shape[:2] and scores.shape[-2:] == (x.shape[1], y.shape[1]) and out.isfinite().all()


@pytest.mark.quick
def test_arrays_of_bfloat16() -> None:
    layer = _built(AdditiveAttention()).bfloat16()
    other = AdditiveAttention(dtype="bfloat16")
    other.set_weights(layer.get_weights())
    assert torch.equal(run(layer), run(other))


@pytest.mark.quick
def test_losses() -> None:
    layer = MultiHeadAttention(
        2, 4, kernel_regularizer="l2", bias_regularizer=lambda w: w.sum() + 1, activity_regularizer=keras.regularizers.L1(0.5)
    )
    assert layer.losses() == []
    out = run(layer)
    w = layer.keras_weights()
    penalties = layer.losses()
    assert len(penalties) == 12  # four projections: an output, a kernel and a bias each
    torch.testing.assert_close(penalties[0], 0.5 * torch.einsum("bld,dnh->blnh", X, w["query/kernel"]).abs().sum() / 2)
    torch.testing.assert_close(penalties[3], 0.5 * out.abs().sum() / 2)
    torch.testing.assert_close(sum(penalties[4:]), sum(0.01 * p.square().sum() if "kernel" in n else p.sum() + 1 for n, p in w.items()))
    sum(penalties).backward()  # type: ignore[union-attr]
    assert layer.query.kernel.grad is not None
    run(layer)
    assert len(layer.losses()) == 12, "of the last call"


@pytest.mark.quick
def test_an_activity_regularizer_of_the_whole_layer() -> None:
    layer = Attention(activity_regularizer="l2")
    out, scores = run(layer, return_attention_scores=True)
    torch.testing.assert_close(sum(layer.losses()), 0.01 * (out.square().sum() + scores.square().sum()) / 2)
    assert len(_built(GroupQueryAttention(4, 2, 1, activity_regularizer="l2")).losses()) == 5


@pytest.mark.quick
def test_constraints_hold_after_a_step() -> None:
    layer = _built(MultiHeadAttention(2, 4, kernel_constraint=constraints.MaxNorm(0.1), bias_constraint="non_neg"))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    run(layer).square().sum().backward()
    optimizer.step()
    layer.apply_constraints()
    for name, weight in layer.keras_weights().items():
        assert (weight.norm(dim=0) <= 0.1001).all() if "kernel" in name else (weight >= 0).all()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("constraint", "right"),
    [
        ("non_neg", [[3.0, 0.0], [4.0, 0.0]]),
        ("max_norm", [[1.2, 0.0], [1.6, 0.0]]),
        ("unit_norm", [[0.6, 0.0], [0.8, 0.0]]),
        (constraints.MinMaxNorm(0.0, 1.0, rate=0.5), [[1.8, 0.0], [2.4, 0.0]]),
    ],
    ids=str,
)
def test_constraints(constraint: Any, right: list[list[float]]) -> None:
    found = constraints.get(constraint)
    assert found is not None
    torch.testing.assert_close(found(torch.tensor([[3.0, 0.0], [4.0, 0.0]])), torch.tensor(right))


@pytest.mark.quick
def test_regularizers() -> None:
    w = torch.tensor([[3.0, 0.0], [4.0, -1.0]])
    found = [regularizers.get(name) for name in ("l1", "l2", "l1l2", "L1L2", regularizers.L1L2(1, 2), regularizers.L2)]
    assert [round(float(rule(w)), 4) for rule in found if rule] == [0.08, 0.26, 0.0, 0.0, 60.0, 0.26]
    torch.testing.assert_close(regularizers.OrthogonalRegularizer(1.0)(w), torch.tensor(12 / 17**0.5 / 3))
    for wrong in (
        lambda: regularizers.L1(-1.0),
        lambda: regularizers.OrthogonalRegularizer(mode="all"),
        lambda: regularizers.get("l3"),
        lambda: regularizers.get("l1_l2"),
    ):
        with pytest.raises(ValueError, match="must be"):
            wrong()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "limit", "deviation"),
    [
        ("glorot_uniform", (6 / 160) ** 0.5, (2 / 160) ** 0.5), ("glorot_normal", 2.28 * (2 / 160) ** 0.5, (2 / 160) ** 0.5),
        ("he_uniform", (6 / 64) ** 0.5, (2 / 64) ** 0.5), ("he_normal", 2.28 * (2 / 64) ** 0.5, (2 / 64) ** 0.5),
        ("lecun_uniform", (3 / 64) ** 0.5, (1 / 64) ** 0.5), ("lecun_normal", 2.28 * (1 / 64) ** 0.5, (1 / 64) ** 0.5),
        ("random_uniform", 0.05, 0.05 / 3**0.5), ("random_normal", 1.0, 0.05), ("truncated_normal", 0.1, 0.05 * 0.88),
        ("variance_scaling", 2.28 * (1 / 64) ** 0.5, (1 / 64) ** 0.5),
    ],
)  # fmt: skip
def test_initializers_have_the_fans_of_the_projection(name: str, limit: float, deviation: float) -> None:
    layer = MultiHeadAttention(8, 12, kernel_initializer=name)
    layer.build((None, None, 64), (None, None, 64))
    kernel = layer.query.kernel.detach()
    assert kernel.abs().max() <= limit * 1.001
    assert abs(kernel.std() / deviation - 1) < 0.05


@pytest.mark.quick
def test_initializers_by_seed_tensor_class_and_callable() -> None:
    seeded = MultiHeadAttention(2, 4, kernel_initializer=initializers.GlorotUniform(seed=3))
    run(seeded)
    assert torch.equal(seeded.query.kernel, seeded.key.kernel), "one seed, one draw, as in Keras"
    values = torch.randn(2, 4)
    given = initializers.get(values)
    assert given is not None and torch.equal(initializers.made(given, (2, 4), (None, None), torch.float32, values.device), values)
    with pytest.raises(ValueError, match="must give the weight's shape"):
        initializers.made(given, (2, 5), (None, None), torch.float32, values.device)
    assert torch.equal(_built(MultiHeadAttention(2, 4, kernel_initializer=_halves)).query.kernel, torch.full((6, 2, 4), 0.5))
    assert isinstance(initializers.get(initializers.Ones), initializers.Ones)
    square = initializers.Orthogonal(gain=2.0)((6, 2, 3))
    torch.testing.assert_close(square.view(12, 3).mT @ square.view(12, 3), 4 * torch.eye(3))
    for name in ("identity", "orthogonal"):
        found = initializers.get(name)
        assert found is not None
        with pytest.raises(ValueError, match="must initialise a matrix"):
            found((3,))


@pytest.mark.quick
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "no weights"])
def test_torch_func(kind: str) -> None:
    layer = _built(LAYERS[kind](dtype="float64")).eval()
    weights = {name: (p * 1.5).detach() for name, p in layer.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        arguments = ([X, Y],) if isinstance(layer, Attention) else (X, Y)
        return torch.func.functional_call(layer, given, arguments).square().sum()  # type: ignore[no-any-return]

    grads = torch.func.grad(loss)(weights)
    scaled = copy.deepcopy(layer)
    scaled.set_weights(list(weights.values()))
    run(scaled, use_causal_mask=False).square().sum().backward()
    for name, parameter in scaled.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


@pytest.mark.quick
def test_inputs_are_left_alone(make: Any) -> None:
    x, y = X.clone(), Y.clone()
    run(make(), x, y, return_attention_scores=True)
    assert torch.equal(x, X) and torch.equal(y, Y)


@pytest.mark.quick
def test_arrays_are_copies() -> None:
    layer = _built(MultiHeadAttention(2, 4))
    arrays, kernel = layer.get_weights(), layer.query.kernel.detach().clone()
    with torch.no_grad():
        layer.query.kernel.zero_()
    assert torch.equal(torch.as_tensor(arrays[0]), kernel)


@pytest.mark.quick
@pytest.mark.parametrize("lost", ["query.kernel", "key.kernel", "value.bias", "gate.kernel", "attention_output.kernel"])
def test_a_state_with_a_weight_missing(lost: str) -> None:
    layer = _built(MultiHeadAttention(2, 4, use_gate=True))
    state = {name: weight for name, weight in layer.state_dict().items() if name != lost}
    fresh = MultiHeadAttention(2, 4, use_gate=True)
    report = fresh.load_state_dict(state, strict=False)
    assert report.missing_keys == [lost] and report.unexpected_keys == []
    assert all(torch.equal(fresh.state_dict()[name], weight) for name, weight in state.items())
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{lost}"\. $'):
        MultiHeadAttention(2, 4, use_gate=True).load_state_dict(state)


@pytest.mark.quick
def test_a_state_without_the_layer() -> None:
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.query.kernel"'):
        nn.Sequential(MultiHeadAttention(2, 4)).load_state_dict({})
    fresh = MultiHeadAttention(2, 4)
    fresh.load_state_dict(MultiHeadAttention(2, 4).state_dict())
    assert not fresh.built, "nor was the other"


@pytest.mark.quick
def test_rules_are_those_of_trained_weights() -> None:
    layer = _built(MultiHeadAttention(2, 4, kernel_regularizer="l2", kernel_constraint=constraints.MaxNorm(0.1)))
    layer.query.requires_grad_(False)
    before = layer.query.kernel.clone()
    assert len(layer.losses()) == 3
    layer.apply_constraints()
    assert torch.equal(layer.query.kernel, before) and layer.key.kernel.norm(dim=0).max() <= 0.1001


@pytest.mark.quick
def test_rules_of_a_parametrized_weight() -> None:
    layer = _built(MultiHeadAttention(2, 4, kernel_regularizer="l2", kernel_constraint=constraints.MaxNorm(0.1)))
    want = layer(X, Y)
    torch.nn.utils.parametrizations.weight_norm(layer.query, "kernel")
    torch.testing.assert_close(layer(X, Y), want)
    torch.testing.assert_close(layer.losses()[0], 0.01 * layer.query.kernel.square().sum())
    with torch.no_grad():
        assert len(layer.losses()) == 4
    layer.apply_constraints()
    assert layer.query.kernel.norm(dim=0).max() <= 0.1001


@pytest.mark.quick
def test_freezing_before_the_first_call(make: Any) -> None:
    layer = make()
    assert layer.requires_grad_(False) is layer and not layer.trainable
    assert not any(p.requires_grad for p in _built(layer).parameters())


@pytest.mark.quick
def test_a_layer_made_on_meta(make: Any) -> None:
    with torch.device("meta"):
        layer = make()
    out = run(layer)
    assert out.device == X.device and out.isfinite().all()
    again = make()
    again.set_weights(layer.keras_weights())
    if layer.get_config().get("seed") is not None:
        assert torch.equal(run(again), out)


@pytest.mark.quick
def test_a_config_after_conversion() -> None:
    layer = MultiHeadAttention(2, 4).to(torch.bfloat16)
    assert layer.get_config()["dtype"]["config"] == {"name": "bfloat16"}
    assert MultiHeadAttention.from_config(layer.get_config()).variable_dtype == torch.bfloat16
    assert MultiHeadAttention(2, 4, dtype="mixed_bfloat16").to(torch.bfloat16).get_config()["dtype"]["config"] == {"name": "bfloat16"}
    assert MultiHeadAttention(2, 4, dtype="mixed_bfloat16").get_config()["dtype"]["config"] == {"name": "mixed_bfloat16"}


@pytest.mark.quick
def test_shapes_are_refused_in_the_words_of_the_call() -> None:
    layer = _built(MultiHeadAttention(2, 4))
    for call, message in (
        (lambda: layer(X[..., :5], Y), "query must have 6 features"),
        (lambda: layer(X, Y[..., :5]), "key must have 6 features"),
        (lambda: layer(X, torch.cat([Y, Y])), "query, key and value must have as many dimensions"),
        (lambda: layer(X, Y[None]), "query, key and value must have as many dimensions"),
        (lambda: Attention()([X, Y[..., :5]]), r"Attention inputs must be query \[..., q_len, dim\]"),
        (lambda: Attention()([X, torch.cat([Y, X, Y])]), "Attention inputs must be query"),
        (lambda: Attention()([X, Y, Y[:, :3]]), "Attention inputs must be query"),
        (lambda: Attention()([]), "got 0. Pass one tensor twice"),
        (lambda: MultiHeadAttention(2, 4, kernel_initializer=None), "kernel_initializer must be a name"),
        (lambda: MultiHeadAttention(2, 4, output_shape="ab"), "output_shape must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
