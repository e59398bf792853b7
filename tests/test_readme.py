"""Every Python snippet of the README and of the pages under docs/ runs: sessions as doctests, the rest as programs."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

from fused_attn import backends

ROOT = Path(__file__).parents[1]
# What holds programs that need other packages, or files of the reader's own, has tests of its own.
ELSEWHERE = {"migrating.md", "benchmarking.md"}
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in ELSEWHERE)]


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


PROGRAMS = {p.name: "\n".join(programs) for p in PAGES if (programs := [s for s in snippets(p) if ">>>" not in s])}
SESSIONS = {p.name: sessions for p in PAGES if (sessions := [s for s in snippets(p) if ">>>" in s])}


@pytest.mark.quick
@pytest.mark.parametrize("page", PROGRAMS)
def test_programs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after another."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    exec(compile(PROGRAMS[page], page, "exec"), {"__name__": page})


@pytest.mark.quick
@pytest.mark.parametrize("page", SESSIONS)
def test_sessions(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another with shared names, as a reader would type them: without the interpreter, without the simulator."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(backends._registered, "cuda", raising=False)
    names: dict[str, Any] = {}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for snippet in SESSIONS[page]:
        test = doctest.DocTestParser().get_doctest(snippet, names, page, page, 0)
        runner.run(test, clear_globs=False)
        names.update(test.globs)
    assert runner.summarize(verbose=False).failed == 0


def test_links_lead_somewhere() -> None:
    """Relative links and pictures of the README and of all pages."""
    broken = [
        f"{page.name}: {target}"
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []
