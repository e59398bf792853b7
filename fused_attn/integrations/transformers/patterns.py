"""What a mask function of the transformers package says, found by calling it once with symbols instead of indices.

Its functions take indices (batch, head, query, key) and compare them. Called with symbols, those that compare positions alone leave a
window, which costs nothing per pair; a function that does anything else is left to whoever evaluates it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class _NoWindow(Exception):
    """The function does something that no window says."""


def _smaller(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


@dataclass(frozen=True)
class Window:
    """Keys from ``left`` before the query's position to ``right`` after it; None for no limit. Also what a comparison of symbols gives."""

    left: int | None = None
    right: int | None = None

    def __and__(self, other: Any) -> Window:
        if other is True:
            return self
        if not isinstance(other, Window):
            raise _NoWindow
        return Window(_smaller(self.left, other.left), _smaller(self.right, other.right))

    __rand__ = __and__

    def to(self, *_: Any, **__: Any) -> Window:
        """The same: functions move what they get to a device or dtype."""
        return self

    @property
    def device(self) -> None:
        """What functions hand to ``to``."""
        return None

    def __bool__(self) -> bool:
        raise _NoWindow


@dataclass(frozen=True, eq=False)
class _Index:
    """query * q + key * k + shift, for positions q and k >= 0."""

    query: int
    key: int
    shift: int = 0

    def new_ones(self, *_: Any, **__: Any) -> Window:
        """True, as the functions begin a conjunction."""
        return Window()

    def __add__(self, other: Any) -> _Index:
        if isinstance(other, _Index):
            return _Index(self.query + other.query, self.key + other.key, self.shift + other.shift)
        return _Index(self.query, self.key, self.shift + _integer(other))

    __radd__ = __add__

    def __neg__(self) -> _Index:
        return _Index(-self.query, -self.key, -self.shift)

    def __sub__(self, other: Any) -> _Index:
        return self + (-other if isinstance(other, _Index) else -_integer(other))

    def __rsub__(self, other: Any) -> _Index:
        return -self + other

    def __abs__(self) -> _Distance:
        return _Distance(self)

    def __le__(self, other: Any) -> Window:
        return (self - other).at_most_zero()

    def __lt__(self, other: Any) -> Window:
        return (self - other + 1).at_most_zero()

    def __ge__(self, other: Any) -> Window:
        return (-(self - other)).at_most_zero()

    def __gt__(self, other: Any) -> Window:
        return (-(self - other) + 1).at_most_zero()

    def __eq__(self, other: object) -> Any:
        raise _NoWindow

    __ne__ = __eq__
    __hash__ = None  # type: ignore[assignment]

    def at_most_zero(self) -> Window:
        """Where it is <= 0: k - q <= -shift, q - k <= -shift, or everywhere."""
        signs = (self.query, self.key)
        if self.shift <= 0 and signs == (-1, 1):
            return Window(right=-self.shift)
        if self.shift <= 0 and signs == (1, -1):
            return Window(left=-self.shift)
        if self.shift <= 0 and max(signs) <= 0:
            return Window()
        raise _NoWindow


@dataclass(frozen=True)
class _Distance:
    """The absolute value of an index."""

    of: _Index

    def __le__(self, other: Any) -> Window:
        return (self.of <= other) & (-self.of <= other)

    def __lt__(self, other: Any) -> Window:
        return (self.of < other) & (-self.of < other)


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _NoWindow
    return value


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
        found = mask_function(_Index(0, 0), _Index(0, 0), _Index(1, 0), _Index(0, 1))
    except Exception:  # whatever a function does with symbols that are no tensors
        return None
    return found if isinstance(found, Window) else None
