"""docs/benchmarking.md and the ready workflow say what is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from benchmarks import power
from benchmarks.project import PROJECT
from benchmarks.variants import ATTENTION
from fused_attn_bench.__main__ import modules
from fused_attn_bench.case import Case
from fused_attn_bench.commands import check
from fused_attn_bench.history import History
from fused_attn_bench.operation import OPERATIONS

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "benchmarking.md").read_text()


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how fast anything is."""
    monkeypatch.setattr("fused_attn_bench.harness.WARM_UP", 0.0)


def test_the_provider_of_the_example_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPERATIONS["attention"], "providers", dict(OPERATIONS["attention"].providers))
    (tmp_path / "mine.py").write_text(re.findall(r"```python\n(.*?)```", TEXT, re.S)[0])
    options = [
        "--device",
        "cpu",
        "--seconds",
        "0",
        "--rounds",
        "2",
        "--db",
        str(tmp_path / "h.sqlite"),
        "--load",
        str(tmp_path / "mine.py"),
    ]
    assert cli.main(["run", "--op", "attention", "--shape", "1x2x16x8", "--provider", "mine", *options]) == 0
    results = History(tmp_path / "h.sqlite").results()
    assert {r.status for r in results} == {"ok", "refused"}
    assert {Case.parse(r.case).variant for r in results if r.status == "ok"} == {n for n, v in ATTENTION.items() if not v.beyond_sdpa}


def test_every_command_is_named() -> None:
    for command in modules(PROJECT):
        assert f"{command} " in TEXT or f"{command}`" in TEXT, command


def test_exit_codes_are_those_of_check() -> None:
    codes = [int(code) for code in re.findall(r"^\| (\d) \|", TEXT, re.M)]
    assert codes == [0, check.SLOWER, 2, check.WRONG, check.NOT_COMPARABLE]
    for code in codes:
        assert re.search(rf"\b{code} ", check.__doc__ or "")


def test_figures_are_those_of_the_committed_measurement() -> None:
    """The table is what ``fused_attn_bench.power`` prints for the file beside it."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "power.json").read_text())
    tallies = [power.Tally(**experiment) for experiment in measured["experiments"]]
    assert {t.title for t in tallies} == {e.title for e in power.EXPERIMENTS}
    for tally in tallies:
        assert "| " + " | ".join(tally.row()) + " |" in TEXT
        if tally.truth == power.SAME:
            assert tally.verdicts.count(power.SAME) >= 0.99 * len(tally.verdicts)


def test_the_workflow_is_one() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / "docs" / "benchmark-workflow.yml").read_text())
    steps = workflow["jobs"]["check"]["steps"]
    script = next(step["run"] for step in steps if step.get("name") == "check")
    assert "python -m benchmarks check" in script and f"= {check.NOT_COMPARABLE} ]" in script
    assert all("uses" in step or "run" in step for step in steps)
