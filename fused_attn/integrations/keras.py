"""Keras' own attention layers on this package's kernels, for Keras 3 on its torch backend; for torch without Keras see ``fused_attn.nn.keras``.

``MultiHeadAttention`` here is a subclass of Keras' layer; ``enable()`` serves the layers of models that exist, and ``disable()`` gives Keras' own
computation back. Neither ever holds a causal or sliding-window mask as a tensor. Results are Keras', rows without keys included; what Keras refuses
because its fused kernel gives no scores works. A subclass that overrides ``_compute_attention`` keeps its own, and its masks as tensors; a subclass or
an instance that overrides a method which makes masks or probabilities (``_compute_attention_mask``, ``_masked_softmax``, ...) is left to Keras.

Example:
    >>> enable()  # doctest: +SKIP
    >>> model.fit(x, y)  # doctest: +SKIP
    >>> disable()  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from fused_attn.backends import require_name
from fused_attn.dropout import Dropout
from fused_attn.nn.keras.axes import Axes
from fused_attn.nn.keras.masks import Masks
from fused_attn.nn.keras.projected import attend_over
from fused_attn.nn.keras.rows import of_fused_path
from fused_attn.nn.keras.seeds import mixed

_METHODS = ("call", "_compute_attention_mask", "_compute_attention")
# Methods of Keras' layers that its own attention goes through, and this package's does not.
_READ_WHEN_ATTENDING = (
    "_compute_attention_mask", "_compute_causal_mask", "_compute_sliding_window_mask", "_masked_softmax", "_build_attention",
)  # fmt: skip
_READ = ("_compute_attention", *_READ_WHEN_ATTENDING)
_OWN = ("keras.src.layers.attention.", __name__)
_replaced: dict[tuple[type, str], Any] = {}
_enabled = {"backend": "auto"}


def _keras() -> Any:
    import keras

    if keras.backend.backend() != "torch":
        raise RuntimeError(
            f"Keras must run on torch; got {keras.backend.backend()}. Set the environment variable KERAS_BACKEND to torch before Keras is imported."
        )
    return keras


class _Asked(NamedTuple):
    """An ``attention_mask`` on its way through Keras' own ``call``, which asks for all masks in one: the answer need be no tensor."""

    attention_mask: Any


def _is_keras_own(layer: Any, names: Sequence[str] = _READ) -> bool:
    """Whether neither the layer's class nor the layer itself overrides any of these methods, and its scale is a number."""
    scale = getattr(layer, "_inverse_sqrt_key_dim", None) or getattr(layer, "_inverse_sqrt_head_dim", None)
    methods = [getattr(type(layer), name, None) for name in names]
    return isinstance(scale, (int, float)) and all(
        name not in vars(layer) and (method is None or str(getattr(method, "__module__", None)).startswith(_OWN))
        for name, method in zip(names, methods, strict=True)
    )


def _attended(layer: Any, tensors: tuple[Tensor, Tensor, Tensor], masks: Masks, training: Any, return_scores: bool) -> Any:
    """What Keras' ``_compute_attention`` gives for projected tensors [batch, length, heads, dim]."""
    query = tensors[0]
    axes = Axes(tuple(getattr(layer, "_attention_axes", (1,))), query.dim())
    rate = layer.dropout
    dropout = Dropout(rate, seed=mixed(layer._dropout_layer.seed_generator.next()).to(query.device)) if rate > 0 and training else None
    is_explicit = not layer._flash_attention and (return_scores or rate > 0 or query.dim() != 4)
    scale = getattr(layer, "_inverse_sqrt_key_dim", None) or layer._inverse_sqrt_head_dim
    return attend_over(
        axes, tensors, masks, scale=float(scale), dropout=dropout, empty_rows="zero" if is_explicit else of_fused_path(query.dtype),
        return_probs=return_scores, backend=getattr(layer, "_fused_backend", _enabled["backend"]),
    )  # fmt: skip


def _methods(base: Any) -> dict[str, Any]:
    """What takes the place of three methods of a layer of Keras, and leaves layers that override what these read to Keras' own."""
    own = {name: _replaced.get((base, name), getattr(base, name)) for name in _METHODS}

    def call(
        self: Any, query: Any, value: Any, key: Any = None, query_mask: Any = None, value_mask: Any = None, key_mask: Any = None,
        attention_mask: Any = None, return_attention_scores: bool = False, training: Any = None, use_causal_mask: bool = False,
    ) -> Any:  # fmt: skip
        if _is_keras_own(self):
            attention_mask = _Asked(attention_mask)
        masks = (query_mask, value_mask, key_mask, attention_mask)
        return own["call"](self, query, value, key, *masks, return_attention_scores, training, use_causal_mask)

    def _compute_attention_mask(
        self: Any, query: Any, value: Any, query_mask: Any = None, value_mask: Any = None, key_mask: Any = None,
        attention_mask: Any = None, use_causal_mask: bool = False,
    ) -> Any:  # fmt: skip
        if not isinstance(attention_mask, _Asked):
            return own["_compute_attention_mask"](self, query, value, query_mask, value_mask, key_mask, attention_mask, use_causal_mask)
        window = getattr(self, "_sliding_window", None) or getattr(self, "sliding_window", None)
        return Masks(query_mask, value_mask, key_mask, attention_mask.attention_mask, use_causal_mask, window)

    def _compute_attention(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, training: Any = None,
        return_attention_scores: bool = False, use_causal_mask: bool = False,
    ) -> Any:  # fmt: skip
        if not _is_keras_own(self, _READ_WHEN_ATTENDING):
            return own["_compute_attention"](self, query, key, value, attention_mask, training, return_attention_scores, use_causal_mask)
        return _attended(self, (query, key, value), Masks.of(attention_mask, use_causal_mask), training, return_attention_scores)

    def _compute_grouped_attention(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, training: Any = None, use_causal_mask: bool = False
    ) -> Any:  # fmt: skip
        # Keras keeps on the layer whether scores are wanted.
        if not _is_keras_own(self, _READ_WHEN_ATTENDING):
            return own["_compute_attention"](self, query, key, value, attention_mask, training, use_causal_mask)
        return _attended(self, (query, key, value), Masks.of(attention_mask, use_causal_mask), training, self._return_attention_scores)

    is_grouped = base is _keras().layers.GroupQueryAttention
    attend = _compute_grouped_attention if is_grouped else _compute_attention
    return {"call": call, "_compute_attention_mask": _compute_attention_mask, "_compute_attention": attend}


@cache
def _layer_class() -> Any:
    keras = _keras()
    base: Any = keras.layers.MultiHeadAttention

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

    for name, method in _methods(base).items():
        setattr(MultiHeadAttention, name, method)
    MultiHeadAttention.__qualname__ = "MultiHeadAttention"  # pickle looks it up in the module
    return keras.saving.register_keras_serializable(package="fused_attn")(MultiHeadAttention)


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
    for layer_class in (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention):
        if (layer_class, "call") not in _replaced:
            methods = _methods(layer_class)
            _replaced.update({(layer_class, name): getattr(layer_class, name) for name in methods})
            # On the class itself, so that Keras sees no override of its method.
            for name, method in methods.items():
                setattr(layer_class, name, method)


def disable() -> None:
    """Undoes ``enable``; does nothing when nothing is enabled."""
    for (layer_class, name), method in _replaced.items():
        setattr(layer_class, name, method)
    _replaced.clear()
