"""The native library for tests: compiled once, whichever worker asks first, into build/native/<flavour>."""

from __future__ import annotations

import fcntl
import functools
from pathlib import Path

from fused_attn import build


@functools.cache
def library(flavour: str) -> Path:
    """The library's path; its objects and the compiler's reports (.log) lie beside it."""
    folder = build.ROOT / "build" / "native"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{flavour}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build.build(flavour)
