"""Attention of "Dive into Deep Learning" (d2l 1.0.3 and 0.17.6, PyTorch) on this package's attention: same names, parameters and results."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_attn.nn.d2l_arguments import by_name, check_features, check_inputs
from fused_attn.nn.d2l_functions import (
    by_heads,
    masked_softmax,
    sequence_mask,
    show_heatmaps,
    transpose_output,
    transpose_qkv,
)
from fused_attn.nn.d2l_weights import Weighing
from fused_attn.scoring import Additive

__all__ = [
    "AdditiveAttention",
    "DotProductAttention",
    "MultiHeadAttention",
    "masked_softmax",
    "sequence_mask",
    "show_heatmaps",
    "transpose_output",
    "transpose_qkv",
]


def _linear(features: int | None, num_hiddens: int, bias: bool = False) -> nn.Linear:
    """One that finds out on its first call how many features there are, where nobody said."""
    return nn.LazyLinear(num_hiddens, bias=bias) if features is None else nn.Linear(features, num_hiddens, bias=bias)


class DotProductAttention(Weighing):
    """softmax(q k^T / sqrt(size)) v over the valid keys (Vaswani et al., arXiv 1706.03762), as ``d2l.DotProductAttention``.

    Rows without keys give the mean of all values. Masked keys count for nothing, where d2l's finite fill lets them win over scores below -1e6,
    and what is NaN in them stays there.

    Args:
        dropout: chance that a weight is removed while training.
        backend: handed to ``fused_attn.attention``.

    Raises:
        ValueError: dropout is no chance.

    Example:
        >>> import torch
        >>> layer = DotProductAttention(dropout=0.5).eval()
        >>> q, k, v = torch.randn(2, 1, 3), torch.ones(2, 10, 3), torch.arange(40.0).view(1, 10, 4).repeat(2, 1, 1)
        >>> layer(q, k, v, torch.tensor([2, 6])).round(decimals=3)
        tensor([[[ 2.,  3.,  4.,  5.]],
        <BLANKLINE>
                [[10., 11., 12., 13.]]])
        >>> layer.attention_weights.shape
        torch.Size([2, 1, 10])
    """

    def __init__(self, dropout: float = 0.0, *, backend: str = "auto") -> None:
        super().__init__(dropout, backend)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, valid_lens: Tensor | None = None) -> Tensor:
        """Weighted values, shaped like the queries but for their last dimension.

        Args:
            queries: [batch, queries, size], or [batch, heads, queries, size] like the others.
            keys: [batch, keys, size].
            values: [batch, keys, features].
            valid_lens: int or float [batch] or [batch, queries], or None.

        Raises:
            RuntimeError: the tensors do not fit one another.
            IndexError: the lengths do not fit them.
        """
        check_inputs(queries, keys, values, (3, 4))
        if queries.shape[-1] != keys.shape[-1]:
            raise RuntimeError(
                f"queries and keys must have as many features as each other; got {queries.shape[-1]} and {keys.shape[-1]}. "
                "Project one of them, or take AdditiveAttention."
            )
        return self._attend(queries, keys, values, valid_lens)


class AdditiveAttention(Weighing):
    """softmax(w_v . tanh(W_q q + W_k k)) v over the valid keys (Bahdanau et al., arXiv 1409.0473), as ``d2l.AdditiveAttention``.

    Built as ``AdditiveAttention(num_hiddens, dropout)`` of d2l 1.0.3, whose sizes are found out on the first call, or as
    ``AdditiveAttention(key_size, query_size, num_hiddens, dropout)`` of d2l 0.17; dropout may be left out. The [batch, queries, keys, num_hiddens]
    tensor that d2l makes is never there.

    Args:
        *args: the arguments below in one of the two orders.
        backend: handed to ``fused_attn.attention``.
        **named: key_size, query_size, num_hiddens and dropout by name.

    Raises:
        TypeError: the arguments fit neither order.
        ValueError: dropout is no chance.

    Example:
        >>> import torch
        >>> layer = AdditiveAttention(key_size=2, query_size=20, num_hiddens=8)
        >>> layer(torch.randn(2, 1, 20), torch.ones(2, 10, 2), torch.randn(2, 10, 4), torch.tensor([2, 6])).shape
        torch.Size([2, 1, 4])
        >>> layer.attention_weights[0, 0, :3]
        tensor([0.5000, 0.5000, 0.0000], grad_fn=<SliceBackward0>)
    """

    def __init__(self, *args: Any, backend: str = "auto", **named: Any) -> None:
        orders = (("num_hiddens", "dropout"), ("key_size", "query_size", "num_hiddens", "dropout"))
        given = by_name("AdditiveAttention", orders, args, named)
        super().__init__(given.get("dropout", 0.0), backend)
        self.W_k = _linear(given.get("key_size"), given["num_hiddens"])
        self.W_q = _linear(given.get("query_size"), given["num_hiddens"])
        self.w_v = nn.Linear(given["num_hiddens"], 1, bias=False)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, valid_lens: Tensor | None = None) -> Tensor:
        """Weighted values [batch, queries, features].

        Args:
            queries: [batch, queries, query_size].
            keys: [batch, keys, key_size].
            values: [batch, keys, features].
            valid_lens: int or float [batch] or [batch, queries], or None.

        Raises:
            RuntimeError: the tensors do not fit one another or the layer.
            IndexError: the lengths do not fit them.
        """
        check_inputs(queries, keys, values)
        check_features({"queries": (queries, self.W_q), "keys": (keys, self.W_k)}, {"queries": "query_size", "keys": "key_size"})
        # A copy, for an optimiser may have stepped when attention_weights is read.
        weight = self.w_v.weight[0].clone()
        return self._attend(self.W_q(queries), self.W_k(keys), values, valid_lens, scoring=Additive(weight))


class MultiHeadAttention(nn.Module):
    """Heads of ``DotProductAttention`` between linear maps (Vaswani et al., arXiv 1706.03762), as ``d2l.MultiHeadAttention``.

    Built as ``MultiHeadAttention(num_hiddens, num_heads, dropout, bias=False)`` of d2l 1.0.3, whose sizes are found out on the first call, or
    as ``MultiHeadAttention(key_size, query_size, value_size, num_hiddens, num_heads, dropout, bias=False)`` of d2l 0.17. The weights are
    ``attention.attention_weights``, [batch * num_heads, queries, keys]. ``attention`` may be replaced by a module written as in the book: it gets
    queries, keys and values [batch * num_heads, steps, size] and the lengths repeated for every head.

    Args:
        *args: the arguments below in one of the two orders.
        backend: handed to ``fused_attn.attention``.
        **named: key_size, query_size, value_size, num_hiddens, num_heads, dropout and bias by name; dropout and bias may be left out.

    Raises:
        TypeError: the arguments fit neither order.
        ValueError: dropout is no chance.

    Example:
        >>> import torch
        >>> layer = MultiHeadAttention(100, 5, 0.5)
        >>> x = torch.ones(2, 4, 100)
        >>> layer(x, x, x, torch.tensor([3, 2])).shape, layer.attention.attention_weights.shape
        (torch.Size([2, 4, 100]), torch.Size([10, 4, 4]))
    """

    def __init__(self, *args: Any, backend: str = "auto", **named: Any) -> None:
        rest = ("num_hiddens", "num_heads", "dropout", "bias")
        given = by_name("MultiHeadAttention", (rest, ("key_size", "query_size", "value_size", *rest)), args, named)
        super().__init__()
        self.num_heads = given["num_heads"]
        self.attention = DotProductAttention(given.get("dropout", 0.0), backend=backend)
        size, bias = given["num_hiddens"], given.get("bias", False)
        self.W_q = _linear(given.get("query_size"), size, bias)
        self.W_k = _linear(given.get("key_size"), size, bias)
        self.W_v = _linear(given.get("value_size"), size, bias)
        self.W_o = nn.Linear(size, size, bias=bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, valid_lens: Tensor | None = None) -> Tensor:
        """Attention of queries to keys and values, [batch, queries, num_hiddens].

        Args:
            queries: [batch, queries, query_size].
            keys: [batch, keys, key_size].
            values: [batch, keys, value_size].
            valid_lens: int or float [batch] or [batch, queries], the same for all heads, or None.

        Raises:
            RuntimeError: the tensors do not fit one another or the layer.
            IndexError: the lengths do not fit them.
        """
        check_inputs(queries, keys, values)
        maps = {"queries": (queries, self.W_q), "keys": (keys, self.W_k), "values": (values, self.W_v)}
        check_features(maps, {"queries": "query_size", "keys": "key_size", "values": "value_size"})
        q, k, v = [by_heads(linear(x), self.num_heads) for x, linear in maps.values()]
        if type(self.attention).forward is DotProductAttention.forward:
            out = self.attention(q, k, v, valid_lens).transpose(1, 2).flatten(2)
        else:
            lens = None if valid_lens is None else valid_lens.repeat_interleave(self.num_heads, 0)
            out = transpose_output(self.attention(*[t.flatten(0, 1) for t in (q, k, v)], lens), self.num_heads)
        result: Tensor = self.W_o(out)
        return result

    @property
    def attention_weights(self) -> Tensor:
        """``attention.attention_weights``."""
        weights: Tensor = self.attention.attention_weights
        return weights

    @attention_weights.setter
    def attention_weights(self, weights: Tensor) -> None:
        self.attention.attention_weights = weights

    def __getattr__(self, name: str) -> Any:
        # torch's own answer to a property's AttributeError is that there is no such attribute.
        return self.attention.attention_weights if name == "attention_weights" else super().__getattr__(name)

    def transpose_qkv(self, X: Tensor) -> Tensor:
        """``transpose_qkv`` with the layer's heads."""
        return transpose_qkv(X, self.num_heads)

    def transpose_output(self, X: Tensor) -> Tensor:
        """``transpose_output`` with the layer's heads."""
        return transpose_output(X, self.num_heads)
