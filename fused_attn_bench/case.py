"""What one line of a benchmark measures, and its name."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

FORM = "op/variant/mode/dtype/1x2x3"
# The form of one part; a size has no sign and no leading zero.
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_NAME = re.compile(rf"({_WORD})/({_WORD})/({_WORD})/({_WORD})/([1-9][0-9]*(?:x[1-9][0-9]*)*)((?:,[A-Za-z_]\w*=[1-9][0-9]*)*)")


@dataclass(frozen=True)
class Case:
    """An operation on inputs of one kind, dtype and size.

    Args:
        op: name of an ``Operation``.
        variant: one of its variants.
        mode: "fwd", "bwd" (the graph of a forward done before) or "fwd+bwd".
        dtype: of the floating inputs, as torch names it.
        shape: sizes along the operation's axes.
        options: sizes by name that differ from what the operation makes of the shape.
    """

    op: str
    variant: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    options: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """A readable id, which ``Case.parse`` takes back.

        Example:
            >>> Case("attention", "causal", "fwd", "float32", (1, 4, 1, 64), (("kv_len", 2048),)).name
            'attention/causal/fwd/float32/1x4x1x64,kv_len=2048'
        """
        return "/".join((self.op, self.variant, self.mode, self.dtype, self.sizes))

    @property
    def sizes(self) -> str:
        """The last part of the name."""
        return ",".join(("x".join(map(str, self.shape)), *(f"{name}={size}" for name, size in self.options)))

    @staticmethod
    def parse(name: str) -> Case:
        """A case from its name; whether its operation knows it is for ``Operation.case`` to say.

        Raises:
            ValueError: the name is none.

        Example:
            >>> Case.parse("rmsnorm/plain/fwd/float32/64x1024").shape
            (64, 1024)
        """
        found = _NAME.fullmatch(name) if isinstance(name, str) else None
        if found is None:
            raise ValueError(f"a case is named {FORM}, with positive sizes, perhaps followed by ,name=4; got {name!r}")
        op, variant, mode, dtype, sizes, options = found.groups()
        pairs = [pair.split("=") for pair in options.split(",")[1:]]
        return Case(op, variant, mode, dtype, tuple(map(int, sizes.split("x"))), tuple((key, int(size)) for key, size in pairs))


@functools.lru_cache(maxsize=4096)
def parsed(name: str) -> Case | None:
    """A case from its name; None for a name that is none, as an imported file may have."""
    try:
        return Case.parse(name)
    except ValueError:
        return None
