"""Runs the compiled split-key decoding kernels of a chip on the PTX simulator: ``python -m tests.simulated_decoding CHIP DTYPE``.

Small steps from pages are held to the error rule; it ends with an error where one breaks it, or where the simulator finds a race, a missing wait or
an access outside a tensor.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import fused_attn as fa
from fused_attn import decoding
from fused_attn.backends.triton.decoding import forward  # its kernels are compiled functions from here on
from fused_attn.decoding import Filled, PagedKV
from fused_attn.paged_call import LoweredPaged
from fused_attn.testing import inputs_of, violations
from tests.simulated import simulate


def in_pages(k: Tensor, v: Tensor, used: Tensor, size: int) -> PagedKV:
    """Pages in reverse order; what no key stands in is NaN, and entries that no key needs are none."""
    batch, _, capacity, _ = k.shape
    beyond = (torch.arange(capacity) >= used[:, None])[:, None, :, None]
    pages = [t.masked_fill(beyond, torch.nan).unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1).flip(0).contiguous() for t in (k, v)]
    table = torch.arange(batch * capacity // size - 1, -1, -1, dtype=torch.int32).view(batch, -1)
    return PagedKV(pages[0], pages[1], table.masked_fill(torch.arange(capacity // size) * size >= used[:, None], -1), used)


def hold(title: str, tensors: tuple[Tensor, Tensor, Tensor], used: Tensor, mask: Any, **options: Any) -> None:
    """out and lse of a step within the error rule."""
    q, k, v = tensors
    inputs = inputs_of(q, k, v, mask=mask & Filled(used), q_offset=used.long() - q.shape[2], **options)
    out, aux = decoding.attention(
        q, in_pages(k, v, used, 8), mask=mask, **options, return_aux=fa.AuxRequest(lse=True), backend="triton", num_splits=2
    )
    broken = violations(inputs, {"out": out, "lse": aux.lse})
    assert not broken, f"{title}: {broken}"
    print(title)


if __name__ == "__main__":
    torch.manual_seed(0)
    simulate(int(sys.argv[1]))
    dtype, used = getattr(torch, sys.argv[2]), torch.tensor([136, 61], dtype=torch.int32)
    q, k, v = (torch.randn(2, h, n, 32).to(dtype) for h, n in ((4, 2), (2, 144), (2, 144)))
    hold("plain", (q, k, v), used, fa.Causal())
    hold("window", (q, k, v), used, fa.Causal() & fa.SlidingWindow(50, 0), score_mods=(fa.SoftCap(2.0),), sinks=torch.randn(4))
    keep = torch.rand(1, 4, 2, 144) < 0.4
    hold("dense", (q, k, v), used, fa.Dense(keep), score_mods=(fa.ALiBi(torch.rand(4)), fa.Bias(torch.randn(1, 4, 1, 144))))
    additive, one = fa.Additive(torch.randn(4, 32)), torch.randn(2, 2, 144, 32).to(dtype)
    inputs = inputs_of(q, one, one, scoring=additive)
    lowered = inputs.problem.lower()
    out, lse = forward.attention_paged(LoweredPaged(lowered.q, lowered.k, lowered.v, None, lowered.terms, 3))
    broken = violations(inputs, {"out": out, "lse": lse})
    assert not broken, broken
    print("additive")
    clean = decoding.attention(q, in_pages(k, v, used, 8), backend="triton")
    v[0, :, 135, 3] = torch.nan
    got = decoding.attention(q, in_pages(k, v, used, 8), backend="triton")
    # Mending rounds its own weights to the inputs' dtype: a few roundings of the largest element.
    atol = 8 * torch.finfo(dtype).eps * float(clean.abs().max())
    torch.testing.assert_close(got[:, :, 0], clean[:, :, 0], rtol=0.0, atol=atol)
    assert bool(got[0, :, 1, 3].isnan().all()) and int(got.isnan().sum()) == 4
    print("broken")
    cache = in_pages(k, v, used, 8)
    cache.block_table[1, 2] = 10**6
    decoding.can_look = lambda tensor: False  # type: ignore[assignment]
    out = decoding.attention(q, cache, backend="triton")
    assert bool(out[1].isnan().all()) and bool(out[0, :, 0].isfinite().all())
    print("missing")
