"""The stacks that x-transformers names: encoder, decoder, decoder with a prefix, cross attender."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_attn.lowering import Grid
from fused_attn.masks import Mask, PrefixLM
from fused_attn.nn.x_transformers.layers import AttentionLayers
from fused_attn.nn.x_transformers.refusals import needs


class Encoder(AttentionLayers):
    """Layers without causality.

    Example:
        >>> import torch
        >>> Encoder(dim=32, depth=1, heads=4, attn_dim_head=8)(torch.randn(1, 6, 32)).shape
        torch.Size([1, 6, 32])
    """

    def __init__(self, *, backend: str = "auto", **options: Any) -> None:
        needs("causal" not in options, "causal must be left out of an Encoder", "it", "Build a Decoder, or AttentionLayers")
        super().__init__(causal=False, backend=backend, **options)


class Decoder(AttentionLayers):
    """Causal layers.

    Example:
        >>> import torch
        >>> decoder = Decoder(dim=32, depth=1, heads=4, attn_dim_head=8).eval()
        >>> x = torch.randn(1, 3, 32)
        >>> _, past = decoder(x[:, :2], return_hiddens=True)
        >>> torch.allclose(decoder(x, cache=past)[:, -1], decoder(x)[:, -1], atol=1e-5)
        True
    """

    def __init__(self, *, backend: str = "auto", **options: Any) -> None:
        needs("causal" not in options, "causal must be left out of a Decoder", "it", "Build an Encoder, or AttentionLayers")
        super().__init__(causal=True, backend=backend, **options)


class PrefixDecoder(AttentionLayers):
    """Causal layers in which everybody attends to the first ``prefix_attn_len`` positions.

    Example:
        >>> import torch
        >>> PrefixDecoder(dim=32, depth=1, heads=4, attn_dim_head=8)(torch.randn(1, 6, 32), prefix_attn_len=3).shape
        torch.Size([1, 6, 32])
    """

    def __init__(self, *, backend: str = "auto", **options: Any) -> None:
        needs("causal" not in options, "causal must be left out of a PrefixDecoder", "it", "Build an Encoder, or AttentionLayers")
        super().__init__(causal=False, backend=backend, **options)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        attn_mask: Tensor | Mask | None = None,
        prefix_attn_len: int | Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """``AttentionLayers.forward`` with a prefix: an int, or an int tensor [batch]; without one, causal."""
        prefix = PrefixLM(0 if prefix_attn_len is None else prefix_attn_len)
        if attn_mask is None:
            return super().forward(x, context, mask, attn_mask=prefix, **arguments)
        grid = Grid((x.shape[0], 1, x.shape[1], x.shape[1]), x.device)
        other = attn_mask.allowed(grid) if isinstance(attn_mask, Mask) else attn_mask
        return super().forward(x, context, mask, attn_mask=prefix.allowed(grid) & other, **arguments)


class CrossAttender(AttentionLayers):
    """Layers of cross attention and feed-forward.

    Example:
        >>> import torch
        >>> CrossAttender(dim=32, depth=1, heads=4, attn_dim_head=8)(torch.randn(1, 6, 32), torch.randn(1, 4, 32)).shape
        torch.Size([1, 6, 32])
    """

    def __init__(self, *, backend: str = "auto", **options: Any) -> None:
        super().__init__(cross_attend=True, only_cross=True, backend=backend, **options)
