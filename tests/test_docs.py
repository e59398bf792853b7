"""Pages of docs/ about layers: their programs run, block after block, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PROGRAMS = {
    "additive or dot product": ("additive-or-dot-product.md", ""),
    "from torch": ("migrating.md", "torch.nn.MultiheadAttention"),
    "from D2L": ("migrating.md", "D2L"),
}


def section(page: str, title: str) -> str:
    """The text below a heading of second order; the whole page without one."""
    text = (DOCS / page).read_text()
    return text if not title else text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install fused-attn[viz])")
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as a reader runs them
    blocks = re.findall(r"```python\n(.*?)```", section(*PROGRAMS[name]), flags=re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    pyplot.close("all")
    assert blocks


@pytest.mark.quick
@pytest.mark.parametrize("page", ["which-layer.md", "additive-or-dot-product.md", "migrating.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (DOCS / page).read_text())
    assert [link for link in links if not (DOCS / link).exists()] == []
