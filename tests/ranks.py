"""One process of a group: ``python -m tests.ranks RANK RANKS FOLDER`` computes every case with the others, judges it, and rank 0 writes what failed.

Every rank makes the whole problem, hands its own rows to ``context_parallel_attention``, and the results are put together again: outputs in the
sequence's order, gradients as sums of all ranks'.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import fused_attn as fa
from fused_attn.auxiliary import AuxOutput
from fused_attn.distributed import Shards, context_parallel_attention, counted
from fused_attn.distributed.cost import Workload, cost
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import Bias, ScoreMod
from fused_attn.testing import Case, Inputs, evaluate, input_names, make_inputs, violations, vocabulary
from tests import parallel_layers, placed

METHODS, ORDERS = ("ring", "gather", "heads"), ("contiguous", "zigzag")
_GRID = Grid((2, 4, 32, 32), torch.device("cpu"))
MASKS = list(vocabulary(Mask, _GRID))
MODS = [name for name in vocabulary(ScoreMod, _GRID) if not name.startswith("Selective")]


@dataclass(frozen=True)
class Trial:
    """A case, and how it is shared.

    Args:
        case: the problem.
        method, order: as ``context_parallel_attention`` takes them.
        cut_bias: whether biases with a dimension of queries come as this rank's rows alone.
        everything: whether all auxiliary outputs are asked for, instead of lse alone.
    """

    case: Case
    method: str
    order: str
    cut_bias: bool = False
    everything: bool = False

    @property
    def name(self) -> str:
        return "-".join((self.method, self.order, "cut" * self.cut_bias, "aux" * self.everything, self.case.name))


def trials() -> Iterator[Trial]:
    """Every mask and modification with the ring, in both orders; pairs of everything else with every method."""
    base = Case((2, 4, 2), (64, 64), (16, 24))
    for (number, masks), order in itertools.product(enumerate([(), *((m,) for m in MASKS)]), ORDERS):
        yield Trial(replace(base, masks=masks), METHODS[number % 3], order)
        yield Trial(replace(base, masks=(*masks, "Causal0") if masks != ("Causal0",) else masks, sinks=True), "ring", order)
    for (number, mod), order in itertools.product(enumerate(MODS), ORDERS):
        yield Trial(replace(base, masks=("Causal0",), mods=(mod,)), METHODS[number % 3], order, cut_bias=bool(number % 2))
        yield Trial(replace(base, mods=(mod,), sizes=(1, 4, 1)), "ring", order, cut_bias=True)
    for method, order, dtype in itertools.product(METHODS, ORDERS, (torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        yield Trial(replace(base, dtype=dtype, masks=("Causal0",), dropout=0.3, sinks=True), method, order)
    for method, order in itertools.product(METHODS, ORDERS):
        yield Trial(
            replace(base, masks=("Causal0",), mods=("SoftCap0", "Bias0")), method, order, cut_bias=True, everything=method != "heads"
        )
        yield Trial(replace(base, layout="transposed", sizes=(3, 4, 4)), method, order)


def shared(trial: Trial, problem: AttentionProblem) -> tuple[Tensor, AuxOutput]:
    """This rank's rows of a problem."""
    shards, rank, m = Shards(dist.get_world_size(), trial.order, problem.q.shape[2]), dist.get_rank(), problem.modifiers  # type: ignore[arg-type]
    mods = tuple(
        Bias(shards.of(mod.bias, rank, -2)) if trial.cut_bias and isinstance(mod, Bias) and mod.bias.shape[-2] == shards.length else mod
        for mod in m.score_mods
    )
    result: Any = context_parallel_attention(
        *(shards.of(t, rank) for t in (problem.q, problem.k, problem.v)), method=trial.method, order=trial.order, mask=m.mask, scale=m.scale,
        score_mods=mods, sinks=m.sinks, dropout=m.dropout, return_aux=problem.aux,
    )  # fmt: skip
    return result


def failures(trial: Trial) -> list[str]:
    """What breaks the error rule, in the results of all ranks put together."""
    inputs, ranks, rank = make_inputs(trial.case), dist.get_world_size(), dist.get_rank()
    names = ("lse", "probs", "scores") if trial.everything else ("lse",)
    shards = Shards(ranks, trial.order, inputs.problem.q.shape[2])  # type: ignore[arg-type]
    own = Inputs(
        replace(inputs.problem, aux=fa.AuxRequest(**dict.fromkeys(names, True))),
        {n: shards.of(t, rank) for n, t in inputs.incoming.items() if n in ("out", *names)},
    )
    through = ("out", *names)
    got = evaluate(lambda problem: shared(trial, problem), own, through)
    outputs, whole = {*through}, {}
    for name, tensor in got.items():
        if name in outputs:
            parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ranks)]
            dist.all_gather(parts, tensor.contiguous())
            whole[name] = shards.whole(parts)
        else:
            total = tensor.double()
            dist.all_reduce(total)
            whole[name] = total.to(tensor.dtype)
    assert {f"d{n}" for n in input_names(inputs.problem)} <= whole.keys()
    return violations(inputs, whole, through) if rank == 0 else []


def around(rank: int, ranks: int) -> None:
    """Bytes sent, steps left out, activation checkpoints, compilers, meshes and sharded parameters."""
    for method, kv_heads in itertools.product(METHODS, (2, 8)):
        q, k, v = (torch.randn(1, heads, 32, 16, requires_grad=True) for heads in (8, kv_heads, kv_heads))
        model = cost(Workload(1, 8, kv_heads, 16, 32 * ranks, 4, causal=False), ranks, method)
        assert model is not None
        with counted() as traffic:
            out: Any = context_parallel_attention(q, k, v, method=method)  # type: ignore[arg-type]
            assert traffic.sent == model.forward_bytes, (method, kv_heads)
            out.sum().backward()
        assert traffic.sent == model.forward_bytes + model.backward_bytes, (method, kv_heads)
    q, k, v = (torch.randn(1, 2, 32, 16, requires_grad=True) for _ in range(3))
    keys = 2 * k.numel() * k.element_size()
    with counted() as traffic, torch.no_grad():
        context_parallel_attention(q, k, v, mask=fa.SlidingWindow(8, 0))
    assert traffic.sent == (keys if rank + 1 < ranks else 0), "a window reaches one rank on"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return context_parallel_attention(q * 2, k, v, mask=fa.Causal(), order="zigzag")

    def gradients(function: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(q, k, v).square().sum(), (q, k, v))

    plain = gradients(attend)
    for other in (lambda *t: checkpoint(attend, *t, use_reentrant=False), torch.compile(attend, backend="aot_eager")):
        assert all(torch.equal(a, b) for a, b in zip(gradients(other), plain, strict=True))
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "cp"))
    assert context_parallel_attention(q, k, v, mesh["cp"]).shape == q.shape  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="must have one dimension here; got 2"):
        context_parallel_attention(q, k, v, mesh)
    for method, wrap in itertools.product(METHODS, (lambda block: block, checkpoint_wrapper)):
        training(mesh, method, wrap)
    training(mesh, "ring", compiled)
    training(mesh, "ring", lambda block: compiled(checkpoint_wrapper(block)))


class Block(nn.Module):
    """Projections around attention; no bias, because a key's has no gradient to compare with."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32, bias=False, dtype=torch.float64) for _ in range(4))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (4, 8)).transpose(1, 2) for projection in (self.q, self.k, self.v))
        return x + self.out(self.attend(q, k, v, mask=fa.Causal()).transpose(1, 2).flatten(2))


def compiled(block: nn.Module) -> nn.Module:
    block.compile(backend="aot_eager")
    return block


def training(mesh: DeviceMesh, method: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A step of two blocks: samples shared by "dp", the sequence by "cp", parameters by both; its gradients are those of one process."""
    attend = partial(context_parallel_attention, group=mesh["cp"], method=method, order="zigzag")
    alone, shared = (nn.Sequential(Block(f), Block(f)) for f in (fa.attention, attend))
    torch.manual_seed(0)
    x = torch.randn(2 * mesh["dp"].size(), 16, 32, dtype=torch.float64)
    for parameter, own in zip(alone.parameters(), shared.parameters(), strict=True):
        own.data.copy_(nn.init.normal_(parameter, std=0.2))
    alone(x).square().sum().backward()

    everyone = mesh._flatten("dp_cp")
    for number, block in enumerate(shared):
        shared[number] = fully_shard(wrap(block), mesh=everyone)
    fully_shard(shared, mesh=everyone)
    x = x.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]
    shared(Shards(mesh["cp"].size(), "zigzag", 16).of(x, mesh["cp"].get_local_rank(), dim=1)).square().sum().backward()
    for parameter, own in zip(alone.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(own.grad.full_tensor() * everyone.size(), parameter.grad)  # they come as the mean over the ranks


def edges() -> None:
    """Sequences of nothing; autocast's dtype, as ``attention`` takes it."""
    for method, order in itertools.product(METHODS, ORDERS):
        x = torch.randn(1, 4, 0, 16, requires_grad=True)
        out: Any = context_parallel_attention(x, x, x, method=method, order=order, mask=fa.Causal())  # type: ignore[arg-type]
        assert out.shape == x.shape == torch.autograd.grad(out.sum(), x)[0].shape
    x = torch.randn(1, 4, 8, 16)
    for method in METHODS:
        with torch.autocast("cpu", torch.bfloat16):
            out = context_parallel_attention(x.bfloat16(), x, x, method=method)  # type: ignore[arg-type]
        assert out.dtype == torch.bfloat16


def uneven(rank: int) -> None:
    """Other sizes elsewhere are an error of every rank."""
    x = torch.randn(1, 2, 8 + rank, 16)
    for method in METHODS:
        with pytest.raises(ValueError, match=r"every rank must hold q, k and v of the same shapes and dtype; got \[\[\[1, 2, 8, 16\]"):
            context_parallel_attention(x, x, x, method=method)  # type: ignore[arg-type]


def dying(rank: int, ranks: int) -> None:
    """The last rank ends without a word; the others print what they are told."""
    q = torch.randn(1, 2, 32, 16)
    dist.barrier()
    if rank == ranks - 1:
        os._exit(9)
    try:
        context_parallel_attention(q, q, q)
    except RuntimeError as error:
        print(error)
    os._exit(0)  # the group cannot be left in order any more


def main(rank: int, ranks: int, folder: Path, task: str = "trials") -> None:
    """Joins the group, runs every trial and what is around them, or dies."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    if task == "dying":
        dying(rank, ranks)
    found = {trial.name: failures(trial) for trial in trials()}
    if ranks == placed.RANKS:
        found |= placed.found()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    around(rank, ranks)
    edges()
    uneven(rank)
    parallel_layers.check(ranks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
