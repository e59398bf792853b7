"""Parameters of one value, made where torch makes those of ``nn.Linear``: on its default device."""

from __future__ import annotations

import torch
from torch import nn


def constant(value: float, *sizes: int) -> nn.Parameter:
    """A parameter filled with a number.

    Example:
        >>> constant(1.0, 2).tolist()
        [1.0, 1.0]
    """
    return nn.Parameter(torch.full(sizes, float(value), device=None))


def normal(*sizes: int, std: float = 1.0) -> nn.Parameter:
    """A parameter drawn from a normal distribution."""
    return nn.Parameter(torch.randn(sizes, device=None) * std)
