"""Several processes that work together as the ranks of a group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def together(count: int, module: str, folder: Path, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """What came of ``python -m MODULE RANK RANKS FOLDER ARGUMENTS`` on so many processes."""
    commands = [[sys.executable, "-m", module, str(rank), str(count), str(folder), *arguments] for rank in range(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(c, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for c in commands
    ]
    try:
        texts = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, text) for p, text in zip(running, texts, strict=True)]
