"""torch's ``nn.MultiheadAttention`` with this package's attention inside: the same parameters, arguments and state dict, no NaN, O(length) memory."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn.auxiliary import AuxRequest
from fused_attn.backends import require_name
from fused_attn.dropout import Dropout
from fused_attn.functional import attention
from fused_attn.nn import torch_mha_masks
from fused_attn.placements import drawn, dropped


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` (Vaswani et al., arXiv 1706.03762) on this package's attention, with the weights from the same pass.

    Rows that may attend to no key give zeros before the output projection and weights of 0, where torch gives NaN. Returned weights cost
    O(q_len * kv_len), everything else O(length). torch's private ``_qkv_same_embed_dim`` is False here, whatever the sizes, so that
    ``nn.TransformerEncoderLayer`` calls this layer in evaluation too instead of a kernel of its own.

    Args:
        embed_dim: features of queries and of the output.
        num_heads: heads; they divide embed_dim.
        dropout: chance that a weight is removed while training.
        bias: whether the projections have biases.
        add_bias_kv: whether one learned key and value joins every sequence.
        add_zero_attn: whether one key and value of zeros joins every sequence.
        kdim: features of keys, embed_dim by default.
        vdim: features of values, embed_dim by default.
        batch_first: whether batched tensors are [batch, length, features] instead of [length, batch, features].
        device: of the parameters.
        dtype: of the parameters.
        backend: handed to ``fused_attn.attention``.

    Raises:
        ValueError: a size is not positive, or there is no such backend.
        AssertionError: num_heads does not divide embed_dim.

    Example:
        >>> layer = MultiheadAttention(16, 4, batch_first=True)
        >>> x = torch.randn(2, 5, 16)
        >>> padding = torch.tensor([[False] * 3 + [True] * 2, [True] * 5])
        >>> out, weights = layer(x, x, x, key_padding_mask=padding)
        >>> out.shape, weights.shape, weights[1].sum().item()
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]), 0.0)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        self.take_over(backend)

    def take_over(self, backend: str) -> None:
        """What sets this layer apart from torch's, for one that was built as torch's."""
        self.backend = require_name(backend)
        self._qkv_same_embed_dim = False

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of query to key and value.

        Args:
            query: [q_len, embed_dim], or batched [q_len, batch, embed_dim], or [batch, q_len, embed_dim] with ``batch_first``.
            key: [kv_len, kdim], batched like query.
            value: [kv_len, vdim], batched like query. All three may be nested tensors, with ``batch_first`` and without masks.
            key_padding_mask: [kv_len] or [batch, kv_len]; bool, True where a key is left out, or floating point, added to the scores.
            need_weights: whether to return the weights as well.
            attn_mask: [q_len, kv_len] or [batch * num_heads, q_len, kv_len]; bool, True where a pair is left out, or floating point, added
                to the scores; it may require grad.
            average_attn_weights: whether the weights returned are the mean over heads.
            is_causal: a hint that attn_mask is the causal mask, which is then not looked at where neither weights nor padding are given.

        Returns:
            The output, shaped like query, and the weights [batch, q_len, kv_len], or [batch, num_heads, q_len, kv_len] where not averaged,
            without the batch where query has none, or None. As torch's they are those after dropout.

        Raises:
            AssertionError, RuntimeError: shapes or dtypes that do not fit, each where torch raises it.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None
            return self._of_nested((query, key, value), masked, need_weights, average_attn_weights)
        masks = torch_mha_masks.Masks.check(self, (query, key, value), key_padding_mask, attn_mask, is_causal and not need_weights)
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask must be given with is_causal=True, which only says what it is; got None. Pass the causal mask.")
        q, k, v = [self._by_heads(t) for t in self._projected(query, key, value)]
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        out, weights = self._attended(q, k, v, masks, need_weights)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if query.dim() == 3 else weights[0]
        return F.linear(self._merged(out, query.dim()), self.out_proj.weight, self.out_proj.bias), weights

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, masks: torch_mha_masks.Masks, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Output [batch, heads, q_len, head_dim] and, where wanted, the weights after dropout."""
        mask, mods = masks.of_attention(k.shape[2])
        p = self.dropout if self.training else 0.0
        dropout = None
        if p:
            dropout = drawn(Dropout(p), q) if need_weights else Dropout(p)
        options: dict[str, Any] = {"mask": mask, "score_mods": mods, "dropout": dropout, "q_offset": 0, "backend": self.backend}
        if not need_weights:
            return attention(q, k, v, **options), None
        out, aux = attention(q, k, v, return_aux=AuxRequest(probs=True), **options)
        probs = aux.probs
        if probs is not None and dropout is not None:
            probs = dropped(probs, dropout)
        return out, probs

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [..., embed_dim]; one product for what is one tensor."""
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            return tuple([F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True)])
        if query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        size, bias = self.embed_dim, self.in_proj_bias
        w, rest = self.in_proj_weight.split((size, 2 * size))
        b, more = (None, None) if bias is None else bias.split((size, 2 * size))
        if key is value:
            return F.linear(query, w, b), *F.linear(key, rest, more).chunk(2, -1)
        pairs = zip((key, value), rest.chunk(2), (None, None) if more is None else more.chunk(2), strict=True)
        return F.linear(query, w, b), *[F.linear(*pair) for pair in pairs]

    def _by_heads(self, x: Tensor) -> Tensor:
        """[batch, heads, length, head_dim], as a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merged(self, out: Tensor, dim: int) -> Tensor:
        """The inverse of ``_by_heads``."""
        if dim == 2:
            return out[0].transpose(0, 1).flatten(1)
        return (out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)).flatten(2)

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values [batch, heads, kv_len, head_dim] and what ``add_bias_kv`` and ``add_zero_attn`` put behind them."""
        shape = (x.shape[0], self.num_heads, 1, self.head_dim)
        added = [] if bias is None else [bias.view(1, self.num_heads, 1, self.head_dim).expand(shape)]
        added += [x.new_zeros(shape)] if self.add_zero_attn else []
        return torch.cat([x, *added], 2) if added else x

    def _of_nested(self, tensors: tuple[Tensor, ...], is_masked: bool, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
        """The call on padded tensors, cut to the queries' lengths again; weights stay padded, with zeros."""
        if not all(t.is_nested and t.layout == torch.strided for t in tensors) or is_masked or not self.batch_first:
            raise AssertionError(
                "query, key and value must all be nested tensors of the strided layout, with batch_first=True and without masks, or none of "
                "them; got something else. Pad them with to_padded_tensor and pass a key_padding_mask."
            )
        lengths, kv_lengths, value_lengths = ([part.shape[0] for part in t.unbind()] for t in tensors)
        if kv_lengths != value_lengths:
            raise AssertionError(
                f"key and value must have one length in every sequence; got {kv_lengths} and {value_lengths}. Slice them alike."
            )
        padded = {id(t): t.to_padded_tensor(0.0) for t in tensors}
        query, key, value = (padded[id(t)] for t in tensors)
        beyond_q, beyond_kv = (_beyond(n, t) for n, t in ((lengths, query), (kv_lengths, key)))
        out, weights = self(query, key, value, key_padding_mask=beyond_kv, need_weights=need_weights, average_attn_weights=average)
        if weights is not None:
            weights = weights.masked_fill(beyond_q[..., None] if average else beyond_q[:, None, :, None], 0.0)
        return torch.nested.as_nested_tensor([part[:n] for part, n in zip(out, lengths, strict=True)]), weights


def _beyond(lengths: list[int], padded: Tensor) -> Tensor:
    """Where a padded batch [batch, length, features] holds nothing, bool [batch, length]."""
    return torch.arange(padded.shape[1], device=padded.device) >= torch.tensor(lengths, device=padded.device)[:, None]


def replace_multihead_attention(model: nn.Module, *, backend: str = "auto") -> list[str]:
    """Makes every ``torch.nn.MultiheadAttention`` of a model this package's, in place: the same objects, parameters, names and hooks.

    Subclasses of torch's stay what they are, for they may compute something else; layers that are this package's already get the backend.

    Args:
        model: any module, ``nn.MultiheadAttention`` itself included.
        backend: handed to ``fused_attn.attention``.

    Returns:
        The names within the model of all layers that are this package's afterwards.

    Raises:
        ValueError: there is no such backend.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, batch_first=True), 2).eval()
        >>> replace_multihead_attention(encoder)
        ['layers.0.self_attn', 'layers.1.self_attn']
    """
    require_name(backend)
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention or isinstance(module, MultiheadAttention)
    }
    for module in found.values():
        if not isinstance(module, MultiheadAttention):
            module.__class__ = MultiheadAttention
        cast(MultiheadAttention, module).take_over(backend)
    return list(found)
