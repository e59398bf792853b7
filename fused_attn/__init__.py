"""Fused masked softmax and flash-style attention for PyTorch: any combination of flags, O(length) memory, or one sentence why not.

Example:
    >>> import torch, fused_attn as fa
    >>> q, k, v = torch.randn(3, 2, 4, 16, 32).unbind(0)
    >>> fa.attention(q, k, v, mask=fa.Causal() & fa.SlidingWindow(8, 0)).shape
    torch.Size([2, 4, 16, 32])
"""

from importlib.metadata import PackageNotFoundError, version

from fused_attn import decoding as decoding
from fused_attn.auxiliary import AuxOutput, AuxRequest
from fused_attn.dropout import Dropout
from fused_attn.functional import attention, explain, masked_softmax, scaled_dot_product_attention
from fused_attn.masks import (
    Band,
    BidirectionalBlocks,
    BlockCausal,
    Causal,
    Chunked,
    Dense,
    Documents,
    KeyPadding,
    PrefixLM,
    SlidingWindow,
    ValidLengths,
)
from fused_attn.normalizers import Sigmoid
from fused_attn.problem import UnsupportedError
from fused_attn.score_mods import ALiBi, Bias, DecayBias, SoftCap
from fused_attn.scoring import Additive, DotProduct, NegativeL2
from fused_attn.selective import Selective

__all__ = [
    "ALiBi",
    "Additive",
    "AuxOutput",
    "AuxRequest",
    "Band",
    "Bias",
    "BidirectionalBlocks",
    "BlockCausal",
    "Causal",
    "Chunked",
    "DecayBias",
    "Dense",
    "Documents",
    "DotProduct",
    "Dropout",
    "KeyPadding",
    "NegativeL2",
    "PrefixLM",
    "Selective",
    "Sigmoid",
    "SlidingWindow",
    "SoftCap",
    "UnsupportedError",
    "ValidLengths",
    "attention",
    "explain",
    "masked_softmax",
    "scaled_dot_product_attention",
]

try:
    __version__ = version("fused-attn")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"
