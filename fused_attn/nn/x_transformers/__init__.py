"""x-transformers' attention (2.31) without x-transformers: same constructors, state dicts, results and errors, on fused kernels.

``Attend`` is the core, ``Attention`` the layer, the others stacks of layers; names are the package's own.
"""

from __future__ import annotations

from fused_attn.nn.x_transformers.attend import Attend
from fused_attn.nn.x_transformers.attention import Attention
from fused_attn.nn.x_transformers.cope import CoPE
from fused_attn.nn.x_transformers.feedforward import FeedForward
from fused_attn.nn.x_transformers.intermediates import Intermediates, LayerIntermediates
from fused_attn.nn.x_transformers.layers import AttentionLayers
from fused_attn.nn.x_transformers.positions import AlibiPositionalBias, DynamicPositionBias, RelativePositionBias
from fused_attn.nn.x_transformers.rotary import RotaryEmbedding
from fused_attn.nn.x_transformers.stacks import CrossAttender, Decoder, Encoder, PrefixDecoder

__all__ = [
    "AlibiPositionalBias",
    "Attend",
    "Attention",
    "AttentionLayers",
    "CoPE",
    "CrossAttender",
    "Decoder",
    "DynamicPositionBias",
    "Encoder",
    "FeedForward",
    "Intermediates",
    "LayerIntermediates",
    "PrefixDecoder",
    "RelativePositionBias",
    "RotaryEmbedding",
]
