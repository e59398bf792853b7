"""Multi-head attention put together from single-head layers: heads are slices of one projection, attended to one by one.

Runs as a script or cell by cell, on a CPU too, and checks itself against plain torch.
"""

# %% One head is a DotProductAttention on its slice of the features; the output projection mixes the heads.
import torch
from torch import Tensor, nn

from fused_attn.nn import MultiheadAttention, d2l

WIDTH, HEADS = 32, 4


class FromParts(nn.Module):
    """W_o [head_1; ...; head_h], head_i = softmax(q_i k_i^T / sqrt(size)) v_i (arXiv 1706.03762, 3.2.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.heads = nn.ModuleList(d2l.DotProductAttention() for _ in range(HEADS))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, valid_lens: Tensor | None = None) -> Tensor:
        slices = zip(*(linear(x).chunk(HEADS, -1) for linear, x in self._inputs(queries, keys, values)), strict=True)
        return self.W_o(torch.cat([head(*qkv, valid_lens) for head, qkv in zip(self.heads, slices, strict=True)], -1))

    def _inputs(self, *tensors: Tensor):
        return zip((self.W_q, self.W_k, self.W_v), tensors, strict=True)


# %% The same weights in the layers that do all heads at once: d2l's, torch's, and torch's own.
torch.manual_seed(0)
parts = FromParts()
whole = d2l.MultiHeadAttention(WIDTH, WIDTH, WIDTH, WIDTH, HEADS)
whole.load_state_dict(parts.state_dict())
ours, plain = (kind(WIDTH, HEADS, bias=False, batch_first=True) for kind in (MultiheadAttention, nn.MultiheadAttention))
for layer in (ours, plain):
    packed = torch.cat([parts.W_q.weight, parts.W_k.weight, parts.W_v.weight])
    layer.load_state_dict({"in_proj_weight": packed, "out_proj.weight": parts.W_o.weight})

x, memory, lengths = torch.randn(2, 7, WIDTH), torch.randn(2, 10, WIDTH), torch.tensor([10, 4])
padding = torch.arange(10) >= lengths[:, None]
want, weights = plain(x, memory, memory, key_padding_mask=padding, average_attn_weights=False)
for name, out in {
    "from parts": parts(x, memory, memory, lengths),
    "d2l.MultiHeadAttention": whole(x, memory, memory, lengths),
    "nn.MultiheadAttention": ours(x, memory, memory, key_padding_mask=padding)[0],
}.items():
    torch.testing.assert_close(out, want)
    print(f"{name}: differs from torch's own by {(out - want).abs().max():.1e}")
torch.testing.assert_close(torch.stack([head.attention_weights for head in parts.heads], 1), weights)
torch.testing.assert_close(whole.attention.attention_weights.unflatten(0, (2, HEADS)), weights)
