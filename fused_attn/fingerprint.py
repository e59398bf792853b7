"""Which code captured a graph.

Compilers keep graphs on disk and find them again by what they say, and a graph says nothing of the formulas that traced its backward, or
of the ops' arguments, as they were then.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path


def fingerprint(folder: Path) -> str:
    """Twelve hexadecimal digits that change with any Python file below a folder (128 files: 4 ms)."""
    digest = blake2b(digest_size=6)
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


PACKAGE = fingerprint(Path(__file__).parent)
