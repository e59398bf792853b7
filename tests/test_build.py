"""The native build: what it says when something is missing, what a wheel is called, and what the compilers made of csrc/."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fused_attn import build
from fused_attn.__main__ import main
from fused_attn.backends.cuda import _failure, library_path
from fused_attn.backends.triton import config
from tests import native

ROOT = build.ROOT
CHIPS = ("sm_80", "sm_90a", "sm_100", "sm_120")
_triton = importlib.util.find_spec("triton")
CUOBJDUMP = Path(_triton.origin if _triton and _triton.origin else "").parent / "backends" / "nvidia" / "bin" / "cuobjdump"
needs_cuobjdump = pytest.mark.skipif(_triton is None, reason="cuobjdump comes with triton, which is not installed")
needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="there is no CUDA compiler (nvcc)")
WORKING = """#!/bin/sh
[ "$1" = --version ] && { echo 'Cuda compilation tools, release 13.0, V13.0.48'; exit 0; }
while [ $# -gt 0 ]; do case $1 in -o) echo made > "$2"; out=$2;; -MF) echo 'x:' > "$2"; esac; shift; done
"""


def fake_nvcc(home: Path, text: str) -> Path:
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The build description works on a copy of this checkout's sources, with a compiler that only claims to be one."""
    folder = tmp_path / "checkout"
    for part in ("csrc", "fused_attn"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / name)
    monkeypatch.setattr(build, "ROOT", folder)
    monkeypatch.setattr(build, "SOURCES", folder / "csrc")
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", WORKING).parents[1]))
    return folder


@pytest.mark.quick
def test_the_compiler_of_cuda_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = fake_nvcc(tmp_path / "home", WORKING)
    other = fake_nvcc(tmp_path / "path", WORKING)
    monkeypatch.setenv("PATH", f"{other.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert build.find_nvcc() == other
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.require_nvcc() == (nvcc, "13.0")


@pytest.mark.quick
def test_the_compiler_of_a_wheel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = fake_nvcc(tmp_path / "nvidia" / "cu13", WORKING)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) == nvcc)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build.find_nvcc() == nvcc


@pytest.mark.quick
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("echo 'release 11.8'", "must be of CUDA 12.8 or later; .* says 'release 11.8'. Set CUDA_HOME"),
        ("exit 3", "nvcc must run; .* exit status 3"),
        ("echo what", "says 'what'"),
    ],
    ids=["old", "broken", "strange"],
)
def test_an_unusable_compiler(reply: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path, f"#!/bin/sh\n{reply}\n").parents[1]))
    with pytest.raises(build.BuildError, match=expected):
        build.require_nvcc()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("lacking", "expected"),
    [
        ("nvcc", r"needs nvcc of CUDA 12.8 or later; found none .* pip install nvidia-cuda-nvcc"),
        ("g++", r"needs a C\+\+ compiler; there is no g\+\+"),
        ("ninja", "needs ninja; .* pip install ninja"),
        ("torch", "needs torch's headers; torch is not installed"),
        ("csrc", "needs the sources; there is no .*csrc"),
    ],
)
def test_something_is_missing(
    lacking: str, expected: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    which, find_spec = shutil.which, importlib.util.find_spec
    monkeypatch.setattr(shutil, "which", lambda name: None if name == lacking else which(name))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == lacking else find_spec(name))
    if lacking == "nvcc":
        monkeypatch.setattr(build, "find_nvcc", lambda: None)
    if lacking == "csrc":
        shutil.rmtree(checkout / "csrc")
    assert main(["build", "--out", str(checkout / "library.so")]) == 2
    said = capsys.readouterr().err
    assert re.search(expected, said) and "Traceback" not in said
    assert not (checkout / "library.so").exists()


@pytest.mark.quick
def test_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs() == 3
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(build.BuildError, match="MAX_JOBS must be a positive whole number"):
            build.jobs()


def test_a_failed_build_leaves_the_older_library(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    library = checkout / "out" / "library.so"
    assert build.build(destination=library) == library
    assert library.read_text() == "made\n"
    Path(os.environ["CUDA_HOME"], "bin/nvcc").write_text(WORKING.replace("while", "echo 'x.cu(1): error: no'; exit 1; while"))
    (checkout / "csrc" / "bindings.cpp").write_text("changed")
    with pytest.raises(build.BuildError, match="it failed, see above"):
        build.build(destination=library)
    assert "x.cu(1): error: no" in capfd.readouterr().out
    assert library.read_text() == "made\n"


def test_what_is_built_is_not_built_again(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build.build()
    total = len(build.units()) + 1
    assert f"[{total}/{total}]" in capfd.readouterr().out
    os.utime(checkout / "csrc" / "bindings.cpp")  # a newer file of the same text
    build.build()
    assert capfd.readouterr().out == ""
    (checkout / "csrc" / "bindings.cpp").write_text("changed")
    build.build()
    assert "[2/2]" in capfd.readouterr().out


def wheel(checkout: Path, **environment: str) -> tuple[Path, str]:
    """The wheel that pip makes of a checkout, and what was printed."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", "wheels", "."]
    done = subprocess.run(
        command,
        cwd=checkout,
        env={**os.environ, "FUSED_ATTN_BUILD_CPU": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    (made,) = (checkout / "wheels").iterdir()
    return made, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["0", "1"])
def test_a_wheel(asked: str, checkout: Path) -> None:
    made, _ = wheel(checkout, FUSED_ATTN_BUILD=asked)
    holds = f"fused_attn/{build.LIBRARY}" in zipfile.ZipFile(made).namelist()
    assert holds == (asked == "1")
    assert re.search(r"-py3-none-linux_\w+\.whl$" if holds else r"-py3-none-any\.whl$", made.name)


@pytest.mark.slow
def test_a_wheel_whose_build_fails_is_pure_python(checkout: Path) -> None:
    Path(os.environ["CUDA_HOME"], "bin/nvcc").write_text("#!/bin/sh\necho 'release 11.8'")
    made, printed = wheel(checkout, FUSED_ATTN_BUILD="1")
    assert made.name.endswith("-py3-none-any.whl")
    (said,) = [line for line in printed.splitlines() if "native build failed" in line]
    assert "nvcc must be of CUDA 12.8 or later" in said and "the pure Python + Triton package is installed" in said
    kept = zipfile.ZipFile(made).read("fused_attn/_native_failure.txt").decode()
    assert kept.startswith("nvcc must be of CUDA 12.8 or later")


@pytest.mark.quick
def test_the_backend_says_why_there_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failure(name: str) -> str:
        monkeypatch.setenv("FUSED_ATTN_LIBRARY", str(tmp_path / name))
        return _failure()

    assert failure("none.so") == "the native library is not built (python -m fused_attn build)"
    (tmp_path / "_native_failure.txt").write_text("nvcc was not there.\n")
    assert failure("other.so").endswith("; the build during installation failed: nvcc was not there.")
    (tmp_path / "broken.so").write_text("no library")
    assert "broken.so does not load: " in failure("broken.so")


@pytest.fixture(scope="session")
def release() -> Path:
    return native.library("release")


@pytest.mark.peers
@needs_nvcc
@pytest.mark.slow
def test_the_library_loads_without_cuda(release: Path) -> None:
    """In a fresh process; the CUDA run-time is inside the library, so nothing of CUDA is mapped for it."""
    code = (
        "import torch; import fused_attn as fa; x = torch.ones(1, 1, 2, 4);"
        "print(fa.explain(x, x, x));"
        "from fused_attn.backends import cuda; assert cuda._failure() == '', cuda._failure();"
        "print(torch.ops.fused_attn_cuda.attention_fwd.default._schema.name);"
        "print([line for line in open('/proc/self/maps') if 'libcudart' in line])"
    )
    environment = {**os.environ, "FUSED_ATTN_LIBRARY": str(release)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "it runs on CUDA tensors only, not on cpu" in printed
    assert printed.endswith("fused_attn_cuda::attention_fwd\n[]\n")


@pytest.mark.peers
@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed")
def test_the_library_uses_the_stable_abi_alone(release: Path) -> None:
    undefined = subprocess.run(["nm", "-D", "--undefined-only", str(release)], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_" in undefined
    assert re.findall(r"_ZNK?(?:2at|3c10|5torch)\S*", undefined) == []


@pytest.mark.peers
@needs_nvcc
@pytest.mark.slow
def test_no_kernel_spills(release: Path) -> None:
    """ptxas reports of every kernel, for every chip."""
    reports = {path.name: path.read_text() for path in release.parent.glob("*.log")}
    assert len(reports) == len(build.units())
    found = [
        (chip, kernel, int(stack), int(stores), int(loads))
        for text in reports.values()
        for kernel, chip, stack, stores, loads in re.findall(
            r"entry function '(\w+)' for '(\w+)'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        )
    ]
    assert {chip for chip, *_ in found} == set(CHIPS)
    assert len(found) == sum(text.count("Compiling entry function") for text in reports.values()) > 100 * len(CHIPS)
    assert [kernel for kernel in found if any(kernel[2:])] == []


@pytest.mark.quick
def test_shared_memory_is_counted_in_one_place() -> None:
    """The launch holds what it gives a kernel to the smallest chip's 99 KB (sm_86, sm_89, sm_120); such a kernel declares nothing beside it."""
    sources = {p.name: p.read_text() for p in build.SOURCES.rglob("*") if p.is_file() and build.SOURCES / "cpu" not in p.parents}
    (limit,) = re.findall(r"kMaxSharedBytes = (\d+) \* 1024;", sources["configs.h"])
    assert int(limit) * 1024 == min(config.SHARED_MEMORY.values())
    assert "static_assert(kSharedBytes <= kMaxSharedBytes" in sources["launch.cuh"]
    assert [name for name, text in sources.items() if "<<<" in re.sub(r"//.*", "", text)] == ["launch.cuh"]
    given = {name for name, text in sources.items() if "extern __shared__" in text}
    declare = {name for name, text in sources.items() if re.search(r"(?<!extern )__shared__", re.sub(r"//.*|`[^`]*`", "", text))}
    assert given and declare and not given & declare


@pytest.mark.peers
@needs_nvcc
@pytest.mark.slow
def test_kernels_declare_little_shared_memory(release: Path) -> None:
    """By ptxas' reports: none of those to which the launch gives some, and of the others no more than a kernel has without an attribute."""
    reports = {p.name: p.read_text() for p in release.parent.glob("*.log")}
    declared = {name: [int(n) for n in re.findall(r"(\d+) bytes smem", text)] for name, text in reports.items()}
    assert [name for name, found in declared.items() if found] == ["softmax.o.log"]
    assert max(declared["softmax.o.log"]) <= 48 * 1024


@pytest.mark.peers
@needs_nvcc
@pytest.mark.slow
@needs_cuobjdump
def test_the_library_holds_code_for_every_chip_and_ptx_for_later_ones(release: Path) -> None:
    listed = subprocess.run([CUOBJDUMP, "-lelf", "-lptx", release], capture_output=True, text=True, check=True).stdout
    per_chip = {chip: len(re.findall(rf"\.{chip}\.cubin$", listed, re.M)) for chip in CHIPS}
    assert len(set(per_chip.values())) == 1 and per_chip["sm_80"] >= len(build.units()) - 1
    assert len(re.findall(r"\.sm_80\.ptx$", listed, re.M)) == per_chip["sm_80"]


@pytest.mark.peers
@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("type_code", "dtype"), [("6__half", "half"), ("13__nv_bfloat16", "bfloat16"), ("f", "float")])
def test_registers_keep_the_budget_of_configs_h(type_code: str, dtype: str, release: Path) -> None:
    """The table at the head of configs.h, read as it stands there."""
    table = re.findall(r"^//   (\w+) +((?:\d+ +){11}\d+)$", (build.SOURCES / "cuda" / "configs.h").read_text(), re.M)
    budgets = {name: [int(n) for n in numbers.split()] for name, numbers in table}
    assert set(budgets) == {"fwd", "rows", "dq", "dkdv", "columns", "bias"}
    for column, size in enumerate(("64", "128", "256")):
        report = (release.parent / f"attention_{dtype}_{size}.o.log").read_text()
        for name, numbers in budgets.items():
            kernel = rf"attention_(?:bwd_)?{name}_kernelI{type_code}Li{size}"
            used = re.findall(rf"entry function '\w*{kernel}\w*' for '(\w+)'\n.*\n.*\n.*Used (\d+) registers", report)
            assert {chip for chip, _ in used} == set(CHIPS)
            for chip, registers in used:
                allowed = numbers[column + (9 if dtype == "float" else 3)] + 8 * (chip == "sm_100")
                assert int(registers) <= allowed, f"{name}, {dtype}, head size {size}, {chip}: {registers} of {allowed} registers"


def sass(release: Path, unit: str, chip: str, kernel: str) -> dict[str, str]:
    """Machine code of the kernels of an object file whose mangled names hold ``kernel``."""
    text = subprocess.run([CUOBJDUMP, "-sass", "-arch", chip, release.parent / unit], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)\n", text)
    return {name: code for name, code in zip(parts[1::2], parts[2::2], strict=True) if kernel in name}


@pytest.mark.peers
@needs_nvcc
@pytest.mark.slow
@needs_cuobjdump
@pytest.mark.parametrize(
    ("dtype", "head_size", "chip"),
    [
        *((dtype, size, "sm_80") for dtype in ("half", "bfloat16") for size in build.UNITS["cuda/attention.cu"]["FUSED_ATTN_HEAD_SIZE"]),
        *(("half", "64", chip) for chip in CHIPS[1:]),
    ],
)
def test_instructions_of_the_forward(dtype: str, head_size: str, chip: str, release: Path) -> None:
    """Tensor cores, matrix loads and asynchronous copies; no local memory, which the calls of modified scores would need as well."""
    kernels = sass(release, f"attention_{dtype}_{head_size}.o", chip, "attention_fwd_kernel")
    assert len(kernels) == 2
    for code in kernels.values():
        opcodes = set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?(\w+)", code, re.M))
        assert {"HMMA", "LDSM", "LDGSTS", "MUFU"} <= opcodes
        assert not {"LDL", "STL"} & opcodes


@pytest.mark.quick
def test_where_the_library_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FUSED_ATTN_LIBRARY", raising=False)
    assert library_path() == ROOT / "fused_attn" / build.LIBRARY
    monkeypatch.setenv("FUSED_ATTN_LIBRARY", str(tmp_path / "mine.so"))
    assert library_path() == tmp_path / "mine.so"
