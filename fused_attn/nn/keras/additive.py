"""Keras' ``AdditiveAttention``."""

from __future__ import annotations

from typing import Any

from fused_attn.nn.keras.attention import Attention
from fused_attn.nn.keras.lookup import Config
from fused_attn.scoring import Additive, Scoring


class AdditiveAttention(Attention):
    """``keras.layers.AdditiveAttention``: scores sum_d scale_d * tanh(q_d + k_d) (Bahdanau et al., arXiv 1409.0473).

    ``scale`` [dim] stands outside tanh, where ``Attention(score_mode="concat")`` has a scalar inside: the two are equal without scales, with a
    ``concat_score_weight`` of 1.

    Args:
        use_scale: whether a scale [dim] is learned; without it every d counts once.
        dropout: as in ``Attention``.
        options: the further ones of ``Attention``, but no score_mode.

    Example:
        >>> import torch
        >>> layer = AdditiveAttention()
        >>> layer([torch.randn(2, 3, 4), torch.randn(2, 5, 4)]).shape, layer.scale.shape
        (torch.Size([2, 3, 4]), torch.Size([4]))
    """

    def __init__(self, use_scale: bool = True, dropout: float = 0.0, **options: Any) -> None:
        super().__init__(use_scale=use_scale, dropout=dropout, **options)

    def _make_scale(self, features: int | None) -> None:
        if self.use_scale:
            assert features is not None
            self.add_weight("scale", (features,), "glorot_uniform")

    def _scoring(self) -> Scoring:
        return Additive(1.0 if self.scale is None else self.scale.to(self.compute_dtype))

    def get_config(self) -> Config:
        """Arguments that make the same layer, in the form that Keras reads."""
        return {name: value for name, value in super().get_config().items() if name != "score_mode"}
