"""torch's own attention as the judge: inputs, and the comparison of outputs and gradients under the error rule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_attn.functional import torch_attention
from fused_attn.testing import excess

ORIGINAL = F.scaled_dot_product_attention
DEFAULTS = {"dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def ours(backend):
    def call(q, k, v, attn_mask=None, **options):
        return torch_attention((q, k, v), attn_mask, DEFAULTS | options, backend)

    return call


def run(function, tensors, mask, options):
    """Output and gradients of q, k, v and a float mask, all through a fixed incoming gradient."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in (*tensors, *([] if mask is None else [mask]))]
    out = function(*leaves[:3], attn_mask=leaves[3] if mask is not None else None, **options)
    incoming = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    wanted = [t for t in leaves if t.requires_grad]
    grads = torch.autograd.grad(out, wanted, incoming)
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(("q", "k", "v", "mask"), grads, strict=False)}


def summed_magnitude(tensors, mask, options):
    """A broadcast mask's gradient, summed with the signs taken away: what its rounding is relative to."""
    full = (*torch.broadcast_shapes(*(t.shape[:-2] for t in tensors), mask.shape[:-2]), tensors[0].shape[-2], tensors[1].shape[-2])
    return run(ORIGINAL, tensors, mask.expand(full).contiguous(), options)["dmask"].abs().sum_to_size(mask.shape)


def compare(tensors, mask=None, backend="auto", call=None, **options):
    """|ours - float64| <= 2 * |torch - float64| + rounding of the terms that are summed, for the output and every gradient.

    ``call`` computes ours in another way than ``fa.scaled_dot_product_attention`` on a backend.
    """
    wide = [t.double() for t in tensors]
    wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    with sdpa_kernel(SDPBackend.MATH):  # torch's CPU flash backward is wrong on rows masked with finite fills
        exact = run(ORIGINAL, wide, wide_mask, options)
        plain = run(ORIGINAL, tensors, mask, options)
    got = run(call or ours(backend), tensors, mask, options)
    # What summing that many rounded terms may add at six standard deviations (see testing's Rounding): float64 has no finer judge.
    step = (
        torch.finfo(tensors[0].dtype).eps
        * (tensors[0].shape[-1] + tensors[2].shape[-1] + tensors[0].shape[-2] + tensors[1].shape[-2]) ** 0.5
    )
    for name, value in exact.items():
        assert got[name].dtype == plain[name].dtype
        magnitude = value if name != "dmask" else summed_magnitude(wide, wide_mask, options)
        band = torch.full_like(value, step * float(magnitude.abs().max() if magnitude.numel() else 0.0))
        assert (message := excess(name, got[name], plain[name], value, band)) is None, message


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def qkv(q_len=7, kv_len=11, dim=8, value_dim=8, lead=(2, 4), kv_lead=None, dtype=torch.float32):
    kv_lead = lead if kv_lead is None else kv_lead
    return [
        randn(*lead, q_len, dim, dtype=dtype),
        randn(*kv_lead, kv_len, dim, dtype=dtype, seed=1),
        randn(*kv_lead, kv_len, value_dim, dtype=dtype, seed=2),
    ]
