"""Compiles ``csrc/cpu`` into one shared library with g++ or clang++ alone, in seconds.

``library.cpp`` and ``threads.cpp`` are compiled once, for any CPU of the architecture; every other source ("kernel unit") once per instruction set, into a
namespace of its own. The library depends on no Torch headers, so that it can be built before torch is there.

Nothing here imports the package, so that ``setup.py`` can load the file by its path.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from .build import ROOT, BuildError, digest, jobs, put

LIBRARY = "_cpu.so"
FAILURE = "_cpu_failure.txt"  # what an installation that could not build leaves beside the modules
PACKAGED = Path(__file__).parent / "_csrc" / "cpu"  # where an installation keeps the sources
GIB_PER_JOB = 1.0
FACE = "library.cpp"
ONCE = (FACE, "threads.cpp")
# Kernels throw nothing. g++ 12 takes the intrinsics' undefined vectors for mistakes; clang knows no such warning.
KERNEL_FLAGS = ("-fno-exceptions", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wall", "-pthread",
)  # fmt: skip
# Features by name: -march=x86-64-v3 and -v4 mean the same, but g++ 9 and 10 and clang 10 and 11 do not know them. library.cpp asks the CPU for
# exactly these. Portable comes first, because of a function that several objects define the linker keeps the first.
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
ISAS: dict[str, tuple[str, ...]] = {"portable": (), "avx2": _AVX2, "avx512": (*_AVX2, *_AVX512)}
# What `make sanitize` builds: the first report ends the process. g++ contracts products and sums among its expensive optimizations, and tests of bits hold
# two ways of adding to each other.
SANITIZE = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g",
    "-O1",
    "-fexpensive-optimizations",
)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command and what it says of itself."""

    command: tuple[str, ...]
    version: str

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs it on arguments; texts are C's, so that errors can be found in them."""
        environment = {**os.environ, "LC_ALL": "C"}
        return subprocess.run([*self.command, *arguments], capture_output=True, text=True, check=False, env=environment, errors="replace")

    def knows(self, flags: tuple[str, ...]) -> bool:
        """Whether it compiles with these flags."""
        return not flags or self.run(*flags, "-x", "c++", "-c", os.devnull, "-o", os.devnull).returncode == 0


def find_compiler() -> Compiler:
    """The compiler that ``CXX`` names (a command line), or the first of g++, clang++ and c++ on the path.

    Raises:
        BuildError: there is none, or it does not run.
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX must be a command line; got {os.environ['CXX']!r} ({error}). Write it as for a shell.") from None
    command = named or next(([name] for name in COMPILERS if shutil.which(name)), [])
    if not command or shutil.which(command[0]) is None:
        found = f"CXX names {command[0]}, which is not there" if command else "found none on PATH"
        raise BuildError(f"the CPU library needs a C++ compiler, g++ or clang++; {found}. Install one, or name it in CXX.")
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, errors="replace").stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"the C++ compiler must run; {command[0]} gave: {str(error).rstrip('.')}. Repair it, or name another one in CXX."
        ) from None
    return Compiler(tuple(command), said.partition("\n")[0])


def sources() -> Path | None:
    """The folder of the sources: of the checkout, or what an installation keeps of it; None where there is none."""
    return next((folder for folder in (ROOT / "csrc" / "cpu", PACKAGED) if (folder / FACE).is_file()), None)


def sources_digest(folder: Path) -> str:
    """What a library says about the sources that it was built from.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as empty:
        ...     len(sources_digest(Path(empty)))
        16
    """
    return digest("", folder, (p for p in folder.iterdir() if p.suffix in (".cpp", ".h")))[:16]


@dataclass(frozen=True)
class Unit:
    """One object file: its name, its source, and the flags that are its own."""

    name: str
    source: Path
    flags: tuple[str, ...]


def isas(compiler: Compiler) -> tuple[str, ...]:
    """Instruction sets that the library is built for: portable, and on x86-64 those whose flags the compiler knows."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return tuple(isa for isa, flags in ISAS.items() if isa == "portable" or (x86 and compiler.knows(flags)))


def units(folder: Path, built: tuple[str, ...]) -> list[Unit]:
    """Every object file in the order in which they are linked, the face first."""
    holds = tuple(f"-DFUSED_ATTN_HAS_{isa.upper()}" for isa in built)
    face = Unit("library.o", folder / FACE, (f'-DFUSED_ATTN_SOURCES="{sources_digest(folder)}"', *holds))
    once = [Unit(f"{Path(name).stem}.o", folder / name, ()) for name in ONCE if name != FACE and (folder / name).is_file()]
    kernels = sorted(p for p in folder.glob("*.cpp") if p.name not in ONCE)
    flags = {isa: (f"-DFUSED_ATTN_ISA={isa}", *KERNEL_FLAGS, *ISAS[isa]) for isa in built}
    return [face, *once, *(Unit(f"{p.stem}_{isa}.o", p, flags[isa]) for isa in built for p in kernels)]


def _said(compiled: subprocess.CompletedProcess[str]) -> str:
    """The first error in the output of a compiler or its linker, as one line."""
    lines = [line.strip() for line in (compiled.stderr + compiled.stdout).splitlines() if line.strip()]
    return next(
        (line for line in lines if re.search(r"\berror: |undefined reference|multiple definition", line)), (lines or ["nothing"])[0]
    )


class _Build:
    """Objects of one set of flags in one folder, each beside the key of what it was compiled from."""

    def __init__(self, compiler: Compiler, folder: Path, objects: Path, sanitize: bool) -> None:
        self.compiler, self.folder, self.objects = compiler, folder, objects
        self.flags = (*FLAGS, *SANITIZE) if sanitize else FLAGS
        # A function that nobody defines is an error of the linker, not of the process; a sanitizer's are found in the process.
        linux, complete = platform.system() == "Linux", () if sanitize else ("-Wl,-z,defs",)
        self.link_flags = ("-shared", "-ldl", *complete) if linux else ("-shared",)

    def key(self, unit: Unit) -> str:
        command = shlex.join((*self.compiler.command, self.compiler.version, *self.flags, *unit.flags))
        return digest(command, self.folder, (unit.source, *(p for p in self.folder.iterdir() if p.suffix == ".h")))

    def stale(self, unit: Unit) -> bool:
        made, stamp = self.objects / unit.name, self.objects / f"{unit.name}.key"
        return not (made.is_file() and stamp.is_file() and stamp.read_text() == self.key(unit))

    def run(self, what: str, target: Path, *arguments: str) -> str:
        """Makes a file, under another name first, so that nobody finds half of it; gives the compiler's warnings."""
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")
        done = self.compiler.run(*self.flags, *arguments, "-o", str(unfinished))
        if done.returncode != 0:
            unfinished.unlink(missing_ok=True)
            raise BuildError(
                f"{self.compiler.command[0]} must {what}; it said: {_said(done)}. Repair what it names, or name another in CXX."
            )
        if not unfinished.is_file():
            raise BuildError(
                f"{self.compiler.command[0]} must {what}; it reported success and wrote nothing. Name another compiler in CXX."
            )
        unfinished.replace(target)
        return done.stderr.strip()

    def compile(self, unit: Unit) -> str:
        key, include = self.key(unit), f"-I{self.folder.parent}"
        warnings = self.run(f"compile {unit.source.name}", self.objects / unit.name, *unit.flags, include, "-c", str(unit.source))
        (self.objects / f"{unit.name}.key").write_text(key)
        return warnings

    def link(self, made: list[Unit]) -> Path:
        library = self.objects / LIBRARY
        objects = (str(self.objects / unit.name) for unit in made)
        self.run(f"link {LIBRARY}", library, *objects, *self.link_flags)
        return library


def build(destination: Path | None = None, sanitize: bool = False, report: Callable[[str], None] = lambda line: None) -> Path:
    """Compiles what has changed and puts the library in place; a failed build leaves an older library as it was.

    Args:
        destination: the library's path; in the build folder by default.
        sanitize: with address and undefined-behaviour sanitizers.
        report: gets a line for every object that was compiled, with the compiler's warnings below it.

    Raises:
        BuildError: something is missing or the compiler failed.
    """
    folder = sources()
    if folder is None:
        raise BuildError(f"the CPU library needs its sources; there is no {ROOT / 'csrc' / 'cpu'}. Build from a checkout.")
    if os.name != "posix":
        raise BuildError(f"the CPU library is built on Linux and macOS; this is {platform.system()}. Plain torch operations serve it.")
    compiler = find_compiler()
    with ExitStack() as stack:
        try:
            kept = ROOT / "build" / ("cpu-sanitized" if sanitize else "cpu")
            objects = Path(stack.enter_context(tempfile.TemporaryDirectory()) if folder == PACKAGED else kept)
            objects.mkdir(parents=True, exist_ok=True)
            library = _make(_Build(compiler, folder, objects, sanitize), report)
            if destination is None and folder == PACKAGED:
                destination = PACKAGED.parents[1] / LIBRARY
            return library if destination is None else put(library, destination)
        except OSError as error:
            raise BuildError(f"the CPU library must be written; that failed: {error}. Name a folder of your own with --out.") from None


def _make(build: _Build, report: Callable[[str], None]) -> Path:
    """The library in the folder of objects."""
    made = units(build.folder, isas(build.compiler))
    stale = [unit for unit in made if build.stale(unit)]
    for path in build.objects.glob("*.o"):
        if path.name not in {unit.name for unit in made}:
            path.unlink(missing_ok=True)  # of a source or an instruction set that is gone
    stamp, library = build.objects / f"{LIBRARY}.key", build.objects / LIBRARY
    with ThreadPoolExecutor(jobs(GIB_PER_JOB)) as pool:
        waiting = [pool.submit(build.compile, unit) for unit in stale]
        try:
            for number, (unit, one) in enumerate(zip(stale, waiting, strict=True), 1):
                warnings = one.result()
                report(f"[{number}/{len(stale)}] {unit.name}" + (f"\n{warnings}" if warnings else ""))
        finally:
            pool.shutdown(cancel_futures=True)
    key = digest("", build.objects, (build.objects / f"{unit.name}.key" for unit in made))
    if stale or not (library.is_file() and stamp.is_file() and stamp.read_text() == key):
        build.link(made)
        stamp.write_text(key)
    return library
