"""Contextual position embeddings: positions counted by gates of the scores themselves (arXiv 2405.18719)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_attn.nn.x_transformers.parameters import constant


def talking(heads: int) -> nn.Conv2d:
    """A 1 x 1 convolution over heads that begins as the identity (arXiv 2003.02436)."""
    mix = nn.Conv2d(heads, heads, 1, bias=False)
    nn.init.dirac_(mix.weight)
    return mix


class CoPE(nn.Module):
    """What is added to the scores [batch, heads, q_len, kv_len]; O(q_len * kv_len) memory, for every gate depends on a score.

    Args:
        dim: head size of the queries.
        heads: query heads.
        max_pos: positions told apart.
        soft_onehot: must be False; the package's own branch fails.
        talking_heads: whether gates come from scores mixed over heads.
        soft_onehot_temp: of that branch.

    Example:
        >>> CoPE(4, 2, 3)(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 5)).shape
        torch.Size([1, 2, 5, 5])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        max_pos: int,
        soft_onehot: bool = False,
        talking_heads: bool = False,
        soft_onehot_temp: float = 5e-2,
    ) -> None:
        super().__init__()
        if soft_onehot:
            raise NotImplementedError(
                "cope_soft_onehot_pos must be False; got True. The package's branch raises too: interpolate between positions, as False does."
            )
        self.max_pos = max_pos
        self.pos_emb = constant(0.0, max_pos, dim)
        self.talking_heads = nn.Conv2d(heads, heads, 1, bias=False) if talking_heads else None

    def forward(self, query: Tensor, attn_logits: Tensor) -> Tensor:
        """query [batch, heads, q_len, dim], scores [batch, heads, q_len, kv_len] whose masked elements are very negative."""
        if self.talking_heads is not None:
            q_len, kv_len = attn_logits.shape[-2:]
            hidden = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).triu(kv_len - q_len + 1)
            attn_logits = mixed(self.talking_heads, attn_logits).masked_fill(hidden, torch.finfo(attn_logits.dtype).min)
        gates = attn_logits.sigmoid()
        positions = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=self.max_pos - 1)
        at_integers = (query.to(positions.dtype) @ self.pos_emb.to(positions.dtype).mT).to(
            positions.dtype
        )  # [batch, heads, q_len, max_pos]
        below, above = positions.floor().long(), positions.ceil().long()
        part = positions - below
        return at_integers.gather(-1, above) * part + at_integers.gather(-1, below) * (1 - part)


def mixed(mix: nn.Conv2d, scores: Tensor) -> Tensor:
    """Scores mixed over heads in their own dtype."""
    return torch.nn.functional.conv2d(scores, mix.weight.to(scores.dtype)).to(scores.dtype)
