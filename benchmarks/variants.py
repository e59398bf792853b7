"""What is added to plain attention and to the plain softmax: masks, and what a call is asked for besides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.lowering import Grid
from fused_attn.masks import Mask


def _dense(grid: Grid, generator: torch.Generator) -> Tensor:
    """A third of the pairs at random, whole tiles of 128 x 128 among them; no row is empty."""
    batch, _, q_len, kv_len = grid.shape
    keep = torch.rand(batch, 1, q_len, kv_len, generator=generator) < 2 / 3
    tiles = torch.rand(batch, 1, -(-q_len // 128), -(-kv_len // 128), generator=generator) < 0.5
    keep &= tiles.repeat_interleave(128, 2)[:, :, :q_len].repeat_interleave(128, 3)[..., :kv_len]
    keep[..., 0] = True
    return keep


def _padding(grid: Grid, generator: torch.Generator) -> Tensor:
    """A third of the keys, the same for every query of a sequence."""
    keep = torch.rand(grid.shape[0], 1, 1, grid.shape[3], generator=generator) < 2 / 3
    keep[..., 0] = True
    return keep


@dataclass(frozen=True)
class Variant:
    """What is added to the plain operation.

    Args:
        mask: makes a mask, or a bool tensor, for a grid.
        probs: whether the probabilities are returned too, with a gradient of their own.
        bias: whether a full bias is added, with gradient.
        additive: whether scores are sum_d weight_d tanh(q_d + k_d), with a weight [heads, head_dim] with gradient.
        selective: whether head 0's scores are taken off those of later queries in every head.
        sinks: whether a logit per head joins the softmax's denominator, with gradient.
        cap: of the scores, which tanh squashes below it; 0 for none.
        dropout: chance that a probability is zeroed.
        layers: so many, each with tensors of its own; each adds the scores of the one before, and the output is the sum of all.
    """

    mask: Callable[[Grid, torch.Generator], Mask | Tensor | None] = lambda grid, generator: None
    probs: bool = False
    bias: bool = False
    additive: bool = False
    selective: bool = False
    sinks: bool = False
    cap: float = 0.0
    dropout: float = 0.0
    layers: int = 1

    @property
    def beyond_sdpa(self) -> str:
        """What no argument of scaled_dot_product_attention says; empty where one does."""
        reasons = {
            "cannot return probabilities": self.probs,
            "has no additive scores": self.additive,
            "cannot take one head's scores off the others'": self.selective,
            "has no sinks": self.sinks,
            "has no soft cap": self.cap > 0,
            "draws other dropout masks than the reference": self.dropout > 0,
            "cannot return scores for the next layer": self.layers > 1,
        }
        return ", ".join(reason for reason, holds in reasons.items() if holds)


ATTENTION: dict[str, Variant] = {
    "plain": Variant(),
    "probs": Variant(probs=True),
    "causal": Variant(lambda grid, _: fa.Causal()),
    "masked": Variant(_dense),
    "bias": Variant(bias=True),
    "window": Variant(lambda grid, _: fa.Causal() & fa.SlidingWindow(255, 0)),
    "documents": Variant(lambda grid, _: fa.Documents(torch.arange(grid.shape[3], device=grid.device) * 4 // grid.shape[3])),
    "additive": Variant(additive=True),
    "selective": Variant(lambda grid, _: fa.Causal(), selective=True),
    "realformer": Variant(layers=3),
    "sinks": Variant(lambda grid, _: fa.Causal(), sinks=True),
    "softcap": Variant(lambda grid, _: fa.Causal(), cap=30.0),
    "dropout": Variant(dropout=0.1),
}
SOFTMAX: dict[str, Variant] = {
    "plain": Variant(),
    "masked": Variant(_padding),
    "dense": Variant(_dense),
    "causal": Variant(lambda grid, _: fa.Causal()),
}
