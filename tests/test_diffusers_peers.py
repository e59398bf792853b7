"""A small diffusion transformer of the diffusers package while torch's attention is patched."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.integrations.sdpa import patched

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed (make test-peers installs it)"),
]
LAYERS = 2


def transformer() -> Any:
    """A DiT over 16 x 16 latents: 64 tokens, 2 layers, 3 heads."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, num_layers=LAYERS, sample_size=16, num_embeds_ada_norm=10
    )
    return model.eval()  # in training it drops class labels at random


def run(model: Any, latents: Tensor) -> tuple[Tensor, ...]:
    """The prediction, and the gradients of the latents and of every parameter."""
    inputs = latents.clone().requires_grad_()
    out = model(inputs, timestep=torch.tensor([1, 7]), class_labels=torch.tensor([3, 9])).sample
    leaves = [inputs, *(p for p in model.parameters() if p.requires_grad)]
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


def test_a_diffusion_transformer_runs_here(counting: Any) -> None:
    model, latents = transformer(), torch.randn(2, 4, 16, 16)
    want = run(model, latents)
    assert counting.calls == 0
    with patched():
        got = run(model, latents)
    assert counting.calls == LAYERS
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * (1 + b.abs().max().item()))
