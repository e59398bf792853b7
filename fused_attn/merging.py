"""Results of parts of the keys put together: each part's output weighs as much as its keys have of the softmax's denominator.

out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i), in float32 (float64 for float64), as split-key decoding
(arXiv 2311.01282) and ring attention (arXiv 2310.01889) do it. Parts come one at a time, in any order that is the same on every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.lowering import stat_dtype


@dataclass
class Merged:
    """What parts seen so far add up to.

    Args:
        out: [batch, heads, q_len, value_dim], divided by its own denominator; None before the first part.
        lse: [batch, heads, q_len]; None before the first part, or where weights are no softmax's and outputs add up.

    Example:
        >>> import fused_attn as fa
        >>> q, k, v = torch.randn(3, 1, 2, 8, 4).unbind(0)
        >>> merged = Merged()
        >>> for keys in (slice(0, 3), slice(3, 8)):
        ...     out, aux = fa.attention(q, k[:, :, keys], v[:, :, keys], return_aux=fa.AuxRequest(lse=True))
        ...     merged.add(out, aux.lse)
        >>> torch.allclose(merged.out, fa.attention(q, k, v), atol=1e-6)
        True
    """

    out: Tensor | None = None
    lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor | None) -> None:
        """One more part; its lse is -inf in rows that found no key there."""
        dtype = stat_dtype(out.dtype)
        if self.out is None:
            self.out, self.lse = out.to(dtype), lse
        elif lse is None or self.lse is None:
            self.out = self.out + out
        else:
            both = torch.logaddexp(self.lse, lse)
            self.out = self.out * share(self.lse, both)[..., None] + out * share(lse, both)[..., None]
            self.lse = both

    def add_sinks(self, sinks: Tensor) -> None:
        """Sinks [heads] join the denominator, once for all parts."""
        assert self.out is not None
        assert self.lse is not None
        both = torch.logaddexp(self.lse, sinks.to(self.lse.dtype)[:, None])
        self.out = self.out * share(self.lse, both)[..., None]
        self.lse = both


def share(lse: Tensor, whole: Tensor) -> Tensor:
    """exp(lse - whole), what a part's keys have of all weight; 0 where the part has none, whatever the whole is.

    Example:
        >>> share(torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, -torch.inf])).tolist()
        [1.0, 0.0]
    """
    return torch.exp(lse - whole).masked_fill(lse == -torch.inf, 0.0)
