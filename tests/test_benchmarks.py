"""Measuring: turns are fair, memory is what was allocated, and a wrong result gets no speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fused_attn as fa
from benchmarks import __main__ as cli
from benchmarks import additive, bounds, memory, overhead
from fused_attn.testing import comparison
from fused_attn.testing.workload import Workload
from fused_attn_bench import measure
from fused_attn_bench.measure import Effort

CPU = torch.device("cpu")


@pytest.mark.quick
def test_turns_run_forth_and_back() -> None:
    seen: list[str] = []
    functions = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = measure.interleaved(functions, CPU, Effort(0.0, rounds=3, sample=0.0))
    assert "".join(seen) == "abc" + "cba" + "abc"
    assert [len(t.samples) for t in times.values()] == [3, 3, 3]


@pytest.mark.quick
def test_short_calls_are_repeated_within_a_sample() -> None:
    calls = []
    times = measure.interleaved({"a": lambda: calls.append(0)}, CPU, Effort(0.0, rounds=2, sample=0.001))
    assert len(times["a"].samples) == 2 and len(calls) > 20
    assert measure.interleaved({}, CPU, Effort(0.0, rounds=2)) == {}


@pytest.mark.quick
def test_peak_counts_what_is_alive_at_once(device: torch.device) -> None:
    megabyte = 2**20

    def work() -> torch.Tensor:
        kept = torch.zeros(megabyte, dtype=torch.uint8, device=device)
        for _ in range(4):
            torch.zeros(2 * megabyte, dtype=torch.uint8, device=device)
        return kept

    result, peak = measure.peak_bytes(work, device)
    assert result.numel() == megabyte and peak == 3 * megabyte


@pytest.mark.quick
def test_peak_sees_inside_operators() -> None:
    q = torch.randn(1, 1, 512, 16)
    _, peak = measure.peak_bytes(lambda: torch._scaled_dot_product_attention_math(q, q, q), CPU)
    assert peak >= 512 * 512 * 4


@pytest.mark.quick
def test_free_memory_is_positive(device: torch.device) -> None:
    assert measure.free_bytes(device) > 2**20


@pytest.mark.quick
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_workloads_agree_and_the_judge_knows(probs: bool, backward: bool, device: torch.device) -> None:
    mask = fa.Causal() & fa.SlidingWindow(5, 0)
    work = Workload(comparison.seeded(device, (2, 2, 33, 8), torch.float32), mask, probs, backward)
    judge, results = work.judge(), work.fused("eager")
    assert set(results) == {"out", *["probs"] * probs, *["dq", "dk", "dv"] * backward}
    assert not judge(results).broken and not judge(work.eager()()).broken
    sdpa = work.sdpa()
    assert (sdpa is None) == probs
    assert sdpa is None or not judge(sdpa()).broken
    wrong = {name: t + 1e-3 for name, t in results.items()}
    assert set(judge(wrong).broken) == set(results)


@pytest.mark.quick
def test_rows_at_a_time_give_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(comparison.seeded(CPU, (1, 4096, 3, 4), torch.float64), fa.Causal(), probs=True, backward=True)
    whole = work.by_rows(torch.float64)
    rows = Workload(comparison.seeded(CPU, (1, 4096, 3, 4), torch.float64), fa.Causal(), probs=True, backward=True)
    monkeypatch.setattr("fused_attn.testing.workload.BLOCK", 1)
    for name, tensor in rows.by_rows(torch.float64).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.quick
def test_a_wrong_result_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Workload.fused
    monkeypatch.setattr(Workload, "fused", lambda self: {n: t * 1.01 for n, t in honest(self).items()})
    done = comparison.compare(Workload(comparison.seeded(CPU, (1, 1, 16, 8), torch.float32)), Effort(0.0, rounds=1))
    ours = done.entries[comparison.FUSED]
    assert ours.timing is None and "breaks the error rule in out" in ours.reason
    assert done.ratio(comparison.EAGER) is None and done.entries[comparison.EAGER].timing is not None


@pytest.mark.quick
def test_what_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "free_bytes", lambda device: 1000)
    done = comparison.compare(Workload(comparison.seeded(CPU, (1, 1, 16, 8), torch.float32)), Effort(0.0, rounds=1))
    assert "not run: needs about" in done.entries[comparison.EAGER].reason
    assert done.entries[comparison.EAGER].peak is None


def test_overhead_reports_the_ratio_and_its_bound() -> None:
    report = overhead.run(CPU, 0.2)
    assert len(report.rows) == 4 and "5.00x" in str(report) and "requires_grad" in str(report)
    assert "Backend cuda is not measured: " in report.note


def test_overhead_measures_the_cuda_backend_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "_refusal", lambda device: "")
    attend = fa.attention  # another backend stands for it: what is tested is the table
    monkeypatch.setattr(fa, "attention", lambda *args, backend="auto", **options: attend(*args, **options))
    report = overhead.run(CPU, 0.2)
    assert [row.cells[-1] for row in report.rows] == ["5.00x"] * 4 + ["2.00x"] * 2 + ["-"] * 2


def test_memory_of_a_window_stays_below_the_dense_one() -> None:
    report = memory.measure((1, 1, 2048, 16), CPU)
    assert report.holds and [row.cells[0] for row in report.rows] == ["fused_attn", "eager", "SDPA"]


@pytest.mark.quick
def test_additive_attention_is_held_to_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_attn_bench.harness.WARM_UP", 0.0)
    for name, easy in (("SHAPE", (1, 2, 9, 8)), ("SPEED", 0.0), ("MEMORY", 1e9)):
        monkeypatch.setattr(additive, name, easy)
    assert [row.cells[0] for row in additive.run(CPU, 0.0).rows] == ["fwd", "fwd+bwd"]
    assert additive.run(CPU, 0.0).holds
    for name, unreachable in (("SPEED", 1e9), ("MEMORY", 0.0)):
        with monkeypatch.context() as patched:
            patched.setattr(additive, name, unreachable)
            assert not additive.run(CPU, 0.0).holds
    monkeypatch.setattr("benchmarks.cases.AttentionProblem.plain", lambda problem, *leaves: (leaves[0] * 1.01,))
    report = additive.run(CPU, 0.0)
    assert not report.holds and "breaks the error rule in out" in str(report)


def test_bounds_print_and_set_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "SHAPE", (1, 1, 512, 16))
    command = ["bounds", "--only", "memory", "--device", "cpu", "--json", str(tmp_path / "b.json")]
    assert cli.main(command) == 0
    assert "fused_attn" in capsys.readouterr().out and json.loads((tmp_path / "b.json").read_text())[0]["rows"]
    monkeypatch.setattr(memory, "BOUND", 1)
    assert cli.main(command) == 1


@pytest.mark.quick
def test_a_report_holds_when_every_bound_does() -> None:
    rows = [bounds.Row(("a", "1"), True), bounds.Row(("b", "2"))]
    assert bounds.Report("t", ("x", "y"), rows, "n").holds
    assert not bounds.Report("t", ("x", "y"), [*rows, bounds.Row(("c", "3"), False)], "n").holds
