"""Instructions of compiled kernels as a metric: a count that no noise moves, where there is no GPU as well."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)")


def instructions(kernel: Any, name: str = "") -> int:
    """How many instructions a kernel has, or those whose name begins so.

    As a metric of an operation: ``metrics={"HMMA": lambda problem, results: instructions(my_kernel, "HMMA")}``.

    Args:
        kernel: a path to a cubin, the bytes of one, or a function under ``triton.jit``, of which every variant that has been compiled in
            this process counts.
        name: beginning of the instructions' names: "HMMA", "LDL"; "" for all.

    Raises:
        ValueError: nothing has been compiled, or it cannot be disassembled.
    """
    return sum(found.startswith(name) for cubin in _cubins(kernel) for found in names(cubin))


def names(cubin: bytes) -> list[str]:
    """The names of a cubin's instructions, in order, without predicates: "HMMA.16816.F32.BF16"."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(_disassembler()), "-c", file.name], capture_output=True, text=True, check=False)
    found = _INSTRUCTION.findall(done.stdout)
    if done.returncode or not found:
        raise ValueError(f"instructions are counted in a cubin; nvdisasm says: {(done.stderr or 'it has none').strip()}")
    return found


def _disassembler() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


def _cubins(kernel: Any) -> list[bytes]:
    if isinstance(kernel, str | Path):
        return [Path(kernel).read_bytes()]
    if isinstance(kernel, bytes):
        return [kernel]
    caches = getattr(kernel, "device_caches", {})
    compiled = [entry.asm["cubin"] for cache in caches.values() for entry in cache[0].values() if "cubin" in getattr(entry, "asm", {})]
    if not compiled:
        raise ValueError(f"a kernel must have been compiled for an NVIDIA GPU before its instructions are counted; got {kernel!r}")
    return compiled
