"""One process of a group: ``python -m tests.placed RANK RANKS FOLDER`` computes every case on DTensors, judges it, and writes what failed.

Every rank makes the whole problem and distributes its tensors by differentiable torch, so that outputs and gradients come back whole to each.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import fused_attn as fa
from fused_attn.auxiliary import AuxOutput
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import ScoreMod
from fused_attn.scoring import Scoring
from fused_attn.testing import Case, Inputs, evaluate, make_inputs, violations, vocabulary

_GRID = Grid((2, 4, 32, 32), torch.device("cpu"))
MASKS = list(vocabulary(Mask, _GRID))
MODS = [name for name in vocabulary(ScoreMod, _GRID)]
SCORINGS = list(vocabulary(Scoring, _GRID))
B, H, Q, R = Shard(0), Shard(1), Shard(2), Replicate()


@dataclass(frozen=True)
class Trial:
    case: Case
    placements: tuple[Placement, ...]
    everything: bool = False

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.placements} {self.everything}"


def trials() -> Iterator[Trial]:
    base = Case((2, 4, 2), (32, 32), (16, 24))
    every = itertools.cycle([(B, H), (H, R), (Q, H), (H, H), (B, Q), (R, B), (B,), (H,), (Q,), (R,)])
    for masks in [(), *((m,) for m in MASKS)]:
        yield Trial(replace(base, masks=masks), next(every))
        yield Trial(replace(base, masks=(*masks, "Causal0") if masks != ("Causal0",) else masks, sinks=True), next(every))
    for mod in MODS:
        for _ in range(3):
            p = next(every)
            while mod.startswith("Selective") and any(x in (H, Q) for x in p):
                p = next(every)
            yield Trial(replace(base, masks=("Causal0",), mods=(mod,)), p)
    for p in [(B, H), (H, R), (Q, H), (H,), (Q,)]:
        yield Trial(replace(base, masks=("Causal0",), mods=("SoftCap0", "Bias0"), dropout=0.3), p, True)
        yield Trial(replace(base, sizes=(3, 6, 2), layout="transposed"), p, True)
        yield Trial(replace(base, sizes=(1, 5, 1), layout="transposed", mods=("Bias1",)), p, True)
        yield Trial(replace(base, sizes=(1, 5, 1), dtype=torch.bfloat16, masks=("ValidLengths0",)), p, True)


def placed(tensor: Tensor, mesh: DeviceMesh, placements: Any) -> Any:
    return DTensor.from_local(tensor, mesh, [R] * mesh.ndim, run_check=False).redistribute(placements=placements)


def failures(trial: Trial, mesh: DeviceMesh) -> list[str]:
    names = ("lse", "probs", "scores", "column_sums", "entropy", "max_scores") if trial.everything else ("lse",)
    inputs = make_inputs(trial.case)
    own = Inputs(
        replace(inputs.problem, aux=fa.AuxRequest(**dict.fromkeys(names, True))),
        {n: t for n, t in inputs.incoming.items() if n in ("out", *names)},
    )

    def run(problem: AttentionProblem) -> Any:
        m = problem.modifiers
        qkv = [placed(t, mesh, trial.placements) for t in (problem.q, problem.k, problem.v)]
        out, aux = fa.attention(
            *qkv,
            mask=m.mask,
            scale=None if m.scoring else m.scale,
            q_offset=m.q_offset,
            score_mods=m.score_mods,
            sinks=m.sinks,
            dropout=m.dropout,
            return_aux=problem.aux,
            scoring=m.scoring,
        )
        assert tuple(out.placements) == trial.placements
        return out.full_tensor(), AuxOutput(**{n: getattr(aux, n).full_tensor() for n in names})

    through = ("out", *names)
    return violations(inputs, evaluate(run, own, through), through)


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    meshes = {1: init_device_mesh("cpu", (ranks,)), 2: init_device_mesh("cpu", (2, ranks // 2))}
    found = {}
    for trial in trials():
        try:
            found[trial.name] = failures(trial, meshes[len(trial.placements)])
        except Exception:
            import traceback

            found[trial.name] = [traceback.format_exc()[-1500:]]
    if rank == 1:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
