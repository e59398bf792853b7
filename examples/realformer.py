"""Residual attention over depth (RealFormer, arXiv 2012.11747): every layer adds its scores to those of the layer before.

Runs as a script or cell by cell, on a CPU too, and checks itself against plain torch.
"""

# %% The scores of the layer before come in as a bias, the layer's own go out: in float32, for they are sums over the layers.
import torch
from torch import Tensor, nn

import fused_attn as fa

BATCH, LENGTH, WIDTH, HEADS, LAYERS = 2, 512, 64, 4, 3
SCORES = fa.AuxRequest(scores=True, scores_dtype=torch.float32)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: fa.Causal, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [batch, heads, length, dim] and scores [batch, heads, length, length], -inf where masked."""
    mods = () if before is None else (fa.Bias(before),)
    out, aux = fa.attention(q, k, v, mask=mask, score_mods=mods, return_aux=SCORES)
    return out, aux.scores


class Layer(nn.Module):
    """Self-attention with a residual of its input and a residual of its scores."""

    def __init__(self, attention=attend) -> None:
        super().__init__()
        self.attention, self.norm = attention, nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [batch, length, width]."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out, scores = self.attention(q, k, v, fa.Causal(), before)
        return x + self.out(out.transpose(1, 2).flatten(2)), scores


def run(layers: list[Layer], x: Tensor) -> Tensor:
    """All layers, scores handed from each to the next."""
    scores = None
    for layer in layers:
        x, scores = layer(x, scores)
    return x


torch.manual_seed(0)
layers = nn.ModuleList(Layer() for _ in range(LAYERS))
x, incoming = torch.randn(2, BATCH, LENGTH, WIDTH)
print(fa.explain(*torch.randn(3, BATCH, HEADS, LENGTH, WIDTH // HEADS), mask=fa.Causal(), return_aux=SCORES))


# %% The same in plain torch.
def plain(q: Tensor, k: Tensor, v: Tensor, mask: fa.Causal, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """What ``attend`` computes; each layer's probabilities are kept for the backward."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if before is None else scores + before
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v, scores


def measured(attention) -> tuple[Tensor, list[Tensor], int]:
    """Output, gradients of all parameters, and how many tensors of the scores' size autograd keeps."""
    kept = {}

    def pack(t: Tensor) -> Tensor:
        if t.numel() >= BATCH * HEADS * LENGTH**2:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    for layer in layers:
        layer.attention = attention
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(layers, x)
    count = len(kept)
    kept.clear()
    return out, list(torch.autograd.grad(out, list(layers.parameters()), incoming)), count


# %% Equal results; between the layers one tensor of the scores' size, where plain torch keeps every layer's probabilities.
out, grads, count = measured(attend)
right, right_grads, right_count = measured(plain)
torch.testing.assert_close(out, right)
for got, want in zip(grads, right_grads, strict=True):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
assert count == LAYERS - 1, count
print(
    f"{LAYERS} layers: the outputs agree to {(out - right).abs().max():.1e}, every gradient too; tensors of the scores' size kept for the"
)
print(f"backward: {count}, one for each layer that gets scores; in plain torch: {right_count}")
