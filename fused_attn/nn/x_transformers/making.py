"""Makes the layers of a stack: its options by prefix, shared or one for each layer, and the wrappers around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from fused_attn.nn.x_transformers.attention import Attention
from fused_attn.nn.x_transformers.branches import AdaptiveLayerScale, LayerScale, Scale, ShiftTokens
from fused_attn.nn.x_transformers.feedforward import FeedForward
from fused_attn.nn.x_transformers.options import Options

if TYPE_CHECKING:
    from fused_attn.nn.x_transformers.layers import AttentionLayers


def per_layer(options: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The options of each of ``count`` layers: a tuple of that length holds one value for each.

    Example:
        >>> per_layer({"dropout": (0.0, 0.1), "mult": 4}, 2)
        [{'dropout': 0.0, 'mult': 4}, {'dropout': 0.1, 'mult': 4}]
    """
    return [{n: v[i] if isinstance(v, tuple) and len(v) == count else v for n, v in options.items()} for i in range(count)]


class LayerMaker:
    """Makes one layer after the other; cross attention takes the options of self-attention too, where they are not one for each layer."""

    def __init__(self, stack: AttentionLayers, option: Options, groups: dict[str, dict[str, Any]], backend: str) -> None:
        self.stack, self.option, self.backend = stack, option, backend
        count = {kind: stack.layer_types.count(kind) for kind in ("a", "c", "f")}
        attn, cross = dict(groups["attn_"]), dict(groups["cross_attn_"])
        attn.pop("inverted_attention", None)
        inverted = cross.pop("inverted_attention", False)
        shared = {n: v for n, v in attn.items() if not (isinstance(v, tuple) and len(v) == count["a"])}
        self._options: dict[str, Iterator[dict[str, Any]]] = {
            "a": iter(per_layer(attn, count["a"])),
            "c": iter(per_layer({**shared, **cross, "inverted_attention": inverted}, count["c"])),
            "f": iter(per_layer(groups["ff_"], count["f"])),
        }
        shift = option.shift_tokens
        self._shifts = iter(shift if isinstance(shift, tuple) else (shift,) * len(stack.layer_types))
        self._index, self._is_first = 0, True

    def __call__(self, kind: str) -> nn.Module:
        block = self._index // self.stack.plan.block
        scaled = self.option.depth_scale_residual is True and not self.option.attn_aggregated_residuals
        depth = block + 1 if scaled else None
        layer = self._wrapped(self._bare(kind, depth), next(self._shifts))
        self._index += 1
        scale = self._scale
        return layer if scale is None or scale == 1 else Scale(scale, layer)

    def _bare(self, kind: str, output_proj_depth: int | None) -> nn.Module:
        options = {"output_proj_depth": output_proj_depth, **next(self._options[kind])}
        dim, heads = self.stack.dim, self.stack.attn_heads
        if kind == "f":
            layer: nn.Module = FeedForward(dim, **options)
            return Scale(0.5, layer) if self.option.macaron else layer
        options = {"backend": self.backend, **options}
        if kind == "c":
            return Attention(dim, heads=heads, **options)
        mixes = self.option.learned_value_residual_mix and self.option.add_value_residual and not self._is_first
        self._is_first = False
        return Attention(
            dim,
            heads=heads,
            causal=self.stack.causal,
            learned_value_residual_mix=mixes,
            rotate_num_heads=self.option.rotate_num_heads,
            qkv_receive_diff_residuals=self.stack.reads_views(self.option, self._index),
            **options,
        )

    def _wrapped(self, layer: nn.Module, shift: int) -> nn.Module:
        option, dim = self.option, self.stack.dim
        if shift > 0:
            layer = ShiftTokens(tuple(range(0 if self.stack.causal else -shift, shift + 1)), layer)
        if option.use_layerscale:
            return LayerScale(layer, dim, option.layerscale_init_value, option.norm_add_unit_offset)
        return AdaptiveLayerScale(layer, dim, self.stack.conditioned_width) if option.use_adaptive_layerscale else layer

    @property
    def _scale(self) -> float | None:
        """A number that every branch is multiplied by: an option that is a number and no switch."""
        if self.option.attn_aggregated_residuals:
            return None
        for value in (self.option.depth_scale_residual, self.option.scale_residual):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
        return None
