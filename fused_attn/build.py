"""Compiles ``csrc/`` (all but ``csrc/cpu``) into one shared library with nvcc, through ninja.

Two flavours of the same sources: "release" holds machine code for sm_80, sm_90a, sm_100 and sm_120 and PTX for later chips, and no
run-time dependency but libtorch's stable ABI; "simulator" holds PTX alone and takes the CUDA run-time from the process, for a simulator of CUDA.

Nothing here imports the package, so that ``setup.py`` can load the file by its path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
LIBRARY = "_native.so"
OLDEST_CUDA = (12, 8)
GIB_PER_JOB = 3

# Each source and the macros it is compiled with, once per combination of their values.
UNITS: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda/attention.cu": {"FUSED_ATTN_DTYPE": ("float", "half", "bfloat16"), "FUSED_ATTN_HEAD_SIZE": ("256", "128", "64")},
    "cuda/dispatch.cu": {},
    "cuda/softmax.cu": {},
    "bindings.cpp": {},
}
COMMON_FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000")
# Many linkers drop a library of which no symbol is used; through libtorch the current CUDA stream is found (fused_attn/stream.h).
NEEDED = ("-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")
FLAVOURS: dict[str, tuple[str, ...]] = {
    # 8.6 and 8.9 run sm_80's machine code, 10.3 sm_100's, 12.1 sm_120's; any later chip compiles the PTX, 15 to 20 s per unit at first use.
    # Three chips share that PTX: sm_100 and sm_120 add half to a unit's CPU time (float16, head size 64: 30 to 45 s; from PTX of their own, 55).
    "release": (
        "-gencode=arch=compute_80,code=[sm_80,sm_100,sm_120,compute_80]",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-Xptxas=-v",
        "-cudart=static",
    ),
    "simulator": ("-gencode=arch=compute_80,code=compute_80", "--no-compress", "-lineinfo", "-cudart=shared"),
}


class BuildError(RuntimeError):
    """The native library cannot be built here; the message says what must hold, what was found and what to do."""


def find_nvcc() -> Path | None:
    """The CUDA compiler: of ``CUDA_HOME``, on the path, of the usual toolkit folder, or of the ``nvidia-cuda-nvcc`` wheel."""
    home, on_path, wheel = os.environ.get("CUDA_HOME"), shutil.which("nvcc"), importlib.util.find_spec("nvidia")
    candidates = [Path(home, "bin/nvcc")] if home else []
    candidates += [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        candidates += sorted(Path(folder).glob("*/bin/nvcc"))
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def require_nvcc() -> tuple[Path, str]:
    """The compiler and its version."""
    needed = ".".join(map(str, OLDEST_CUDA))
    nvcc, host = find_nvcc(), os.environ.get("NVCC_CCBIN") or "g++"
    if nvcc is None:
        raise BuildError(
            f"the native build needs nvcc of CUDA {needed} or later; found none in CUDA_HOME, on PATH, in /usr/local/cuda or in the "
            "nvidia-cuda-nvcc package. Install the CUDA toolkit, or: pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl"
        )
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"nvcc must run; {nvcc} gave: {error}. Repair the CUDA toolkit or set CUDA_HOME to another one.") from None
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_CUDA:
        version = found[0] if found else text.strip() or "nothing"
        raise BuildError(f"nvcc must be of CUDA {needed} or later; {nvcc} says {version!r}. Set CUDA_HOME to a newer toolkit.")
    if shutil.which(host) is None:
        raise BuildError(f"nvcc needs a C++ compiler; there is no {host}. Install g++, or name another compiler in NVCC_CCBIN.")
    return nvcc, f"{found[1]}.{found[2]}"


def _require_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "the native build needs torch's headers; torch is not installed. Install it first, and build with --no-build-isolation."
        )
    return Path(spec.submodule_search_locations[0])


def _require_ninja() -> list[str]:
    path = shutil.which("ninja")
    if path is None and importlib.util.find_spec("ninja") is None:
        raise BuildError("the native build needs ninja; found none on PATH and no ninja package. Install it: pip install ninja")
    return [path] if path else [sys.executable, "-m", "ninja"]


def jobs(gib_per_job: float = GIB_PER_JOB) -> int:
    """How many compilers run side by side: ``MAX_JOBS``, or as many as there are cores and memory for.

    Example:
        >>> jobs() >= 1
        True
    """
    wanted = os.environ.get("MAX_JOBS", "")
    if wanted:
        if not wanted.isdigit() or int(wanted) < 1:
            raise BuildError(f"MAX_JOBS must be a positive whole number; got {wanted!r}. Unset it to use every core.")
        return int(wanted)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / gib_per_job)))


def units() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Every object file: its name, its source, and its macros as flags.

    Example:
        >>> units()["attention_half_64.o"]
        ('cuda/attention.cu', ('-DFUSED_ATTN_DTYPE=half', '-DFUSED_ATTN_HEAD_SIZE=64'))
    """
    found = {}
    for source, macros in UNITS.items():
        for values in itertools.product(*macros.values()):
            name = "_".join((Path(source).stem, *values)) + ".o"
            found[name] = (source, tuple(f"-D{macro}={value}" for macro, value in zip(macros, values, strict=True)))
    return found


def ninja_file(flavour: str, nvcc: Path, version: str, torch: Path) -> str:
    """The build description: one compiler call per object, whose output (registers and spills) stays beside it in a .log file."""
    flags = (*COMMON_FLAGS, *FLAVOURS[flavour], f"-I{SOURCES}", f"-I{SOURCES / 'include'}", f"-I{torch / 'include'}")
    libraries = (f"-L{torch / 'lib'}", *NEEDED)
    lines = [
        f"nvcc = {shlex.quote(str(nvcc))}",
        f"# CUDA {version}: another compiler writes another file, and the version in the command makes ninja compile again.",
        "rule compile",
        f"  command = CUDA_VERSION={version} $nvcc {shlex.join(flags)} $macros -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $nvcc -shared {FLAVOURS[flavour][-1]} -o $out $in {shlex.join(libraries)}",
        "  description = $out",
    ]
    for name, (source, macros) in units().items():
        lines += [f"build {name}: compile {str(SOURCES / source).replace(' ', '$ ')}", f"  macros = {' '.join(macros)}"]
    lines += [f"build {LIBRARY}: link {' '.join(units())}", ""]
    return "\n".join(lines)


def digest(rules: str, folder: Path, paths: Iterable[Path]) -> str:
    """Of the rules by which files of a folder are compiled, and of every file's name and bytes."""
    found = hashlib.sha256(rules.encode())
    for path in sorted(p for p in paths if p.is_file()):
        found.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()


def put(library: Path, destination: Path) -> Path:
    """Copies a library to where it is used, all of it or nothing: a process that has the older one loaded keeps that."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = destination.with_suffix(f".{os.getpid()}")
    shutil.copy(library, unfinished)
    return unfinished.replace(destination)


def build(flavour: str = "release", destination: Path | None = None, verbose: bool = False) -> Path:
    """Compiles what has changed and puts the library in place; a failed build leaves an older library as it was.

    Args:
        flavour: "release" or "simulator".
        destination: the library's path; in the build folder by default.
        verbose: show the compilers' command lines.

    Raises:
        BuildError: something is missing or the compiler failed.
    """
    if not SOURCES.is_dir():
        raise BuildError(f"the native build needs the sources; there is no {SOURCES}. Build from a checkout or a source distribution.")
    ninja, torch, (nvcc, version) = _require_ninja(), _require_torch(), require_nvcc()
    folder = ROOT / "build" / "native" / flavour
    folder.mkdir(parents=True, exist_ok=True)
    library, stamp, rules = folder / LIBRARY, folder / "sources.sha256", ninja_file(flavour, nvcc, version, torch)
    # Ninja goes by file times, and another checkout of the same text has others.
    key = digest(rules, SOURCES, (p for p in SOURCES.rglob("*") if SOURCES / "cpu" not in p.parents))
    if not (library.is_file() and stamp.is_file() and stamp.read_text() == key):
        (folder / "build.ninja").write_text(rules)
        command = [*ninja, "-C", str(folder), "-j", str(jobs()), *(["-v"] if verbose else [])]
        if subprocess.run(command, check=False).returncode != 0:
            raise BuildError(
                f"the compiler must accept {SOURCES}; it failed, see above. Repair what it names, or report it with that text."
            )
        stamp.write_text(key)
    return library if destination is None else put(library, destination)


def build_extension(out_dir: Path) -> Path:
    """What ``setup.py`` calls: the release library inside the package's folder ``out_dir``."""
    return build("release", out_dir / LIBRARY)
