"""The CPU's targets: every case is what it says in every provider's words, what is wrong has no time, and the page shows what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu_cases, cpu_table, cpu_targets
from benchmarks.cpu_cases import KINDS, Attention, Job, Rows
from benchmarks.cpu_targets import Line

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_providers_agree_with_the_definition(kind: cpu_cases.Kind) -> None:
    for job in Attention(kind, 128, 16).jobs():
        for name, call in job.calls.items():
            assert job.judge(name, call()) == "", (job.mode, name)
        assert job.rival in job.calls and "cpu" in job.calls
        if kind.name != "dropout":  # a result that is off must be seen, in each of the tensors
            results = job.calls["eager"]()
            for i in range(len(results)):
                assert job.judge("cpu", (*results[:i], results[i] * 1.01, *results[i + 1 :]))


@pytest.mark.parametrize("masked", [False, True])
def test_rows_agree_with_the_definition(masked: bool) -> None:
    for shape in ((4, 8, 16), (50, 4)):
        job = Rows("softmax", shape, masked, 1.0).job()
        assert {name: job.judge(name, call()) for name, call in job.calls.items()} == dict.fromkeys(job.calls, "")


def test_targets_grow_as_tiles_are_left_out() -> None:
    by_name = {kind.name: kind for kind in KINDS}
    causal, window = (Attention(by_name[name], 1024, 16).jobs()[0].target for name in ("causal", "window"))
    documents = Attention(by_name["documents"], 1024, 16)
    # 22 blocks of 48 rows, five of which hold the end of one of eight documents and the beginning of the next.
    share = (22 + 5) / (22 * 8)
    assert causal == 1.1 and documents.kept_share == pytest.approx(share) and documents.jobs()[0].target == pytest.approx(1.1 / share)
    # Rows of 48 queries see 128 keys to each side and their own: two to four of eight tiles.
    assert window is not None and 1.1 * 8 / 4 < window < 1.1 * 8 / 2
    assert [by_name["probabilities"].target.of("fwd+bwd", n) for n in (1024, 2048)] == [1.5, 1.8]
    assert [job.mode for job in Attention(by_name["bias gradient"], 256, 16).jobs()] == ["fwd+bwd"]


def test_what_is_wrong_or_raises_has_no_time() -> None:
    def fail() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no such kernel\nmore")

    calls = {"cpu": lambda: (torch.ones(1),), "blocked": fail, "eager": lambda: (torch.zeros(1),)}
    job = Job("plain", "fwd", 256, "64", calls, lambda name, results: "out" * int(results[0]), 1.1, "eager")
    line = cpu_targets.measure(job, 0.0, 0)
    assert set(line.seconds) == set(line.faults) == {"eager"} and line.busy == {}
    assert line.wrong == {"cpu": "breaks the error rule in out", "blocked": "no such kernel"}
    shown = cpu_table.judged(asdict(line), "cpu", cpu_table.library_target)
    assert shown == "✗ breaks the error rule in out"


LINE = Line("plain", "fwd", 1024, "64", 1.1, "sdpa", {"cpu": 1.0, "blocked": 1.2, "sdpa": 1.1, "eager": 3.0}, dict.fromkeys(("cpu", "blocked", "sdpa", "eager"), 7.0))  # fmt: skip


def found(*lines: Line, host: float = 30.0) -> dict[str, Any]:
    environment = {"device": "a chip", "threads": "2", "torch": "2", "library": "avx2", "load": "0.1"}
    costs = [{"call": "fwd", "ours": host, "sdpa": 17.0, "target": 2.0}]
    return {"environment": environment, "busy": 2, "lines": [asdict(line) for line in lines], "host": costs}


def test_marks_and_misses() -> None:
    assert cpu_table.missed(found(LINE)) == 0
    assert "1.10 ✓ (1.1)" in cpu_table.rendered(found(LINE)) and "0.92 ✓ (0.9)" in cpu_table.rendered(found(LINE))
    slow = replace(LINE, seconds=LINE.seconds | {"cpu": 1.3})
    assert cpu_table.missed(found(slow)) == 1 and "0.85 ✗ (1.1)" in cpu_table.rendered(found(slow))
    assert cpu_table.missed(found(replace(LINE, seconds=LINE.seconds | {"cpu": 1.05}))) == 0, "a tenth is noise"
    assert cpu_table.missed(found(replace(LINE, wrong={"cpu": "no"}, seconds={"sdpa": 1.0}))) == 1
    assert cpu_table.missed(found(LINE, host=50.0)) == 1


def test_growth_is_held_to_that_of_eager() -> None:
    busy = replace(LINE, busy={"cpu": 2.0, "blocked": 6.0, "eager": 6.0})
    assert [(name, value) for _, name, value in cpu_table.growth([asdict(busy)])] == [("cpu", 1.0), ("blocked", 2.5)]
    assert cpu_table.missed(found(busy)) == 1
    assert "2.00, 1.00 of eager's ✓" in cpu_table.rendered(found(busy)) and "5.00, 2.50 of eager's ✗" in cpu_table.rendered(found(busy))


def test_a_backend_that_is_missing_is_a_dash() -> None:
    line = replace(LINE, seconds={"cpu": 1.0, "sdpa": 1.1, "eager": 3.0})
    text = cpu_table.rendered(found(line))
    assert cpu_table.missed(found(line)) == 0 and "this version has no such backend" in text and "| 1e+03 (7) | - |" in text


def test_a_small_run_writes_its_file_and_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_targets, "KINDS", KINDS[:1])
    monkeypatch.setattr(cpu_targets, "SOFTMAX", (Rows("thin rows, masked", (40, 4), True, 10.0),))
    monkeypatch.setattr(cpu_targets, "BUSY_LENGTH", 256)
    monkeypatch.setattr(cpu_targets, "ROUNDS", 1)
    monkeypatch.setattr(cpu_targets, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(cpu_targets, "HOST_SECONDS", 0.0)
    page, out = tmp_path / "page.md", tmp_path / "new" / "t.json"
    page.write_text(f"before\n\n{cpu_table.BEGIN}\nold\n{cpu_table.END}\nafter\n")
    options = ["--length", "256", "--seconds", "0", "--threads", str(torch.get_num_threads()), "--busy", "1"]
    assert cpu_targets.main([*options, "--out", str(out), "--page", str(page)]) in (0, 1)
    stored = json.loads(out.read_text())
    assert {(x["kind"], x["mode"], x["size"]) for x in stored["lines"]} == {
        ("plain", "fwd", "64"), ("plain", "fwd+bwd", "64"), ("plain", "fwd", "80"), ("plain", "fwd+bwd", "80"), ("thin rows, masked", "fwd", "40x4"),
    }  # fmt: skip
    assert [bool(x["busy"]) for x in stored["lines"]] == [True, True, False, False, False]
    assert [cost["call"] for cost in stored["host"]] == ["no mask, no grad", "no mask, requires_grad", "no mask, fwd+bwd"]
    text = page.read_text()
    assert text.startswith("before\n\n") and text.endswith("\nafter\n") and "old" not in text and cpu_table.rendered(stored) in text
    with pytest.raises(ValueError, match="the page must have the lines"):
        cpu_table.replaced("nothing", "text")


def test_the_page_shows_the_committed_measurement() -> None:
    stored = json.loads(cpu_targets.RESULTS.read_text())
    assert cpu_table.replaced(cpu_targets.PAGE.read_text(), cpu_table.rendered(stored)) == cpu_targets.PAGE.read_text()
