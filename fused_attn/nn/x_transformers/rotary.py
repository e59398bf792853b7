"""Positions as rotations of queries and keys, and as phases of their magnitudes."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.lowering import stat_dtype
from fused_attn.nn.x_transformers.parameters import constant
from fused_attn.nn.x_transformers.refusals import needs

Rotation = tuple[Tensor, Tensor | float | None]


class RotaryEmbedding(nn.Module):
    """Angles position * base^(-2n/dim), neighbours in pairs (arXiv 2104.09864); with xPos' decay (arXiv 2212.10554).

    Example:
        >>> angles, scale = RotaryEmbedding(4)(torch.arange(3))
        >>> angles.shape, scale
        (torch.Size([1, 3, 4]), 1.0)
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        use_xpos: bool = False,
        scale_base: float = 512,
        interpolation_factor: float = 1.0,
        base: float = 10000,
        base_rescale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        needs(interpolation_factor >= 1, "rotary_interpolation_factor must be at least 1", repr(interpolation_factor), "Pass 1 for none")
        if base_rescale_factor != 1:
            base = base * base_rescale_factor ** (dim / (dim - 2))
        steps = torch.arange(0, dim, 2, device=None)
        self.register_buffer("inv_freq", 1.0 / (base ** (steps.float() / dim)))
        self.interpolation_factor, self.scale_base = interpolation_factor, scale_base
        self.register_buffer("scale", (steps + 0.4 * dim) / (1.4 * dim) if use_xpos else None)

    def forward_from_seq_len(self, seq_len: int) -> Rotation:
        """Angles and scale of positions 0, 1, ..., seq_len - 1."""
        return self(torch.arange(seq_len, device=self.inv_freq.device))  # type: ignore[no-any-return]

    def forward(self, t: Tensor, offset: int = 0) -> Rotation:
        """Positions [length] or [batch, length] to angles [batch|1, length, dim] and their scale, 1.0 without xPos."""
        t = t[None] if t.dim() == 1 else t
        with _exact(t):
            angles = _angles(t, self.inv_freq) / self.interpolation_factor
            if self.scale is None:
                return angles.repeat_interleave(2, -1), 1.0
            power = (t - (t.max() + 1) // 2) / self.scale_base
            return angles.repeat_interleave(2, -1), (self.scale ** power[..., None]).repeat_interleave(2, -1)


def _exact(tensor: Tensor) -> AbstractContextManager[Any]:
    """No autocast for what follows on a tensor's device; the meta device knows none."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """[..., dim] in float32 or wider: 16 bits tell no more than some hundred positions apart."""
    frequencies = frequencies.to(stat_dtype(frequencies.dtype))
    return positions.to(frequencies.dtype)[..., None] * frequencies


def rotated(x: Tensor, angles: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """x [batch, heads, length, dim] turned by the last ``length`` angles [batch|1, positions, rot_dim]; elements from rot_dim on stay.

    Example:
        >>> rotated(torch.tensor([[[[1.0, 0.0, 7.0]]]]), torch.tensor([[[math.pi, math.pi]]]))[0, 0, 0, 2]
        tensor(7.)
    """
    length, size = x.shape[-2], angles.shape[-1]
    with _exact(x):
        angles = angles[:, None, -length:]
        scale = scale[:, None, -length:] if isinstance(scale, Tensor) else scale
        turning, rest = x[..., :size], x[..., size:]
        crossed = torch.stack((-turning[..., 1::2], turning[..., ::2]), -1).flatten(-2)
        turned = turning * angles.cos() * scale + crossed * angles.sin() * scale
        return torch.cat((turned.to(x.dtype), rest), -1)


def inverse(scale: Tensor | float | None) -> Tensor | float:
    """What keys are scaled by where queries are scaled by ``scale``."""
    return 1.0 if scale is None else scale**-1.0


class PolarEmbedding(nn.Module):
    """Angles for softplus magnitudes, and a learned phase of the keys in [-2 pi, 0] (PoPE, arXiv 2509.10534)."""

    inv_freq: Tensor

    def __init__(self, dim: int, heads: int, bias_uniform_init: bool = False, base: float = 10000) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (base ** (torch.arange(dim, device=None).float() / dim)))
        self.learned_bias = constant(0.0, heads, 1, dim)
        if bias_uniform_init:
            nn.init.uniform_(self.learned_bias, -2 * math.pi, 0.0)

    def forward(self, t: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Positions [length] to angles [1, length, dim] and phases [heads, 1, dim]."""
        t = t[None] if t.dim() == 1 else t
        with _exact(t):
            return _angles(t, self.inv_freq), self.learned_bias.clamp(-2 * math.pi, 0.0)


def polar(x: Tensor, angles: Tensor) -> Tensor:
    """x [batch, heads, length, dim] to [batch, heads, length, 2 dim]: softplus(x) times cosines and sines."""
    with _exact(x):
        angles = angles[:, -x.shape[-2] :]
        wide = x if x.dtype == torch.float64 else x.float()
        size = nn.functional.softplus(wide)
        return torch.cat((size * angles.cos(), size * angles.sin()), -1).to(x.dtype)
