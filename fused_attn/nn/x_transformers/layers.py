"""Stacks of x-transformers' layers: attention, cross attention and feed-forward around one stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from fused_attn.backends import require_name
from fused_attn.nn.x_transformers.arguments import Arguments
from fused_attn.nn.x_transformers.attention import Attention
from fused_attn.nn.x_transformers.branches import ConcatCombine
from fused_attn.nn.x_transformers.feedforward import FeedForward
from fused_attn.nn.x_transformers.intermediates import LayerIntermediates
from fused_attn.nn.x_transformers.making import LayerMaker
from fused_attn.nn.x_transformers.norms import (
    AdaptiveLayerNorm,
    AdaptiveRMSNorm,
    Derf,
    DynamicTanh,
    LayerNorm,
    RMSNorm,
    ScaleNorm,
    SimpleRMSNorm,
)
from fused_attn.nn.x_transformers.options import Options, taken
from fused_attn.nn.x_transformers.order import LayerOrder
from fused_attn.nn.x_transformers.parameters import constant
from fused_attn.nn.x_transformers.positions import AlibiPositionalBias, DynamicPositionBias, PositionBias, RelativePositionBias
from fused_attn.nn.x_transformers.refusals import at_most_one, needs
from fused_attn.nn.x_transformers.residuals import GRUGating, MVSplitResidualUpdate, OrthogonalResidualUpdate, Residual
from fused_attn.nn.x_transformers.rotary import PolarEmbedding, RotaryEmbedding
from fused_attn.nn.x_transformers.running import Run
from fused_attn.nn.x_transformers.streams import AttentionResidual, DynamicLIMe, GatedMultiResidual, HyperConnection


class AttentionLayers(nn.Module):
    """Layers of attention and feed-forward with x-transformers' options; prefixes ``attn_``, ``cross_attn_`` and ``ff_`` reach them.

    RealFormer's residual attention (``residual_attn``, ``cross_residual_attn``) is inside: each layer's scores, with everything that was
    added to them, are added to the next one's. A tuple as long as there are such layers gives each its own value. What is left out stands
    in ``docs/migrating.md``.

    Args:
        dim: features of the stream.
        depth: blocks.
        heads: query heads of every attention.
        causal: of self-attention.
        backend: "auto", or a name that runs or raises, never falls back.
        options: everything else, by the package's names.

    Raises:
        AssertionError: an unknown option, or options that exclude each other, as in the package.
        NotImplementedError: an option that is left out.

    Example:
        >>> import torch
        >>> layers = AttentionLayers(32, depth=2, heads=4, causal=True, attn_dim_head=8, attn_selective=True, residual_attn=True)
        >>> layers(torch.randn(1, 6, 32)).shape
        torch.Size([1, 6, 32])
    """

    def __init__(
        self, dim: int, depth: int | None = None, heads: int = 8, causal: bool = False, *, backend: str = "auto", **options: Any
    ) -> None:
        super().__init__()
        groups = {prefix: taken(options, prefix) for prefix in ("ff_", "attn_", "cross_attn_")}
        option = Options(options)
        self.dim, self.causal, self.attn_heads = dim, causal, heads
        self.attn_dim_head: int = groups["attn_"].get("dim_head", 64)
        self.plan = LayerOrder.of(depth, options)
        self.layer_types, self.layers_execute_order, self.depth = self.plan.types, self.plan.order, self.plan.depth
        self.has_custom_layer_types = any(options.get(n) is not None for n in ("custom_layers", "par_ratio", "sandwich_coef"))
        self.num_attn_layers, self.num_cross_attn_layers, self.num_ff_layers = (self.layer_types.count(kind) for kind in "acf")
        self.pre_norm, self.pre_and_post_norm, self.sandwich_norm = option.pre_norm, option.pre_and_post_norm, option.sandwich_norm
        self.cross_attend, self.unet_skips = option.cross_attend, option.unet_skips
        self.residual_attn, self.cross_residual_attn = option.residual_attn, option.cross_residual_attn
        self._check(option, groups["attn_"].get("flash", False), groups["attn_"].get("data_dependent_alibi", False))
        self._positions(option, dim, heads)
        norm = self._norm(option, dim)
        self._streams(option, dim)
        if option.zero_init_branch_output:
            groups["attn_"]["zero_init_output"] = groups["ff_"]["zero_init_output"] = True
        made = LayerMaker(self, option, groups, require_name(backend))
        pre_norm = option.pre_norm and not option.gated_multi_residual  # whose gates normalise what they read
        post = None if pre_norm and not option.pre_and_post_norm else norm
        self.layers, self.skip_combines, self.layer_integrators = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        skips = [i * self.plan.block for i in range(self.depth // self.plan.block)]
        needs(not self.unet_skips or len(skips) > 0, "unet_skips must have a depth of at least a block", repr(self.depth), "Raise depth")
        for index, kind in enumerate(self.layer_types):
            begins, block = index % self.plan.block == 0, index // self.plan.block
            joins = self.unet_skips and begins and block >= self.depth / 2
            needs(not joins or len(skips) > 0, "unet_skips must have an earlier block for each later one", repr(self.depth), "Raise depth")
            join: Any = ConcatCombine(dim, skips.pop()) if joins else None
            self.skip_combines.append(join)
            norms: list[Any] = [norm() if pre_norm else None, norm() if option.sandwich_norm else None, post() if post else None]
            self.layers.append(nn.ModuleList([nn.ModuleList(norms), made(kind), self._residual(option, index)]))
            self.layer_integrators.append(self._view(option, index))
        has_final = (pre_norm and option.pre_norm_has_final_norm and not option.pre_and_post_norm) or option.gated_multi_residual
        self.final_norm = norm() if has_final else nn.Identity()
        self._keep_scores()

    @property
    def attentions(self) -> list[Attention]:
        """The attention modules in the order of the layers."""
        return [m for m in self.modules() if isinstance(m, Attention)]

    @property
    def can_cache_kv(self) -> bool:
        """Whether every layer can go on from cached keys and values."""
        return all(m.can_cache_kv for m in self.attentions)

    def attn_qk_clip_(self, intermediates: LayerIntermediates, tau: float = 100.0) -> None:
        """``Attention.qk_clip_`` for every layer, from the intermediates of a call."""
        left = intermediates.attn_intermediates
        needs(len(self.attentions) == len(left), f"intermediates must be of {len(self.attentions)} layers", repr(len(left)), "Call anew")
        for layer, of_layer in zip(self.attentions, left, strict=True):
            layer.qk_clip_(of_layer, tau=tau)

    def muon_parameters(self) -> list[Tensor]:
        """Parameters that the package hands to Muon."""
        return [p for m in self.modules() if isinstance(m, (Attention, FeedForward)) for p in m.muon_parameters()]

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **arguments: Any) -> Any:
        """Runs the layers.

        Args:
            x: [batch, length, dim].
            context: [batch, context_length, dim], needed with ``cross_attend``.
            mask: bool [batch, length], True where a position counts.
            arguments: see ``fused_attn.nn.x_transformers.arguments.Arguments``.

        Returns:
            [batch, length, dim], or with ``return_hiddens=True`` that and ``LayerIntermediates``.
        """
        return Run(self, x, Arguments.of(context, mask, arguments))()

    def _check(self, option: Options, flash: bool, forgetting: bool) -> None:
        norms = {n: option.given(n) for n in _NORMS}
        at_most_one(**norms)
        at_most_one(**{n: option.given(n) for n in (*_RESIDUALS, "attn_aggregated_residuals", "gated_multi_residual")})
        streams = option.num_residual_streams
        needs(streams > 0, "num_residual_streams must be positive", repr(streams), "Pass 1 for one stream")
        single = [n for n in _RESIDUALS if option.given(n)] if streams > 1 and not option.gated_multi_residual else []
        needs(not single, "num_residual_streams must be 1 with " + ", ".join(single), repr(streams), "Choose one")
        at_most_one(alibi_pos_bias=option.alibi_pos_bias, rel_pos_bias=option.rel_pos_bias, attn_data_dependent_alibi=bool(forgetting))
        at_most_one(rel_pos_bias=option.rel_pos_bias, dynamic_pos_bias=option.dynamic_pos_bias, alibi_pos_bias=option.alibi_pos_bias)
        at_most_one(rotary_pos_emb=option.rotary_pos_emb or option.rotary_xpos, polar_pos_emb=option.polar_pos_emb)
        at_most_one(use_layerscale=option.use_layerscale, use_adaptive_layerscale=option.use_adaptive_layerscale)
        needs(not flash or not option.rel_pos_bias, "rel_pos_bias must come without attn_flash", "both", "Leave attn_flash out")
        needs(not flash or not option.dynamic_pos_bias, "dynamic_pos_bias must come without attn_flash", "both", "Leave attn_flash out")
        needs(
            not (flash and (option.residual_attn or option.cross_residual_attn)),
            "residual_attn must come without attn_flash",
            "both",
            "Leave attn_flash out",
        )
        pre = option.pre_norm and not option.gated_multi_residual
        needs(pre or not option.sandwich_norm, "sandwich_norm must come with pre_norm", "none", "Choose one")
        needs(pre or not option.use_dynamic_tanh, "use_dynamic_tanh must come with pre_norm", "none", "Choose one")
        needs(self.causal or not option.rotary_xpos, "rotary_xpos must come with causal attention", "causal=False", "Use rotary_pos_emb")
        needs(not (option.only_attn and option.unet_skips), "only_attn must come without unet_skips", "both", "Choose one")
        buckets, distance = option.rel_pos_num_buckets, option.rel_pos_max_distance
        needs(buckets <= distance, f"rel_pos_num_buckets must be at most rel_pos_max_distance = {distance}", repr(buckets), "Lower it")

    def _positions(self, option: Options, dim: int, heads: int) -> None:
        head = self.attn_dim_head
        size = head // 2 if option.rotary_emb_dim is None else option.rotary_emb_dim
        needs(size <= head, f"rotary_emb_dim must be at most attn_dim_head = {head}", repr(size), "Lower it")
        self.rotary_pos_emb = (
            RotaryEmbedding(
                size,
                use_xpos=option.rotary_xpos,
                scale_base=option.rotary_xpos_scale_base,
                interpolation_factor=option.rotary_interpolation_factor,
                base_rescale_factor=option.rotary_base_rescale_factor,
            )
            if option.rotary_pos_emb or option.rotary_xpos
            else None
        )
        self.polar_pos_emb = PolarEmbedding(head, heads, option.polar_bias_uniform_init) if option.polar_pos_emb else None
        more = dict(option.rel_pos_kwargs)
        self.rel_pos: PositionBias | None = None
        if option.rel_pos_bias:
            self.rel_pos = RelativePositionBias(
                head**0.5, self.causal, option.rel_pos_num_buckets, option.rel_pos_max_distance, heads, **more
            )
        elif option.dynamic_pos_bias:
            mlp = {"log_distance": option.dynamic_pos_bias_log_distance, "norm": option.dynamic_pos_bias_norm, **more}
            self.rel_pos = DynamicPositionBias(dim // 4, heads=heads, depth=option.dynamic_pos_bias_mlp_depth, **mlp)
        elif option.alibi_pos_bias:
            count = heads if option.alibi_num_heads is None else option.alibi_num_heads
            needs(count <= heads, f"alibi_num_heads must be at most heads = {heads}", repr(count), "Lower it")
            self.rel_pos = AlibiPositionalBias(count, heads, **more)

    def _norm(self, option: Options, dim: int) -> Callable[[], nn.Module]:
        """What makes a norm; and the map of a condition that some norms and branches have."""
        name = next((n for n in _NORMS if option.given(n)), "")
        condition = dim if option.dim_condition is None else option.dim_condition
        wide = condition * (option.adaptive_condition_mlp_expansion if option.adaptive_condition_mlp else 1)
        self.dim_condition, self.conditioned_width = condition, wide
        self.norm_need_condition = name in ("use_adaptive_layernorm", "use_adaptive_rmsnorm")
        self.branch_needs_condition = option.use_adaptive_layerscale
        self.need_condition = self.norm_need_condition or self.branch_needs_condition
        self.adaptive_mlp: nn.Module = nn.Identity()
        if self.need_condition and option.adaptive_condition_mlp:
            self.adaptive_mlp = nn.Sequential(nn.Linear(condition, wide, bias=False), nn.SiLU())
        keywords: dict[str, Any] = {"dim_condition": wide} if self.norm_need_condition else {"unit_offset": option.norm_add_unit_offset}
        if name == "use_dynamic_tanh":
            keywords["init_alpha"] = option.dynamic_tanh_init_alpha
        return partial(_NORMS.get(name, LayerNorm), dim, **keywords)

    def _streams(self, option: Options, dim: int) -> None:
        """What happens to the stream besides the layers."""
        types, self.num_residual_streams = len(self.layer_types), option.num_residual_streams
        self.stream_emb = constant(0.0, self.num_residual_streams, dim) if self.num_residual_streams > 1 else None
        self.layer_dropouts = option.layer_dropout if isinstance(option.layer_dropout, tuple) else (option.layer_dropout,) * types
        self.cross_attn_tokens_dropout: float = option.cross_attn_tokens_dropout
        self.softclamp_output, self.softclamp_output_value = option.softclamp_output, option.softclamp_output_value
        self.add_value_residual = option.add_value_residual
        self.reinject_input = option.reinject_input
        self.reinject_input_proj = nn.Linear(dim, dim, bias=False) if option.reinject_input else None
        self.learned_reinject_input_gate = nn.Linear(dim, 1, bias=False) if option.learned_reinject_input_gate else None
        positions = option.rel_pos_bias or option.rotary_pos_emb or option.rotary_xpos or option.polar_pos_emb
        self.disable_abs_pos_emb = positions if option.disable_abs_pos_emb is None else option.disable_abs_pos_emb

    def reads_views(self, option: Options, index: int) -> bool:
        """Whether queries, keys and values of a layer read views of their own."""
        wanted = option.qkv_receive_diff_residuals or option.integrate_layers
        is_first = "a" not in self.layer_types[:index]
        return bool(self.layer_types[index] == "a" and wanted and not (is_first and option.integrate_layers))

    def _view(self, option: Options, index: int) -> Any:
        """What makes a layer's input of all that layers saw; None where it is the stream."""
        views = 3 if self.reads_views(option, index) else 1
        if option.integrate_layers:
            return DynamicLIMe(self.dim, index + 1, views, option.layer_integrate_use_softmax)
        return AttentionResidual(self.dim, views, **option.attn_aggregated_residual_kwargs) if option.attn_aggregated_residuals else None

    def _residual(self, option: Options, index: int) -> nn.Module:
        made = next((cls for name, cls in _RESIDUALS.items() if option.given(name)), Residual)
        more = {"scale_residual": option.scale_residual, "scale_residual_constant": option.scale_residual_constant}
        if option.gated_multi_residual or option.num_residual_streams > 1:
            made = GatedMultiResidual if option.gated_multi_residual else HyperConnection
            views = 3 if self.reads_views(option, index) and not option.integrate_layers else 1
            more = {"num_residual_streams": option.num_residual_streams, "num_input_views": views}
        residual: nn.Module = made(self.dim, layer_index=index, **more, **option.residual_fn_kwargs)
        return residual

    def _keep_scores(self) -> None:
        """Layers whose scores the next one of their type gets give them out of the pass that computes them."""
        for kind, wanted in (("a", self.residual_attn), ("c", self.cross_residual_attn)):
            places = [i for i in self.layers_execute_order if self.layer_types[i] == kind]
            for place in set(places[:-1]) if wanted else ():
                for module in self.layers[place].modules():
                    if isinstance(module, Attention):
                        module.attend.keeps_scores = True


_RESIDUALS: dict[str, Callable[..., nn.Module]] = {
    "gate_residual": GRUGating,
    "orthog_residual": OrthogonalResidualUpdate,
    "mv_split_residual": MVSplitResidualUpdate,
}
_NORMS: dict[str, Callable[..., nn.Module]] = {
    "use_scalenorm": ScaleNorm,
    "use_rmsnorm": RMSNorm,
    "use_simple_rmsnorm": SimpleRMSNorm,
    "use_dynamic_tanh": DynamicTanh,
    "use_derf": Derf,
    "use_adaptive_layernorm": AdaptiveLayerNorm,
    "use_adaptive_rmsnorm": AdaptiveRMSNorm,
}
