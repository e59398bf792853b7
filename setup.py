"""The hook of the native build; everything else about the package stands in pyproject.toml.

``FUSED_ATTN_BUILD=1 pip install --no-build-isolation .`` compiles ``csrc/`` into the package with
``build_extension(out_dir)`` of ``fused_attn/build.py``. Where there is nothing to compile, or compiling fails,
one sentence says so and the pure Python + Triton package is installed. pip shows that sentence with -v only, so it is
kept beside the modules too, where ``explain`` and ``info`` find it.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel, get_platform
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
BUILDER = ROOT / "fused_attn" / "build.py"


def build_native(out_dir: Path) -> Path:
    """Compiles csrc/ into out_dir and returns the library. The builder is loaded by path, before the package exists."""
    spec = importlib.util.spec_from_file_location("fused_attn_build", BUILDER)
    if spec is None or spec.loader is None:
        raise ImportError(f"{BUILDER} cannot be loaded")
    builder = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = builder
    spec.loader.exec_module(builder)
    return Path(builder.build_extension(out_dir))


class BuildPy(build_py):
    """Copies the Python files, then adds the native library when it is asked for and can be had."""

    library: Path | None = None

    def run(self) -> None:
        super().run()
        out_dir = (ROOT if self.editable_mode else Path(self.build_lib)) / "fused_attn"
        failure = out_dir / "_native_failure.txt"
        for leftover in (failure, *Path(self.build_lib).glob("fused_attn/**/*.so")):
            leftover.unlink(missing_ok=True)
        if os.environ.get("FUSED_ATTN_BUILD", "0") in ("", "0"):
            return
        if not BUILDER.is_file() or not any(p.is_file() for p in SOURCES.rglob("*")):
            print("fused_attn: this version carries no native sources; the pure Python + Triton package is installed.")
            return
        try:
            self.library = build_native(out_dir)
        except (Exception, SystemExit) as error:
            print(f"fused_attn: the native build failed ({error}); the pure Python + Triton package is installed.")
            failure.write_text(f"{error}\n")


class BdistWheel(bdist_wheel):
    """Marks a wheel that holds a native library as made for this platform; torch's stable ABI serves any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if self.get_finalized_command("build_py").library is not None:
            platform = get_platform(self.bdist_dir).replace("-", "_").replace(".", "_")
        return python, abi, platform


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
