"""What ``MultiHeadAttention`` and ``GroupQueryAttention`` share: everything but their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fused_attn.checks import described
from fused_attn.dropout import Dropout
from fused_attn.nn.keras.axes import Axes
from fused_attn.nn.keras.flash import is_flash_attention_enabled
from fused_attn.nn.keras.layer import Layer, Shape
from fused_attn.nn.keras.lookup import Config
from fused_attn.nn.keras.masks import Masks, materialized
from fused_attn.nn.keras.projected import attend_over
from fused_attn.nn.keras.projection import Projection, Rules
from fused_attn.nn.keras.rows import EmptyRows, check_empty_rows, of_fused_path
from fused_attn.nn.keras.seeds import SeedGenerator, as_number, check_rate


class Heads(NamedTuple):
    """Numbers of heads of queries and of keys, sizes of a key and of a value."""

    queries: int
    keys: int
    key_dim: int
    value_dim: int


class Attending(Layer):
    """Base of layers that project, attend over heads, and project back."""

    _uncalled = (
        "_masked_softmax", "_compute_attention_mask", "_compute_causal_mask", "_compute_sliding_window_mask", "_build_attention", "_make_output_dense",
    )  # fmt: skip
    _instead = "_compute_attention"

    def __init__(
        self,
        heads: Heads,
        rules: dict[str, Any],
        *,
        dropout: float,
        use_bias: bool,
        use_gate: bool,
        sliding_window: int | None,
        flash_attention: bool | None,
        seed: int | None,
        empty_rows: EmptyRows | None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if sliding_window is not None:
            require_sizes(sliding_window=sliding_window)
            sliding_window = int(sliding_window)
        check_rate(dropout)
        check_empty_rows(empty_rows)
        self._heads, self._rules = Heads(*(int(size) for size in heads)), Rules.of(rules)
        self._output_shape: tuple[int, ...] | None = None
        self._attention_axes: tuple[int, ...] | None = None
        self._dropout, self._use_bias, self._use_gate, self._sliding_window = as_number(dropout), use_bias, use_gate, sliding_window
        self._flash_attention = flash_attention or is_flash_attention_enabled()
        self._empty_rows, self.seed = empty_rows, seed
        if dropout > 0:
            self.seed_generator = SeedGenerator(seed)

    query_dense = property(lambda self: self.query, doc="The query's projection.")
    key_dense = property(lambda self: self.key, doc="The key's projection.")
    value_dense = property(lambda self: self.value, doc="The value's projection.")
    output_dense = property(lambda self: self.attention_output, doc="The output's projection.")

    def build(self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None) -> None:
        """Makes the projections for inputs of these shapes, of which the last sizes count."""
        key_shape = value_shape if key_shape is None else key_shape
        check_lengths(value_shape, key_shape)
        features, heads = query_shape[-1], self._heads
        self.query = self._projection("query", (features,), (heads.queries, heads.key_dim))
        self.key = self._projection("key", (key_shape[-1],), (heads.keys, heads.key_dim))
        if self._use_gate:
            self.gate = self._projection("gate", (features,), (heads.queries, heads.value_dim), has_sigmoid=True)
        self.value = self._projection("value", (value_shape[-1],), (heads.keys, heads.value_dim))
        self.attention_output = self._projection("attention_output", (heads.queries, heads.value_dim), self._output_shape or (features,))
        self.built = True

    def _projection(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any], *, has_sigmoid: bool = False) -> Projection:
        return Projection(
            self._rules, inputs, outputs, self._placement, use_bias=self._use_bias, has_sigmoid=has_sigmoid,
            dtype=self._policy.name, trainable=self.trainable, name=name,
        )  # fmt: skip

    def call(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        query_mask: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        """The layer on query [batch, q_len, features] and value, key [batch, kv_len, features].

        Args:
            query: floating-point tensor; ``MultiHeadAttention`` takes further axes before the features.
            value: floating-point tensor.
            key: shaped like value but for the features; value for None.
            query_mask: bool [batch, q_len]; True may attend.
            value_mask: bool [batch, kv_len]; True may be attended to.
            key_mask: likewise.
            attention_mask: nonzero where a pair may attend, [batch, q_len, kv_len], [q_len, kv_len] or [batch, heads, q_len, kv_len] with sizes
                of 1 where it repeats; or a mask of this package.
            return_attention_scores: whether the probabilities come too, [batch, heads, q_len, kv_len], before dropout.
            training: whether to drop; None for the module's mode.
            use_causal_mask: keys at or before the query's index, both counted from 0.

        Returns:
            out [batch, q_len, features], or (out, scores).

        Raises:
            ValueError: lengths or masks do not fit.
        """
        key = value if key is None else key
        self._build_on(query, query.shape, value.shape, key.shape)
        check_lengths(value.shape, key.shape)
        masks: Any = Masks(query_mask, value_mask, key_mask, attention_mask, use_causal_mask, self._sliding_window)
        q, k, v = self.query(query), self.key(key), self.value(value)
        if type(self)._compute_attention is not Attending._compute_attention:
            masks = materialized(masks, self._axes(q), q, k)
            groups = self._heads.queries // self._heads.keys
            k, v = (t if groups == 1 else t.repeat_interleave(groups, -2) for t in (k, v))
        out, scores = self._compute_attention(q, k, v, masks, training, return_attention_scores)
        out = self.attention_output(out * self.gate(query) if self._use_gate else out)
        return (out, scores) if return_attention_scores else out

    def _compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of projected tensors [batch, length, heads, dim]; override this one to attend in another way.

        Args:
            query: projected query.
            key: projected key; a method that overrides this one gets as many heads as the query has.
            value: projected value, likewise.
            attention_mask: every mask of the call in one: for a method that overrides this one a bool tensor [batch, q_len, kv_len], with heads
                where they differ and sizes of 1 where it repeats; the masks side by side otherwise.
            training: as given to the layer.
            return_attention_scores: as given to the layer.
            use_causal_mask: a causal mask besides; the layer itself has it in ``attention_mask``.

        Returns:
            (out [batch, q_len, heads, value_dim], scores or None).
        """
        dropout: Dropout | None = None
        if self._dropout > 0 and (self.training if training is None else training):
            dropout = self.seed_generator(self._dropout, query.device)
        is_explicit = not self._flash_attention and (return_attention_scores or self._dropout > 0 or query.dim() != 4)
        return attend_over(
            self._axes(query), (query, key, value), Masks.of(attention_mask, use_causal_mask), scale=1 / math.sqrt(self._heads.key_dim), dropout=dropout,
            empty_rows=self._empty_rows or ("zero" if is_explicit else of_fused_path(query.dtype)), return_probs=return_attention_scores, backend=self.backend,
        )  # fmt: skip

    def _axes(self, projected: Tensor) -> Axes:
        return Axes.of(self._attention_axes, projected.dim())

    def _build_for(self, inputs: dict[str, Any]) -> None:
        query, value = inputs.get("query"), inputs.get("value")
        if isinstance(query, Tensor) and isinstance(value, Tensor):
            key = inputs.get("key")
            self._build_on(query, query.shape, value.shape, (value if key is None else key).shape)

    def _build_from(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Where a kernel is missing, its inputs are taken to have as many features as the nearest of those that are there."""
        sizes = {name: shape[0] for name, shape in shapes.items() if name.endswith("/kernel") and "output" not in name}
        if self._output_shape is None:
            sizes |= {name: shape[-1] for name, shape in shapes.items() if name.startswith("attention_output/")}

        def nearest(*names: str) -> int | None:
            return next((sizes[name] for name in (*names, *sizes) if name in sizes), None)

        features = nearest("query/kernel", "gate/kernel", "attention_output/kernel", "attention_output/bias")
        value, key = nearest("value/kernel", "key/kernel"), nearest("key/kernel", "value/kernel")
        if features is not None:
            self.build((None, None, features), (None, None, value), (None, None, key))

    def _weight_names(self) -> list[str]:
        names = ("query", "key", *(["gate"] if self._use_gate else []), "value", "attention_output")
        return [f"{name}/{weight}" for name in names for weight in ("kernel", *(["bias"] if self._use_bias else []))]

    def compute_output_shape(self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None) -> tuple[int | None, ...]:
        """The output's shape for inputs of these shapes."""
        check_lengths(value_shape, value_shape if key_shape is None else key_shape)
        return (*query_shape[:-1], *(self._output_shape or (query_shape[-1],)))

    def get_config(self) -> Config:
        """Arguments that make the same layer, in the form that Keras reads."""
        own = {"empty_rows": self._empty_rows} if self._empty_rows else {}
        return {
            **super().get_config(),
            "dropout": self._dropout,
            "use_bias": self._use_bias,
            "use_gate": self._use_gate,
            "sliding_window": self._sliding_window,
            **self._rules.get_config(),
            "seed": self.seed,
            **own,
        }


def check_lengths(value_shape: Shape, key_shape: Shape) -> None:
    """A ValueError unless every key has one value."""
    if tuple(value_shape[1:-1]) != tuple(key_shape[1:-1]):
        raise ValueError(
            f"value and key must agree in all dimensions but the batch and the last; got {list(value_shape)} and {list(key_shape)}. Every key has one value."
        )


def require_sizes(**sizes: Any) -> None:
    """A ValueError unless all are positive ints."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size <= 0:
            raise ValueError(f"{name} must be a positive int; got {described(size)}. It is a size.")
