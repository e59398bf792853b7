"""The CPU library in the process: which file, which kernels, and what is said where there is none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_attn as fa
from fused_attn import build_cpu
from fused_attn.__main__ import main
from fused_attn.backends.cpu import library
from tests.cpu_builds import needs_compiler


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library as it is at the start of a process: not asked for yet."""
    monkeypatch.setattr(library, "_state", None)
    monkeypatch.delenv("FUSED_ATTN_CPU", raising=False)


@needs_compiler
def test_a_built_library_chooses_its_kernels(small_cpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    made = build_cpu.build(tmp_path / "out" / "mine.so")
    assert sorted(p.name for p in made.parent.iterdir()) == ["mine.so"]
    monkeypatch.setenv("FUSED_ATTN_CPU_LIBRARY", str(made))
    assert library.failure() == "" and library.load() is library.load() and library.load() is not None
    held = library.isas()
    assert held[-1] == "portable" and set(held) <= set(build_cpu.ISAS) and library.isa() == held[0]
    for name in held:
        with library.use(name):
            assert library.isa() == name and library.load().fused_attn_cpu_isa() == name.encode()
            with library.use("off"):
                assert library.load() is None and library.isa() == "" and "turned off" in library.failure()
            assert library.isa() == name
    assert library.isa() == held[0] and library.load().fused_attn_cpu_isa() == held[0].encode()
    with pytest.raises(RuntimeError, match=r"must be off or one that the library holds .* got 'sse2'"), library.use("sse2"):
        pass
    assert library.isa() == held[0]


@needs_compiler
@pytest.mark.parametrize(
    ("named", "isa", "failure"), [("portable", "portable", ""), ("off", "", "FUSED_ATTN_CPU=off"), ("mmx", "", "got 'mmx'")]
)
def test_the_environment_chooses(
    named: str, isa: str, failure: str, small_cpu: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    monkeypatch.setenv("FUSED_ATTN_CPU_LIBRARY", str(build_cpu.build()))
    monkeypatch.setenv("FUSED_ATTN_CPU", named)
    assert library.isa() == isa
    assert (failure in library.failure()) if failure else library.failure() == ""
    assert (library.load() is None) == bool(failure)


@pytest.mark.quick
def test_it_says_why_there_is_none(tmp_path: Path) -> None:
    assert library._find(tmp_path / "none.so").failure == "the CPU library is not built (python -m fused_attn build --cpu)"
    (tmp_path / build_cpu.FAILURE).write_text("g++ was not there.\n")
    assert library._find(tmp_path / "other.so").failure.endswith("; the build during installation failed: g++ was not there")
    (tmp_path / "text.so").write_text("no library")
    (tmp_path / "empty.so").touch()
    for name in ("text.so", "empty.so"):
        assert re.search(
            rf"{name} does not load: .*; build it anew \(python -m fused_attn build --cpu\)", library._find(tmp_path / name).failure
        )
    assert "does not load: it is another library" in library._find(Path(torch._C.__file__)).failure


@needs_compiler
def test_half_a_file_is_a_sentence(small_cpu: Path, tmp_path: Path) -> None:
    """The loader itself would map it and die of the pages that are not there."""
    whole = build_cpu.build().read_bytes()
    for part in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        cut = tmp_path / f"cut{part}.so"
        cut.write_bytes(whole[: int(len(whole) * part)])
        assert "does not load: " in library._find(cut).failure
    other = tmp_path / "other-machine.so"
    other.write_bytes(whole[:18] + b"\xf3\x00" + whole[20:])  # e_machine: RISC-V
    assert "does not load: " in library._find(other).failure


@needs_compiler
def test_a_library_of_older_sources_is_not_used(small_cpu: Path, tmp_path: Path) -> None:
    made = build_cpu.build(tmp_path / "mine.so")
    (small_cpu / "factor.h").write_text("// Newer.\nconstexpr double kFactor = 4;\n")
    assert re.search(r"mine\.so is older than its sources .*\(python -m fused_attn build --cpu\)", library._find(made).failure)
    assert library._find(build_cpu.build(tmp_path / "new.so")).failure == ""


@pytest.mark.quick
def test_info_and_explain_say_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    q = torch.zeros(1, 1, 256, 8)
    with library.use("off"):
        sentence = library.failure()
        assert main(["info"]) == 0
        assert f"CPU library  {sentence}\n" in capsys.readouterr().out
        assert f"{sentence}; plain torch operations run instead" in fa.explain(q, q, q).notes
        assert fa.explain(q, q, q, on="cpu").notes == ()
    assert main(["explain", "--on", "cpu", "--no-library"]) == 0
    assert f"note: {library.NOT_BUILT}; plain torch operations run instead" in capsys.readouterr().out


@pytest.mark.quick
def test_the_build_that_a_test_chose_is_in_force(cpu_build: str) -> None:
    assert library.isa() == ("" if cpu_build == library.OFF else cpu_build)
    assert (library.load() is None) == (cpu_build == library.OFF)


def test_the_variable_that_names_no_file_is_named(tmp_path: Path) -> None:
    """Building anew would change nothing."""
    said = subprocess.run(
        [sys.executable, "-c", "from fused_attn.backends.cpu import library; print(library.failure())"],
        env={**os.environ, "FUSED_ATTN_CPU_LIBRARY": str(tmp_path)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f"FUSED_ATTN_CPU_LIBRARY must name a CPU library; got {tmp_path}, which is no file" in said
