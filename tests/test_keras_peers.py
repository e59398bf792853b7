"""Keras itself, on its torch backend: our layers beside its own, and its models on our kernels."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn.integrations import keras as bridge
from fused_attn.nn import keras as ours

pytestmark = pytest.mark.peers
os.environ.setdefault("KERAS_BACKEND", "torch")

GATES = ({}, {"use_gate": True, "use_bias": False}, {"value_dim": 3, "output_shape": (2, 3), "sliding_window": 3}, {"dropout": 0.3})
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"use_causal_mask": True},
    "merged": {
        "value_mask": torch.arange(7) < torch.tensor([[4], [7]]),
        "key_mask": torch.arange(7) > torch.tensor([[0], [1]]),
        "attention_mask": torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4,
        "use_causal_mask": True,
    },
    "heads": {"attention_mask": torch.rand(2, 2, 5, 7, generator=torch.Generator().manual_seed(2)) > 0.6},
}


@pytest.fixture
def keras() -> Iterator[Any]:
    found = pytest.importorskip("keras", reason="Keras is not installed")
    if found.backend.backend() != "torch":
        pytest.skip(f"Keras runs on {found.backend.backend()}")
    yield found
    bridge.disable()


def tensors() -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, d, generator=made) for n, d in ((5, 6), (7, 6), (7, 4))]


def results(layer: Any, call: dict[str, Any], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, the sum of penalties, and gradients by inputs and weights. torch's flash kernel is wrong in rows without keys."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        outputs = (
            layer(leaves, **call) if type(layer).__name__ == "Attention" or "Additive" in type(layer).__name__ else layer(*leaves, **call)
        )
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    is_ours = isinstance(layer, ours.Layer)
    losses = layer.losses() if is_ours else layer.losses
    weights = list(layer.parameters()) if is_ours else [w.value for w in layer.weights]
    total = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in outputs) + sum(losses)
    return [*outputs, sum(losses, torch.zeros(())), *torch.autograd.grad(total, [*leaves, *weights])]


def hold(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("return_scores", [False, True], ids=["out", "scores"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("ctor", GATES, ids=lambda c: "-".join(c) or "default")
def test_multi_head_attention_is_keras_own(keras: Any, ctor: dict[str, Any], mask: str, return_scores: bool) -> None:
    """Our torch layer, our subclass of Keras' layer, and Keras' layer while enabled."""
    ctor = {"num_heads": 2, "key_dim": 4, "kernel_regularizer": "l2", "activity_regularizer": "l1", "bias_initializer": "ones", **ctor}
    call, inputs = {**MASKS[mask], "return_attention_scores": return_scores, "training": False}, tensors()
    real = keras.layers.MultiHeadAttention(**ctor)
    want = results(real, call, inputs)
    mine = ours.MultiHeadAttention(**ctor)
    mine.set_weights(real.get_weights())
    hold(results(mine, call, inputs), want)
    fused = bridge.MultiHeadAttention(**ctor)
    fused.build(*(t.shape for t in inputs))
    fused.set_weights(mine.get_weights())
    hold(results(fused, call, inputs), want)
    bridge.enable()
    hold(results(real, call, inputs), want)
    bridge.disable()
    hold(results(real, call, inputs), want)


@pytest.mark.parametrize("return_scores", [False, True], ids=["out", "scores"])
@pytest.mark.parametrize("mask", ["plain", "causal", "merged"])
def test_group_query_attention_is_keras_own(keras: Any, mask: str, return_scores: bool) -> None:
    ctor = {
        "head_dim": 4,
        "num_query_heads": 6,
        "num_key_value_heads": 2,
        "sliding_window": 4,
        "use_gate": True,
        "activity_regularizer": "l2",
    }
    call, inputs = {**MASKS[mask], "return_attention_scores": return_scores}, tensors()
    real, mine = keras.layers.GroupQueryAttention(**ctor), ours.GroupQueryAttention(**ctor)
    want = results(real, call, inputs)
    mine.set_weights(real.get_weights())
    hold(results(mine, call, inputs), want)
    bridge.enable()
    hold(results(real, call, inputs), want)


@pytest.mark.parametrize("factor", [1.0, 40.0])
@pytest.mark.parametrize(
    ("name", "ctor"),
    [
        ("Attention", {}),
        ("Attention", {"use_scale": True}),
        ("Attention", {"score_mode": "concat", "use_scale": True}),
        ("AdditiveAttention", {}),
    ],
)
def test_attention_is_keras_own(keras: Any, name: str, ctor: dict[str, Any], factor: float) -> None:
    """With rows without keys, whose scores Keras rounds to multiples of 64."""
    query, _, _ = tensors()
    inputs = [query * factor, torch.randn(2, 7, 4), torch.randn(2, 7, 6)]
    mask = [torch.arange(5) < torch.tensor([[3], [5]]), torch.tensor([[False] * 2 + [True] * 5, [False] * 7])]
    real, mine = getattr(keras.layers, name)(**ctor), getattr(ours, name)(**ctor)
    call = {"mask": mask, "use_causal_mask": True, "return_attention_scores": True}
    want = results(real, call, inputs)
    mine.set_weights(real.get_weights())
    hold(results(mine, call, inputs), want)


@pytest.mark.parametrize("axes", [(1,), (2,), (-2,), (1, 2), (2, 1), (0,), (3,), None], ids=str)
def test_attention_axes_are_keras_own(keras: Any, axes: Any) -> None:
    x = torch.randn(2, 3, 5, 6)
    real, mine = keras.layers.MultiHeadAttention(2, 4, attention_axes=axes), ours.MultiHeadAttention(2, 4, attention_axes=axes)
    want = [*real(x, x, return_attention_scores=True), real(x, x)]
    mine.set_weights(real.get_weights())
    hold([*mine(x, x, return_attention_scores=True), mine(x, x)], want)
    bridge.enable()
    hold([*real(x, x, return_attention_scores=True), real(x, x)], want)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("MultiHeadAttention", {"num_heads": 2, "key_dim": 4, "use_gate": True, "dropout": 0.1, "seed": 3, "kernel_regularizer": "l2", "output_shape": 5}),
        ("MultiHeadAttention", {"num_heads": 2, "key_dim": 4, "dtype": "mixed_bfloat16", "kernel_initializer": "he_normal", "bias_constraint": "max_norm"}),
        ("GroupQueryAttention", {"head_dim": 4, "num_query_heads": 4, "num_key_value_heads": 2, "activity_regularizer": "l1l2"}),
        ("Attention", {"use_scale": True, "dropout": 0.1}),
        ("AdditiveAttention", {"use_scale": False}),
    ],
)  # fmt: skip
def test_configs_both_ways(keras: Any, name: str, arguments: dict[str, Any]) -> None:
    real = getattr(keras.layers, name)(**arguments)
    mine = getattr(ours, name).from_config(real.get_config())
    assert mine.get_config() == real.get_config()
    again = getattr(keras.layers, name).from_config(mine.get_config())
    assert again.get_config() == real.get_config()


def test_weights_move_both_ways_and_through_a_file(keras: Any, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    x = torch.randn(2, 5, 6)
    inputs = keras.Input((5, 6))
    layer = keras.layers.MultiHeadAttention(2, 4, use_gate=True)
    model = keras.Model(inputs, layer(inputs, inputs))
    mine = ours.MultiHeadAttention(2, 4, use_gate=True)
    mine.set_weights(layer.get_weights())
    torch.testing.assert_close(mine(x, x), model(x))
    assert [w.path.partition("/")[2] for w in layer.weights] == list(mine.keras_weights())
    with torch.no_grad():
        mine.query.kernel.mul_(3)
    layer.set_weights(mine.get_weights())
    torch.testing.assert_close(mine(x, x), model(x))
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        stored = file["layers/multi_head_attention"]
        arrays = [stored[f"{part}_dense/vars/{n}"][()] for part in ("query", "key", "_gate", "value", "output") for n in (0, 1)]
    fresh = ours.MultiHeadAttention(2, 4, use_gate=True)
    fresh.set_weights(arrays)
    torch.testing.assert_close(fresh(x, x), model(x))


@pytest.mark.parametrize(
    "name",
    ["zeros", "ones", "random_normal", "random_uniform", "truncated_normal", "glorot_uniform", "glorot_normal", "he_normal", "he_uniform", "lecun_normal",
     "lecun_uniform", "variance_scaling", "orthogonal", "identity"],
)  # fmt: skip
def test_initializers_draw_what_keras_draws(keras: Any, name: str) -> None:
    for shape in ((4, 5), (6, 2, 4), (5,)):
        found = []
        for initializer in (ours.initializers.get(name), keras.initializers.get(name)):
            assert initializer is not None
            config = initializer.get_config()
            seeded = type(initializer).from_config({**config, "seed": 7} if "seed" in config else config)
            try:
                found.append(torch.as_tensor(seeded(shape)))
            except ValueError as error:
                found.append(type(error))
        if isinstance(found[1], type):
            assert found[0] is found[1]
        else:
            torch.testing.assert_close(*found)


def test_seeded_layers_begin_alike(keras: Any) -> None:
    ctor = {"num_heads": 2, "key_dim": 4, "kernel_initializer": {"class_name": "GlorotUniform", "config": {"seed": 5}}}
    layers = keras.layers.MultiHeadAttention(**ctor), ours.MultiHeadAttention(**ctor)
    x = torch.randn(1, 3, 6)
    hold([layers[1](x, x)], [layers[0](x, x)])


def test_regularizers_and_constraints_are_keras_own(keras: Any) -> None:
    w = torch.randn(4, 5) * 3
    for kind, names in (
        ("constraints", ("max_norm", "non_neg", "unit_norm", "min_max_norm")),
        ("regularizers", ("l1", "l2", "L1L2", "orthogonal_regularizer")),
    ):
        for name in names:
            torch.testing.assert_close(getattr(ours, kind).get(name)(w), getattr(keras, kind).get(name)(w))


ERRORS = {
    **{f"{name}={value}": {name: value} for name, value in itertools.chain(
        itertools.product(("num_heads", "key_dim"), (0, -1, 2.0)), itertools.product(("value_dim",), (-1, 0, "3")), itertools.product(("sliding_window",), (0, 1.5)),
        [("output_shape", 2.5), ("kernel_regularizer", "l1_l2"), ("attention_axes", "a"), ("kernel_initializer", "nothing"), ("bias_regularizer", 3), ("kernel_constraint", "nothing"), ("name", "a/b"),
         ("dtype", "int3"), ("unknown", 1)],
    )},
    "dtype=an object": {"dtype": object()},
}  # fmt: skip


@pytest.mark.parametrize("wrong", ERRORS)
def test_errors_of_the_same_class(keras: Any, wrong: str) -> None:
    caught = []
    for layer_class in (keras.layers.MultiHeadAttention, ours.MultiHeadAttention):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are each package's own
            layer_class(**{"num_heads": 2, "key_dim": 4, **ERRORS[wrong]})
        caught.append(str(error.value))
    assert all(next(iter(ERRORS[wrong])).rpartition("_")[2] in text for text in caught)


def test_errors_of_calls_of_the_same_class(keras: Any) -> None:
    x = torch.zeros(2, 5, 6)
    for layers in (keras.layers, ours):
        for call in (
            lambda layers=layers: layers.MultiHeadAttention(2, 4)(x, x[:, :3], x),
            lambda layers=layers: layers.MultiHeadAttention(2, 4)(x, x, attention_mask=torch.ones(3, 5, 5), return_attention_scores=True),
            lambda layers=layers: layers.Attention()(x),
            lambda layers=layers: layers.Attention()([x]),
            lambda layers=layers: layers.Attention()([x, x], mask=torch.ones(2, 5)),
            lambda layers=layers: layers.Attention(score_mode="other"),
            lambda layers=layers: layers.GroupQueryAttention(4, 5, 2),
            lambda layers=layers: layers.GroupQueryAttention(4, 2, 1).compute_output_shape((2, 5, 6), (2, 5, 7)),
            lambda layers=layers: layers.MultiHeadAttention(2, 4, output_shape=-1)(x, x),
            lambda layers=layers: layers.MultiHeadAttention(2, 4, output_shape=(2.5,))(x, x),
            lambda layers=layers: layers.Attention()([]),
            lambda layers=layers: layers.Attention().compute_mask([x, x], torch.ones(2)),
            lambda layers=layers: layers.Attention().compute_mask([x, x], [torch.ones(2)]),
        ):
            with pytest.raises(ValueError):  # noqa: PT011
                call()


def test_a_tiny_model_fits(keras: Any) -> None:
    """Two runs of ``fit`` on the same data, Keras' own and ours, and back."""
    made = torch.Generator().manual_seed(0)
    data = torch.randint(0, 9, (16, 6), generator=made)
    target = torch.randn(16, 4, generator=made)

    def trained() -> list[Any]:
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,), dtype="int32")
        x = keras.layers.Embedding(9, 8, mask_zero=True)(inputs)
        x = keras.layers.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True)
        x = keras.layers.GlobalAveragePooling1D()(x)
        model = keras.Model(inputs, keras.layers.Dense(4)(x))
        model.compile(keras.optimizers.SGD(0.5), "mse")
        model.fit(data.numpy(), target.numpy(), epochs=3, batch_size=8, verbose=0)
        return [torch.as_tensor(w) for w in model.get_weights()]

    with sdpa_kernel(SDPBackend.MATH):
        want = trained()
    bridge.enable()
    hold(trained(), want)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            self.elements = max(self.elements, t.numel() if isinstance(t, Tensor) else 0)
        return result


@pytest.mark.parametrize("options", [{}, {"sliding_window": 50}], ids=["causal", "window"])
def test_no_mask_is_a_tensor(keras: Any, options: dict[str, Any]) -> None:
    length = 2048
    x = torch.randn(1, length, 4)
    fused = bridge.MultiHeadAttention(1, 4, **options, backend="cpu")
    plain = keras.layers.MultiHeadAttention(1, 4, sliding_window=50)
    fused(x, x), plain(x, x)
    sizes = []
    for layer in (fused, plain):
        with torch.no_grad(), Largest() as largest:
            layer(x, x, use_causal_mask=True)
        sizes.append(largest.elements)
    assert sizes[0] < length * length // 4 and sizes[1] >= length * length


def test_enabled_layers_are_those_that_exist(keras: Any, counting: Any) -> None:
    """Counted calls; an override of a user's keeps its own method and gets masks as tensors."""

    class Own(keras.layers.MultiHeadAttention):  # type: ignore[misc]
        def _compute_attention(self, query: Any, key: Any, value: Any, attention_mask: Any = None, *args: Any) -> Any:
            assert attention_mask.shape == (1, 5, 5) and attention_mask.dtype == torch.bool
            return super()._compute_attention(query, key, value, attention_mask, *args)

    x = torch.randn(2, 5, 6)
    existing, own = keras.layers.MultiHeadAttention(2, 4), Own(2, 4)
    want = existing(x, x, use_causal_mask=True), own(x, x, use_causal_mask=True)
    bridge.enable(backend="counting")
    hold([existing(x, x, use_causal_mask=True), own(x, x, use_causal_mask=True)], list(want))
    assert counting.calls == 2
    out, scores = keras.layers.MultiHeadAttention(2, 4, flash_attention=True)(x, x, return_attention_scores=True)
    assert out.shape == x.shape and scores.shape == (2, 2, 5, 5), "what Keras refuses"
    bridge.enable("cpu")
    bridge.disable()
    bridge.disable()
    existing(x, x)
    assert counting.calls == 3


def test_the_subclass_saves_and_loads(keras: Any, tmp_path: Path) -> None:
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, bridge.MultiHeadAttention(2, 4, dropout=0.1)(inputs, inputs, use_causal_mask=True))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = torch.randn(2, 5, 6)
    hold([again(x)], [model(x)])
    assert type(again.layers[-1]) is bridge.MultiHeadAttention


def test_dropout_of_the_bridge_follows_keras_seeds(keras: Any) -> None:
    x = torch.randn(2, 5, 6)
    first, second = (bridge.MultiHeadAttention(2, 4, dropout=0.5, seed=3, kernel_initializer="ones") for _ in range(2))
    outs = [layer(x, x, training=True) for layer in (first, second, first)]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_unknown_backends_are_found_at_once(keras: Any) -> None:
    for build in (lambda: bridge.enable("tpu"), lambda: bridge.MultiHeadAttention(2, 4, backend="tpu")):
        with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*; got 'tpu'"):
            build()


OVERRIDES: dict[str, Any] = {
    "_compute_causal_mask": lambda self, query, value=None: torch.ones(1, query.shape[1], value.shape[1], dtype=torch.bool).tril(-1),
    "_compute_sliding_window_mask": lambda self, query, value=None: torch.ones(1, query.shape[1], value.shape[1], dtype=torch.bool).triu(1),
    "_masked_softmax": lambda self, scores, attention_mask=None: scores.sigmoid(),
    "_compute_attention_mask": lambda self, query, value, **masks: torch.ones(query.shape[1], value.shape[1], dtype=torch.bool).triu(2)[
        None
    ],
}


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("name", OVERRIDES)
@pytest.mark.parametrize("kind", ["MultiHeadAttention", "GroupQueryAttention", "bridge"])
def test_overrides_of_masks_and_softmax_count(keras: Any, kind: str, name: str, where: str) -> None:
    """On the class or on the layer: such a layer is left to Keras."""
    sizes = (4, 2, 1) if kind == "GroupQueryAttention" else (2, 4)
    base = keras.layers.MultiHeadAttention if kind == "bridge" else getattr(keras.layers, kind)

    def made(base: Any) -> Any:
        layer = (type("Own", (base,), {name: OVERRIDES[name]}) if where == "class" else base)(*sizes, sliding_window=3)
        if where == "instance":
            setattr(layer, name, OVERRIDES[name].__get__(layer))
        return layer

    x, call = torch.randn(2, 5, 6), {"use_causal_mask": True, "value_mask": torch.arange(5) < torch.tensor([[5], [4]])}
    plain = made(base)
    want = [plain(x, x, **call, return_attention_scores=scores) for scores in (False, True)]
    other = made(bridge.MultiHeadAttention) if kind == "bridge" else plain
    if kind == "bridge":
        other.build(x.shape, x.shape)
        other.set_weights(plain.get_weights())
    else:
        bridge.enable()
    got = [other(x, x, **call, return_attention_scores=scores) for scores in (False, True)]
    hold([got[0], *got[1]], [want[0], *want[1]])


@pytest.mark.parametrize("kind", ["MultiHeadAttention", "GroupQueryAttention"])
def test_a_scale_of_the_layer_counts(keras: Any, kind: str) -> None:
    layer = getattr(keras.layers, kind)(*((4, 2, 1) if kind == "GroupQueryAttention" else (2, 4)))
    setattr(layer, "_inverse_sqrt_head_dim" if kind == "GroupQueryAttention" else "_inverse_sqrt_key_dim", 3.0)
    x = torch.randn(2, 5, 6)
    want = layer(x, x)
    bridge.enable()
    hold([layer(x, x)], [want])


@pytest.mark.parametrize("how", ["enabled", "bridge"])
def test_masks_are_tensors_wherever_a_layer_reads_them(keras: Any, how: str) -> None:
    """In an override of any method, and for a caller of ``_compute_attention_mask``."""
    if how == "enabled":
        bridge.enable()
    base = keras.layers.MultiHeadAttention if how == "enabled" else bridge.MultiHeadAttention
    seen: list[Any] = []

    class Masked(base):  # type: ignore[misc]
        def _compute_attention_mask(self, *args: Any, **kwargs: Any) -> Any:
            mask = super()._compute_attention_mask(*args, **kwargs)
            seen.append(mask & torch.ones(5, dtype=torch.bool))
            return keras.ops.logical_and(mask, torch.ones(5, 5, dtype=torch.bool))

    class Attends(base):  # type: ignore[misc]
        def _compute_attention(self, query: Any, key: Any, value: Any, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
            seen.append(attention_mask)
            return super()._compute_attention(query, key, value, attention_mask, *args, **kwargs)

    x, call = torch.randn(2, 5, 6), {"use_causal_mask": True, "value_mask": torch.arange(5) < torch.tensor([[5], [4]])}
    plain = keras.layers.MultiHeadAttention(2, 4)
    want = plain(x, x, **call)
    for layer in (Masked(2, 4), Attends(2, 4)):
        layer.build(x.shape, x.shape)
        layer.set_weights(plain.get_weights())
        hold([layer(x, x, **call)], [want])
    seen.append(base(2, 4)._compute_attention_mask(x, x, use_causal_mask=True, value_mask=call["value_mask"]))
    right = torch.ones(5, 5, dtype=torch.bool).tril() & call["value_mask"][:, None]
    assert len(seen) == 3 and all(torch.equal(mask, right) for mask in seen)


def test_the_subclass_pickles(keras: Any, tmp_path: Path) -> None:
    layer, x = bridge.MultiHeadAttention(2, 4), torch.randn(2, 5, 6)
    want = layer(x, x)
    torch.save(layer, tmp_path / "layer.pt")
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert type(again) is bridge.MultiHeadAttention
        hold([again(x, x)], [want])


@pytest.mark.parametrize("call", [{}, {"use_causal_mask": True}, {"return_attention_scores": True}], ids=lambda c: next(iter(c), "plain"))
@pytest.mark.parametrize("shapes", [((1, 5), (3, 7)), ((3, 5), (1, 7)), ((1, 2, 5), (3, 1, 7))], ids=str)
@pytest.mark.parametrize("kind", ["MultiHeadAttention", "GroupQueryAttention"])
def test_sizes_of_one_serve_all(keras: Any, kind: str, shapes: Any, call: dict[str, Any]) -> None:
    if kind == "GroupQueryAttention" and len(shapes[0]) > 2:
        pytest.skip("takes three dimensions")
    sizes: dict[str, Any] = (
        {"head_dim": 4, "num_query_heads": 2, "num_key_value_heads": 1} if kind[0] == "G" else {"num_heads": 2, "key_dim": 4}
    )
    if len(shapes[0]) > 2:
        sizes["attention_axes"] = 2
        call = {name: value for name, value in call.items() if name != "use_causal_mask"}
    real, mine = getattr(keras.layers, kind)(**sizes), getattr(ours, kind)(**sizes)
    query, value = (torch.randn(*shape, 6) for shape in shapes)
    call = {**call, "value_mask": torch.arange(7) < torch.arange(4, 4 + value.shape[0])[:, None]}
    want = real(query, value, **call)
    mine.set_weights(real.get_weights())
    got = [mine(query, value, **call)]
    bridge.enable()
    got.append(real(query, value, **call))
    for one in got:
        hold(list(one) if isinstance(one, tuple) else [one], list(want) if isinstance(want, tuple) else [want])


@pytest.mark.parametrize("factor", [1.0, 6.0])
def test_rows_without_keys_in_float16(keras: Any, factor: float) -> None:
    """Keras adds a number that leaves the scores to the hundredth."""
    real, mine = (kind(2, 4, dtype="float16") for kind in (keras.layers.MultiHeadAttention, ours.MultiHeadAttention))
    x = torch.randn(2, 5, 6, dtype=torch.float16) * factor
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask[0, 2], mask[1] = False, False
    want = real(x, x, attention_mask=mask)
    mine.set_weights(real.get_weights())
    bridge.enable()
    for got in (mine(x, x, attention_mask=mask), real(x, x, attention_mask=mask)):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * factor)
    mean = mine.value(x).mean(1, keepdim=True).expand(2, 5, 2, 4)
    assert (mine.attention_output(mean) - want).abs()[1].max() > 3e-2 * factor, "not the mean"


def test_arguments_that_keras_takes(keras: Any) -> None:
    """bools as ints, numpy's numbers, iterables of sizes."""
    x, found = torch.randn(2, 5, 6), []
    for layers in (keras.layers, ours):
        made = [
            layers.MultiHeadAttention(True, 4, sliding_window=True),
            layers.MultiHeadAttention(2, True, dropout=np.float32(0.25), output_shape=range(2, 4)),
            layers.MultiHeadAttention(2, 4, output_shape=np.array([3])),
            layers.GroupQueryAttention(4, True, True),
        ]
        found.append([layer(x, x, training=False) for layer in made] if layers is ours else [(layer(x, x), layer) for layer in made])
        if layers is ours:
            json.dumps([layer.get_config() for layer in made])
            for layer, (want, real) in zip(made, found[0], strict=True):
                layer.set_weights(real.get_weights())
                hold([layer(x, x, training=False)], [want])
    assert keras.layers.GroupQueryAttention(4, 2, 1).name.startswith("grouped_query_attention")
    assert ours.GroupQueryAttention(4, 2, 1).name.startswith("grouped_query_attention")


@pytest.mark.parametrize("kind", ["array", "list", "tensor"])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 5, 7), (7,), (2, 7), (1, 7)], ids=str)
def test_value_masks_of_attention(keras: Any, shape: tuple[int, ...], kind: str) -> None:
    query, value = torch.randn(2, 5, 6), torch.randn(2, 7, 6)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    rows = torch.tensor([True, True, False, True, False])
    to = {"array": lambda t: t.numpy(), "list": lambda t: t.tolist(), "tensor": lambda t: t}[kind]
    want = keras.layers.Attention()([query, value], mask=[rows, keep])
    hold([ours.Attention()([query, value], mask=[to(rows), to(keep)])], [want])
