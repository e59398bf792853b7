"""Functions that compute the same thing in different ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import fused_attn as fa

Softmax = Callable[[Tensor, Tensor], Tensor]


def eager_softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """Plain torch: fill, then softmax."""
    return torch.softmax(scores.masked_fill(~keep, -torch.inf), -1)


def fused_softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """``fused_attn.masked_softmax``."""
    return fa.masked_softmax(scores, keep)


SOFTMAX: Mapping[str, Softmax] = {"fused_attn": fused_softmax, "eager": eager_softmax}
