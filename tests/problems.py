"""Small attention problems that reach much: for what runs compiled kernels on a simulator."""

from __future__ import annotations

import torch

import fused_attn as fa
from fused_attn.testing import Inputs, inputs_of


def problems(dtype: torch.dtype, head_dim: int = 32) -> dict[str, Inputs]:
    """Three problems that together reach every attention kernel, masked and full tiles, mended rows excepted."""
    q, k, v = torch.randn(1, 2, 70, head_dim), torch.randn(1, 1, 140, head_dim), torch.randn(1, 1, 140, head_dim)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    keep = torch.rand(1, 1, 70, 140) < 0.4
    keep[..., :64] = False
    bias = fa.Bias(torch.randn(1, 2, 70, 140))
    window = {"mask": fa.SlidingWindow(100, 10), "q_offset": 30, "score_mods": (fa.SoftCap(2.0),), "sinks": torch.randn(2)}
    dense = {"mask": fa.Dense(keep) & fa.ValidLengths(torch.tensor([130])), "score_mods": (bias,), "dropout": fa.Dropout(0.3, seed=5)}
    return {name: inputs_of(q, k, v, **options) for name, options in (("plain", {}), ("window", window), ("dense", dense))}
