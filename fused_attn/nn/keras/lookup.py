"""Objects by name, class, config or as they are: what initialisers, regularisers and constraints share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, ClassVar

from fused_attn.checks import described

Config = dict[str, Any]


class Configured:
    """Base of dataclasses whose fields are their config.

    Attributes:
        module: the module of Keras that has a class of this name, for configs that Keras reads.
    """

    module: ClassVar[str] = ""

    def get_config(self) -> Config:
        """The fields by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, config: Config) -> Any:
        """The inverse of ``get_config``."""
        return cls(**config)


def snake_case(name: str) -> str:
    """A class' name as Keras spells it in lower case.

    Example:
        >>> snake_case("GlorotUniform"), snake_case("MultiHeadAttention"), snake_case("L1L2")
        ('glorot_uniform', 'multi_head_attention', 'l1l2')
    """
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


def by_name(classes: Iterable[type[Configured]], **aliases: type[Configured]) -> dict[str, type[Configured]]:
    """A table of classes by their names, by these in snake case, and by further names."""
    table = {name: cls for cls in classes for name in (cls.__name__, snake_case(cls.__name__))}
    return {**table, **aliases}


def find(kind: str, identifier: Any, table: dict[str, type[Configured]]) -> Callable[..., Any] | None:
    """What an identifier stands for: None, a name, a dict of class name and config, a class, or any callable.

    Raises:
        ValueError: nothing is known by that name, or it is no callable.
    """
    if identifier is None:
        return None
    found = identifier
    if isinstance(identifier, str):
        found = table.get(identifier)
    elif isinstance(identifier, dict):
        cls = table.get(str(identifier.get("class_name")))
        found = cls and cls.from_config(identifier.get("config") or {})
    found = found() if isinstance(found, type) else found
    if not callable(found):
        raise ValueError(
            f"{kind} must be a name, a config, a class or a callable; got {described(identifier)}. "
            f"Names are {', '.join(sorted(name for name in table if name.islower()))}."
        )
    return found  # type: ignore[no-any-return]


def serialized(found: Any) -> Any:
    """A config that Keras and ``find`` read; a callable of the user's own comes back as it is."""
    if not isinstance(found, Configured):
        return found
    return {"module": found.module, "class_name": type(found).__name__, "config": found.get_config(), "registered_name": None}
