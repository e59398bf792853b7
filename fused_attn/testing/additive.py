"""What rounding may do to additive attention's scores and gradients, to first order; see ``budget.Rounding``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.scoring import Additive


@dataclass(frozen=True)
class AdditiveTerms:
    """The terms of sum_d w_d tanh(a (q_d + k_d)) in float64.

    Args:
        scoring: the scoring.
        q: [batch, heads, q_len, head_dim].
        k: the same, keys repeated.
    """

    scoring: Additive
    q: Tensor
    k: Tensor

    @property
    def scale(self) -> float:
        """a."""
        return 1.0 if self.scoring.scale is None else float(self.scoring.scale)

    @property
    def weight(self) -> Tensor:
        """w, [1, heads|1, 1, head_dim]."""
        folded = self.scoring.fold(self.q, self.k)[2]
        assert isinstance(folded, Additive)
        assert isinstance(folded.weight, Tensor)
        return folded.weight

    def _reach(self) -> Tensor:
        """How far each tanh and the rounding of its argument reach, [batch, heads, q_len, kv_len, head_dim]."""
        bent = ((self.q[..., :, None, :] + self.k[..., None, :, :]) * self.scale).tanh()
        return bent.abs() + (1 - bent.square()) * (self.q.abs()[..., :, None, :] + self.k.abs()[..., None, :, :]) * abs(self.scale)

    def scores(self) -> tuple[Tensor, Tensor]:
        """Scores, and the magnitude of the terms that each is the sum of."""
        return self.scoring.score(self.q, self.k), (self._reach() * self.weight.abs()[:, :, None]).sum(-1)

    def of_inputs(self, ds: Tensor) -> tuple[Tensor, Tensor]:
        """Error of dq, and of dk for every query head, given that of the scores; 1 - tanh^2 errs as 1 does."""
        factor = self.weight.abs() * abs(self.scale)
        return ds.sum(-1)[..., None] * factor, ds.sum(-2)[..., None] * factor

    def of_parameters(self, ds: Tensor) -> list[Tensor]:
        """Error of the gradients of weight and scale, as far as they are tensors."""
        found = []
        if isinstance(self.scoring.weight, Tensor):
            total = torch.einsum("bhqk,bhqkd->hd", ds, self._reach())
            found.append(total.sum_to_size(self.scoring.weight.shape))
        if isinstance(self.scoring.scale, Tensor):
            sizes = self.q.abs()[..., :, None, :] + self.k.abs()[..., None, :, :]
            found.append(torch.einsum("bhqk,bhqkd->", ds, sizes * self.weight.abs()[:, :, None]))
        return found
