"""Selective attention (arXiv 2410.02703): a token that is no longer needed is hidden from all later queries, in x-transformers' words.

Runs as a script or cell by cell, on a CPU too, and checks itself against plain torch. With the package installed,
``fused_attn.integrations.x_transformers.fuse(model)`` does the same to a model of its own.
"""

# %% The attention alone: what x-transformers calls Attend, without any array of scores.
import torch
from torch import Tensor

from fused_attn.nn.x_transformers import Attend
from fused_attn_bench.measure import peak_bytes

torch.manual_seed(0)
q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 4, 1024, 32).unbind(0))  # [batch, heads, length, dim]
attend = Attend(causal=True, selective=True)
print(attend.explain(q, k, v))


# %% The same in plain torch: head 0 says how much each query hides each key from the queries after it.
def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output of selective attention, through several [length, length] arrays per head."""
    length = q.shape[2]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
    hides = scores[:, :1].relu().masked_fill(torch.eye(length, dtype=torch.bool), 0.0)  # nobody hides itself
    hides[..., 0] = 0.0  # nor the first token
    hidden = hides.cumsum(-2) - hides  # by the queries before
    return (scores - hidden).softmax(-1) @ v


# %% Output, gradients and memory.
def step(attention) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    out = attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]


got, peak = peak_bytes(lambda: step(lambda *qkv: attend(*qkv)[0]), q.device)
want, plain_peak = peak_bytes(lambda: step(plain), q.device)
for ours, theirs in zip(got, want, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
assert peak < plain_peak / 3
print(f"output and gradients agree; peak memory {peak / 2**20:.0f} MiB, in plain torch {plain_peak / 2**20:.0f} MiB")
