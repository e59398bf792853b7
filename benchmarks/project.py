"""What the measuring tool has to know of this repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fused_attn_bench.project import Project

ROOT = Path(__file__).resolve().parents[1]


def build(tree: Path, native: bool) -> None:
    """The CPU's library of a commit, and CUDA's where it is asked for; without a compiler plain torch operations are compared, which it says."""
    if (tree / "fused_attn" / "build_cpu.py").is_file():
        subprocess.run([sys.executable, "-m", "fused_attn", "build", "--cpu"], cwd=tree, check=False, stdout=subprocess.DEVNULL)
    if native:
        subprocess.run([sys.executable, "-m", "fused_attn", "build"], cwd=tree, check=True)


PROJECT = Project(
    program="python -m benchmarks",
    launch=("-m", "benchmarks"),
    title="fused_attn benchmarks",
    root=ROOT,
    files=(ROOT / "benchmarks" / "providers.py",),
    watched="fused_attn",
    build=build,
    commands={
        "bounds": ("benchmarks.commands.bounds", "host cost per call and peak memory, held to their bounds"),
        "tune": ("benchmarks.commands.tune", "choose the tiles of Hopper's kernels by measuring"),
    },
)
