"""Keras' own attention layers on this package's kernels, for Keras 3 on its torch backend; for torch without Keras see ``fused_attn.nn.keras``.

``MultiHeadAttention`` here is a subclass of Keras' layer; ``enable()`` serves the layers of models that exist, and ``disable()`` gives Keras' own
computation back. Neither ever holds a causal or sliding-window mask as a tensor. Results are Keras', rows without keys included; what Keras refuses
because its fused kernel gives no scores works. A subclass that overrides ``_compute_attention`` keeps its own, and its masks as tensors.

Example:
    >>> enable()  # doctest: +SKIP
    >>> model.fit(x, y)  # doctest: +SKIP
    >>> disable()  # doctest: +SKIP
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from torch import Tensor

from fused_attn.backends import require_name
from fused_attn.dropout import Dropout
from fused_attn.masks import Mask
from fused_attn.nn.keras.axes import Axes
from fused_attn.nn.keras.masks import Masks, as_mask
from fused_attn.nn.keras.rows import attend
from fused_attn.nn.keras.seeds import mixed

_METHODS = ("_compute_attention", "_compute_attention_mask")
_replaced: dict[tuple[type, str], Any] = {}
_enabled = {"backend": "auto"}


def _keras() -> Any:
    import keras

    if keras.backend.backend() != "torch":
        raise RuntimeError(
            f"Keras must run on torch; got {keras.backend.backend()}. Set the environment variable KERAS_BACKEND to torch before Keras is imported."
        )
    return keras


def _merged(
    layer: Any,
    query: Any,
    value: Any,
    query_mask: Any = None,
    value_mask: Any = None,
    key_mask: Any = None,
    attention_mask: Any = None,
    use_causal_mask: bool = False,
) -> Masks | None:
    """In place of Keras' ``_compute_attention_mask``: the masks side by side, None where there is none."""
    window = getattr(layer, "_sliding_window", None) or getattr(layer, "sliding_window", None)
    masks = Masks(query_mask, value_mask, key_mask, attention_mask, use_causal_mask, window)
    return masks if any(part is not None and part is not False for part in masks) else None


def _attended(layer: Any, tensors: tuple[Tensor, Tensor, Tensor], mask: Any, training: Any, return_scores: bool, backend: str) -> Any:
    """What Keras' ``_compute_attention`` gives for projected tensors [batch, length, heads, dim]."""
    query, key, value = tensors
    axes = Axes(tuple(getattr(layer, "_attention_axes", (1,))), query.dim())
    if isinstance(mask, Masks):
        mask = mask.merged(axes, query.shape, key.shape, query.device)
    elif mask is not None:
        mask = as_mask(mask, axes, query.shape, key.shape, query.device)
    rate = layer.dropout
    dropout = Dropout(rate, seed=mixed(layer._dropout_layer.seed_generator.next()).to(query.device)) if rate > 0 and training else None
    is_explicit = not layer._flash_attention and (return_scores or rate > 0 or query.dim() != 4)
    out, scores = attend(
        axes.fold(query), axes.fold(key), axes.fold(value), mask=mask, scale=1 / math.sqrt(query.shape[-1]), dropout=dropout, q_offset=0,
        empty_rows="zero" if is_explicit else "softmax", return_probs=return_scores, backend=backend,
    )  # fmt: skip
    return axes.unfold(out, query.shape), None if scores is None else axes.unfold_scores(scores, query.shape, key.shape)


def _with_causal(mask: Any, use_causal_mask: bool) -> Any:
    if not use_causal_mask:
        return mask
    if mask is None or isinstance(mask, Masks):
        return (mask or Masks())._replace(causal=True)
    return mask if isinstance(mask, Mask) else Masks(attention=mask, causal=True)


def _compute_attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    training: Any = None,
    return_attention_scores: bool = False,
    use_causal_mask: bool = False,
) -> Any:
    """In place of the method of Keras' ``MultiHeadAttention``."""
    mask = _with_causal(attention_mask, use_causal_mask)
    return _attended(
        self, (query, key, value), mask, training, return_attention_scores, getattr(self, "_fused_backend", _enabled["backend"])
    )


def _compute_grouped_attention(
    self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, training: Any = None, use_causal_mask: bool = False
) -> Any:
    """In place of the method of Keras' ``GroupQueryAttention``, which keeps whether scores are wanted on the layer."""
    mask = _with_causal(attention_mask, use_causal_mask)
    return _attended(self, (query, key, value), mask, training, self._return_attention_scores, _enabled["backend"])


@cache
def _layer_class() -> Any:
    keras = _keras()
    base: Any = keras.layers.MultiHeadAttention

    @keras.saving.register_keras_serializable(package="fused_attn")
    class MultiHeadAttention(base):  # type: ignore[misc]
        """Keras' layer on this package's kernels, without a mask tensor for ``use_causal_mask`` or ``sliding_window``.

        Args:
            args: those of ``keras.layers.MultiHeadAttention``.
            backend: of ``fused_attn.attention``: "auto", or a name that runs or raises; not part of the config.
            kwargs: those of ``keras.layers.MultiHeadAttention``.
        """

        def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._fused_backend = require_name(backend)

        _compute_attention = _compute_attention
        _compute_attention_mask = _merged

    return MultiHeadAttention


def __getattr__(name: str) -> Any:
    """``MultiHeadAttention``, made when it is first asked for: Keras is imported then."""
    if name == "MultiHeadAttention":
        return _layer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def enable(backend: str = "auto") -> None:
    """Makes Keras' ``MultiHeadAttention`` and ``GroupQueryAttention`` attend here, layers of existing models included, until ``disable``.

    Args:
        backend: of ``fused_attn.attention``: "auto", or a name that runs or raises. Enabling again only changes it.

    Raises:
        RuntimeError: Keras does not run on torch.
        ValueError: there is no such backend.
    """
    keras = _keras()
    _enabled["backend"] = require_name(backend)
    ours = {keras.layers.MultiHeadAttention: _compute_attention, keras.layers.GroupQueryAttention: _compute_grouped_attention}
    for layer_class, compute in ours.items():
        if (layer_class, _METHODS[0]) not in _replaced:
            own = {name: getattr(layer_class, name) for name in _METHODS}
            _replaced.update({(layer_class, name): method for name, method in own.items()})
            # On the class itself, so that Keras sees no override of its method and leaves a causal mask to it.
            layer_class._compute_attention = compute
            layer_class._compute_attention_mask = _unless_overridden(compute, own["_compute_attention_mask"])


def _unless_overridden(compute: Any, keras_own: Any) -> Any:
    """Masks side by side for the method they are meant for, Keras' tensor for one of a subclass."""

    def _compute_attention_mask(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (_merged if type(self)._compute_attention is compute else keras_own)(self, *args, **kwargs)

    return _compute_attention_mask


def disable() -> None:
    """Undoes ``enable``; does nothing when nothing is enabled."""
    for (layer_class, name), method in _replaced.items():
        setattr(layer_class, name, method)
    _replaced.clear()
