"""The normal form of one score modification or scoring: a name, numbers and tensors, and how they make up the author's object again."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KernelScore:
    """One score modification or scoring: the name a backend resolves, its numbers and its tensors, in the order of its fields.

    Args:
        name: what backends resolve.
        scalars: floats, and ints where ``layout`` says so.
        tensors: [batch|1, heads|1, q_len|1, kv_len|1] without a layout, in the author's shapes with one.
        layout: one letter per field of the author's object: t a tensor, f a float, i an int, y True, x False, n None. It says that the
            author's code wants all heads at once. None where code answers for any part of the score array.

    Example:
        >>> @dataclass
        ... class Shift:
        ...     table: Tensor
        ...     width: int
        >>> score = KernelScore.of(Shift(torch.zeros(2, 9), 4), "shift")
        >>> score.scalars, score.layout, score.rebuilt(Shift).table.shape
        ((4,), 'ti', torch.Size([2, 9]))
    """

    name: str
    scalars: tuple[float, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    layout: str | None = None

    @classmethod
    def of(cls, owner: Any, name: str) -> KernelScore:
        """A dataclass taken apart, nothing reshaped or converted.

        Raises:
            TypeError: a field is no tensor, number, bool or None.
        """
        values = [(f.name, getattr(owner, f.name)) for f in fields(owner)]
        letters = [_letter(value) for _, value in values]
        for (field, value), letter in zip(values, letters, strict=True):
            if letter is None:
                raise TypeError(
                    f"{type(owner).__name__}.{field} must be a tensor, a number, a bool or None for a kernel backend; got {type(value).__name__}. "
                    "Write one field per tensor, or ask for backend='eager'."
                )
        pairs = [(value, letter) for (_, value), letter in zip(values, letters, strict=True)]
        scalars = tuple([_plain(value, letter) for value, letter in pairs if letter in ("f", "i")])
        return cls(name, scalars, tuple([value for value, letter in pairs if letter == "t"]), "".join(map(str, letters)))

    def rebuilt(self, cls: type) -> Any:
        """The author's object; its constructor is not run again, for it may convert what it is given."""
        scalars, tensors = iter(self.scalars), iter(self.tensors)
        owner: Any = object.__new__(cls)
        for field, letter in zip(fields(cls), self.layout or "", strict=True):
            value = next(tensors) if letter == "t" else next(scalars) if letter in "fi" else _CONSTANTS[letter]
            object.__setattr__(owner, field.name, value)
        return owner

    @property
    def entry(self) -> str:
        """What a string of an op's arguments says of it: name:scalars:tensors, and the layout where there is one."""
        plain = f"{self.name}:{len(self.scalars)}:{len(self.tensors)}"
        return plain if self.layout is None else f"{plain}:{self.layout}"

    @property
    def kinds(self) -> str:
        """The letters of the scalars."""
        return "f" * len(self.scalars) if self.layout is None else "".join([x for x in self.layout if x in "fi"])


_CONSTANTS = {"y": True, "x": False, "n": None}


def _letter(value: Any) -> str | None:
    """How a field's value is written in a layout; None where it cannot be."""
    if isinstance(value, Tensor):
        return "t"
    if isinstance(value, bool) or value is None:
        return "n" if value is None else "y" if value else "x"
    if isinstance(value, (int, torch.SymInt)):
        return "i"
    if isinstance(value, (float, torch.SymFloat)):
        return "f"
    if getattr(value, "shape", None) != ():
        return None
    kind = getattr(getattr(value, "dtype", None), "kind", None)  # numpy's scalars say what they are
    return {"b": "y" if value else "x", "i": "i", "u": "i", "f": "f"}.get(str(kind))


def _plain(value: Any, letter: str) -> Any:
    """A number as Python's own; symbolic ones stay."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value
    return operator.index(value) if letter == "i" else float(value)


def unlowerable(owner: Any, registry: dict[str, Any]) -> str:
    """Why a modification or scoring with code of its own has no normal form, or an empty string."""
    kind = type(owner).__name__
    if registry.get(owner.name) is not type(owner):
        whose = f"{registry[owner.name].__name__} has" if owner.name in registry else "no class has"
        return f"{kind} must have a name of its own for a kernel backend; got {owner.name!r}, which {whose}. Set name in its class"
    for f in fields(owner):
        if _letter(getattr(owner, f.name)) is None:
            got = type(getattr(owner, f.name)).__name__
            return f"{kind}.{f.name} must be a tensor, a number, a bool or None for a kernel backend; got {got}. Write one field per tensor"
    return ""


def parse(mods: str, numbers: dict[str, Iterator[float]], tensors: Iterator[Tensor]) -> Iterator[KernelScore]:
    """The inverse of ``entry``, for entries with commas between them; numbers and tensors are those of all of them in order."""
    for entry in filter(None, mods.split(",")):
        name, n_scalars, n_tensors, *layout = entry.split(":")
        kinds = "f" * int(n_scalars) if not layout else [x for x in layout[0] if x in "fi"]
        scalars = tuple([next(numbers[kind]) for kind in kinds])
        yield KernelScore(name, scalars, tuple([next(tensors) for _ in range(int(n_tensors))]), layout[0] if layout else None)
