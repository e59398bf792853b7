"""Attention that processes share, by its sequence or as DTensors: every mask, modification, method and placement on 2 and 4 real processes, by the error rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from fused_attn.distributed import Shards
from fused_attn.distributed.cost import Workload, cost
from fused_attn.lowering import Grid, KernelMask
from fused_attn_bench.text import table
from tests import placed, ranks
from tests.processes import together

DOCS = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
TRIALS = {trial.name for trial in ranks.trials()}
PLACED = {trial.name for trial in placed.trials()}


@pytest.fixture(scope="module", params=(2, 4))
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, list[str]]]:
    """What the ranks found; they also assert what ``ranks.around``, ``placed.found`` and ``parallel_layers.check`` say."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    ends = together(request.param, "tests.ranks", folder)
    assert [end.returncode for end in ends] == [0] * request.param, "\n".join(end.stdout[-2000:] for end in ends)
    return request.param, json.loads((folder / "found.json").read_text())


@pytest.mark.peers
def test_results_are_those_of_one_process(found: tuple[int, dict[str, list[str]]]) -> None:
    count, failures = found
    assert failures.keys() == (TRIALS | PLACED if count == placed.RANKS else TRIALS)
    assert {name: reasons for name, reasons in failures.items() if reasons} == {}


@pytest.mark.peers
def test_a_rank_that_dies_is_an_error_of_the_others(tmp_path: Path) -> None:
    *others, last = together(4, "tests.ranks", tmp_path, "dying")
    assert last.returncode == 9
    for rank, end in enumerate(others):
        assert end.returncode == 0, end.stdout[-2000:]
        assert f"every rank of the group must take part until the call and its backward end; got, rank {rank} with" in end.stdout


@pytest.mark.quick
def test_the_table_is_the_model_s() -> None:
    assert table(scaling.HEADER, scaling.rows(), left=1) in DOCS


@pytest.mark.quick
def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="must be a multiple of 8 = 2 x 4 ranks long; got 12"):
        Shards(4, "zigzag", 12)
    with pytest.raises(ValueError, match="order must be 'contiguous' or 'zigzag'; got 'striped'"):
        Shards(2, "striped", 8)  # type: ignore[arg-type]
    assert cost(Workload(heads=8, kv_heads=3), 16, "heads") is None


@pytest.mark.quick
def test_zigzag_gives_every_rank_the_same_work() -> None:
    shards = Shards(4, "zigzag", 64)
    meetings = shards.meetings(KernelMask(right=0), Grid((1, 1, 64, 64), torch.device("cpu")))
    work = [sum(meetings[q][k] for q in shards.numbers(rank) for k in range(shards.count)) for rank in range(4)]
    assert work == [9] * 4, "of 8 x 8 chunks 36 hold pairs"
