"""The native library and the simulator of CUDA for tests: each compiled once, whichever worker asks first, below build/."""

from __future__ import annotations

import fcntl
import functools
import importlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fused_attn import build


@functools.cache
def library(flavour: str) -> Path:
    """The library's path; its objects and the compiler's reports (.log) lie beside it."""
    folder = build.ROOT / "build" / "native"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{flavour}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build.build(flavour)


@functools.cache
def simulated_library() -> Path:
    """The library of the simulator's flavour, linked again where the process has a CUDA run-time that it would take for the simulator's."""
    made, cusim = library("simulator"), simulator()
    if not cusim.is_private():
        return made
    unfinished, nvcc = made.with_suffix(f".{os.getpid()}"), build.require_nvcc()[0]
    objects = [made.with_name(name) for name in build.units()]
    libraries = ["-Xlinker", cusim.library_path(), f"-L{Path(torch.__file__).with_name('lib')}", *build.NEEDED]
    subprocess.run([nvcc, "-shared", "-cudart=none", "-o", unfinished, *objects, *libraries], check=True)
    return unfinished.replace(made.with_name("_native_private.so"))


def missing_for_simulator() -> str:
    """Why the simulator cannot be compiled here, or an empty string."""
    if platform.machine() != "x86_64":
        return f"the CUDA simulator computes with the vector instructions of x86-64, not of {platform.machine()}"
    return next((f"there is no {tool} to compile the CUDA simulator with" for tool in ("g++", "make") if shutil.which(tool) is None), "")


@functools.cache
def simulator() -> Any:
    """The simulator's module; it compiles itself into build/cusim when something first runs on it."""
    sys.path.insert(0, str(Path(__file__).with_name("cusim")))
    return importlib.import_module("cusim")
