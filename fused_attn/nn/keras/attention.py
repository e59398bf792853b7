"""Keras' ``Attention`` and ``AdditiveAttention``: no projections, one head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.checks import described
from fused_attn.dropout import dropped
from fused_attn.masks import Causal, Dense, Mask
from fused_attn.nn.keras.layer import Layer, Shape
from fused_attn.nn.keras.lookup import Config
from fused_attn.nn.keras.rows import EmptyRows, attend, check_empty_rows
from fused_attn.nn.keras.seeds import SeedGenerator, as_number, check_rate
from fused_attn.scoring import Additive, DotProduct, Scoring


class Attention(Layer):
    """``keras.layers.Attention``: softmax(q k^T) v without a scale of its own (Luong et al., arXiv 1508.04025), or concat scores.

    Scores are q k^T times a learned scalar (``use_scale``), or with ``score_mode="concat"`` w * sum_d tanh(scale * (q_d + k_d)), which never takes
    memory for every d. Weights are named and shaped as Keras has them: ``scale`` [] and ``concat_score_weight`` [].

    Args:
        use_scale: whether a scale is learned; 1 at first.
        score_mode: "dot" or "concat".
        dropout: chance that an attention probability is dropped while training.
        seed: an int for masks of this layer's own, counted by calls; None follows ``torch.manual_seed``.
        empty_rows: what a query gets that may attend to no key: "unmasked" for None, as Keras (it subtracts 1e9 where masked), "zero", "uniform" or
            "softmax".
        backend: of ``fused_attn.attention``: "auto", or a name that runs or raises.
        options: name, dtype, trainable, autocast and activity_regularizer, as every layer takes them.

    Raises:
        ValueError: an argument is not what it must be.

    Example:
        >>> layer = Attention(use_scale=True)
        >>> out, scores = layer([torch.randn(2, 3, 4), torch.randn(2, 5, 4)], return_attention_scores=True)
        >>> out.shape, scores.shape
        (torch.Size([2, 3, 4]), torch.Size([2, 3, 5]))
    """

    scale: nn.Parameter | None
    concat_score_weight: nn.Parameter | None
    _uncalled = ("_calculate_scores", "_apply_scores", "_calculate_score_mask", "_validate_inputs")

    def __init__(
        self,
        use_scale: bool = False,
        score_mode: str = "dot",
        dropout: float = 0.0,
        seed: int | None = None,
        *,
        empty_rows: EmptyRows | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(backend=backend, **options)
        if score_mode not in ("dot", "concat"):
            raise ValueError(f"score_mode must be 'dot' or 'concat'; got {described(score_mode)}. Choose one.")
        check_rate(dropout)
        check_empty_rows(empty_rows)
        self.use_scale, self.score_mode, self.dropout, self.seed = use_scale, score_mode, as_number(dropout), seed
        self._empty_rows = empty_rows
        self.register_parameter("scale", None)
        self.register_parameter("concat_score_weight", None)
        if dropout > 0:
            self.seed_generator = SeedGenerator(seed)

    def build(self, shapes: Sequence[Shape]) -> None:
        """Makes the weights for inputs [query, value(, key)] of these shapes."""
        _check_list(type(self).__name__, "inputs", shapes)
        self._make_scale(shapes[0][-1])
        if self.score_mode == "concat":
            self.add_weight("concat_score_weight", (), "ones")
        self.built = True

    def _make_scale(self, features: int | None) -> None:
        if self.use_scale:
            self.add_weight("scale", (), "ones")

    def call(
        self,
        inputs: list[Tensor],
        mask: list[Tensor | None] | None = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        """The layer on [query [..., q_len, dim], value [..., kv_len, value_dim](, key [..., kv_len, dim])].

        Args:
            inputs: a list; key is value where it is left out.
            mask: a list [query_mask [batch, q_len], value_mask [batch, kv_len]] of tensors, arrays or None, nonzero where a position counts; a third is
                ignored. Either may leave the batch out, and value_mask may be one of pairs, [..., q_len, kv_len]. Output rows of masked queries
                are 0, their scores are not.
            training: whether to drop; None for the module's mode.
            return_attention_scores: whether the probabilities come too, [..., q_len, kv_len], after dropout.
            use_causal_mask: keys at or before the query's index, both counted from 0.

        Returns:
            out [..., q_len, value_dim], or (out, scores).

        Raises:
            ValueError: inputs or masks are no list of 2 or 3, or shapes do not fit.
        """
        name = type(self).__name__
        _check_list(name, "inputs", inputs)
        if mask is not None:
            _check_list(name, "mask", mask)
        self._build_on(inputs[0], [t.shape for t in inputs])
        query, value = inputs[:2]
        key = inputs[2] if len(inputs) > 2 else value
        lead = _lead(name, query, value, key)
        q, k, v = (t.expand(*lead, *t.shape[-2:]).reshape(math.prod(lead), 1, *t.shape[-2:]) for t in (query, key, value))
        query_mask, value_mask = (None, None) if mask is None else mask[:2]
        allowed: Mask | None = Causal() if use_causal_mask else None
        if value_mask is not None:
            keep = _pairs(torch.as_tensor(value_mask, device=query.device), lead, query.shape[-2], value.shape[-2])
            allowed = Dense(keep) if allowed is None else allowed & Dense(keep)
        out, scores = self._attend(q, k, v, allowed, training, return_attention_scores)
        out = out.reshape(*lead, *out.shape[-2:])
        if query_mask is not None:
            rows = _positions("query_mask", torch.as_tensor(query_mask, device=query.device), lead, query.shape[-2])
            out = out.where(rows[..., None], 0.0)
        return out if scores is None else (out, scores.reshape(*lead, *scores.shape[-2:]))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, training: bool | None, return_attention_scores: bool
    ) -> tuple[Tensor, Tensor | None]:
        is_dropped = self.dropout > 0 and (self.training if training is None else training)
        dropout = self.seed_generator(self.dropout, q.device) if is_dropped else None
        out, probs = attend(
            q, k, v, mask=mask, scoring=self._scoring(), dropout=dropout, q_offset=0, empty_rows=self._empty_rows or "unmasked",
            return_probs=return_attention_scores, backend=self.backend,
        )  # fmt: skip
        return out, probs if dropout is None or probs is None else dropped(probs, dropout)

    def _scoring(self) -> Scoring:
        scale = None if self.scale is None else self.scale.to(self.compute_dtype)
        if self.concat_score_weight is not None:
            return Additive(self.concat_score_weight.to(self.compute_dtype), scale)
        return DotProduct(1.0 if scale is None else scale)

    def _build_for(self, inputs: dict[str, Any]) -> None:
        tensors = inputs.get("inputs")
        if isinstance(tensors, list) and tensors and all(isinstance(t, Tensor) for t in tensors):
            self._build_on(tensors[0], [t.shape for t in tensors])

    def _build_from(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.build([(None, None, *shapes.get("scale", ())), (None, None, None)])

    def _weight_names(self) -> list[str]:
        return [*(["scale"] if self.use_scale else []), *(["concat_score_weight"] if self.score_mode == "concat" else [])]

    def compute_mask(self, inputs: list[Tensor], mask: list[Tensor | None] | None = None) -> Tensor | None:
        """The output's mask, which is the query's."""
        _check_list(type(self).__name__, "inputs", inputs)
        if mask is None:
            return None
        _check_list(type(self).__name__, "mask", mask)
        return None if mask[0] is None else torch.as_tensor(mask[0], device=inputs[0].device)

    def compute_output_shape(self, input_shape: Sequence[Shape]) -> tuple[int | None, ...]:
        """The output's shape for inputs of these shapes."""
        return (*input_shape[0][:-1], input_shape[1][-1])

    def get_config(self) -> Config:
        """Arguments that make the same layer, in the form that Keras reads."""
        own = {"empty_rows": self._empty_rows} if self._empty_rows else {}
        return {
            **super().get_config(),
            "use_scale": self.use_scale,
            "score_mode": self.score_mode,
            "dropout": self.dropout,
            "seed": self.seed,
            **own,
        }


def _check_list(layer: str, name: str, given: Any) -> None:
    is_inputs = name == "inputs"
    items = "[query, value] or [query, value, key]" if is_inputs else "[query_mask, value_mask]"
    if not isinstance(given, list):
        raise ValueError(f"{layer} {name} must be a list {items}; got {described(given)}. Put them into one.")
    if not 2 <= len(given) <= 3:
        advice = "Pass one tensor twice for self-attention" if is_inputs else "Write None for a mask that is not there"
        raise ValueError(f"{layer} {name} must be a list of 2 or 3, {items}; got {len(given)}. {advice}.")


def _lead(layer: str, query: Tensor, value: Tensor, key: Tensor) -> torch.Size:
    """The leading dimensions of all three, of which some may be 1."""
    shapes = [t.shape for t in (query, value, key)]
    count = max(t.dim() - 2 for t in (query, value, key))
    columns = list(zip(*((*[1] * (count - len(shape) + 2), *shape[:-2]) for shape in shapes), strict=True))
    lead = torch.Size([next((n for n in column if n != 1), 1) for column in columns])
    is_fitting = all(n in (1, full) for column, full in zip(columns, lead, strict=True) for n in column)
    is_fitting = is_fitting and min(len(shape) for shape in shapes) >= 2 and query.shape[-1] == key.shape[-1]
    if not is_fitting or value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"{layer} inputs must be query [..., q_len, dim], value [..., kv_len, value_dim] and key [..., kv_len, dim]; "
            f"got {', '.join(str(list(shape)) for shape in shapes)}, where the key is the value if it is left out. Leading sizes are equal or 1."
        )
    return lead


def _positions(name: str, mask: Tensor, lead: torch.Size, length: int) -> Tensor:
    """A mask [*lead, length], [batch, length] or [length] as bool with all dimensions, which may be 1."""
    mask = mask.to(torch.bool)
    if 0 < mask.dim() < 3 and mask.dim() <= len(lead):
        mask = mask.reshape(*mask.shape[:-1], *[1] * (len(lead) + 1 - mask.dim()), mask.shape[-1])
    _check_mask(name, mask, (*lead, length))
    return mask


def _pairs(mask: Tensor, lead: torch.Size, q_len: int, kv_len: int) -> Tensor:
    """A mask of values or of pairs as bool [batch|1, 1, q_len|1, kv_len|1], the batch being all leading dimensions."""
    if mask.dim() == len(lead) + 2:
        mask = mask.to(torch.bool)
        _check_mask("value_mask", mask, (*lead, q_len, kv_len))
    else:
        mask = _positions("value_mask", mask, lead, kv_len)[..., None, :]
    if any(n != 1 for n in mask.shape[:-2]):
        mask = mask.expand(*lead, *mask.shape[-2:])
    return mask.reshape(math.prod(mask.shape[:-2]), 1, *mask.shape[-2:])


def _check_mask(name: str, mask: Tensor, wanted: tuple[int, ...]) -> None:
    if mask.dim() != len(wanted) or any(n not in (1, full) for n, full in zip(mask.shape, wanted, strict=True)):
        raise ValueError(
            f"{name} must have one element for each position, {list(wanted)}; got {described(mask)}. Leave it out where all count."
        )
