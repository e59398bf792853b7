"""A mask and a scoring of your own, with masks and weights of the package beside them.

Runs as a script or cell by cell, on a CPU too, and checks itself against plain torch.
"""

# %% A mask says which pairs may attend; where it compares positions, it says so.
from dataclasses import dataclass

import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.masks import Mask
from fused_attn.scoring import Product, Scoring


@dataclass(frozen=True)
class Dilated(Mask):
    """Every ``step``-th key, counted from the query."""

    step: int
    positional = True

    def keep(self, grid) -> Tensor:
        return (grid.q_pos - grid.kv_idx) % self.step == 0


print((Dilated(2) & fa.Causal()).picture(5, 5))


# %% A scoring makes scores of queries and keys. Written as a product (lower), it runs on every kernel.
@dataclass(frozen=True, eq=False)
class Cosine(Scoring):
    """Temperature times the cosine of the angle between query and key."""

    temperature: Tensor  # [heads, 1, 1], learned
    name = "cosine"

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return self.temperature * torch.cosine_similarity(q[..., :, None, :], k[..., None, :, :], -1)

    def lower(self, q: Tensor, k: Tensor) -> Product:
        return Product(self.temperature * torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1), 1.0)


# %% Together, against plain torch: output, weights, gradients.
torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 40, 16, requires_grad=True) for _ in range(3))
temperature = (1 + torch.rand(4, 1, 1)).requires_grad_()
call = {"mask": Dilated(3) & fa.Causal(), "scoring": Cosine(temperature), "backend": "cpu"}
out, aux = fa.attention(q, k, v, return_aux=fa.AuxRequest(probs=True), **call)
distance = torch.arange(40)[:, None] - torch.arange(40)
weights = Cosine(temperature).score(q, k).masked_fill((distance < 0) | (distance % 3 != 0), -torch.inf).softmax(-1)
results = ((out, aux.probs), (weights @ v, weights))
grads = [torch.autograd.grad(r, [q, k, v, temperature], [torch.ones_like(t).cumsum(-1) for t in r]) for r in results]
for mine, plain in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
print("output, weights and gradients agree with plain torch")
