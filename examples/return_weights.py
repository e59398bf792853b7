"""Attention weights from the fused pass: averaged as torch gives them, of a few rows of a long sequence, and as a term of the loss.

Runs as a script or cell by cell, on a CPU too, and checks itself against plain torch.
"""

# %% The layer: torch's parameters and arguments; the second sequence is all padding.
import torch
from torch import nn

import fused_attn as fa
from fused_attn.nn import MultiheadAttention

torch.manual_seed(0)
theirs = nn.MultiheadAttention(64, 4, batch_first=True)
ours = MultiheadAttention(64, 4, batch_first=True)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(2, 50, 64)
padding = torch.arange(50) >= torch.tensor([[40], [0]])

out, weights = ours(x, x, x, key_padding_mask=padding)
right, right_weights = theirs(x, x, x, key_padding_mask=padding)
torch.testing.assert_close((out[0], weights[0]), (right[0], right_weights[0]))
assert out[1].isfinite().all()
assert not weights[1].any()
print("weights [batch, queries, keys]:", list(weights.shape), "and no NaN where a sequence is all padding")

# %% The function, on a long sequence: what is looked at is what is made.
LENGTH = 4096
q, k, v = torch.randn(3, 1, 8, LENGTH, 32).unbind(0)
rows, heads = torch.tensor([0, 100, -1]), torch.tensor([3])
request = fa.AuxRequest(probs=True, entropy=True, rows=rows, heads=heads)
_, aux = fa.attention(q, k, v, mask=fa.Causal(), return_aux=request)
hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[rows]
plain = (q[:, 3, rows] @ k[:, 3].mT / 32**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
torch.testing.assert_close(aux.probs[:, 0], plain)
torch.testing.assert_close(aux.entropy[0, 3, rows], torch.special.entr(plain[0]).sum(-1), rtol=1e-4, atol=1e-4)
print("weights of three rows of one head:", list(aux.probs.shape), "; entropies of all rows:", list(aux.entropy.shape))

# %% A loss on the weights: sharper attention to the first key, say.
q, k, v = torch.randn(3, 1, 2, 30, 16).unbind(0)
found = []
for fused in (True, False):
    leaf = q.clone().requires_grad_()
    if fused:
        out, aux = fa.attention(leaf, k, v, return_aux=fa.AuxRequest(probs=True))
        probs = aux.probs
    else:
        probs = (leaf @ k.mT / 4).softmax(-1)
        out = probs @ v
    found.append(torch.autograd.grad(out.square().mean() - probs[..., 0].log().mean(), leaf)[0])
torch.testing.assert_close(*found)
print("gradients through output and weights together agree with plain torch")
