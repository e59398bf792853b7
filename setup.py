"""The hooks of the native builds; everything else about the package stands in pyproject.toml.

``csrc/cpu`` is compiled into the package where there is a C++ compiler (``FUSED_ATTN_BUILD_CPU=0`` says no), and an installation keeps its
sources, so that ``python -m fused_attn build --cpu`` can do it later. ``FUSED_ATTN_BUILD=1 pip install --no-build-isolation .`` compiles ``csrc/`` into the package with
``build_extension(out_dir)`` of ``fused_attn/build.py``. Where there is nothing to compile, or compiling fails,
one sentence says so and the package is installed without that library. pip shows that sentence with -v only, so it is
kept beside the modules too, where ``explain`` and ``info`` find it.
"""

import importlib
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel, get_platform
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
BUILDER = ROOT / "fused_attn" / "build.py"


def builder(name: str) -> ModuleType:
    """A module of fused_attn by its path, with those that it imports relatively, before the package (and torch) can be imported."""
    package = sys.modules.setdefault("fused_attn_builders", ModuleType("fused_attn_builders"))
    package.__path__ = [str(BUILDER.parent)]
    return importlib.import_module(f"fused_attn_builders.{name}")


class BuildPy(build_py):
    """Copies the Python files, then adds the native libraries: the CPU's where it can be had, CUDA's when it is asked for as well."""

    holds_library = False

    def run(self) -> None:
        super().run()
        out_dir = (ROOT if self.editable_mode else Path(self.build_lib)) / "fused_attn"
        for leftover in (out_dir / "_native_failure.txt", out_dir / "_cpu_failure.txt", *Path(self.build_lib).glob("fused_attn/**/*.so")):
            leftover.unlink(missing_ok=True)
        self.add_cpu(out_dir)
        self.add_cuda(out_dir)

    def add_cpu(self, out_dir: Path) -> None:
        if not (SOURCES / "cpu").is_dir():
            return
        if not self.editable_mode:
            # A source that is gone would make the library look older than its sources.
            shutil.rmtree(out_dir / "_csrc", ignore_errors=True)
            shutil.copytree(SOURCES / "cpu", out_dir / "_csrc" / "cpu")
        if os.environ.get("FUSED_ATTN_BUILD_CPU", "1") == "0":
            return
        try:
            found = builder("build_cpu")
            found.build(out_dir / found.LIBRARY)
            self.holds_library = True
        except (Exception, SystemExit) as error:
            print(f"fused_attn: the CPU library is not built ({error}); plain torch operations run on CPUs.")
            (out_dir / "_cpu_failure.txt").write_text(f"{error}\n")

    def add_cuda(self, out_dir: Path) -> None:
        if os.environ.get("FUSED_ATTN_BUILD", "0") in ("", "0"):
            return
        if not BUILDER.is_file() or not any(p.is_file() for p in SOURCES.rglob("*")):
            print("fused_attn: this version carries no native sources; the pure Python + Triton package is installed.")
            return
        try:
            builder("build").build_extension(out_dir)
            self.holds_library = True
        except (Exception, SystemExit) as error:
            print(f"fused_attn: the native build failed ({error}); the pure Python + Triton package is installed.")
            (out_dir / "_native_failure.txt").write_text(f"{error}\n")


class BdistWheel(bdist_wheel):
    """Marks a wheel that holds a native library as made for this platform; ctypes and torch's stable ABI serve any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if self.get_finalized_command("build_py").holds_library:
            platform = get_platform(self.bdist_dir).replace("-", "_").replace(".", "_")
        return python, abi, platform

    def write_wheelfile(self, *args: Any, **kwargs: Any) -> None:
        # Only now: a wheel that is not pure from the start would be tagged for one Python.
        self.root_is_pure = not self.get_finalized_command("build_py").holds_library
        super().write_wheelfile(*args, **kwargs)


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
