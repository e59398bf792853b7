"""Generating text with a small random transformer: through a cache in one piece, one in pages, and none; all three say the same.

Runs as a script or cell by cell, on a CPU too.
"""

# %% Grouped heads: 8 query heads share 2 key heads, which is all that a cache holds. ALiBi says where a key stands.
import torch
from torch import Tensor, nn

import fused_attn as fa
from fused_attn.decoding import KVCache, PagedKV, attention

HEADS, KV_HEADS, DIM, LAYERS, WORDS = 8, 2, 16, 3, 50
SLOPES = fa.ALiBi(2.0 ** -torch.arange(1.0, HEADS + 1))


class Layer(nn.Module):
    """Attention and two linear layers, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        width, out = HEADS * DIM, (HEADS + 2 * KV_HEADS) * DIM
        self.qkv, self.out = nn.Linear(width, out), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, cache: KVCache | PagedKV | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, DIM)).transpose(1, 2)
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), 1)
        if cache is not None:
            cache.append(k, v)  # in place; lengths stay on the device
        y = attention(q, cache, score_mods=(SLOPES,)) if cache else fa.attention(q, k, v, mask=fa.Causal(), score_mods=(SLOPES,))
        return (x := x + self.out(y.transpose(1, 2).flatten(2))) + self.mlp(x)


torch.manual_seed(2)
words, logits = nn.Embedding(WORDS, HEADS * DIM), nn.Linear(HEADS * DIM, WORDS)
layers, prompt = nn.ModuleList(Layer() for _ in range(LAYERS)), torch.randint(WORDS, (2, 5))


# %% The prompt at once, then a token at a time: with caches the model sees only what is new.
@torch.no_grad()
def generate(caches: list | None, tokens: int = 12) -> Tensor:
    """The prompt and the likeliest words after it."""
    text, seen = prompt, 0
    for _ in range(tokens):
        x, seen = words(text[:, seen:]), 0 if caches is None else text.shape[1]
        for layer, cache in zip(layers, caches or [None] * LAYERS, strict=True):
            x = layer(x, cache)
        text = torch.cat((text, logits(x[:, -1:]).argmax(-1)), 1)
    return text


plain = generate(None)
whole = generate([KVCache.empty((2, KV_HEADS, 32, DIM)) for _ in range(LAYERS)])
# Pages of 4 tokens, in any order; one table serves all layers, each of which has pages and lengths of its own.
table = torch.randperm(16).view(2, 8).to(torch.int32)
pages = [PagedKV(*torch.zeros(2, 16, KV_HEADS, 4, DIM), table, torch.zeros(2, dtype=torch.int32)) for _ in range(LAYERS)]
assert torch.equal(torch.stack((whole, generate(pages))), torch.stack((plain, plain)))
print("both caches generate what no cache does:", plain[0, 5:].tolist())
