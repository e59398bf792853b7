"""Attention for models of the transformers package: ``register()``, then ``attn_implementation="fused_attn"``.

Existing models take it by ``model.set_attn_implementation("fused_attn")``, new ones by ``attn_implementation=`` of ``from_pretrained`` and
``from_config``. Weights come with the fused path: ``model(..., output_attentions=True)``.

Example:
    >>> register()  # doctest: +SKIP
    >>> model.set_attn_implementation("fused_attn")  # doctest: +SKIP
    >>> model(**batch, output_attentions=True).attentions[0].shape  # doctest: +SKIP
    torch.Size([2, 12, 17, 17])
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from fused_attn.backends import require_name
from fused_attn.integrations.transformers.attention import Attend
from fused_attn.integrations.transformers.masks import row_mask

NAME = "fused_attn"


def _interfaces() -> tuple[Any, Any]:
    transformers = import_module("transformers")
    return transformers.AttentionInterface, transformers.AttentionMaskInterface


def _collector() -> Any:
    """Where models say what their hooks collect; None where this version of the package has none."""
    try:
        return import_module("transformers.utils.output_capturing")._active_collector
    except (ImportError, AttributeError):
        return None


def register(backend: str = "auto") -> None:
    """Makes "fused_attn" known to transformers, its attention and its masks; doing so again only changes the backend.

    Args:
        backend: "auto", or a name that runs or raises, never falls back.

    Raises:
        ValueError: there is no such backend.
        ImportError: transformers is not installed.

    Example:
        >>> register(backend="cpu")  # doctest: +SKIP
    """
    require_name(backend)
    attention, masks = _interfaces()
    attention.register(NAME, Attend(backend, _collector()))
    # Without a mask function of the same name transformers would leave masks out without a word.
    masks.register(NAME, partial(row_mask, added_mask=import_module("transformers.masking_utils").eager_mask))


def unregister() -> None:
    """Takes "fused_attn" away again; does nothing where it is not known. Models set to it then fail at their next call.

    Raises:
        ImportError: transformers is not installed.
    """
    for interface in _interfaces():
        interface._global_mapping.pop(NAME, None)
