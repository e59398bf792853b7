"""Residual attention over depth (RealFormer, arXiv 2012.11747): every layer adds its scores to those of the layer before.

Runs as a script or cell by cell, on a CPU too, and checks itself against plain torch.
"""

# %% The scores of the layer before come in as a bias, the layer's own go out: in float32, for they are sums over the layers.
import torch

import fused_attn as fa

BATCH, LENGTH, WIDTH, HEADS, LAYERS = 2, 512, 64, 4, 3
SCORES = fa.AuxRequest(scores=True, scores_dtype=torch.float32)
torch.manual_seed(0)
x, incoming = torch.randn(2, BATCH, LENGTH, WIDTH)
projections = [(torch.randn(WIDTH, 4 * WIDTH) * WIDTH**-0.5).requires_grad_() for _ in range(LAYERS)]


def attend(q, k, v, before):
    """Output [batch, heads, length, dim] and scores [batch, heads, length, length], -inf where masked."""
    out, aux = fa.attention(q, k, v, mask=fa.Causal(), score_mods=() if before is None else (fa.Bias(before),), return_aux=SCORES)
    return out, aux.scores


def plain(q, k, v, before):
    """The same in plain torch; each layer's probabilities are kept for the backward."""
    scores = q @ k.mT * q.shape[-1] ** -0.5 + (0 if before is None else before)
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v, scores


# %% Layers with a residual of their input and of their scores; on the way the tensors of the scores' size that autograd keeps are counted.
def measured(attention):
    """Output, gradients of the projections, and that count."""
    x_now, scores, kept = x, None, {}

    def pack(t):
        if t.numel() >= BATCH * HEADS * LENGTH**2:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for weight in projections:
            normed = torch.nn.functional.layer_norm(x_now, (WIDTH,))
            q, k, v = (normed @ weight[:, : 3 * WIDTH]).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            out, scores = attention(q, k, v, scores)
            x_now = x_now + out.transpose(1, 2).flatten(2) @ weight[:, 3 * WIDTH :]
    return x_now, torch.autograd.grad(x_now, projections, incoming), len(kept)


# %% Equal results; between the layers one tensor of the scores' size, where plain torch keeps every layer's probabilities.
(out, grads, count), (right, right_grads, right_count) = measured(attend), measured(plain)
torch.testing.assert_close(out, right)
for got, want in zip(grads, right_grads, strict=True):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
assert count == LAYERS - 1, count
print(f"{LAYERS} layers: the outputs agree to {(out - right).abs().max():.1e}, every gradient too; tensors of the scores' size kept")
print(f"for the backward: {count}, one for each layer that gets scores; in plain torch: {right_count}")
