"""How much worse is too much: defaults, and limits per case from a TOML file."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fused_attn_bench.text import seconds, size

# A case that holds so many bytes more, and such a part more, is heavier; a file's limit stands alone.
MEMORY, MEMORY_PART = 4 * 2**20, 0.01
# Rounding: an error that grows by less than this part of plain torch's is no less exact, whatever the factor.
ROUNDING = 0.25


@dataclass(frozen=True)
class Limits:
    """What B may exceed A by on one case.

    Args:
        time: a fraction of the time.
        memory: bytes of peak memory; None for 4 MiB or 1 % of A's, whichever is more.
        host: seconds until a call returns, where that is not the time itself.
        error: a factor of the distance from float64, beyond rounding.
    """

    time: float = 0.03
    memory: float | None = None
    host: float = 10e-6
    error: float = 1.5

    def heavier(self, before: int | None, after: int | None) -> str:
        """What is too much of peak memory; empty where nothing is, or it is not known.

        Example:
            >>> Limits().heavier(2**20, 33 * 2**20), Limits().heavier(2**30, 2**30 + 2**23), Limits(memory=0).heavier(0, 1024)
            ('peak memory 33.0 MiB, was 1.00 MiB: more than 4.00 MiB above', '', 'peak memory 1.00 KiB, was 0.00 KiB: more than 0.00 KiB above')
        """
        if before is None or after is None:
            return ""
        limit = max(MEMORY, MEMORY_PART * before) if self.memory is None else self.memory
        return f"peak memory {size(after)}, was {size(before)}: more than {size(limit)} above" if after - before > limit else ""

    def less_exact(self, before: float | None, after: float | None, plain: float | None) -> str:
        """What is too much of an error; ``plain`` is that of plain torch.

        Example:
            >>> Limits().less_exact(1e-7, 2e-7, 1e-7), Limits().less_exact(1e-9, 2e-9, 1e-7)
            ('error 2.0e-07, was 1.0e-07: more than 1.5 times', '')
        """
        if before is None or after is None:
            return ""
        worse = after > self.error * before and after - before > ROUNDING * (plain or 0.0)
        return f"error {after:.1e}, was {before:.1e}: more than {self.error:g} times" if worse else ""

    def later(self, by: float) -> str:
        """What is too much of host time, of a difference in seconds that is beyond the noise.

        Example:
            >>> Limits().later(20e-6), Limits().later(8e-6)
            ('host time 20.0 µs more per call: more than 10.0 µs above', '')
        """
        return f"host time {seconds(by)} more per call: more than {seconds(self.host)} above" if by > self.host else ""


def amount(text: object, units: Mapping[str, float], example: str) -> float:
    """A number with a unit, in the unit that has 1.

    Raises:
        ValueError: it is none.

    Example:
        >>> amount("32 MiB", {"MiB": 2.0**20}, "32 MiB"), amount("3%", {"%": 0.01}, "3%")
        (33554432.0, 0.03)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([%A-Za-zµ]+)\s*", text) if isinstance(text, str) else None
    if found is None or found[2] not in units:
        raise ValueError(f'must be a number with one of {", ".join(units)}, like "{example}"; got {text!r}')
    return float(found[1]) * units[found[2]]


def factor(value: object) -> float:
    """A factor of at least 1.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < float("inf"):
        raise ValueError(f"must be a factor of at least 1, like 2.0; got {value!r}")
    return float(value)


KEYS: dict[str, Callable[[Any], float]] = {
    "time": lambda value: amount(value, {"%": 0.01}, "3%"),
    "memory": lambda value: amount(value, {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}, "32 MiB"),
    "host": lambda value: amount(value, {"us": 1e-6, "µs": 1e-6, "ms": 1e-3}, "20 us"),
    "error": factor,
}


@dataclass(frozen=True)
class Rules:
    """Limits by case: of all patterns that a case matches the last one that has a key decides it, so that a file goes from the general to the special.

    Example:
        >>> rules = Rules(Limits(), (("*", {"time": 0.05}), ("softmax/*", {"time": 0.1})))
        >>> rules("softmax/masked/fwd/float32/1x1x8x8").time, rules("attention/plain/fwd/float32/1x1x8x8").time
        (0.1, 0.05)
    """

    default: Limits = field(default_factory=Limits)
    patterns: tuple[tuple[str, Mapping[str, float]], ...] = ()

    def __call__(self, case: str) -> Limits:
        values = vars(self.default)
        for pattern, keys in self.patterns:
            if fnmatch.fnmatchcase(case, pattern):
                values = {**values, **keys}
        return Limits(**values)

    def idle(self, cases: Iterable[str]) -> list[str]:
        """The patterns that match none of these cases, as one that is misspelt.

        Example:
            >>> Rules(patterns=(("softmax/*", {"time": 0.1}), ("sofmax/*", {"time": 0.2}))).idle(["softmax/masked/fwd/float32/1x1x8x8"])
            ['sofmax/*']
        """
        names = list(cases)
        return [pattern for pattern, _ in self.patterns if not fnmatch.filter(names, pattern)]


def read(path: Path, default: Limits) -> Rules:
    """The rules of a file: a table for each pattern of case names, with ``time``, ``memory``, ``host`` and ``error``.

    Raises:
        ValueError: it cannot be read, or a value is none; file, pattern and key are named.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a TOML file of limits; got: {error}") from None
    patterns = []
    for pattern, keys in tables.items():
        if not isinstance(keys, dict):
            raise ValueError(
                f'{path} must have each limit in a table named after cases, like ["softmax/*"]; got {pattern} = {keys!r} outside of any'
            )
        found = {}
        for key, value in keys.items():
            if key not in KEYS:
                raise ValueError(f'{path}, ["{pattern}"]: a limit must be one of {", ".join(KEYS)}; got {key}')
            try:
                found[key] = KEYS[key](value)
            except ValueError as error:
                raise ValueError(f'{path}, ["{pattern}"], {key} {error}') from None
        patterns.append((pattern, found))
    return Rules(default, tuple(patterns))
