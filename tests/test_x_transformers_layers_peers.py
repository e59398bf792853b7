"""Our layers against x-transformers' own: one state dict for both, outputs, scores, gradients; decoding from a cache."""

from __future__ import annotations

from random import seed as random_seed
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.nn import x_transformers as ours

theirs = pytest.importorskip("x_transformers", reason="needs x-transformers")
pytestmark = pytest.mark.peers

DIM, HEADS, LENGTH = 32, 4, 7
COMMON = {"dim": DIM, "heads": HEADS, "attn_dim_head": 8, "ff_mult": 2, "depth": 2, "verbose": False}

DECODERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "real_former_selective_grouped": {"residual_attn": True, "attn_selective": True, "attn_kv_heads": 2},
    "real_former_three_layers": {"residual_attn": True, "depth": 3, "alibi_pos_bias": True, "attn_kv_heads": 2},
    "rotary_rmsnorm_swiglu": {"rotary_pos_emb": True, "use_rmsnorm": True, "ff_glu": True, "ff_swish": True},
    "rotary_xpos": {"rotary_xpos": True, "rotary_base_rescale_factor": 2.0, "rotary_interpolation_factor": 2.0},
    "rotary_some_heads": {"rotary_pos_emb": True, "rotate_num_heads": 2},
    "polar": {"polar_pos_emb": True},
    "t5": {"rel_pos_bias": True, "rel_pos_num_buckets": 8, "rel_pos_max_distance": 16},
    "dynamic_logarithmic": {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": True, "dynamic_pos_bias_norm": True},
    "alibi_six_heads": {"alibi_pos_bias": True, "heads": 6, "alibi_num_heads": 5},
    "forgetting_grouped": {"attn_data_dependent_alibi": True, "attn_kv_heads": 2},
    "forgetting_memories": {"attn_data_dependent_alibi": True, "attn_num_mem_kv": 2},
    "forgetting_per_row": {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_per_row": True},
    "projected_positions": {"attn_use_rel_proj_pos_bias": True, "attn_rel_proj_max_dist": 4},
    "cope": {"attn_use_cope": True, "attn_cope_max_pos": 4, "attn_cope_talking_heads": True},
    "window_memories": {"attn_max_attend_past": 2, "attn_num_mem_kv": 2},
    "cosine": {"attn_qk_norm": True, "attn_qk_norm_groups": 2, "attn_num_mem_kv": 1},
    "cosine_scaled_grouped": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True, "attn_kv_heads": 2},
    "rmsnorms": {"attn_qk_rmsnorm": True, "attn_value_rmsnorm": True},
    "key_rmsnorm": {"attn_k_rmsnorm": True, "attn_one_kv_head": True},
    "clamp_zero_key": {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 2.0, "attn_add_zero_kv": True},
    "sinks_grouped": {"attn_head_learned_sink": True, "attn_kv_heads": 2},
    "talking_heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True, "attn_pre_scale_post_talking_heads": True},
    "topk": {"attn_sparse_topk": 2},
    "sigmoid": {"attn_sigmoid": True},
    "hard": {"attn_hard": True},
    "distance": {"attn_l2_distance": True},
    "cog": {"attn_cog_signed": True},
    "flash": {"attn_flash": True, "alibi_pos_bias": True},
    "gates": {"attn_gate_values": True, "attn_gate_values_rank": 4, "attn_output_gate": True, "attn_output_gate_headwise": True},
    "gates_swiglu": {"attn_gate_values": True, "attn_swiglu_values": True, "attn_gate_value_heads": True, "attn_head_scale": True},
    "on_attention": {"attn_on_attn": True, "attn_value_dim_head": 6},
    "laser": {"attn_laser": True},
    "orthogonal_values": {"attn_orthog_projected_values": True, "attn_orthog_projected_values_per_head": True, "attn_kv_heads": 2},
    "latents": {
        "attn_use_latent_q": True, "attn_dim_latent_q": 16, "attn_use_latent_kv": True, "attn_dim_latent_kv": 12,
        "attn_latent_rope_subheads": 1, "rotary_pos_emb": True,
    },
    "value_residual": {"add_value_residual": True, "depth": 3},
    "value_residual_halves": {"add_value_residual": True, "learned_value_residual_mix": False},
    "post_norm": {"pre_norm": False},
    "sandwich_scalenorm": {"sandwich_norm": True, "use_scalenorm": True},
    "pre_and_post_simple": {"pre_and_post_norm": True, "use_simple_rmsnorm": True},
    "dynamic_tanh": {"use_dynamic_tanh": True},
    "derf": {"use_derf": True, "norm_add_unit_offset": False},
    "gru": {"gate_residual": True, "scale_residual": True},
    "orthogonal_residual": {"orthog_residual": True},
    "split_residual": {"mv_split_residual": True},
    "split_residual_learned": {"mv_split_residual": True, "residual_fn_kwargs": {"learned": True}},
    "scaled_residual": {"scale_residual": True, "scale_residual_constant": 0.5},
    "branch_scale": {"depth_scale_residual": 0.5},
    "layer_scale": {"use_layerscale": True, "layerscale_init_value": 0.1},
    "macaron_sandwich": {"macaron": True, "sandwich_coef": 1},
    "par": {"par_ratio": 3, "depth": 6},
    "custom_layers": {"custom_layers": ("a", "f", "f", "a"), "depth": None},
    "tied": {"weight_tie_layers": True, "depth": 3},
    "order": {"layers_execute_order": (0, 1, 0, 1, 2, 3)},
    "only_attention": {"only_attn": True},
    "shifted": {"shift_tokens": 1},
    "unet": {"unet_skips": True},
    "reinjected": {"reinject_input": True, "learned_reinject_input_gate": True},
    "clamped_output": {"softclamp_output": True, "softclamp_output_value": 1.0},
    "per_layer_options": {"attn_kv_heads": (4, 2), "ff_glu": (True, False), "attn_sparse_topk": (None, 2)},
    "hyper_connections": {"num_residual_streams": 3},
    "hyper_connections_three_views": {"num_residual_streams": 2, "qkv_receive_diff_residuals": True, "attn_kv_heads": 2},
    "gated_streams": {"num_residual_streams": 2, "gated_multi_residual": True, "residual_fn_kwargs": {"read_gate_rank": 4}},
    "gated_streams_three_views": {
        "num_residual_streams": 2, "gated_multi_residual": True, "residual_fn_kwargs": {"read_gate_rank": 4}, "qkv_receive_diff_residuals": True,
    },
    "integrated_layers": {"integrate_layers": True},
    "integrated_layers_relu": {"integrate_layers": True, "layer_integrate_use_softmax": False, "num_residual_streams": 1},
    "attention_over_depth": {"attn_aggregated_residuals": True, "attn_aggregated_residual_kwargs": {"lora_rank": 8}},
    "attention_over_depth_three_views": {
        "attn_aggregated_residuals": True, "attn_aggregated_residual_kwargs": {"lora_rank": 8}, "qkv_receive_diff_residuals": True,
    },
    "recurrence_beside": {
        "attn_hybrid_module": torch.nn.GRU(32, 32, batch_first=True), "attn_hybrid_fold_axial_dim": 2, "attn_hybrid_learned_mix": True,
    },
    "ff_variants": {"ff_relu_squared": True, "ff_post_act_ln": True, "ff_no_bias": True},
    "ff_solu": {"ff_solu": True, "ff_softclamp_value": 1.0},
    "ff_gated_clamped": {"ff_glu": True, "ff_glu_mult_bias": True, "ff_glu_softclamp": True},
    "ff_gated_clamped_swish": {"ff_glu": True, "ff_swish": True, "ff_glu_softclamp": True},
}  # fmt: skip

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder": ("Encoder", {"residual_attn": True}),
    "encoder_t5": ("Encoder", {"rel_pos_bias": True, "rel_pos_num_buckets": 8, "rel_pos_max_distance": 16}),
    "encoder_alibi_memories": ("Encoder", {"alibi_pos_bias": True, "attn_num_mem_kv": 1}),
    "encoder_forgetting": ("Encoder", {"attn_data_dependent_alibi": True}),
    "encoder_shifted": ("Encoder", {"shift_tokens": 1}),
    "cross": ("Decoder", {"cross_attend": True, "residual_attn": True, "cross_residual_attn": True, "cross_attn_kv_heads": 2}),
    "cross_selective": ("Decoder", {"cross_attend": True, "attn_selective": True, "cross_attn_selective": False}),
    "cross_inverted": ("Encoder", {"cross_attend": True, "cross_attn_inverted_attention": True}),
    "cross_value_residual": ("Decoder", {"cross_attend": True, "add_value_residual": True}),
    "cross_attender": ("CrossAttender", {"attn_dim_context": 20}),
    "prefix": ("PrefixDecoder", {"alibi_pos_bias": True}),
}


def pair(name: str, options: dict[str, Any]) -> tuple[Any, Any, torch.dtype]:
    """Ours and theirs with the same weights, none of which is left where it begins, in a dtype that both compute in."""
    options = {n: v for n, v in {**COMMON, **options}.items() if v is not None}
    single = {"dynamic_pos_bias", "polar_pos_emb"} & set(options)  # the package makes distances or magnitudes float32
    dtype = torch.float32 if single else torch.float64
    torch.manual_seed(0)
    a, b = getattr(ours, name)(**options).to(dtype).eval(), getattr(theirs, name)(**options).to(dtype).eval()
    assert {n: t.shape for n, t in a.state_dict().items()} == {n: t.shape for n, t in b.state_dict().items()}
    for p in b.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.2)
    for module in b.modules():  # its softmax is float32's, whatever the dtype
        getattr(getattr(module, "attn_fn", None), "keywords", {}).pop("dtype", None)
    a.load_state_dict(b.state_dict())
    b.load_state_dict(a.state_dict())
    return a, b, dtype


def hold(a: Any, b: Any, x: Tensor, **call: Any) -> None:
    """Outputs, scores, weights and gradients agree."""
    near = {"rtol": 1e-9, "atol": 1e-9} if x.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    results = []
    for model in (a, b):
        leaf = x.clone().requires_grad_()
        out, left = model(leaf, **call, return_hiddens=True)
        leaves = {"x": leaf, **dict(model.named_parameters())}
        loss = (out * torch.sin(torch.arange(out.numel())).view_as(out)).sum()
        grads = torch.autograd.grad(loss, tuple(leaves.values()), allow_unused=True)
        arrays = [t for of in left.attn_intermediates for t in of.to_tuple()]
        results.append(([out, *arrays], dict(zip(leaves, grads, strict=True)), [of.layer_type for of in left.attn_intermediates]))
    assert results[0][2] == results[1][2]
    for got, want in zip(results[0][0], results[1][0], strict=True):
        if want is not None:  # the package's flash path leaves no arrays
            torch.testing.assert_close(got, want, **near)
    for name, want in results[1][1].items():
        got = results[0][1][name]
        got, want = (torch.zeros(()) if t is None else t for t in (got, want))
        torch.testing.assert_close(
            got.expand_as(want), want.expand_as(got), **near, msg=lambda text, n=name: f"{n}: {text}", check_dtype=False
        )


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str) -> None:
    a, b, dtype = pair("Decoder", DECODERS[name])
    hold(a, b, torch.randn(2, LENGTH, DIM, dtype=dtype))


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_with_padding(name: str) -> None:
    a, b, dtype = pair("Decoder", DECODERS[name])
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 2]])
    hold(a, b, torch.randn(2, LENGTH, DIM, dtype=dtype), mask=mask)


@pytest.mark.parametrize("name", OTHERS)
def test_other_stacks(name: str) -> None:
    cls, options = OTHERS[name]
    a, b, dtype = pair(cls, options)
    call: dict[str, Any] = {"mask": torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 2]])}
    if cls == "PrefixDecoder":
        call["prefix_attn_len"] = torch.tensor([3, 1])
    if options.get("cross_attend") or cls == "CrossAttender":
        call["context"] = torch.randn(2, 5, options.get("attn_dim_context", DIM), dtype=dtype)
        call["context_mask"] = torch.arange(5) < torch.tensor([[5], [3]])
    hold(a, b, torch.randn(2, LENGTH, DIM, dtype=torch.float64), **call)


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


CALLS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "left_padding": ("Decoder", {}, lambda: {"seq_start_pos": torch.tensor([0, 3])}),
    "left_padding_selective": ("Decoder", {"attn_selective": True, "residual_attn": True}, lambda: {"seq_start_pos": torch.tensor([2, 3])}),
    "left_padding_sinks": ("Decoder", {"attn_head_learned_sink": True}, lambda: {"seq_start_pos": torch.tensor([1, 3])}),
    "left_padding_window": ("Decoder", {"attn_max_attend_past": 1}, lambda: {"seq_start_pos": torch.tensor([1, 4])}),
    "left_padding_flash": ("Decoder", {"attn_flash": True}, lambda: {"seq_start_pos": torch.tensor([1, 3])}),
    "pairs": ("Decoder", {"attn_kv_heads": 2}, lambda: {"attn_mask": torch.rand(HEADS, LENGTH, LENGTH) > 0.3}),
    "pairs_of_batches": ("Encoder", {}, lambda: {"attn_mask": torch.rand(2, 1, LENGTH, LENGTH) > 0.6}),
    "bias": ("Decoder", {"attn_kv_heads": 2}, lambda: {"attn_bias": random(HEADS, LENGTH, LENGTH)}),
    "positions": ("Decoder", {"alibi_pos_bias": True}, lambda: {"pos": torch.tensor([0, 1, 2, 3, 7, 8, 9])}),
    "positions_of_batches": ("Decoder", {"rotary_pos_emb": True}, lambda: {"pos": torch.stack((torch.arange(7), torch.arange(7) * 2))}),
    "not_causal": ("Decoder", {"residual_attn": True}, lambda: {"causal": False}),
    "memories": ("Decoder", {"rotary_pos_emb": True}, lambda: {"mems": [random(2, 3, DIM), random(2, 3, DIM)]}),
    "masked_memories": (
        "Decoder",
        {},
        lambda: {
            "mems": [random(2, 3, DIM), None],
            "mem_masks": [torch.rand(2, 3) > 0.4, None],
            "mask": torch.arange(LENGTH) < torch.tensor([[7], [5]]),
        },
    ),
    "adaptive_norm": (
        "Encoder",
        {"use_adaptive_layernorm": True, "use_adaptive_layerscale": True, "dim_condition": 6, "adaptive_condition_mlp": True},
        lambda: {"condition": random(2, 6)},
    ),
    "adaptive_rmsnorm": ("Encoder", {"use_adaptive_rmsnorm": True, "dim_condition": 6}, lambda: {"condition": random(2, LENGTH, 6)}),
    "inner_condition": ("Encoder", {}, lambda: {"in_attn_cond": random(2, DIM)}),
    "repeated_blocks": ("Decoder", {}, lambda: {"repeat_blocks": ((0, 1), 2)}),
    "order": ("Decoder", {}, lambda: {"layers_execute_order": (2, 3, 0, 1)}),
    "kv_residuals": ("Decoder", {}, lambda: {"self_attn_kv_residuals": random(2, 2, LENGTH, DIM)}),
    "additional_keys": (
        "Decoder",
        {"attn_kv_heads": 2},
        lambda: {"self_attn_additional_kv": [(random(2, 2, 3, 8), random(2, 2, 3, 8))], "additional_kv_mask": torch.rand(2, 3) > 0.4},
    ),
    "additional_keys_of_all_heads": (
        "Encoder",
        {"attn_kv_heads": 2},
        lambda: {"self_attn_additional_kv": [(random(2, 4, 3, 8), random(2, 4, 3, 8))], "mask": torch.rand(2, LENGTH) > 0.4},
    ),
    "deep_embeddings": ("Decoder", {}, lambda: {"deep_embeds_and_ids": (random(9, 2, DIM), torch.randint(9, (2, LENGTH)))}),
    "block_inputs": ("Decoder", {}, lambda: {"transform_block_inputs": lambda depth, x: x * depth}),
    "cross_positions": (
        "Decoder",
        {"cross_attend": True, "rotary_pos_emb": True},
        lambda: {"context": random(2, 5, DIM), "context_pos": torch.arange(5) * 3},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_call(name: str) -> None:
    cls, options, call = CALLS[name]
    a, b, dtype = pair(cls, options)
    hold(a, b, torch.randn(2, LENGTH, DIM, dtype=dtype), **call())


CACHED = ("plain", "real_former_three_layers", "rotary_rmsnorm_swiglu", "t5", "alibi_six_heads", "window_memories", "cosine", "latents",
          "sinks_grouped", "value_residual", "clamp_zero_key", "shifted")  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
def test_decoding_from_a_cache(name: str) -> None:
    a, b, dtype = pair("Decoder", DECODERS[name])
    x = torch.randn(2, LENGTH, DIM, dtype=dtype)
    found = []
    for model in (a, b):
        out, cache = model(x[:, :3], return_hiddens=True)
        outs = [out]
        for end in range(4, LENGTH + 1):
            out, cache = model(x[:, :end], cache=cache, return_hiddens=True)
            outs.append(out)
        assert cache.cache_length == LENGTH
        found.append(torch.cat(outs, 1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "no_prefix": ("Decoder", {"selective": True}),
    "selective_encoder": ("Encoder", {"attn_selective": True}),
    "selective_cross": ("Decoder", {"attn_selective": True, "cross_attend": True}),
    "flash_selective": ("Decoder", {"attn_flash": True, "attn_selective": True}),
    "flash_real_former": ("Decoder", {"attn_flash": True, "residual_attn": True}),
    "flash_t5": ("Decoder", {"attn_flash": True, "rel_pos_bias": True}),
    "flash_dynamic": ("Decoder", {"attn_flash": True, "dynamic_pos_bias": True}),
    "flash_clamp": ("Decoder", {"attn_flash": True, "attn_softclamp_logits": True}),
    "flash_sinks": ("Decoder", {"attn_flash": True, "attn_head_learned_sink": True}),
    "two_biases": ("Decoder", {"alibi_pos_bias": True, "rel_pos_bias": True}),
    "forgetting_alibi": ("Decoder", {"alibi_pos_bias": True, "attn_data_dependent_alibi": True}),
    "rotary_polar": ("Decoder", {"rotary_pos_emb": True, "polar_pos_emb": True}),
    "xpos_encoder": ("Encoder", {"rotary_xpos": True}),
    "causal_encoder": ("Encoder", {"causal": True}),
    "causal_decoder": ("Decoder", {"causal": False}),
    "no_depth": ("Decoder", {"depth": None}),
    "two_norms": ("Decoder", {"use_rmsnorm": True, "use_scalenorm": True}),
    "sandwich_post_norm": ("Decoder", {"sandwich_norm": True, "pre_norm": False}),
    "heads": ("Decoder", {"attn_kv_heads": 3}),
    "two_kv_heads": ("Decoder", {"attn_kv_heads": 2, "attn_one_kv_head": True}),
    "sigmoid_hard": ("Decoder", {"attn_sigmoid": True, "attn_hard": True}),
    "tied_custom": ("Decoder", {"weight_tie_layers": True, "custom_layers": ("a", "f")}),
    "cope_encoder": ("Encoder", {"attn_use_cope": True}),
    "clamp": ("Decoder", {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 0.0}),
    "buckets": ("Decoder", {"rel_pos_bias": True, "rel_pos_num_buckets": 64, "rel_pos_max_distance": 32}),
    "alibi_heads": ("Decoder", {"alibi_pos_bias": True, "alibi_num_heads": 9}),
    "small_groups": ("Decoder", {"attn_qk_norm": True, "attn_qk_norm_groups": 4}),
    "rotate_grouped": ("Decoder", {"rotate_num_heads": 2, "attn_kv_heads": 2}),
    "rotary_size": ("Decoder", {"rotary_pos_emb": True, "rotary_emb_dim": 16}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_both(name: str) -> None:
    cls, options = REFUSED[name]
    options = {n: v for n, v in {**COMMON, **options}.items() if v is not None}
    for package in (ours, theirs):
        with pytest.raises(AssertionError):
            getattr(package, cls)(**options)


def test_log_probabilities_of_drawn_keys() -> None:
    a, b, dtype = pair("Decoder", {"attn_gumbel_softmax": True})
    x = torch.randn(2, LENGTH, DIM, dtype=dtype)
    found = []
    for model in (a, b):
        torch.manual_seed(3)
        out, left = model(x, return_gumbel_log_probs=True)
        found.append([out, *(of.log_probs for of in left.attn_intermediates)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["layer_dropout", "cross_attn_tokens_dropout"])
def test_what_training_leaves_out(name: str) -> None:
    a, b, dtype = pair("Decoder", {name: 0.5, "cross_attend": True, "depth": 3, "residual_attn": True})
    x, context = torch.randn(2, LENGTH, DIM, dtype=dtype), torch.randn(2, 8, DIM, dtype=dtype)
    found = []
    for model in (a.train(), b.train()):
        torch.manual_seed(3)
        random_seed(3)
        found.append(model(x, context=context, context_mask=torch.arange(8) < torch.tensor([[8], [5]])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_decoding_with_a_context_from_a_cache() -> None:
    a, b, dtype = pair("Decoder", {"cross_attend": True, "residual_attn": True, "cross_residual_attn": True, "add_value_residual": True})
    x, context = torch.randn(2, LENGTH, DIM, dtype=dtype), torch.randn(2, 5, DIM, dtype=dtype)
    found = []
    for model in (a, b):
        out, cache = model(x[:, :3], context=context, return_hiddens=True)
        outs = [out]
        for end in range(4, LENGTH + 1):
            out, cache = model(x[:, :end], context=context, cache=cache, return_hiddens=True)
            outs.append(out)
        found.append(torch.cat(outs, 1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["rotary_rmsnorm_swiglu", "real_former_three_layers", "real_former_selective_grouped", "pre_and_post_simple"]
)
def test_inside_the_wrappers_of_the_package(name: str) -> None:
    a, b, _ = pair("Decoder", DECODERS[name])
    tokens, keep = torch.randint(50, (2, 12)), torch.arange(12) < torch.tensor([[12], [9]])
    wrapped = [theirs.TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=layers).double().eval() for layers in (a, b)]
    wrapped[0].load_state_dict(wrapped[1].state_dict())
    torch.testing.assert_close(*(w(tokens, mask=keep) for w in wrapped), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(w(tokens, return_attn=True)[1] for w in wrapped), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(w(tokens, return_attn_z_loss=True)[1].attn_z_loss for w in wrapped), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(w(tokens, return_mems=True)[1] for w in wrapped), rtol=1e-9, atol=1e-9)
    generated = [theirs.AutoregressiveWrapper(w).generate(tokens[:, :3], 8, temperature=0.0) for w in wrapped]
    assert torch.equal(*generated)


LAYERS: dict[str, tuple[dict[str, Any], Any]] = {
    "no_projection": ({"project_out": False}, dict),
    "zero_output": ({"zero_init_output": True}, dict),
    "one_head": ({"heads": 1, "dim_head": DIM}, dict),
    "sizes": ({"dim_out": 20, "dim_context": 24, "value_dim_head": 12}, lambda: {"context": random(2, 4, 24)}),
    "inverted": ({"inverted_attention": True}, lambda: {"context": random(2, 4, DIM), "mask": torch.rand(2, LENGTH) > 0.3}),
    "deltas": ({"causal": True}, lambda: {"q_delta": random(2, LENGTH, DIM), "attn_delta": random(2, HEADS, LENGTH, LENGTH)}),
    "scores_of_a_layer_before": ({"kv_heads": 2}, lambda: {"prev_attn": random(2, HEADS, LENGTH, LENGTH)}),
    "value_residual": ({}, lambda: {"value_residual": random(2, HEADS, LENGTH, 8)}),
    "memories": ({}, lambda: {"mem": random(2, 3, DIM), "mem_mask": torch.rand(2, 3) > 0.5}),
    "custom": ({"custom_attn_fn": torch.sigmoid}, dict),
    "views": ({"qkv_receive_diff_residuals": True}, dict),
    "forgetting_scaled": ({"data_dependent_alibi": True, "causal": True, "data_dependent_alibi_kwargs": {"post_log_scale": 0.5}}, dict),
    "topk_gates": ({"sparse_topk": 3, "gate_values": True, "gate_values_rank": 3, "low_rank_silu_gates": False}, dict),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    options, call = LAYERS[name]
    options = {"dim": DIM, "dim_head": 8, "heads": HEADS, **options}
    torch.manual_seed(0)
    a, b = ours.Attention(**options).double().eval(), theirs.Attention(**options).double().eval()
    for p in b.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.2)
    getattr(b.attend.attn_fn, "keywords", {}).pop("dtype", None)
    a.load_state_dict(b.state_dict())
    given = call()
    x = random(3, 2, LENGTH, DIM) if "views" in name else random(2, LENGTH, DIM)
    (got, left), (want, right) = a(x, **given, return_intermediates=True), b(x, **given, return_intermediates=True)
    for ours_is, theirs_is in zip((got, *left.to_tuple(), left.values), (want, *right.to_tuple(), right.values), strict=True):
        torch.testing.assert_close(ours_is, theirs_is, rtol=1e-9, atol=1e-9)
