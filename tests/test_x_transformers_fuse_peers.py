"""Real models of the x-transformers package, fused: outputs, intermediates and gradients as the package's own, in O(length) memory."""

from __future__ import annotations

import copy
import io
import math
import re
import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fused_attn as fa
from fused_attn_bench.judge import rounding
from fused_attn_bench.measure import peak_bytes

pytestmark = [pytest.mark.slow, pytest.mark.peers]
x_transformers = pytest.importorskip("x_transformers", reason="x-transformers is not installed (make test-peers)")

from x_transformers.attend import Attend, Intermediates, one_hot_straight_through, sparse_topk_attn  # noqa: E402

from fused_attn.integrations.x_transformers import flash_with_everything, fuse, unfuse  # noqa: E402

LENGTH = 13
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "selective, RealFormer, kv heads": {"attn_selective": True, "residual_attn": True, "attn_kv_heads": 2},
    "one kv head, softclamp": {"attn_one_kv_head": True, "attn_softclamp_logits": True, "attn_logit_softclamp_value": 2.0},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 3},
    "alibi, memories": {"alibi_pos_bias": True, "attn_num_mem_kv": 2},
    "alibi, zero key, RealFormer": {"alibi_pos_bias": True, "attn_add_zero_kv": True, "residual_attn": True},
    "forgetting": {"attn_data_dependent_alibi": True},
    "forgetting, memories": {"attn_data_dependent_alibi": True, "attn_num_mem_kv": 1},
    "per-row forgetting": {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_per_row": True},
    "T5": {"rel_pos_bias": True, "attn_kv_heads": 2},
    "dynamic": {"dynamic_pos_bias": True},
    "rotary, window": {"rotary_pos_emb": True, "attn_max_attend_past": 4},
    "sinks": {"attn_head_learned_sink": True},
    "qk_norm": {"attn_qk_norm": True, "attn_kv_heads": 2},
    "sigmoid": {"attn_sigmoid": True},
    "distance": {"attn_l2_distance": True},
    "top-k": {"attn_sparse_topk": 3},
    "top-k, straight through": {"attn_sparse_topk": 3, "attn_sparse_topk_straight_through": True},
    "hard": {"attn_hard": True},
    "talking heads, RealFormer": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True, "residual_attn": True},
    "scaled after": {"attn_pre_scale_post_talking_heads": True},
    "signs": {"attn_cog_signed": True},
    "cope": {"attn_use_cope": True},
    "laser": {"attn_laser": True},
    "flash": {"attn_flash": True, "alibi_pos_bias": True},
    "values of the first layer": {"add_value_residual": True},
}


def decoder(**options: Any) -> Any:
    torch.manual_seed(1)
    return x_transformers.Decoder(dim=24, depth=2, heads=4, attn_dim_head=8, ff_mult=2, verbose=False, **options)


def in_double(model: Any) -> Any:
    """The package's model in float64, with the softmax that it makes in float32 whatever the input."""
    twin = copy.deepcopy(model).double()
    for attend in (m for m in twin.modules() if isinstance(m, Attend)):
        if isinstance(attend.attn_fn, partial) and "dtype" in attend.attn_fn.keywords:
            attend.attn_fn = partial(attend.attn_fn.func, **{**attend.attn_fn.keywords, "dtype": torch.float64})
    for bias in (m for m in twin.modules() if isinstance(m, x_transformers.x_transformers.DynamicPositionBias)):
        bias.mlp[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return twin


def step(model: Any, x: Tensor, through: str, **options: Any) -> dict[str, Tensor]:
    """Output, each layer's probabilities and scores, and the gradients of everything by all of them."""
    x = x.detach().requires_grad_()
    out, hidden = model(x, return_hiddens=True, **options)
    loss, results = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum(), {"out": out}
    for i, left in enumerate(hidden.attn_intermediates):
        if through and getattr(left, through) is not None:
            results[f"{through}.{i}"] = array = getattr(left, through)
            shown = array.masked_fill(array == torch.finfo(array.dtype).min, 0.0)
            loss = loss + (shown * torch.linspace(0, 1, shown.shape[-1], dtype=shown.dtype)).sum()
    leaves = {"x": x, **dict(model.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results |= {f"grad {n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}
    return {name: t.detach() for name, t in results.items()}


def hold(model: Any, x: Tensor, fused: Any, through: str = "", **options: Any) -> None:
    """The error rule: at most twice the package's own float32 error in results of that kind, and sqrt(length) roundings."""
    exact = step(in_double(model), x.double(), through, **options)
    plain, got = step(model, x, through, **options), step(fused, x, through, **options)
    assert got.keys() == plain.keys()
    visible = {name: truth.masked_fill(truth == torch.finfo(truth.dtype).min, 0.0) for name, truth in exact.items()}

    def error(results: dict[str, Tensor], name: str) -> float:
        return float((results[name].double() - exact[name]).masked_fill(exact[name] == torch.finfo(torch.float64).min, 0.0).abs().max())

    # One weight's error in one run is a draw; that of its kind, relative to its size, is what the package's arithmetic gives at any depth.
    size = {name: float(truth.abs().max()) for name, truth in visible.items()}
    kinds: dict[str, float] = {}
    for name in exact:
        kinds[kind(name)] = max(kinds.get(kind(name), 0.0), error(plain, name) / (size[name] or 1.0))
    for name, truth in visible.items():
        bound = 2 * kinds[kind(name)] * size[name] + math.sqrt(LENGTH) * rounding(truth, torch.float32)
        assert error(got, name) <= bound, f"{name}: {error(got, name):.1e} > {bound:.1e}"
        assert torch.equal(got[name] == torch.finfo(torch.float32).min, plain[name] == torch.finfo(torch.float32).min), name


def kind(name: str) -> str:
    """What a result is, at whatever depth."""
    return re.sub(r"\d+", "#", name)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, LENGTH, 24)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_step_of_training(options: dict[str, Any], x: Tensor) -> None:
    model = decoder(**options)
    fused = fuse(copy.deepcopy(model))
    assert list(fused.state_dict()) == list(model.state_dict())
    hold(model, x, fused)
    hold(model, x, fused, mask=torch.arange(LENGTH).expand(2, -1) < torch.tensor([[LENGTH], [8]]))


@pytest.mark.parametrize("through", ["pre_softmax_attn", "post_softmax_attn", "qk_similarities"])
@pytest.mark.parametrize("name", ["selective, RealFormer, kv heads", "alibi, memories", "sinks", "sigmoid", "top-k"])
def test_intermediates_are_differentiable(name: str, through: str, x: Tensor) -> None:
    model = decoder(**OPTIONS[name])
    hold(model, x, fuse(copy.deepcopy(model)), through)


def test_on_interpreted_triton(x: Tensor) -> None:
    """Selective, RealFormer and kv heads together: one step on the Triton kernels."""
    model = decoder(attn_selective=True, residual_attn=True, attn_kv_heads=2)
    fused = fuse(copy.deepcopy(model), backend="triton")
    hold(model, x, fused)
    assert {m.backend for m in fused.modules() if isinstance(m, Attend)} == {"triton"}


def test_encoders_and_cross_attention(x: Tensor) -> None:
    encoder = x_transformers.Encoder(dim=24, depth=2, heads=4, attn_dim_head=8, residual_attn=True, alibi_pos_bias=True, verbose=False)
    hold(encoder, x, fuse(copy.deepcopy(encoder)), mask=torch.arange(LENGTH).expand(2, -1) < torch.tensor([[LENGTH], [8]]))
    model = decoder(cross_attend=True, attn_selective=True, cross_attn_selective=False, cross_residual_attn=True, residual_attn=True)
    seen = torch.arange(9).expand(2, -1) < torch.tensor([[9], [5]])
    context = torch.randn(2, 9, 24)
    for twin in (model, fused := fuse(copy.deepcopy(model))):
        twin.eval()
    got, want = fused(x, context=context, context_mask=seen), model(x, context=context, context_mask=seen)
    torch.testing.assert_close(got, want)


def test_decoding_with_a_cache_is_decoding_without() -> None:
    net = x_transformers.TransformerWrapper(num_tokens=20, max_seq_len=32, attn_layers=decoder(rotary_pos_emb=True, attn_kv_heads=2))
    model = x_transformers.AutoregressiveWrapper(net).eval()
    fused = fuse(copy.deepcopy(model))
    start = torch.randint(0, 20, (2, 4))
    want = model.generate(start, 9, temperature=0.0)
    assert torch.equal(fused.generate(start, 9, temperature=0.0, cache_kv=True), want)
    assert torch.equal(fused.generate(start, 9, temperature=0.0, cache_kv=False), want)


def test_decoding_with_a_cache_runs_on_the_split_key_kernels(reached: list[Any]) -> None:
    model = x_transformers.AutoregressiveWrapper(
        x_transformers.TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=decoder(attn_kv_heads=2, rotary_pos_emb=True))
    ).eval()
    start = torch.randint(0, 50, (2, 5))
    want, fused = model.generate(start, 4, temperature=0.0), fuse(copy.deepcopy(model), backend="triton")
    assert torch.equal(fused.generate(start, 4, temperature=0.0, cache_kv=True), want)
    layers = sum(isinstance(m, Attend) for m in fused.modules())
    assert sum(call.shape[2] == 1 for call in reached) == 3 * layers, "every step but the prompt's, in every layer"


def test_selective_attention_takes_no_cache(x: Tensor) -> None:
    fused = fuse(decoder(attn_selective=True))
    _, hidden = fused(x, return_hiddens=True)
    with pytest.raises(ValueError, match="cache must be None with selective"):
        fused(x, cache=hidden)


def test_models_that_the_package_refuses_to_build(x: Tensor) -> None:
    options = {"attn_selective": True, "residual_attn": True, "rel_pos_bias": True}
    with pytest.raises(AssertionError):
        decoder(attn_flash=True, **options)
    with flash_with_everything():
        built = decoder(attn_flash=True, **options)
        alone = x_transformers.Attention(24, flash=True, sigmoid=True)
    assert all(isinstance(m, fa.nn.x_transformers.Attend) for m in (*built.modules(), *alone.modules()) if isinstance(m, Attend))
    hold(decoder(**options), x, built)
    with pytest.raises(AssertionError):
        decoder(attn_flash=True, **options)


def test_what_is_left_behind_is_the_packages(x: Tensor) -> None:
    """An Intermediates by class, whose arrays can be set, that pickles with the model and goes back with unfuse."""
    model = fuse(decoder(residual_attn=True))
    _, hidden = model(x, return_hiddens=True)
    left = hidden.attn_intermediates[0]
    assert isinstance(left, Intermediates) and len(left.to_tuple()) == 3
    left.pre_softmax_attn = torch.zeros(1)
    assert left.pre_softmax_attn.shape == (1,)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), model(x))
    assert {type(m) for m in unfuse(model).modules() if isinstance(m, Attend)} == {Attend}
    torch.testing.assert_close(model(x), again(x))


CUSTOM: dict[str, Any] = {
    "softmax over queries": partial(functional.softmax, dim=-2),
    "hard at a temperature": partial(one_hot_straight_through, temperature=3.0),
    "top-k at a temperature": partial(sparse_topk_attn, sparse_topk=2, straight_through=True, temperature=3.0, dim=-1),
    "top-k over queries": partial(sparse_topk_attn, sparse_topk=2, straight_through=True, dim=-2),
    "top-k alone": partial(sparse_topk_attn, sparse_topk=2),
    "a square": lambda scores: scores.clamp(min=-1e3).square(),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_functions_that_only_resemble_the_packages_are_called(name: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8).unbind(0)
    q.requires_grad_()
    given, late = Attend(custom_attn_fn=CUSTOM[name]), Attend()
    fused, fused_late = fuse(copy.deepcopy(given)), fuse(copy.deepcopy(late))
    late.attn_fn = fused_late.attn_fn = CUSTOM[name]
    for twin, model in ((fused, given), (fused_late, late)):
        got, want = twin(q, k, v)[0], model(q, k, v)[0]
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(t.sin().sum(), q)[0] for t in (got, want)))


def test_gumbel_softmax_needs_no_other_keyword() -> None:
    fused, scores = fuse(Attend(custom_attn_fn=partial(functional.gumbel_softmax, dim=-1))), torch.randn(1, 2, 5, 8)
    torch.manual_seed(0)
    out, _ = fused(scores, scores, scores)
    torch.manual_seed(0)
    torch.testing.assert_close(out, functional.gumbel_softmax(scores @ scores.mT * 8**-0.5, dim=-1) @ scores)


@pytest.mark.parametrize("per_row", [False, True], ids=["gates", "gates per row"])
def test_forgetting_takes_no_cache(per_row: bool) -> None:
    layers = decoder(attn_data_dependent_alibi=True, attn_data_dependent_alibi_per_row=per_row)
    model = x_transformers.AutoregressiveWrapper(
        x_transformers.TransformerWrapper(num_tokens=20, max_seq_len=32, attn_layers=layers)
    ).eval()
    fused, start = fuse(copy.deepcopy(model)), torch.randint(0, 20, (2, 4))
    assert torch.equal(fused.generate(start, 6, temperature=0.0), model.generate(start, 6, temperature=0.0, cache_kv=False))
    _, hidden = fused.net(start, return_intermediates=True)
    with pytest.raises(ValueError, match="cache must be None with data_dependent_alibi"):
        fused.net(start, cache=hidden)
    assert not fused.net.can_cache_kv
    assert unfuse(fused).net.can_cache_kv
    assert torch.equal(fused.net(start), model.net(start))


def test_forgetting_keeps_its_module(x: Tensor) -> None:
    fused = fuse(decoder(attn_data_dependent_alibi=True))
    torch.testing.assert_close(torch.func.functional_call(fused, dict(fused.named_parameters()), (x,)), fused(x))
    assert fused.get_submodule("layers.0.1.data_dependent_alibi") is fused.layers[0][1].data_dependent_alibi
    assert fused(x[:0]).shape == (0, LENGTH, 24)
    for _, block, _ in fused.layers:
        if hasattr(block, "data_dependent_alibi"):
            block.data_dependent_alibi = None
    plain = decoder()
    plain.load_state_dict({n: t for n, t in fused.state_dict().items() if n in plain.state_dict()})
    torch.testing.assert_close(fused(x), plain(x))


def test_forgetting_beside_projected_positions(x: Tensor) -> None:
    model = decoder(attn_data_dependent_alibi=True, attn_use_rel_proj_pos_bias=True)
    hold(model, x, fuse(copy.deepcopy(model)))


@pytest.mark.parametrize("mixes", [False, True], ids=["kernels", "talking heads"])
def test_polar_positions_of_one_kv_head(mixes: bool, x: Tensor) -> None:
    model = decoder(polar_pos_emb=True, attn_one_kv_head=True, attn_pre_talking_heads=mixes)
    ours = fa.nn.x_transformers.Decoder(
        dim=24, depth=2, heads=4, attn_dim_head=8, ff_mult=2, polar_pos_emb=True, attn_one_kv_head=True, attn_pre_talking_heads=mixes
    )
    ours.load_state_dict(model.state_dict())
    for twin in (ours, fuse(copy.deepcopy(model))):
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"attn_add_zero_kv": True}, {"attn_kv_heads": 2}, {"attn_pre_talking_heads": True}], ids=str)
def test_realformer_with_sinks_is_that_of_our_own_layers(more: dict[str, Any], x: Tensor) -> None:
    """The package fails there: the column of the sinks is no key of the next layer."""
    options = {"residual_attn": True, "attn_head_learned_sink": True, **more}
    model = decoder(**options)
    ours = fa.nn.x_transformers.Decoder(dim=24, depth=2, heads=4, attn_dim_head=8, ff_mult=2, **options)
    ours.load_state_dict(model.state_dict())
    torch.testing.assert_close(fuse(model)(x), ours(x), rtol=1e-4, atol=1e-5)


def test_flash_is_taken_away_wherever_it_stands() -> None:
    with flash_with_everything():
        by_place = x_transformers.Attention(24, 8, None, 4, True, True, True)
        alone = Attend(flash=True, selective=True, causal=True)
        with flash_with_everything("eager"):
            inner = Attend(flash=True, sigmoid=True)
    assert by_place(torch.randn(1, 5, 24)).shape == (1, 5, 24)
    assert [type(m).__name__ for m in (by_place, alone, inner)] == ["FusedAttention", "FusedAttend", "FusedAttend"]
    assert (alone.backend, inner.backend) == ("auto", "eager")


def test_other_threads_build_the_packages_models() -> None:
    kinds = []

    def build() -> None:
        kinds.append(type(Attend()).__name__)

    construct = Attend.__init__
    with flash_with_everything():
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
        build()
    build()
    assert kinds == ["Attend", "FusedAttend", "Attend"]
    assert Attend.__init__ is construct


def test_nothing_to_fuse() -> None:
    with pytest.raises(ValueError, match="must hold an Attend"):
        fuse(nn.Linear(2, 2))
    model = decoder()
    next(m for m in model.modules() if isinstance(m, Attend)).flash_pack_seq = True
    with pytest.raises(NotImplementedError, match="flash_pack_seq"):
        fuse(model)


def test_selective_attention_peaks_at_a_tenth_of_the_packages_memory() -> None:
    model = decoder(attn_selective=True)
    x = torch.randn(1, 2048, 24)
    peaks = [peak_bytes(lambda m=m: m(x).sum().backward(), torch.device("cpu"))[1] for m in (model, fuse(copy.deepcopy(model)))]
    assert peaks[1] <= 0.1 * peaks[0], peaks


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["all_heads", "grouped"])
def test_realformer_keeps_one_tensor_of_scores_per_layer(kv_heads: int) -> None:
    model, x = fuse(decoder(residual_attn=True, attn_kv_heads=kv_heads)), torch.randn(1, 512, 24)  # less runs on eager
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.numel() >= 4 * 512 * 512:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    assert len(kept) <= 2, [t.shape for t in kept.values()]
    out.sum().backward()


def test_unknown_backends_are_found_at_once() -> None:
    model = decoder()
    for enter in (lambda: fuse(model, "tpu"), lambda: flash_with_everything("tpu").__enter__()):
        with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*; got 'tpu'"):
            enter()
    assert all(type(m) is Attend for m in model.modules() if isinstance(m, Attend))
