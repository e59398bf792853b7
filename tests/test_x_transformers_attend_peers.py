"""Our ``Attend`` against x-transformers' own on drawn shapes, masks, biases and scores of a layer before."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.nn.x_transformers import Attend

theirs = pytest.importorskip("x_transformers.attend", reason="needs x-transformers")
pytestmark = pytest.mark.peers

DRAWS = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"causal": True},
    "clamp": {"softclamp_logits": True, "logit_softclamp_value": 2.0},
    "pre_talking_heads": {"pre_talking_heads": True},
    "post_talking_heads": {"post_talking_heads": True},
    "scale_after": {"pre_scale_post_talking_heads": True, "causal": True},
    "topk": {"sparse_topk": 3},
    "topk_sinks": {"sparse_topk": 2, "causal": True, "head_learned_sink": True},
    "topk_straight_through": {"sparse_topk": 3, "sparse_topk_straight_through": True},
    "hard": {"hard": True},
    "gumbel": {"gumbel_softmax": True, "gumbel_softmax_temp": 1.5},
    "gumbel_soft": {"gumbel_softmax": True, "gumbel_softmax_hard": False, "causal": True},
    "sigmoid": {"sigmoid": True},
    "sigmoid_sinks": {"sigmoid": True, "head_learned_sink": True},
    "custom": {"custom_attn_fn": lambda scores: scores.clamp(min=0).square()},
    "distance": {"l2_distance": True},
    "cog": {"cog_signed": True},
    "cog_sinks": {"cog_signed": True, "head_learned_sink": True},
    "sinks": {"head_learned_sink": True},
    "sinks_causal": {"head_learned_sink": True, "causal": True},
    "zero_key": {"add_zero_kv": True},
    "zero_key_distance": {"add_zero_kv": True, "causal": True, "l2_distance": True},
    "selective": {"selective": True, "causal": True},
    "selective_zero_key_clamp": {"selective": True, "causal": True, "add_zero_kv": True, "softclamp_logits": True},
    "selective_sinks": {"selective": True, "causal": True, "head_learned_sink": True},
    "inverted": {"inverted_attention": True},
    "flash": {"flash": True},
    "flash_causal": {"flash": True, "causal": True},
    "flash_distance": {"flash": True, "l2_distance": True},
}


def drawn(options: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Arguments of a call."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    flash = options.get("flash", False)
    heads, kv_heads = choose.choice([(4, 4), (4, 2), (4, 1), (6, 3)])
    q_len, kv_len = choose.choice([(5, 5), (3, 7), (1, 6), (7, 7)])
    tensors = {"q": torch.randn(2, heads, q_len, 8), "k": torch.randn(2, kv_heads, kv_len, 8), "v": torch.randn(2, kv_heads, kv_len, 6)}
    mask = choose.choice([None, (2, kv_len), (2, 1, q_len, kv_len), (2, heads, q_len, kv_len)])
    if mask is not None:
        keep = torch.rand(mask) > 0.4
        tensors["mask"] = keep[:, None, None] if flash and len(mask) == 2 else keep
    if choose.random() < 0.5:
        tensors["attn_bias"] = torch.randn(choose.choice([(heads, q_len, kv_len), (1, heads, q_len, kv_len), (2, heads, q_len, kv_len)]))
    if choose.random() < 0.5 and not flash and not options.get("add_zero_kv"):
        tensors["prev_attn"] = torch.randn(2, heads, q_len, kv_len)
    if choose.random() < 0.3 and not options.get("add_zero_kv") and not options.get("head_learned_sink"):
        tensors["attn_delta"] = 0.1 * torch.randn(2, heads, q_len, kv_len)
    if options.get("inverted_attention") and choose.random() < 0.5:
        tensors["row_mask"] = torch.rand(2, q_len) > 0.3
    return {n: t if t.dtype == torch.bool else t.double() for n, t in tensors.items()}


def results(module: torch.nn.Module, tensors: dict[str, Tensor], seed: int, with_arrays: bool) -> dict[str, Tensor]:
    """Output, arrays and the gradients of all of them together."""
    leaves = {n: t if t.dtype == torch.bool else t.clone().requires_grad_() for n, t in tensors.items()}
    torch.manual_seed(seed)
    out, left = module(**leaves)
    arrays = left.to_tuple() if with_arrays else ()
    found = {"out": out, **{f"array {n}": t for n, t in enumerate(arrays)}}
    weights = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for t in found.values():
        factors = torch.randn(t.shape, generator=weights, dtype=torch.float64)
        loss = loss + (t.masked_fill(t.detach() < -1e30, 0.0) * factors).sum()
    wanted = {n: t for n, t in (*leaves.items(), *module.named_parameters()) if t.requires_grad}
    grads = torch.autograd.grad(loss, tuple(wanted.values()), allow_unused=True)
    return found | {f"grad {n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(wanted.items(), grads, strict=True)}


@pytest.mark.parametrize("seed", range(DRAWS))
@pytest.mark.parametrize("name", OPTIONS)
def test_attend(name: str, seed: int) -> None:
    options = OPTIONS[name]
    tensors = drawn(options, seed)
    heads = tensors["q"].shape[1]
    ours, other = Attend(heads=heads, **options).double(), theirs.Attend(heads=heads, **options).double()
    getattr(other.attn_fn, "keywords", {}).pop("dtype", None)  # its softmax is float32's, whatever the dtype
    for p in other.parameters():
        p.data.normal_()
    ours.load_state_dict(other.state_dict())
    with_arrays = not options.get("flash") or "attn_delta" in tensors  # the package's flash path leaves none
    got, wanted = (results(module, tensors, seed, with_arrays) for module in (ours, other))
    for n, want in wanted.items():
        torch.testing.assert_close(got[n], want, rtol=1e-8, atol=1e-9, msg=lambda text, n=n: f"{n}: {text}")
