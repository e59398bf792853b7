"""Which stream the native library launches on, beside stand-ins of torch's libraries: on no machine without a GPU does torch have a stream."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_attn import build
from tests import native

pytestmark = [pytest.mark.quick, pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler (g++)")]

PROBE = """
#include "fused_attn/stream.h"
static std::string failure;
extern "C" __attribute__((visibility("default"))) void* stream_of(int device) {
  try { return fused_attn::current_stream(device); } catch (const std::exception& error) { failure = error.what(); return nullptr; }
}
extern "C" __attribute__((visibility("default"))) const char* failure_text() { return failure.c_str(); }
"""
# Streams 1000, 1001, ... of devices 0, 1, ...; no device 7.
CUDA = 'extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = (char*)0 + 1000 + device; return device == 7; }'
# Loads libraries as Python loads torch and its extensions (RTLD_LOCAL), the last of them being the probe.
ASK = """
import ctypes, sys
*torch, probe = sys.argv[1:]
loaded = [ctypes.CDLL(path) for path in torch]
probe = ctypes.CDLL(probe)
probe.stream_of.restype, probe.failure_text.restype = ctypes.c_void_p, ctypes.c_char_p
print([probe.stream_of(device) for device in (0, 3, 7)], probe.failure_text().decode())
"""


def compiled(path: Path, source: str, *arguments: str) -> Path:
    """A shared library, linked as most distributions' compilers link: what is not used is not needed."""
    flags = ["-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden" if "stream.h" in source else "-O0", f"-I{build.SOURCES / 'include'}"]
    path.parent.mkdir(exist_ok=True)
    command = ["g++", *flags, "-Wl,--as-needed", f"-Wl,-soname,{path.name}", "-x", "c++", "-", "-x", "none", "-o", path, *arguments]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.fixture(scope="module")
def torches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The libraries that ``import torch`` would load, per kind of torch: CUDA's in a library of its own, CPU alone, everything in one."""
    folder = tmp_path_factory.mktemp("torches")
    found = {}
    for kind in ("cuda", "cpu", "whole"):
        here = folder / kind
        libraries = [compiled(here / name, "") for name in ("libc10.so", "libtorch_cpu.so")]
        if kind == "cuda":
            libraries.append(compiled(here / "libtorch_cuda.so", CUDA))
        needed = [f"-l:{path.name}" for path in libraries]
        source = CUDA if kind == "whole" else ""
        found[kind] = [
            *libraries,
            compiled(here / "libtorch.so", source, "-Wl,--no-as-needed", f"-L{here}", *needed, "-Wl,-rpath,$ORIGIN"),
        ]
    return found


@pytest.fixture(scope="module")
def probes(torches: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The lookup in a library linked beside the CPU build: as ``build.py`` links, and by a linker that dropped libtorch."""
    folder, beside = tmp_path_factory.mktemp("probes"), f"-L{torches['cpu'][0].parent}"
    dropped = [flag for flag in build.NEEDED if flag.startswith("-l")]
    return {
        "needed": compiled(folder / "needed.so", PROBE, beside, *build.NEEDED),
        "dropped": compiled(folder / "dropped.so", PROBE, beside, *dropped),
    }


def needs(library: Path) -> set[str]:
    """Names in the needed list of a library."""
    text = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    return {line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line}


def asked(libraries: list[Path]) -> str:
    return subprocess.run([sys.executable, "-c", ASK, *libraries], capture_output=True, text=True, check=True).stdout.strip()


def test_the_linker_keeps_or_drops_libtorch(probes: dict[str, Path]) -> None:
    """Otherwise the cases below would all be one."""
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= needs(probes["needed"])
    assert not {"libtorch.so", "libtorch_cpu.so", "libc10.so"} & needs(probes["dropped"])


@pytest.mark.parametrize(("kind", "linked"), [("cuda", "needed"), ("cuda", "dropped"), ("whole", "needed")])
def test_the_current_stream_of_the_device_is_used(kind: str, linked: str, torches: dict[str, list[Path]], probes: dict[str, Path]) -> None:
    said = asked([*torches[kind], probes[linked]])
    assert said.startswith(
        "[1000, 1003, None] the cuda backend must launch on torch's current CUDA stream; got an error from torch for device 7."
    )


@pytest.mark.parametrize("linked", ["needed", "dropped"])
def test_without_a_stream_it_is_an_error(linked: str, torches: dict[str, list[Path]], probes: dict[str, Path]) -> None:
    """Never the legacy stream, which would race with torch's own and break the capture of graphs."""
    said = asked([*torches["cpu"], probes[linked]])
    assert said.startswith("[None, None, None] the cuda backend must launch on torch's current CUDA stream; got a torch that does not say")
    assert said.endswith("Install a CUDA build of torch 2.10 or later, or use backend='triton'.")


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.skipif(build.find_nvcc() is None, reason="there is no CUDA compiler (nvcc)")
def test_the_release_library_needs_libtorch() -> None:
    assert {"libtorch.so", "libtorch_cpu.so"} <= needs(native.library("release"))
