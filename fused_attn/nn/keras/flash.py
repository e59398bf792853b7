"""The switch of Keras' configuration for flash attention, with its three functions and its two values."""

from __future__ import annotations

_state: dict[str, bool | None] = {"enabled": None}


def enable_flash_attention() -> None:
    """Lets layers that are made from now on choose for themselves, which is the state on import.

    Example:
        >>> enable_flash_attention()
        >>> is_flash_attention_enabled() is None
        True
    """
    _state["enabled"] = None


def disable_flash_attention() -> None:
    """Makes layers from now on with the flag False, unless they are given ``flash_attention=True``.

    Example:
        >>> disable_flash_attention()
        >>> is_flash_attention_enabled()
        False
        >>> enable_flash_attention()
    """
    _state["enabled"] = False


def is_flash_attention_enabled() -> bool | None:
    """None (every layer's own choice) or False, as in Keras; never True. Layers read it when they are made."""
    return _state["enabled"]
