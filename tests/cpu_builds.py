"""The builds of the CPU library that tests choose from: every instruction set, and "off", which is plain torch operations alone.

A test that takes the fixture ``cpu_build`` runs once per build, with that build in force. ``FUSED_ATTN_CPU=avx2 pytest`` runs on that one
alone, the tests without the fixture included.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fused_attn import build_cpu
from fused_attn.backends.cpu import library

ALL = (*reversed(build_cpu.ISAS), library.OFF)


UNIT = """// A unit of the tests.
#include "cpu/factor.h"
namespace fused_attn::cpu::FUSED_ATTN_ISA {
double total(const double* x, long n) {
  double sum = 0;
  for (long i = 0; i < n; ++i) sum += kFactor * x[i];
  return sum;
}
}  // namespace fused_attn::cpu::FUSED_ATTN_ISA
"""


def has_compiler() -> bool:
    """Whether the library can be built here."""
    try:
        build_cpu.find_compiler()
    except build_cpu.BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")


def selected() -> tuple[str, ...]:
    """The builds of this run: all, or the one that ``FUSED_ATTN_CPU`` names."""
    named = os.environ.get("FUSED_ATTN_CPU", "")
    if named and named not in ALL:
        raise pytest.UsageError(f"FUSED_ATTN_CPU must be one of {', '.join(ALL)}; got {named!r}. Unset it to run on all of them.")
    return (named,) if named else ALL


def lacking(build: str) -> str:
    """Why a build cannot run here, or an empty string.

    A library that is missing or old although there is a compiler is no reason: then the tests would pass on what is not there.
    """
    if build == library.OFF:
        return ""
    try:
        with library.use(build):
            return ""
    except RuntimeError as error:
        if build not in library.isas() and library.isas():
            return f"the CPU library holds no kernels for {build} that this CPU runs"
        if has_compiler():
            raise
        return f"{error}; and there is no C++ compiler"


@pytest.fixture(params=selected())
def cpu_build(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = lacking(request.param)
    if reason:
        pytest.skip(reason)
    with library.use(request.param):
        yield request.param


@pytest.fixture
def small_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose csrc/cpu is the choice of kernels and one unit with a header; it is built in a second."""
    folder = tmp_path / "checkout" / "csrc" / "cpu"
    folder.mkdir(parents=True)
    shutil.copy(build_cpu.ROOT / "csrc" / "cpu" / "choice.h", folder)
    (folder / build_cpu.FACE).write_text('// The choice alone.\n#include "cpu/choice.h"\n')
    (folder / "unit.cpp").write_text(UNIT)
    (folder / "factor.h").write_text("// What the unit multiplies with.\nconstexpr double kFactor = 2;\n")
    monkeypatch.setattr(build_cpu, "ROOT", tmp_path / "checkout")
    return folder
