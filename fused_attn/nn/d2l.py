"""Attention of "Dive into Deep Learning" (d2l 1.0.3 and 0.17.6, PyTorch) on this package's attention: same names, parameters and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.auxiliary import AuxRequest
from fused_attn.checks import captured
from fused_attn.dropout import Dropout
from fused_attn.functional import attention
from fused_attn.nn.d2l_functions import (
    by_heads,
    lengths_mask,
    masked_softmax,
    sequence_mask,
    show_heatmaps,
    transpose_output,
    transpose_qkv,
)
from fused_attn.scoring import Additive
from fused_attn.torch_sdpa import ArgumentError, ArgumentTypeError

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


def _by_name(owner: str, orders: Sequence[tuple[str, ...]], args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments by name, from the first signature that they fit.

    Raises:
        TypeError: they fit none, or a size is missing.
    """
    for order in orders:
        given = dict(zip(order, args, strict=False))
        if len(args) <= len(order) and not given.keys() & named.keys() and named.keys() <= set(order):
            given = {**given, **named}
            missing = [name for name in orders[0] if name.startswith("num_") and name not in given]
            if not missing:
                return given
    readings = " or ".join(f"{owner}({', '.join(order)})" for order in orders)
    raise TypeError(f"{owner} must be built as {readings}; got {len(args)} positional arguments and {sorted(named)}. Name the arguments.")


def _linear(features: int | None, num_hiddens: int, bias: bool = False) -> nn.Linear:
    """One that finds out on its first call how many features there are, where nobody said."""
    return nn.LazyLinear(num_hiddens, bias=bias) if features is None else nn.Linear(features, num_hiddens, bias=bias)


@dataclass(frozen=True)
class _Call:
    """What a layer's last call scored, kept until somebody asks for the weights: O(length) memory."""

    q: Tensor
    k: Tensor
    valid_lens: Tensor | None
    options: dict[str, Any]
    with_grad: bool
    versions: tuple[int, ...]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, valid_lens: Tensor | None, options: dict[str, Any]) -> _Call:
        versions = () if captured(q) else _versions(q, k, valid_lens)
        return cls(q, k, valid_lens, options, torch.is_grad_enabled(), versions)

    def weights(self) -> Tensor:
        """[batch * heads, queries, keys], before dropout, differentiable where the call was."""
        if self.versions and _versions(self.q, self.k, self.valid_lens) != self.versions:
            raise RuntimeError(
                "queries, keys and valid_lens must be what they were in the call for attention_weights to be computed; got some that were modified "
                "in place since. Read attention_weights before, or pass clones."
            )
        with torch.set_grad_enabled(self.with_grad):
            _, aux = attention(self.q, self.k, self.k[..., :1].detach(), return_aux=AuxRequest(probs=True), **self.options)
            return aux.probs.flatten(0, 1)  # type: ignore[union-attr]


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if t is not None and not t.is_inference())


class _Attention(nn.Module):
    """What the two ways to score share: dropout of the weights, and the weights themselves for who asks."""

    def __init__(self, dropout: float, backend: str) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.backend = backend
        self._last: _Call | Tensor | None = None

    @property
    def attention_weights(self) -> Tensor:
        """The last call's weights before dropout, [batch * heads, queries, keys], differentiable; computed when they are first read.

        Raises:
            AttributeError: no call yet.
            RuntimeError: queries, keys or lengths were modified in place since.
        """
        if self._last is None:
            raise AttributeError("attention_weights must be read after a call; got none yet. Call the layer first.")
        if isinstance(self._last, _Call):
            self._last = self._last.weights()
        return self._last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, valid_lens: Tensor | None, **scoring: Any) -> Tensor:
        """q [batch, heads, queries, size], k [batch, heads, keys, size] and v [batch, heads, keys, features], or all without heads."""
        is_3d = q.dim() == 3
        q, k, v = [t[:, None] if t.dim() == 3 else t for t in (q, k, v)]
        mask = lengths_mask(valid_lens, q.shape[0], q.shape[-2])
        options = {"mask": mask, "empty_rows": "uniform", "backend": self.backend, **scoring}
        p = self.dropout.p if self.dropout.training else 0.0
        try:
            out: Tensor = attention(q, k, v, dropout=Dropout(p) if p else None, **options)
        except ValueError as error:
            raise ArgumentError(*error.args) from None
        except TypeError as error:
            raise ArgumentTypeError(*error.args) from None
        self._last = _Call.of(q, k, valid_lens, options)
        return out.squeeze(1) if is_3d else out


class DotProductAttention(_Attention):
    """softmax(q k^T / sqrt(size)) v over the valid keys (Vaswani et al., arXiv 1706.03762), as ``d2l.DotProductAttention``.

    Rows without keys give the mean of all values. Masked keys count for nothing, where d2l's finite fill lets them win over scores below -1e6,
    and what is NaN in them stays there.

    Args:
        dropout: chance that a weight is removed while training.
        backend: handed to ``fused_attn.attention``.

    Raises:
        ValueError: dropout is no chance.

    Example:
        >>> layer = DotProductAttention(dropout=0.5).eval()
        >>> q, k, v = torch.randn(2, 1, 3), torch.ones(2, 10, 3), torch.arange(40.0).view(1, 10, 4).repeat(2, 1, 1)
        >>> layer(q, k, v, torch.tensor([2, 6]))
        tensor([[[ 2.0000,  3.0000,  4.0000,  5.0000]],
        <BLANKLINE>
                [[10.0000, 11.0000, 12.0000, 13.0000]]])
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
        return self._attend(queries, keys, values, valid_lens)


class AdditiveAttention(_Attention):
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
        >>> layer = AdditiveAttention(key_size=2, query_size=20, num_hiddens=8)
        >>> layer(torch.randn(2, 1, 20), torch.ones(2, 10, 2), torch.randn(2, 10, 4), torch.tensor([2, 6])).shape
        torch.Size([2, 1, 4])
        >>> layer.attention_weights[0, 0, :3]
        tensor([0.5000, 0.5000, 0.0000], grad_fn=<SliceBackward0>)
    """

    def __init__(self, *args: Any, backend: str = "auto", **named: Any) -> None:
        orders = (("num_hiddens", "dropout"), ("key_size", "query_size", "num_hiddens", "dropout"))
        given = _by_name("AdditiveAttention", orders, args, named)
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
        # A copy, for an optimiser may have stepped when attention_weights is read.
        weight = self.w_v.weight[0].clone()
        return self._attend(self.W_q(queries), self.W_k(keys), values, valid_lens, scoring=Additive(weight))


class MultiHeadAttention(nn.Module):
    """Heads of ``DotProductAttention`` between linear maps (Vaswani et al., arXiv 1706.03762), as ``d2l.MultiHeadAttention``.

    Built as ``MultiHeadAttention(num_hiddens, num_heads, dropout, bias=False)`` of d2l 1.0.3, whose sizes are found out on the first call, or
    as ``MultiHeadAttention(key_size, query_size, value_size, num_hiddens, num_heads, dropout, bias=False)`` of d2l 0.17. The weights are
    ``attention.attention_weights``, [batch * num_heads, queries, keys].

    Args:
        *args: the arguments below in one of the two orders.
        backend: handed to ``fused_attn.attention``.
        **named: key_size, query_size, value_size, num_hiddens, num_heads, dropout and bias by name; dropout and bias may be left out.

    Raises:
        TypeError: the arguments fit neither order.
        ValueError: dropout is no chance.

    Example:
        >>> layer = MultiHeadAttention(100, 5, 0.5)
        >>> x = torch.ones(2, 4, 100)
        >>> layer(x, x, x, torch.tensor([3, 2])).shape, layer.attention.attention_weights.shape
        (torch.Size([2, 4, 100]), torch.Size([10, 4, 4]))
    """

    def __init__(self, *args: Any, backend: str = "auto", **named: Any) -> None:
        rest = ("num_hiddens", "num_heads", "dropout", "bias")
        given = _by_name("MultiHeadAttention", (rest, ("key_size", "query_size", "value_size", *rest)), args, named)
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
        pairs = ((self.W_q, queries), (self.W_k, keys), (self.W_v, values))
        out = self.attention(*[by_heads(linear(x), self.num_heads) for linear, x in pairs], valid_lens)
        result: Tensor = self.W_o(out.transpose(1, 2).flatten(2))
        return result

    @property
    def attention_weights(self) -> Tensor:
        """``attention.attention_weights``."""
        weights: Tensor = self.attention.attention_weights
        return weights

    def transpose_qkv(self, X: Tensor) -> Tensor:
        """``transpose_qkv`` with the layer's heads."""
        return transpose_qkv(X, self.num_heads)

    def transpose_output(self, X: Tensor) -> Tensor:
        """``transpose_output`` with the layer's heads."""
        return transpose_output(X, self.num_heads)
