"""Keras' attention layers as torch modules, without Keras: same arguments, weights, results and errors, on this package's kernels.

Example:
    >>> import torch
    >>> from fused_attn.nn import keras
    >>> layer = keras.MultiHeadAttention(num_heads=2, key_dim=8)
    >>> layer(torch.randn(1, 5, 6), torch.randn(1, 7, 6), use_causal_mask=True).shape
    torch.Size([1, 5, 6])
"""

from fused_attn.nn.keras import constraints, initializers, regularizers
from fused_attn.nn.keras.additive import AdditiveAttention
from fused_attn.nn.keras.attention import Attention
from fused_attn.nn.keras.flash import disable_flash_attention, enable_flash_attention, is_flash_attention_enabled
from fused_attn.nn.keras.grouped import GroupQueryAttention
from fused_attn.nn.keras.layer import Layer
from fused_attn.nn.keras.multi_head import MultiHeadAttention

__all__ = [
    "AdditiveAttention",
    "Attention",
    "GroupQueryAttention",
    "Layer",
    "MultiHeadAttention",
    "constraints",
    "disable_flash_attention",
    "enable_flash_attention",
    "initializers",
    "is_flash_attention_enabled",
    "regularizers",
]
