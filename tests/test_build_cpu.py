"""The build of the CPU library: what it says when something is missing, what the compilers made of csrc/cpu, and how an installation carries it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fused_attn import build_cpu
from fused_attn.__main__ import main
from fused_attn.backends.cpu import library
from tests import sanitized_cpu
from tests.cpu_builds import UNIT, needs_compiler

ROOT = build_cpu.ROOT
KERNELS = [f"unit_{isa}.o" for isa in build_cpu.ISAS]


needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed")
needs_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="other processors have one instruction set, portable")


def fake_compiler(path: Path, refuses: str) -> Path:
    """g++ (or what there is) that does not know the flags beginning with ``refuses``."""
    real = build_cpu.find_compiler().command[0]
    path.write_text(
        f'#!/bin/sh\ncase " $* " in *" {refuses}"*) echo "g++: error: unrecognized {refuses}" >&2; exit 1;; esac\nexec {real} "$@"\n'
    )
    path.chmod(0o755)
    return path


@needs_compiler
def test_only_what_changed_is_compiled_again(small_cpu: Path) -> None:
    lines: list[str] = []

    def compiled() -> list[str]:
        lines.clear()
        build_cpu.build(report=lines.append)
        return [line.split()[1] for line in lines]

    x86 = os.uname().machine == "x86_64"
    kernels = KERNELS if x86 else KERNELS[:1]
    assert compiled() == ["library.o", *kernels] and lines[0].startswith(f"[1/{1 + len(kernels)}] ")
    os.utime(small_cpu / "unit.cpp")
    assert compiled() == []
    (small_cpu / "unit.cpp").write_text(UNIT + "// Changed.\n")
    assert compiled() == ["library.o", *kernels]
    (small_cpu / "factor.h").write_text("// Another.\nconstexpr double kFactor = 3;\n")
    assert compiled() == ["library.o", *kernels]
    (small_cpu / "unit.cpp").unlink()
    (small_cpu / "factor.h").unlink()
    assert compiled() == ["library.o"]


@needs_compiler
def test_a_failed_build_leaves_the_older_library(small_cpu: Path, tmp_path: Path) -> None:
    made = build_cpu.build(tmp_path / "mine.so")
    before = made.read_bytes()
    (small_cpu / "unit.cpp").write_text(UNIT.replace("kFactor", "kNothing"))
    with pytest.raises(build_cpu.BuildError, match=r"must compile unit\.cpp; it said: .*unit\.cpp:6:\d+: error: .*kNothing") as caught:
        build_cpu.build(made)
    assert "\n" not in str(caught.value)
    assert made.read_bytes() == before and [p.name for p in tmp_path.glob("mine*")] == ["mine.so"]
    assert not list((build_cpu.ROOT / "build" / "cpu").glob("*.o.[0-9]*"))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("cxx", "expected"),
    [
        ("no-such-compiler -O2", "needs a C++ compiler, g++ or clang++; CXX names no-such-compiler, which is not there"),
        ("false", "the C++ compiler must run; false gave: .* exit status 1"),
        ("", "found none on PATH"),
    ],
    ids=["absent", "broken", "none"],
)
def test_no_compiler(cxx: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", cxx)
    if not cxx:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["build", "--cpu", "--out", str(tmp_path / "mine.so")]) == 2
    said = capsys.readouterr().err
    assert re.search(expected.replace("++", r"\+\+"), said) and said.count("\n") == 1
    assert not (tmp_path / "mine.so").exists()


@pytest.mark.quick
def test_no_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_cpu, "ROOT", tmp_path)
    with pytest.raises(build_cpu.BuildError, match=r"needs its sources; there is no .*csrc"):
        build_cpu.build()


@needs_compiler
@needs_x86
@pytest.mark.parametrize(("refuses", "left"), [("-mavx512f", ["portable", "avx2"]), ("-mavx2", ["portable"])])
def test_a_compiler_that_knows_fewer_instruction_sets(
    refuses: str, left: list[str], small_cpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"{fake_compiler(tmp_path / 'old-g++', refuses)} -DUNUSED")
    found = library._find(build_cpu.build())
    assert found.failure == "" and set(found.isas) <= set(left) and "portable" in found.isas
    assert sorted(p.name for p in (build_cpu.ROOT / "build" / "cpu").glob("unit_*.o")) == sorted(f"unit_{isa}.o" for isa in left)


@pytest.mark.quick
@pytest.mark.parametrize("machine", ["aarch64", "arm64", "riscv64"])
def test_other_processors_have_the_portable_build(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert build_cpu.isas(build_cpu.Compiler(("never-run",), "")) == ("portable",)


def real() -> Path:
    """The library of these sources in the build folder, with its objects; made by whichever worker asks first."""
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    with (folder / "cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build_cpu.build()


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """Kind and mangled name of each symbol."""
    listed = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^(?:[0-9a-f]+)? +(\w) (\S+)$", listed, re.M)


def shared(path: Path, isa: str) -> list[str]:
    """Functions and variables that the linker may take for those of another instruction set: defined weakly, under a name without its own."""
    return [name for kind, name in symbols(path) if kind in "WVuC" and f"3cpu{len(isa)}{isa}" not in name]


@needs_compiler
@needs_nm
def test_no_kernel_is_shared_between_instruction_sets() -> None:
    """What AVX-512 compiled and every build uses would stop older CPUs."""
    made = real()
    for isa in build_cpu.ISAS:
        for path in made.parent.glob(f"*_{isa}.o"):
            assert shared(path, isa) == [], path.name


@needs_compiler
@needs_nm
def test_a_shared_function_would_be_found(small_cpu: Path) -> None:
    own = "template <int N> double own() { return N; }\nauto* kept = own<3>;\n}  // namespace"
    (small_cpu / "factor.h").write_text(
        "constexpr double kFactor = 2;\n__attribute__((noinline)) inline double twice(double x) { return 2 * x; }\nstatic auto* kTwice = twice;\n"
    )
    (small_cpu / "unit.cpp").write_text(UNIT.replace("}  // namespace", own).replace("kFactor * x[i]", "kTwice(x[i])"))
    path = build_cpu.build().with_name("unit_portable.o")
    assert shared(path, "portable") == ["_Z5twiced"]
    assert any(kind == "W" and "own" in name for kind, name in symbols(path))


@needs_compiler
@needs_nm
def test_what_the_library_shows_and_asks_for() -> None:
    # clang++ shows what it compiled of the standard library, under the standard library's own visibility.
    shown = [name for _, name in symbols(real(), "-D", "--defined-only") if not re.match(r"_ZN?K?St", name)]
    assert {"fused_attn_cpu_isas", "fused_attn_cpu_use"} <= set(shown) and all(name.startswith("fused_attn_cpu_") for name in shown)
    asked = [name for _, name in symbols(real(), "-D", "--undefined-only")]
    assert [name for name in asked if re.search(r"torch|GOMP|omp_|_ZNK?(?:2at|3c10)", name)] == []


@needs_compiler
@needs_x86
@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils' objdump is not installed")
def test_what_every_cpu_runs_has_no_wide_registers() -> None:
    made = real()
    for path in (p for p in made.parent.glob("*.o") if not p.stem.endswith(("_avx2", "_avx512"))):
        text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True).stdout
        assert "ret" in text and re.findall(r"%[yz]mm\d|\tv\w+ ", text) == [], path.name


FAULTY = """// Faults that a caller can ask the portable build for.
#define NAME_OF(name, isa) name##_##isa
#define NAME(name, isa) NAME_OF(name, isa)
extern "C" __attribute__((visibility("default"))) double NAME(beyond, FUSED_ATTN_ISA)(int n) {
  double* volatile x = new double[8]();
  return x[n - 1];
}
extern "C" __attribute__((visibility("default"))) int NAME(overflow, FUSED_ATTN_ISA)(int n) { return n + 1; }
"""


@needs_compiler
def test_the_sanitizers_report(small_cpu: Path) -> None:
    """A read beside an array and a sum beyond an int end the process."""
    (small_cpu / "unit.cpp").write_text(FAULTY)
    try:
        made = build_cpu.build(sanitize=True)
        variables = sanitized_cpu.environment(made)
    except build_cpu.BuildError as error:
        pytest.skip(str(error))

    def run(call: str) -> subprocess.CompletedProcess[str]:
        return sanitized_cpu.python("-c", f"import ctypes; ctypes.CDLL({str(made)!r}).{call}", output=subprocess.PIPE, **variables)

    assert run("beyond_portable(8)").returncode == run("overflow_portable(7)").returncode == 0
    for call, report in (("beyond_portable(9)", "heap-buffer-overflow"), ("overflow_portable(2**31 - 1)", "signed integer overflow")):
        ended = run(call)
        assert ended.returncode != 0 and report in ended.stderr


@pytest.fixture
def project(small_cpu: Path) -> Path:
    """What pip needs of this checkout, with the small sources."""
    checkout = small_cpu.parents[1]
    shutil.copytree(ROOT / "fused_attn", checkout / "fused_attn", ignore=shutil.ignore_patterns("__pycache__", "*.so", "_*.txt"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, checkout / name)
    return checkout


def backend_hook(checkout: Path, hook: str, **environment: str) -> Path:
    """What pip calls to make a wheel or a source distribution, in a process of its own that cannot import torch, as in an isolated build."""
    code = f"import sys; sys.modules['torch'] = None; from setuptools import build_meta; build_meta.{hook}('made')"
    (checkout / "made").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (checkout / "made").iterdir()
    return made


def installed(made: Path, folder: Path, *commands: str) -> str:
    """What commands of the installed package print, one after another in one process."""
    if not folder.exists():
        zipfile.ZipFile(made).extractall(folder)
    code = f"from fused_attn.__main__ import main\nfor command in {commands}: main(command.split())"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("FUSED_ATTN_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**variables, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.mark.peers
@needs_compiler
@pytest.mark.slow
def test_a_wheel_carries_the_library(project: Path, tmp_path: Path) -> None:
    leftover = project / "build" / "lib" / "fused_attn" / "_csrc" / "cpu" / "gone.h"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("// Of an earlier build in this folder.\n")
    made = backend_hook(project, "build_wheel")
    assert re.search(r"-py3-none-(?:linux|macosx)_\w+\.whl$", made.name)
    names = zipfile.ZipFile(made).namelist()
    assert {"fused_attn/_cpu.so", "fused_attn/_csrc/cpu/library.cpp"} <= set(names) and "fused_attn/_cpu_failure.txt" not in names
    assert re.search(r"CPU library +kernels for \w+ run; it holds .*portable for this CPU", installed(made, tmp_path / "site", "info"))


@pytest.mark.peers
@needs_compiler
@pytest.mark.slow
def test_an_installation_without_a_compiler_is_pure_and_builds_later(project: Path, tmp_path: Path) -> None:
    made, site = backend_hook(project, "build_wheel", CXX="no-such-compiler"), tmp_path / "site"
    assert made.name.endswith("-py3-none-any.whl")
    sentence = "the CPU library needs a C++ compiler, g++ or clang++; CXX names no-such-compiler"
    assert zipfile.ZipFile(made).read("fused_attn/_cpu_failure.txt").decode().startswith(sentence)
    said = installed(made, site, "info", "explain")
    assert said.count(f"(python -m fused_attn build --cpu); the build during installation failed: {sentence}") == 2
    said = installed(made, site, "build --cpu", "info")
    assert re.search(r"site/fused_attn/_cpu\.so: \d+\.\d MiB\n", said) and "kernels for" in said
    assert not (site / "build").exists() and not (site / "fused_attn" / "_cpu_failure.txt").exists()


@pytest.mark.slow
def test_an_installation_that_is_told_not_to_build(project: Path) -> None:
    made = backend_hook(project, "build_wheel", FUSED_ATTN_BUILD_CPU="0")
    assert made.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(made).namelist()
    assert not [n for n in names if n.endswith((".so", "_failure.txt"))]
    assert "fused_attn/backends/triton/hopper/tiles.json" in names


@needs_compiler
@pytest.mark.slow
def test_an_editable_installation_builds_beside_the_modules(project: Path) -> None:
    backend_hook(project, "build_editable")
    assert (project / "fused_attn" / "_cpu.so").is_file() and not (project / "fused_attn" / "_csrc").exists()


@pytest.mark.slow
def test_a_source_distribution_carries_the_sources(project: Path) -> None:
    with tarfile.open(backend_hook(project, "build_sdist")) as made:
        names = made.getnames()
    tables = "fused_attn/backends/triton/hopper/tiles.json"
    assert {"csrc/cpu/library.cpp", "csrc/cpu/unit.cpp", "fused_attn/build_cpu.py", tables} <= {name.split("/", 1)[-1] for name in names}


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("target", ["demo", "test", "test-peers", "quick", "bench"])
def test_make_builds_it_before_it_is_used(target: str) -> None:
    """When a source has changed; what make would do, without doing it."""
    asked = ["make", "--dry-run", "--what-if=csrc/cpu/library.cpp", "VENV=.none", target]
    steps = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    (built,) = [i for i, step in enumerate(steps) if step == ".none/bin/python -m fused_attn build --cpu || true"]
    used = [i for i, step in enumerate(steps) if re.match(r"\.none/bin/python -m (?:pytest|benchmarks|fused_attn demo)", step)]
    assert used and built < min(used)


def test_what_is_no_compiler_is_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "'unbalanced")
    with pytest.raises(build_cpu.BuildError, match="CXX must be a command line"):
        build_cpu.find_compiler()
    idle = build_cpu._Build(build_cpu.Compiler(("true",), "says nothing"), tmp_path, tmp_path, False)
    with pytest.raises(build_cpu.BuildError, match="reported success and wrote nothing"):
        idle.run("compile unit.cpp", tmp_path / "unit.o")
