"""What a mask function of the transformers package says, found by calling it once with symbols instead of indices.

Its functions take indices (batch, head, query, key) and compare them. Called with symbols, those that compare positions alone leave a
window, which costs nothing per pair; a function that does anything else is left to whoever evaluates it. Symbols are tensors, so that
inside a compiler a function may index with them: what it gets meets a symbol next, and there the attempt ends by an exception that can
be caught.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class NoWindowError(Exception):
    """The function does something that no window says."""


@dataclass(frozen=True)
class Window:
    """Keys from ``left`` before the query's position to ``right`` after it; None for no limit."""

    left: int | None = None
    right: int | None = None

    def __and__(self, other: Window) -> Window:
        return Window(_smaller(self.left, other.left), _smaller(self.right, other.right))


def _smaller(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


@dataclass(frozen=True)
class Number:
    """query * q + key * k + shift for positions q and k >= 0 that are not known, or the absolute value of that."""

    query: int
    key: int
    shift: int = 0
    is_distance: bool = False

    def plus(self, other: Number, sign: int = 1) -> Number:
        """The sum, or the difference."""
        if self.is_distance or other.is_distance:
            raise NoWindowError
        return Number(self.query + sign * other.query, self.key + sign * other.key, self.shift + sign * other.shift)

    def at_most(self, other: Number, less: bool) -> Window:
        """Where it is <= the other, or less."""
        linear = Number(self.query, self.key, self.shift)
        below = linear.plus(other, -1).at_most_zero(less)
        return below & Number(0, 0).plus(linear, -1).plus(other, -1).at_most_zero(less) if self.is_distance else below

    def at_most_zero(self, less: bool) -> Window:
        """Where k - q <= -shift, q - k <= -shift, or everywhere."""
        limit = -self.shift - less
        if limit >= 0 and (self.query, self.key) == (-1, 1):
            return Window(right=limit)
        if limit >= 0 and (self.query, self.key) == (1, -1):
            return Window(left=limit)
        if limit >= 0 and self.query <= 0 and self.key <= 0:
            return Window()
        raise NoWindowError


class Symbol(Tensor):
    """A number that is not known, or what comparing such numbers allows.

    Example:
        >>> q_idx, kv_idx = Symbol.of(Number(1, 0)), Symbol.of(Number(0, 1))
        >>> (kv_idx <= q_idx).meaning, (abs(q_idx - kv_idx) < 3).meaning
        (Window(left=None, right=0), Window(left=2, right=2))
    """

    meaning: Number | Window

    @staticmethod
    def of(meaning: Number | Window) -> Symbol:
        """A symbol with this meaning."""
        # Of one dimension: a compiler would ask an index without any for its value.
        result: Symbol = torch.Tensor._make_subclass(Symbol, torch.zeros((1,), dtype=torch.int64, device="cpu"))
        result.meaning = meaning
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name == "__get__":  # device and dtype, which functions hand to ``to``
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        if name == "to":
            return args[0]
        if name == "new_ones":
            return Symbol.of(Window())
        if kwargs:  # as alpha of torch.sub
            raise NoWindowError
        if name in ("abs", "__abs__"):
            number = _number(args[0])
            return Symbol.of(Number(number.query, number.key, number.shift, True))
        if name in _CONJUNCTIONS:
            return Symbol.of(_window(args[0]) & _window(args[1]))
        if name in _OPERATORS:
            return Symbol.of(_combined(*_OPERATORS[name], args))
        raise NoWindowError


_CONJUNCTIONS = ("__and__", "__rand__", "bitwise_and", "logical_and")
# Of each operator its kind, and whether its sides change places.
_OPERATORS = {
    "add": ("+", False), "__add__": ("+", False), "__radd__": ("+", False),
    "sub": ("-", False), "__sub__": ("-", False), "rsub": ("-", True), "__rsub__": ("-", True),
    "le": ("<=", False), "__le__": ("<=", False), "ge": ("<=", True), "__ge__": ("<=", True),
    "lt": ("<", False), "__lt__": ("<", False), "gt": ("<", True), "__gt__": ("<", True),
}  # fmt: skip


def _combined(kind: str, changed: bool, args: tuple[Any, ...]) -> Number | Window:
    left, right = _number(args[0]), _number(args[1])
    if changed:
        left, right = right, left
    if kind in ("+", "-"):
        return left.plus(right, 1 if kind == "+" else -1)
    return left.at_most(right, kind == "<")


def _number(value: Any) -> Number:
    if isinstance(value, Symbol) and isinstance(value.meaning, Number):
        return value.meaning
    if isinstance(value, int) and not isinstance(value, bool):
        return Number(0, 0, value)
    raise NoWindowError


def _window(value: Any) -> Window:
    if isinstance(value, Symbol) and isinstance(value.meaning, Window):
        return value.meaning
    raise NoWindowError


def window_of(mask_function: Callable[..., Any]) -> Window | None:
    """The window that a mask function allows, or None where it is none or cannot be told.

    Args:
        mask_function: (batch, head, query, key) indices to what may attend, as ``transformers.masking_utils`` builds them.

    Example:
        >>> window_of(lambda b, h, q, kv: (kv <= q) & (kv > q - 4))
        Window(left=3, right=0)
        >>> window_of(lambda b, h, q, kv: kv % 2 == 0) is None
        True
    """
    try:
        other = Symbol.of(Window())  # neither a number nor compared
        return _window(mask_function(other, other, Symbol.of(Number(1, 0)), Symbol.of(Number(0, 1))))
    except Exception:  # whatever a function does with symbols; and where a mode makes tensors of its own class, there are none
        return None
