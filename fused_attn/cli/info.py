"""Versions, devices, and which backends can run here. Needs nothing but torch."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import fused_attn
from fused_attn.backends.cpu import library
from fused_attn_bench.text import size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    """Prints three sections."""
    for title, rows in (
        ("Versions", versions()),
        ("Devices", devices()),
        ("Backends, in the order that auto tries them", backends()),
    ):
        print(title)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"  {name:<{width}}  {value}")
        print()
    return 0


def versions() -> list[tuple[str, str]]:
    """Of everything that decides what runs."""
    return [
        ("fused_attn", fused_attn.__version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("Triton", _installed("triton")),
        (
            "CUDA",
            f"{torch.version.cuda} (that torch was built with)" if torch.version.cuda else "none (a build of torch for CPUs)",
        ),
        ("CPU library", library.failure() or f"kernels for {library.isa()} run; it holds {', '.join(library.isas())} for this CPU"),
    ]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed (pip install {package})"


def devices() -> list[tuple[str, str]]:
    """The CPU, then every GPU."""
    return [("cpu", cpu()), *((f"cuda:{i}", gpu(i)) for i in range(torch.cuda.device_count()))]


def cpu() -> str:
    """Name, threads, instruction set and memory of the CPU."""
    parts = [_cpu_name(), f"{torch.get_num_threads()} threads", torch.backends.cpu.get_cpu_capability()]
    if hasattr(os, "sysconf"):
        parts.append(f"{size(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))} memory")
    return ", ".join(parts)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu(index: int) -> str:
    """Name, compute capability and memory of a GPU."""
    found = torch.cuda.get_device_properties(index)
    capability = f"compute capability {found.major}.{found.minor}"
    return f"{found.name}, {capability}, {found.multi_processor_count} SMs, {size(found.total_memory)} memory"


def backends() -> list[tuple[str, str]]:
    """What each backend says to a small float32 problem on each kind of device."""
    kinds = ["cpu", *["cuda"] * torch.cuda.is_available()]
    said: dict[str, list[str]] = {}
    for kind in kinds:
        q = torch.zeros(1, 1, 4, 8, device=kind)
        explanation = fused_attn.explain(q, q, q)
        for row in explanation.rows:
            chosen = ", chosen by auto" if row.backend == explanation.chosen else ""
            said.setdefault(row.backend, []).append(f"on {kind}: {row.reason or 'can run'}{chosen}")
    return [(name, "; ".join(answers)) for name, answers in said.items()]
