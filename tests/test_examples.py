"""Every script of examples/ runs and checks itself; those that need another package are its peers' tests."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
PACKAGES = {"diffusers", "keras", "transformers", "x_transformers"}
OURS = {"fused_attn.integrations.keras": "keras", "fused_attn.integrations.transformers": "transformers"}
OURS |= {"fused_attn.integrations.x_transformers": "x_transformers"}


def packages_of(path: Path) -> set[str]:
    """The other packages that a script imports, itself or through an integration."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {OURS.get(name, name.partition(".")[0]) for name in names} & PACKAGES


def _example(path: Path) -> Any:
    return pytest.param(path, id=path.stem, marks=[pytest.mark.peers] if packages_of(path) else [])


@pytest.mark.parametrize("path", [_example(path) for path in EXAMPLES])
def test_example(path: Path) -> None:
    """In a process of its own: without the interpreter and the simulator."""
    for package in packages_of(path):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FUSED_ATTN_LIBRARY")}
    environment |= {"PYTHONPATH": str(path.parents[1]), "KERAS_BACKEND": "torch"}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout, "an example says what it checked"


@pytest.mark.quick
@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_examples_are_short_cells(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert sum(line.startswith("# %%") for line in lines) >= 2
    assert len(lines) < 60
