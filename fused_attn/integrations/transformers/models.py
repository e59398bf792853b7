"""Which models of the transformers package leave their masks to the attention that they ask the interface for."""

from __future__ import annotations

import sys
from typing import Any

# Models that ask the interface and put a float mask together with numbers of their own before they do, by the type of their configuration.
_COMPUTE_WITH_THEIR_MASK = ("deepseek_v4",)
_known: dict[type, bool] = {}


def leaves_masks_to_attention(config_class: type) -> bool:
    """Whether models of a configuration hand their mask to the interface's function as it is; also where no model of it is loaded.

    Others compute attention themselves, some or all of it, and add the mask to the scores. The package takes any registered name for them.

    Example:
        >>> leaves_masks_to_attention(int)
        True
    """
    if config_class not in _known:
        found = _looked_up(config_class)
        if found is None:  # its models may come yet
            return True
        _known[config_class] = found
    return _known[config_class]


# torch.compile runs it while tracing: Dynamo cannot walk over modules.
leaves_masks_to_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _looked_up(config_class: type) -> bool | None:
    """None where no model is loaded; a user's configuration is looked up as the package's that it derives from."""
    if getattr(config_class, "model_type", None) in _COMPUTE_WITH_THEIR_MASK:
        return False
    for base in config_class.__mro__:
        beside = base.__module__.rpartition(".")[0] + ".modeling_"
        modules = [module for name, module in list(sys.modules.items()) if name.startswith(beside)]
        models = [m for module in modules for m in vars(module).values() if hasattr(m, "_can_set_attn_implementation")]
        own: list[Any] = [m for m in models if getattr(m, "config_class", None) is base]
        if own:
            return any(m._can_set_attn_implementation() and (m._supports_attention_backend or m._supports_sdpa) for m in own)
    return None
