"""Layers that people already use, on this package's attention: same constructors, state dicts, results and errors, O(length) memory."""

from fused_attn.nn.torch_mha import MultiheadAttention, replace_multihead_attention

__all__ = ["MultiheadAttention", "replace_multihead_attention"]
