"""docs/migrating.md followed literally: the blocks of a section, one after another, as one program in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.peers]
ROOT = Path(__file__).parents[1]
SECTIONS = {
    title: "\n".join(blocks)
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "migrating.md").read_text(), re.MULTILINE | re.DOTALL)
    if (blocks := re.findall(r"```python\n(.*?)```", text, re.DOTALL))
}


@pytest.mark.parametrize("title", SECTIONS)
def test_section(title: str, tmp_path: Path) -> None:
    environment = os.environ | {"KERAS_BACKEND": "torch", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", SECTIONS[title]], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_system_has_a_program() -> None:
    assert len(SECTIONS) >= 7
