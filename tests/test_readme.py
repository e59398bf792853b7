"""Every Python snippet of the README runs: sessions as doctests, the rest as programs."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

from fused_attn import backends

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
PROGRAMS = [snippet for snippet in SNIPPETS if ">>>" not in snippet]
SESSIONS = [snippet for snippet in SNIPPETS if ">>>" in snippet]


@pytest.mark.quick
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_program(program: str) -> None:
    exec(compile(program, str(README), "exec"), {})


@pytest.mark.quick
def test_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another with shared names, as a reader would type them: without the interpreter, without the simulator."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(backends._registered, "cuda", raising=False)
    names: dict[str, Any] = {}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for snippet in SESSIONS:
        test = doctest.DocTestParser().get_doctest(snippet, names, "README", str(README), 0)
        runner.run(test, clear_globs=False)
        names.update(test.globs)
    assert runner.summarize(verbose=False).failed == 0
    assert len(SESSIONS) >= 4 and len(PROGRAMS) >= 1
