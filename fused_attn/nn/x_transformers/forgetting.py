"""Forgetting: biases by what lies between query and key, learned from the data (arXiv 2503.02130)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from fused_attn.nn.x_transformers.refusals import needs
from fused_attn.score_mods import Bias, DecayBias, ScoreMod


class DataDependentAlibi(nn.Module):
    """c_i - c_j for the running sums c of each head's log-forget-gates; in both directions, one kind of gates for each.

    Example:
        >>> DataDependentAlibi(8, 2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 2, 3, 3])
    """

    def __init__(self, dim: int, heads: int, causal: bool = True, bias_init: float = 5.0, post_log_scale: float = 1.0) -> None:
        super().__init__()
        self.causal, self.post_log_scale = causal, post_log_scale
        linear = nn.Linear(dim, heads if causal else heads * 2)
        nn.init.constant_(linear.bias, bias_init)
        self.to_forget_gates = nn.Sequential(linear)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, length, dim] to [batch, heads, length, length]."""
        sums = self._sums(x)
        if self.causal:
            return sums[..., :, None] - sums[..., None, :]
        ahead, back = sums.chunk(2, 1)
        return (ahead[..., :, None] - ahead[..., None, :]).tril() + (back[..., None, :] - back[..., :, None]).triu()

    def in_kernel(self, x: Tensor, front: int) -> tuple[ScoreMod, ...]:
        """As modifications of scores over x's own keys and ``front`` keys before them that nothing is forgotten of."""
        if self.causal and not front:
            return (DecayBias(self._sums(x)),)
        return (Bias(pad(self(x), (front, 0))),)

    def _sums(self, x: Tensor) -> Tensor:
        gates = logsigmoid(self.to_forget_gates(x).transpose(1, 2)) * self.post_log_scale
        return gates.cumsum(-1)


class PerRowDataDependentAlibi(nn.Module):
    """Log-forget-gates for every pair, from small queries and keys, added up over the keys from j to the query.

    Example:
        >>> PerRowDataDependentAlibi(8, 2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 2, 3, 3])
    """

    def __init__(self, dim: int, heads: int, causal: bool = True, dim_head: int = 8, post_log_scale: float = 1.0) -> None:
        super().__init__()
        needs(causal, "data_dependent_alibi_per_row must be causal", "causal=False", "Leave it out for one gate per key")
        self.heads, self.scale, self.post_log_scale = heads, dim_head**-0.5, post_log_scale
        self.to_forget_gates = nn.Sequential(nn.Linear(dim, heads * dim_head * 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, length, dim] to [batch, heads, length, length]; O(length^2) memory."""
        q, k = self.to_forget_gates(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        gates = logsigmoid(q @ k.mT * self.scale) * self.post_log_scale
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu()
        return gates.masked_fill(later, 0.0).flip(-1).cumsum(-1).flip(-1)

    def in_kernel(self, x: Tensor, front: int) -> tuple[ScoreMod, ...]:
        """As a dense bias of scores over x's own keys and ``front`` keys before them."""
        return (Bias(pad(self(x), (front, 0))),)
