"""Keras' ``GroupQueryAttention``: several query heads share one key and value head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_attn.nn.keras.attending import Attending, Heads, require_sizes
from fused_attn.nn.keras.axes import Axes
from fused_attn.nn.keras.layer import Shape
from fused_attn.nn.keras.lookup import Config
from fused_attn.nn.keras.rows import EmptyRows


class GroupQueryAttention(Attending):
    """``keras.layers.GroupQueryAttention`` (arXiv 2305.13245): as ``MultiHeadAttention``, with fewer heads of keys and values.

    Query head n uses key head n // (num_query_heads // num_key_value_heads); keys and values are never repeated in memory.

    Args:
        head_dim: size of a query, key and value.
        num_query_heads: a multiple of num_key_value_heads.
        num_key_value_heads: number of heads of keys and values.
        dropout: chance that an attention probability is dropped while training.
        use_bias: whether projections have a bias.
        sliding_window: keys nearer than this on either side.
        flash_attention: as in ``MultiHeadAttention``, like all that follows; ``activity_regularizer`` is of the layer's output too, as in Keras.
        kernel_initializer: of kernels.
        bias_initializer: of biases.
        kernel_regularizer: of kernels.
        bias_regularizer: of biases.
        activity_regularizer: of outputs.
        kernel_constraint: of kernels.
        bias_constraint: of biases.
        use_gate: whether each head's output is multiplied by a sigmoid of the query.
        seed: of dropout.
        empty_rows: what a query gets that may attend to no key.
        backend: of ``fused_attn.attention``.
        options: name, dtype, trainable and autocast.

    Raises:
        ValueError: an argument is not what it must be.

    Example:
        >>> import torch
        >>> layer = GroupQueryAttention(head_dim=4, num_query_heads=6, num_key_value_heads=2)
        >>> out, scores = layer(torch.randn(3, 5, 8), torch.randn(3, 7, 8), return_attention_scores=True)
        >>> out.shape, scores.shape, layer.key.kernel.shape
        (torch.Size([3, 5, 8]), torch.Size([3, 6, 5, 7]), torch.Size([8, 2, 4]))
    """

    def __init__(
        self,
        head_dim: int,
        num_query_heads: int,
        num_key_value_heads: int,
        dropout: float = 0.0,
        use_bias: bool = True,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        seed: int | None = None,
        *,
        empty_rows: EmptyRows | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        require_sizes(head_dim=head_dim, num_query_heads=num_query_heads, num_key_value_heads=num_key_value_heads)
        if num_query_heads % num_key_value_heads:
            raise ValueError(
                f"num_query_heads must be a multiple of num_key_value_heads; got {num_query_heads} and {num_key_value_heads}. Every key head serves as many."
            )
        rules = {
            "kernel_initializer": kernel_initializer, "bias_initializer": bias_initializer,
            "kernel_regularizer": kernel_regularizer, "bias_regularizer": bias_regularizer, "activity_regularizer": activity_regularizer,
            "kernel_constraint": kernel_constraint, "bias_constraint": bias_constraint,
        }  # fmt: skip
        super().__init__(
            Heads(num_query_heads, num_key_value_heads, head_dim, head_dim), rules, dropout=dropout, use_bias=use_bias, use_gate=use_gate, sliding_window=sliding_window, flash_attention=flash_attention, seed=seed,
            empty_rows=empty_rows, backend=backend, activity_regularizer=activity_regularizer, **options,
        )  # fmt: skip
        self.num_query_heads, self.num_key_value_heads, self.head_dim, _ = self._heads
        self.dropout, self.use_bias, self.use_gate, self.sliding_window = self._dropout, use_bias, use_gate, self._sliding_window

    def _axes(self, projected: Tensor) -> Axes:
        if projected.dim() != 4:
            raise ValueError(
                f"query and value must be [batch, length, features]; got {projected.dim() - 1} dimensions. MultiHeadAttention takes more."
            )
        return Axes((1,), 4)

    def compute_output_shape(self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None) -> tuple[int | None, ...]:
        """The output's shape; a ValueError unless query and value have as many features, which only this method asks, as in Keras."""
        if query_shape[-1] != value_shape[-1]:
            raise ValueError(
                f"query_shape and value_shape must end with the same number of features; got {list(query_shape)} and {list(value_shape)}. "
                "Call the layer to see what other shapes give."
            )
        return super().compute_output_shape(query_shape, value_shape, key_shape)

    def get_config(self) -> Config:
        """Arguments that make the same layer, in the form that Keras reads."""
        sizes = {"head_dim": self.head_dim, "num_query_heads": self.num_query_heads, "num_key_value_heads": self.num_key_value_heads}
        return {**super().get_config(), **sizes}
