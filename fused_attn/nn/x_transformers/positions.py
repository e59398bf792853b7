"""Biases by distance: ALiBi, T5's buckets, an MLP of the distance, learned curves; [heads, q_len, kv_len], the last query at the last key.

``in_kernel`` says the same in modifications of this package, so that ALiBi needs no such array.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fused_attn.nn.x_transformers.norms import LayerNorm
from fused_attn.nn.x_transformers.parameters import normal
from fused_attn.nn.x_transformers.refusals import needs
from fused_attn.score_mods import ALiBi, Bias, ScoreMod


def distances(q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """Query position minus key position, [q_len, kv_len].

    Example:
        >>> distances(1, 3, torch.device("cpu"))
        tensor([[2, 1, 0]])
    """
    return torch.arange(kv_len - q_len, kv_len, device=device)[:, None] - torch.arange(kv_len, device=device)


class PositionBias(nn.Module):
    """Base of the biases that depend on lengths alone."""

    def in_kernel(self, q_len: int, kv_len: int, front: int) -> tuple[ScoreMod, ...]:
        """As modifications of scores over ``kv_len`` keys and ``front`` keys without position before them."""
        return (Bias(pad(self(q_len, kv_len), (front, 0))),)


class AlibiPositionalBias(PositionBias):
    """-slope_h * |distance| for the first ``heads`` heads, nothing for the others up to ``total_heads`` (arXiv 2108.12409).

    Example:
        >>> AlibiPositionalBias(2, slopes=[1.0, 0.5])(1, 3)[..., :2].tolist()
        [[[-2.0, -1.0]], [[-1.0, -0.5]]]
    """

    slopes: Tensor

    def __init__(self, heads: int, total_heads: int | None = None, slopes: list[float] | None = None) -> None:
        super().__init__()
        self.heads, self.total_heads = heads, total_heads or heads
        values = torch.tensor(slopes or _slopes(heads), dtype=torch.float32, device=None)
        self.register_buffer("slopes", values[:, None, None], persistent=False)

    def forward(self, q_len: int, kv_len: int) -> Tensor:
        """[total_heads, q_len, kv_len]."""
        return self._for_all(-distances(q_len, kv_len, self.slopes.device).abs() * self.slopes)

    def forward_custom_pos(self, pos_i: Tensor, pos_j: Tensor | None = None) -> Tensor:
        """[total_heads, q_len, kv_len], or [batch, ...], for positions [q_len] and [kv_len], or [batch, ...]."""
        keys = pos_i if pos_j is None else pos_j
        bias = -(keys[..., None, :] - pos_i[..., :, None]).abs()
        return self._for_all((bias[:, None] if bias.dim() == 3 else bias) * self.slopes)

    def in_kernel(self, q_len: int, kv_len: int, front: int) -> tuple[ScoreMod, ...]:
        if front:
            return super().in_kernel(q_len, kv_len, front)
        return (ALiBi(pad(self.slopes[:, 0, 0], (0, self.total_heads - self.heads))),)

    def _for_all(self, bias: Tensor) -> Tensor:
        return pad(bias, (0, 0, 0, 0, 0, self.total_heads - bias.shape[-3]))


def _slopes(heads: int) -> list[float]:
    """The paper's slopes: a geometric series for a power of two, and every other one of the next series for heads beyond it."""
    whole = 2 ** math.floor(math.log2(heads))
    series = [2 ** (-8 * (n + 1) / whole) for n in range(whole)]
    between = [2 ** (-8 * (n + 1) / (2 * whole)) for n in range(0, 2 * whole, 2)]
    return series + between[: heads - whole]


class RelativePositionBias(PositionBias):
    """T5's: distances in buckets, near ones each by itself, far ones logarithmically (arXiv 1910.10683).

    Example:
        >>> RelativePositionBias(1.0, causal=True, heads=4)(3, 5).shape
        torch.Size([4, 3, 5])
    """

    def __init__(self, scale: float, causal: bool = False, num_buckets: int = 32, max_distance: int = 128, heads: int = 8) -> None:
        super().__init__()
        self.scale, self.causal, self.num_buckets, self.max_distance = scale, causal, num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def forward(self, q_len: int, kv_len: int) -> Tensor:
        """[heads, q_len, kv_len]."""
        buckets = self._buckets(distances(q_len, kv_len, self.relative_attention_bias.weight.device))
        bias: Tensor = self.relative_attention_bias(buckets)
        return bias.permute(2, 0, 1) * self.scale

    def _buckets(self, distance: Tensor) -> Tensor:
        count = self.num_buckets if self.causal else self.num_buckets // 2
        future = 0 if self.causal else (distance < 0).long() * count
        distance = distance.clamp(min=0) if self.causal else distance.abs()
        near = count // 2
        logs = torch.log(distance.float() / near) / math.log(self.max_distance / near)
        far = (near + (logs * (count - near)).long()).clamp(max=count - 1)
        return future + torch.where(distance < near, distance, far)


class DynamicPositionBias(PositionBias):
    """An MLP of the signed distance or of its logarithm (arXiv 2111.09883).

    Example:
        >>> DynamicPositionBias(8, heads=4, depth=2)(3, 5).shape
        torch.Size([4, 3, 5])
    """

    def __init__(self, dim: int, *, heads: int, depth: int, log_distance: bool = False, norm: bool = False) -> None:
        super().__init__()
        needs(depth >= 1, "dynamic_pos_bias_mlp_depth must be at least 1", repr(depth), "Count the hidden layers")
        self.log_distance = log_distance
        first = [LayerNorm(dim)] if norm else []
        layers: list[nn.Module] = [nn.Sequential(nn.Linear(1, dim), *first, nn.SiLU())]
        for _ in range(depth - 1):
            layers.append(nn.Sequential(nn.Linear(dim, dim), *([nn.LayerNorm(dim)] if norm else []), nn.SiLU()))
        self.mlp = nn.ModuleList([*layers, nn.Linear(dim, heads)])

    def forward(self, q_len: int, kv_len: int) -> Tensor:
        """[heads, q_len, kv_len]."""
        weight = next(self.parameters())
        values = torch.arange(1 - kv_len, kv_len, device=weight.device).to(weight.dtype)[:, None]
        values = values.sign() * (values.abs() + 1).log() if self.log_distance else values
        for layer in self.mlp:
            values = layer(values)
        return values[distances(q_len, kv_len, weight.device) + kv_len - 1].permute(2, 0, 1)


class RelativeProjPositionalBias(nn.Module):
    """Curves over the distance, mixed per query of learned ones; nothing for future keys and beyond ``max_dist``.

    Example:
        >>> RelativeProjPositionalBias(8, 4)(torch.zeros(1, 3, 8), 5).shape
        torch.Size([1, 4, 3, 5])
    """

    def __init__(self, dim: int, heads: int, num_distance_basis: int = 16, max_dist: int = 1024) -> None:
        super().__init__()
        self.heads, self.max_dist = heads, max_dist
        self.to_distance_weights = nn.Sequential(nn.Linear(dim, heads * num_distance_basis))
        self.distance_bank = normal(num_distance_basis, max_dist, std=0.02)

    def forward(self, x: Tensor, seq_len_k: int | None = None) -> Tensor:
        """x [batch, q_len, dim] to [batch, heads, q_len, kv_len]."""
        batch, q_len, _ = x.shape
        kv_len = q_len if seq_len_k is None else seq_len_k
        distance = distances(q_len, kv_len, x.device)
        weights: Tensor = self.to_distance_weights(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        curves = weights @ self.distance_bank
        index = distance.clamp(0, self.max_dist - 1).expand(batch, self.heads, -1, -1)
        return curves.gather(-1, index).masked_fill((distance < 0) | (distance >= self.max_dist), 0.0)
