"""The compiled half of the cpu backend: the library of ``csrc/cpu``, found, checked and loaded once.

``FUSED_ATTN_CPU_LIBRARY`` names a library built elsewhere, ``FUSED_ATTN_CPU`` the instruction set whose kernels run (avx512, avx2,
portable), or "off"; both are read when the library is first asked for. Where there is none the backend runs on plain torch operations,
and ``failure`` says why.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fused_attn import build_cpu

OFF = "off"
NOT_BUILT = "the CPU library is not built (python -m fused_attn build --cpu)"
_PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class _State:
    """What is in force: the library or the reason why there is none, the instruction set that runs, and all that could."""

    library: ctypes.CDLL | None
    failure: str
    isa: str = ""
    isas: tuple[str, ...] = ()


def library_path() -> Path:
    """Where the library lies: ``FUSED_ATTN_CPU_LIBRARY``, or beside the package's modules."""
    return Path(os.environ.get("FUSED_ATTN_CPU_LIBRARY") or _PACKAGE / build_cpu.LIBRARY)


def _is_whole(path: Path) -> bool:
    """Whether a file is as long as its ELF header says: the loader maps a shorter one all the same, and the process dies of it."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:6] != b"\x7fELF\x02\x01":
        return True  # no ELF of 64 bits: the loader reads all that it maps, or refuses
    if len(head) < 64:
        return False
    (table,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return path.stat().st_size >= int(table) + int(size) * int(count)


def _open(path: Path) -> ctypes.CDLL:
    """The library with its signatures; OSError says why it is none."""
    if not _is_whole(path):
        raise OSError("the file ends too early")
    library = ctypes.CDLL(str(path.resolve()))  # a bare name would be looked for in the loader's folders
    try:
        for name in ("isas", "isa", "sources"):
            getattr(library, f"fused_attn_cpu_{name}").restype = ctypes.c_char_p
        library.fused_attn_cpu_use.argtypes = (ctypes.c_char_p,)
    except AttributeError as error:
        raise OSError(f"it is another library ({error})") from None
    return library


@functools.cache
def _find(path: Path) -> _State:
    """The library of a path with nothing chosen yet, one object however often it is asked for."""
    if not path.is_file() and os.environ.get("FUSED_ATTN_CPU_LIBRARY"):
        return _State(
            None, f"FUSED_ATTN_CPU_LIBRARY must name a CPU library; got {path}, which is no file (unset it, or build there with --out)"
        )
    if not path.is_file():
        left = path.with_name(build_cpu.FAILURE)
        reason = f"; the build during installation failed: {left.read_text().strip().rstrip('.')}" if left.is_file() else ""
        return _State(None, f"{NOT_BUILT}{reason}")
    try:
        library = _open(path)
    except OSError as error:
        return _State(None, f"the CPU library {path} does not load: {error}; build it anew (python -m fused_attn build --cpu)")
    folder = build_cpu.sources()
    if folder is not None and library.fused_attn_cpu_sources().decode() != build_cpu.sources_digest(folder):
        return _State(None, f"the CPU library {path} is older than its sources in {folder} (python -m fused_attn build --cpu)")
    return _State(library, "", isas=tuple(library.fused_attn_cpu_isas().decode().split(",")))


def _choose(found: _State, isa: str) -> _State:
    """A library with the kernels of an instruction set, by default the best one."""
    if found.library is None:
        return found
    wanted = isa or found.isas[0]
    if not found.library.fused_attn_cpu_use(wanted.encode()):
        said = f"the instruction set (FUSED_ATTN_CPU) must be off or one that the library holds and this CPU runs, {', '.join(found.isas)}"
        return _State(None, f"{said}; got {isa!r}", isas=found.isas)
    return replace(found, isa=wanted)


_state: _State | None = None


def _current() -> _State:
    global _state
    if _state is None:
        wanted = os.environ.get("FUSED_ATTN_CPU", "")
        off = _State(None, "FUSED_ATTN_CPU=off keeps the CPU library out")
        _state = off if wanted == OFF else _choose(_find(library_path()), wanted)
    return _state


def load() -> ctypes.CDLL | None:
    """The library, or None where plain torch operations have to serve; what a compiler traces asks ``isa`` instead."""
    return (_state or _current()).library


def failure() -> str:
    """Why there is no library, in one sentence; an empty string where there is one."""
    return (_state or _current()).failure


def isa() -> str:
    """The instruction set whose kernels run: avx512, avx2 or portable; an empty string without a library."""
    return (_state or _current()).isa


def isas() -> tuple[str, ...]:
    """The instruction sets that the library holds and this CPU runs, best first."""
    return (_state or _current()).isas


@functools.cache
def _passes(library: ctypes.CDLL, name: str) -> Any:
    return getattr(library, f"fused_attn_cpu_{name}")


def run(name: str, fields: bytes) -> None:
    """Runs a pass of the library on the struct that its C function takes.

    Raises:
        MemoryError: a thread could not have its share of memory.
    """
    library = load()
    assert library is not None
    if _passes(library, name)(fields):
        raise MemoryError(
            f"{name} must have memory for its threads' tiles, O(length) each; got none. Use fewer threads or shorter sequences."
        )


# torch.compile runs them while tracing instead of tracing through the load (what torch.compiler.assume_constant_result sets).
failure._dynamo_marked_constant = True  # type: ignore[attr-defined]
isa._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def use(isa: str) -> Iterator[None]:
    """Kernels of another instruction set, or "off", inside a ``with``: for tests, in every thread of the process.

    Raises:
        RuntimeError: there is no library, or it holds no such kernels for this CPU.
    """
    global _state
    before = _current()
    after = _State(None, "the CPU library is turned off") if isa == OFF else _choose(_find(library_path()), isa)
    if isa != OFF and after.library is None:
        raise RuntimeError(after.failure)
    _state = after
    try:
        yield
    finally:
        _state = before
        if before.library is not None:
            before.library.fused_attn_cpu_use(before.isa.encode())
