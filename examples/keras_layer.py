"""Keras' MultiHeadAttention as a torch module: its weights, scores together with the fused kernels, and no mask in memory.

Runs as a script or cell by cell, on a CPU too, without Keras, and checks itself against plain torch.
"""

# %% The layer is made and called as Keras makes and calls it; parameters appear with the first call.
import torch

from fused_attn.nn import keras

BATCH, LENGTH, WIDTH, HEADS, DIM = 2, 256, 32, 4, 8
layer = keras.MultiHeadAttention(HEADS, DIM, sliding_window=64, use_gate=True, kernel_regularizer="l2")
x = torch.randn(BATCH, LENGTH, WIDTH)
padding = torch.arange(LENGTH) < torch.tensor([[200], [256]])
out = layer(x, x, value_mask=padding, use_causal_mask=True)
print({name: list(weight.shape) for name, weight in layer.keras_weights().items()})

# %% Scores by an argument of the call; the output stays the same.
with_scores, scores = layer(x, x, value_mask=padding, use_causal_mask=True, return_attention_scores=True)
torch.testing.assert_close(with_scores, out)

# %% Weights go in and out as numpy arrays in Keras' order, such as keras.layers.MultiHeadAttention(...).get_weights(); here those of one with 0.5 times each.
other = keras.MultiHeadAttention.from_config(layer.get_config())
other.set_weights([0.5 * array for array in layer.get_weights()])
assert not torch.allclose(other(x, x), layer(x, x))

# %% A step of training: penalties are in losses().
optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
loss = layer(x, x, use_causal_mask=True).square().mean() + sum(layer.losses())
loss.backward()
optimizer.step()


# %% The same in plain torch.
def plain(weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer computes; the mask and the scores have an element for every pair."""

    def project(name: str) -> torch.Tensor:
        return torch.einsum("bld,dnh->bnlh", x, weights[f"{name}/kernel"]) + weights[f"{name}/bias"][:, None]

    position = torch.arange(LENGTH)
    distance = position[:, None] - position
    keep = (distance >= 0) & (distance < 64) & padding[:, None, None, :]
    probs = (project("query") @ project("key").mT * DIM**-0.5).masked_fill(~keep, -1e9).softmax(-1).where(keep, 0.0)
    heads = probs @ project("value") * project("gate").sigmoid()
    return torch.einsum("bnlh,nho->blo", heads, weights["attention_output/kernel"]) + weights["attention_output/bias"], probs


right, right_scores = plain(dict(layer.keras_weights()))
got, got_scores = layer(x, x, value_mask=padding, use_causal_mask=True, return_attention_scores=True)
torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(got_scores, right_scores, rtol=1e-4, atol=1e-6)
print(f"output and scores agree with plain torch to {(got - right).abs().max():.1e}")
