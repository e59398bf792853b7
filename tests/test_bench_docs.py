"""docs/benchmarking.md and the ready workflow say what is so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as cli
from benchmarks import power, power_check, power_simulated
from benchmarks.project import PROJECT
from benchmarks.variants import ATTENTION
from fused_attn_bench import codes, limits
from fused_attn_bench.__main__ import modules
from fused_attn_bench.case import Case
from fused_attn_bench.commands import check, compare
from fused_attn_bench.compare import Plan
from fused_attn_bench.history import History
from fused_attn_bench.limits import Limits
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
    (tmp_path / "mine.py").write_text(re.findall(r"```python\n(.*?)```", TEXT, re.S)[1])
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


def test_the_operation_of_the_example_is_the_file_s() -> None:
    """Which tests/test_bench_product.py measures, compares, checks and reports."""
    example = (ROOT / "examples" / "bench" / "rmsnorm.py").read_text()
    assert re.findall(r"```python\n(.*?)```", TEXT, re.S)[0] == example and len(example.splitlines()) <= 25


def test_every_command_is_named() -> None:
    for command in modules(PROJECT):
        assert f"{command} " in TEXT or f"{command}`" in TEXT, command


def test_exit_codes_are_those_of_the_commands() -> None:
    listed = [int(code) for code in re.findall(r"^\| (\d+) \|", TEXT, re.M)]
    assert listed == [codes.GOOD, codes.WORSE, codes.USAGE, codes.UNDECIDED, codes.CRASHED, codes.INTERRUPTED]
    assert {*listed} == {value for name, value in vars(codes).items() if name.isupper()}
    for module in (check, compare):
        for code in listed:
            assert re.search(rf"\b{code} ", module.__doc__ or ""), code


def test_the_limits_of_the_example_are_read(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text(re.findall(r"```toml\n(.*?)```", TEXT, re.S)[0])
    rules = limits.read(tmp_path / "limits.toml", Limits())
    assert rules("attention/causal/fwd/float32/1x1x8x8") == Limits(
        time=pytest.approx(0.03), memory=2**25, host=pytest.approx(20e-6), error=2.0
    )
    assert rules("softmax/masked/fwd/float32/1x1x8x8") == Limits(time=pytest.approx(0.05), memory=2**25)


def read(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "cpu" / name).read_text())


def test_figures_are_those_of_the_committed_measurements() -> None:
    """The tables are what the scripts print for the files beside them."""
    compared, checked = (
        [power.Tally(**experiment) for experiment in read(name)["experiments"]] for name in ("power.json", "power_check.json")
    )
    assert [t.title for t in compared] == [e.title for e in power.EXPERIMENTS] and [t.title for t in checked] == [*power_check.TRUTHS]
    for tally in (*compared, *checked):
        assert "| " + " | ".join(tally.row()) + " |" in TEXT
    # False alarms are named.
    identical = [verdict for tally in compared if tally.truth == power.SAME for verdict in tally.verdicts]
    alarms = sum(verdict in (power.SLOWER, power.FASTER) for verdict in identical)
    assert f"**{alarms} of {len(identical)} comparisons of identical code was called a change**" in TEXT
    alarms = checked[0].verdicts.count(power.SLOWER)
    assert f"**{alarms} of {len(checked[0].verdicts)} checks of identical code called it slower**" in TEXT


def test_the_promise_is_what_was_simulated() -> None:
    """False alarms in at most one run of a hundred on every kind of noise; 8 % found 95 times in a hundred where the noise is the usual one."""
    simulated = read("power_simulated.json")
    tallies = [power_simulated.Tally(**tally) for tally in simulated["tallies"]]
    assert len(tallies) == len(power_simulated.COMMANDS) * len(power_simulated.NOISE) * len(power_simulated.TRUTHS)
    assert (simulated["cases"], simulated["sigma"], simulated["looks"]) == (power_simulated.CASES, power_simulated.SIGMA, Plan().looks)
    for tally in tallies:
        assert "| " + " | ".join(tally.row()) + " |" in TEXT
        assert tally.runs >= 1000 and tally.alarms <= 0.01 * tally.runs
        if tally.title == "8 % slower" and tally.noise == "equal":
            assert tally.failed >= 0.95 * tally.runs


def test_the_workflow_is_one() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / "docs" / "benchmark-workflow.yml").read_text())
    steps = workflow["jobs"]["check"]["steps"]
    script = next(step["run"] for step in steps if step.get("name") == "check")
    assert "fused-attn-bench check" in script and f"= {codes.UNDECIDED} ]" in script
    assert all("uses" in step or "run" in step for step in steps)
