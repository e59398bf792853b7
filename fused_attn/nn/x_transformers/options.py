"""The options of a stack that have no prefix, with the package's defaults."""

from __future__ import annotations

from typing import Any

from fused_attn.nn.x_transformers.refusals import needs

OPTIONS: dict[str, Any] = {
    "cross_attend": False, "only_cross": False, "only_attn": False,
    "use_scalenorm": False, "use_rmsnorm": False, "use_dynamic_tanh": False, "use_derf": False, "dynamic_tanh_init_alpha": 1.0,
    "use_simple_rmsnorm": False, "use_adaptive_layernorm": False, "use_adaptive_rmsnorm": False, "use_adaptive_layerscale": False,
    "norm_add_unit_offset": True, "dim_condition": None, "adaptive_condition_mlp": False, "adaptive_condition_mlp_expansion": 4,
    "alibi_pos_bias": False, "alibi_num_heads": None, "rel_pos_bias": False, "rel_pos_num_buckets": 32, "rel_pos_max_distance": 128,
    "dynamic_pos_bias": False, "dynamic_pos_bias_log_distance": False, "dynamic_pos_bias_mlp_depth": 2, "dynamic_pos_bias_norm": False,
    "rotary_pos_emb": False, "rotary_emb_dim": None, "rotary_xpos": False, "rotary_interpolation_factor": 1.0,
    "rotary_xpos_scale_base": 512, "rotary_base_rescale_factor": 1.0, "rotate_num_heads": None, "polar_pos_emb": False,
    "polar_bias_uniform_init": False, "weight_tie_layers": False, "custom_layers": None, "layers_execute_order": None,
    "sandwich_coef": None, "par_ratio": None, "residual_attn": False, "cross_residual_attn": False, "macaron": False,
    "pre_norm": True, "pre_norm_has_final_norm": True, "pre_and_post_norm": False, "gate_residual": False, "orthog_residual": False,
    "mv_split_residual": False, "scale_residual": False, "scale_residual_constant": 1.0, "depth_scale_residual": False,
    "shift_tokens": 0, "sandwich_norm": False, "softclamp_output": False, "softclamp_output_value": 30.0,
    "zero_init_branch_output": False, "layer_dropout": 0.0, "cross_attn_tokens_dropout": 0.0, "disable_abs_pos_emb": None,
    "use_layerscale": False, "layerscale_init_value": 0.0, "unet_skips": False, "reinject_input": False,
    "learned_reinject_input_gate": False, "add_value_residual": False, "learned_value_residual_mix": True, "rel_pos_kwargs": {},
    "residual_fn_kwargs": {}, "verbose": True, "attn_aggregated_residuals": False, "attn_aggregated_residual_kwargs": {},
    "gated_multi_residual": False, "integrate_layers": False, "layer_integrate_use_softmax": True, "num_residual_streams": 1,
    "qkv_receive_diff_residuals": False, "hyper_conn_sinkhorn_iters": 5,
}  # fmt: skip


def taken(options: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The options of a prefix, without it, taken out of the others; the stack's own names that begin so stay."""
    names = [n for n in options if n.startswith(prefix) and n not in OPTIONS]
    return {n.removeprefix(prefix): options.pop(n) for n in names}


class Options:
    """Options of a stack by their names, each with the package's default.

    Example:
        >>> Options({"macaron": True}).macaron, Options({}).rel_pos_num_buckets
        (True, 32)
        >>> Options({"selective": True})
        Traceback (most recent call last):
            ...
        AssertionError: options must be known; got selective. Options of a layer have the prefix attn_, cross_attn_ or ff_.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        unknown = sorted(set(given) - set(OPTIONS))
        needs(not unknown, "options must be known", ", ".join(unknown), "Options of a layer have the prefix attn_, cross_attn_ or ff_")
        self._values = {**OPTIONS, **given}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def given(self, name: str) -> bool:
        """Whether an option is on."""
        return bool(self._values[name])
