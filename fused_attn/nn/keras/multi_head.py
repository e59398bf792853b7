"""Keras' ``MultiHeadAttention``: projections, masks, gate and scores around ``fused_attn.attention``."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_attn.checks import described
from fused_attn.nn.keras.attending import Attending, Heads, require_sizes
from fused_attn.nn.keras.lookup import Config
from fused_attn.nn.keras.rows import EmptyRows


class MultiHeadAttention(Attending):
    """``keras.layers.MultiHeadAttention`` (arXiv 1706.03762): same arguments, weights and results, memory O(length) unless scores are asked for.

    Differences, all on purpose, are in docs/migrating.md. Where Keras must choose between its fused kernel and scores, dropout or a flag, there is
    nothing to choose here: every combination runs on the fused path.

    Args:
        num_heads: number of heads.
        key_dim: size of a query and key.
        value_dim: size of a value; key_dim for None.
        dropout: chance that an attention probability is dropped while training.
        use_bias: whether projections have a bias.
        output_shape: an int or several that replace the last dimension of the query; its own size for None.
        attention_axes: an axis or several of the inputs to attend over; all but batch and features for None.
        sliding_window: keys nearer than this on either side, with one attention axis.
        flash_attention: True makes rows without keys those of the fused path whatever is asked for; read together with
            ``disable_flash_attention``. Which kernels run is said by ``backend``.
        kernel_initializer: name, config, class, tensor or callable ``f(shape, dtype)``; likewise for biases.
        bias_initializer: likewise.
        kernel_regularizer: name, config or callable whose penalty is in ``losses()``.
        bias_regularizer: likewise.
        activity_regularizer: likewise, of the projections' outputs.
        kernel_constraint: name, config or callable that ``apply_constraints()`` runs.
        bias_constraint: likewise.
        use_gate: whether each head's output is multiplied by a sigmoid of the query (arXiv 2505.06708).
        seed: an int for masks of this layer's own, counted by calls; None follows ``torch.manual_seed``.
        empty_rows: what a query gets that may attend to no key: "softmax" (the mean of all values, with gradients), "uniform" (the same without
            gradients to scores), "zero", or "unmasked" (as layers do that subtract 1e9, TF-Keras 2.11 among them). None is Keras' own habit: "zero" where
            scores or dropout are asked for or inputs are not of rank 3, else "softmax", and in float16 the softmax of what is left of its scores.
        honour_query_mask: whether ``query_mask`` counts; Keras' layer throws the argument away.
        backend: of ``fused_attn.attention``: "auto", or a name that runs or raises.
        options: name, dtype, trainable and autocast, as every layer takes them.

    Raises:
        ValueError: an argument is not what it must be.

    Example:
        >>> layer = MultiHeadAttention(num_heads=2, key_dim=4)
        >>> out, scores = layer(torch.randn(3, 5, 6), torch.randn(3, 7, 6), return_attention_scores=True)
        >>> out.shape, scores.shape, [name for name in layer.keras_weights()][:2]
        (torch.Size([3, 5, 6]), torch.Size([3, 2, 5, 7]), ['query/kernel', 'query/bias'])
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: int | Sequence[int] | None = None,
        attention_axes: int | Sequence[int] | None = None,
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
        honour_query_mask: bool = False,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        require_sizes(num_heads=num_heads, key_dim=key_dim, value_dim=key_dim if value_dim is None else value_dim)
        rules = {
            "kernel_initializer": kernel_initializer, "bias_initializer": bias_initializer,
            "kernel_regularizer": kernel_regularizer, "bias_regularizer": bias_regularizer, "activity_regularizer": activity_regularizer,
            "kernel_constraint": kernel_constraint, "bias_constraint": bias_constraint,
        }  # fmt: skip
        heads = Heads(num_heads, num_heads, key_dim, value_dim or key_dim)
        super().__init__(
            heads, rules, dropout=dropout, use_bias=use_bias, use_gate=use_gate, sliding_window=sliding_window,
            flash_attention=flash_attention, seed=seed, empty_rows=empty_rows, backend=backend, **options,
        )  # fmt: skip
        self._output_shape, self._attention_axes = _output_shape(output_shape), _attention_axes(attention_axes)
        self._honour_query_mask = honour_query_mask

    num_heads = property(lambda self: self._heads.queries, doc="Number of heads.")
    key_dim = property(lambda self: self._heads.key_dim, doc="Size of a query and key.")
    value_dim = property(lambda self: self._heads.value_dim, doc="Size of a value.")
    dropout = property(lambda self: self._dropout, doc="Chance that a probability is dropped while training.")
    use_bias = property(lambda self: self._use_bias, doc="Whether projections have a bias.")
    attention_axes = property(lambda self: self._attention_axes, doc="Axes of the inputs; None for all but batch and features.")

    def call(
        self, query: Tensor, value: Tensor, key: Tensor | None = None, query_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As ``Attending.call``, where ``query_mask`` counts only with ``honour_query_mask``."""
        if query_mask is not None and not self._honour_query_mask:
            if not torch.compiler.is_compiling():
                warnings.warn(
                    f"{self.name} ignores query_mask, as Keras does, whose layer takes the one that the query tensor carries. "
                    "Make the layer with honour_query_mask=True.",
                    stacklevel=5,
                )
            query_mask = None
        return super().call(query, value, key, query_mask, *args, **kwargs)

    def _build_from(self, shapes: dict[str, tuple[int, ...]]) -> None:
        features, output_shape = shapes.get("query/kernel", (None,))[0], shapes.get("attention_output/kernel", (None,) * 2)[2:]
        if self._output_shape is None and features and output_shape and output_shape != (features,):
            raise ValueError(
                f"output_shape must be given to load weights that project to {list(output_shape)}; got None. Pass output_shape=."
            )
        super()._build_from(shapes)

    def get_config(self) -> Config:
        """Arguments that make the same layer, in the form that Keras reads."""
        own = {"honour_query_mask": True} if self._honour_query_mask else {}
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "output_shape": self._output_shape,
            "attention_axes": self._attention_axes,
            **own,
        }


def _output_shape(given: Any) -> tuple[int, ...] | None:
    if given is None or (isinstance(given, (int, list, tuple)) and not given):
        return None
    try:
        sizes = tuple(int(operator.index(size)) for size in (given if isinstance(given, Iterable) else (operator.index(given),)))
    except TypeError:
        sizes = (-1,)
    if any(size < 0 for size in sizes):
        raise ValueError(
            f"output_shape must be an int or several, none negative; got {described(given)}. Leave it out for the query's size."
        )
    return sizes or None


def _attention_axes(given: Any) -> tuple[int, ...] | None:
    if given is not None and not isinstance(given, (int, tuple, list)):
        raise ValueError(f"attention_axes must be an int, a tuple or a list of ints; got {described(given)}. Leave it out for all lengths.")
    return (int(given),) if isinstance(given, int) else None if given is None else tuple(given)
