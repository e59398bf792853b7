"""Small attention problems that reach much: for what runs kernels under a simulator or a sanitizer."""

from __future__ import annotations

import torch

import fused_attn as fa
from fused_attn.testing import Inputs, inputs_of

CPU = torch.device("cpu")


def problems(dtype: torch.dtype, head_dim: int = 32, device: torch.device = CPU) -> dict[str, Inputs]:
    """Three problems that together reach every attention kernel, masked and full tiles, mended rows excepted."""
    q, k, v = (torch.randn(1, h, n, head_dim).to(device, dtype) for h, n in ((2, 70), (1, 140), (1, 140)))
    keep = torch.rand(1, 1, 70, 140).to(device) < 0.4
    keep[..., :64] = False
    bias, sinks = fa.Bias(torch.randn(1, 2, 70, 140).to(device)), torch.randn(2).to(device)
    window = {"mask": fa.SlidingWindow(100, 10), "q_offset": 30, "score_mods": (fa.SoftCap(2.0),), "sinks": sinks}
    window["dropout"] = fa.Dropout(0.2, seed=6).part((0, 0, 0, 3), (1, 2, 70, 150))  # keys from inside a group of four
    lengths = fa.ValidLengths(torch.tensor([130], device=device))
    dense = {"mask": fa.Dense(keep) & lengths, "score_mods": (bias,), "dropout": fa.Dropout(0.3, seed=5)}
    return {name: inputs_of(q, k, v, **options) for name, options in (("plain", {}), ("window", window), ("dense", dense))}
