"""Pair-biased attention: every pair of positions has features of its own, and a learned map of them is added to the scores.

Runs as a script or cell by cell, on a CPU too, and checks itself against plain torch.
"""

# %% The bias comes from a pair representation [batch, length, length, channels], as in protein structure models.
import torch
from torch import Tensor, nn

import fused_attn as fa

BATCH, LENGTH, WIDTH, HEADS, CHANNELS = 2, 96, 64, 4, 8


class PairBiased(nn.Module):
    """Self-attention over x with a bias per pair and head, and a gate of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.gate = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Linear(CHANNELS, HEADS, bias=False)

    def forward(self, x: Tensor, pairs: Tensor, lengths: Tensor, attend) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, self.bias(pairs).permute(0, 3, 1, 2), lengths)
        return self.out(out.transpose(1, 2).flatten(2) * self.gate(x).sigmoid())


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    """The bias [batch, heads, length, length] is read by the kernels and gets its gradient; scores are never stored."""
    return fa.attention(q, k, v, mask=fa.ValidLengths(lengths), score_mods=(fa.Bias(bias),))


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    """The same in plain torch; rows of an empty sequence would be NaN."""
    hidden = torch.arange(LENGTH) >= lengths[:, None, None, None]
    return (q @ k.mT * q.shape[-1] ** -0.5 + bias).masked_fill(hidden, -torch.inf).softmax(-1) @ v


# %% Outputs and the gradients of everything, the pair representation included.
torch.manual_seed(0)
layer = PairBiased()
x, incoming = torch.randn(2, BATCH, LENGTH, WIDTH)
pairs, lengths = torch.randn(BATCH, LENGTH, LENGTH, CHANNELS, requires_grad=True), torch.tensor([LENGTH, 70])
results = []
for attend in (fused, plain):
    out = layer(x, pairs, lengths, attend)
    results.append((out, *torch.autograd.grad(out, [pairs, *layer.parameters()], incoming)))
for got, want in zip(*results, strict=True):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
assert layer(x, pairs, torch.tensor([LENGTH, 0]), fused).isfinite().all()
print("output and gradients agree with plain torch, that of the pair representation", list(pairs.shape), "too")
