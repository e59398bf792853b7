"""What 4 ranks find with DTensors: every mask, modification and scoring in every placement by the error rule, and what must hold around them.

Every rank makes the whole problem and distributes its tensors by differentiable torch, so that outputs and gradients come back whole to each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing import assert_close

import fused_attn as fa
from fused_attn.auxiliary import SWITCHES, AuxOutput
from fused_attn.distributed import context_parallel_attention
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.normalizers import Gumbel, Hard, Sigmoid, TalkingHeads, TopK
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import ScoreMod
from fused_attn.testing import Case, Inputs, evaluate, make_inputs, violations, vocabulary

RANKS = 4
B, H, Q, K, R = Shard(0), Shard(1), Shard(2), Shard(3), Replicate()
# On a mesh of 2 x 2 ranks, or on one of 4.
PLACEMENTS = ((B, H), (H, R), (Q, H), (H, H), (B, Q), (R, B), (B,), (H,), (Q,), (R,))
_GRID = Grid((2, 4, 32, 32), torch.device("cpu"))
MASKS = list(vocabulary(Mask, _GRID))
MODS = list(vocabulary(ScoreMod, _GRID))
Placements = tuple[Placement, ...]


@dataclass(frozen=True)
class Trial:
    """A case, where q, k and v lie, and whether all auxiliary outputs are asked for instead of lse alone."""

    case: Case
    placements: Placements
    everything: bool = False

    @property
    def name(self) -> str:
        return "-".join(("".join(map(_letter, self.placements)), "aux" * self.everything, self.case.name))


def _letter(placement: Placement) -> str:
    return "BHQK"[placement.dim] if isinstance(placement, Shard) else "R"


def trials() -> Iterator[Trial]:
    """Every mask and modification in some placements; heads and batches that the ranks do not divide; groups that they divide, or not."""
    base = Case((2, 4, 2), (32, 32), (16, 24))
    every = itertools.cycle(PLACEMENTS)
    for masks in [(), *((m,) for m in MASKS)]:
        yield Trial(replace(base, masks=masks), next(every))
        yield Trial(replace(base, masks=(*masks, "Causal0") if masks != ("Causal0",) else masks, sinks=True), next(every))
    for mod in MODS:
        of_rows = [p for p in PLACEMENTS if not {H, Q} & {*p}] if mod.startswith("Selective") else PLACEMENTS
        yield from (Trial(replace(base, masks=("Causal0",), mods=(mod,)), p) for p in of_rows[len(mod) % 3 :: 3])
    for p in ((B, H), (H, R), (Q, H), (H,), (Q,)):
        yield Trial(replace(base, masks=("Causal0",), mods=("SoftCap0", "Bias0"), dropout=0.3), p, True)
        yield Trial(replace(base, sizes=(3, 6, 2), layout="transposed"), p, True)
        yield Trial(replace(base, sizes=(1, 5, 1), layout="transposed", mods=("Bias1",)), p, True)
        yield Trial(replace(base, sizes=(1, 5, 1), dtype=torch.bfloat16, masks=("ValidLengths0",)), p, True)


def placed(tensor: Tensor, mesh: DeviceMesh, placements: Placements) -> Any:
    """A tensor that all ranks have, distributed; differentiable."""
    return DTensor.from_local(tensor, mesh, [R] * mesh.ndim, run_check=False).redistribute(placements=placements)


def keys_of(placements: Placements) -> Placements:
    """Where keys lie without being gathered for queries that are divided."""
    return tuple([R if p == Q else p for p in placements])


def failures(trial: Trial, mesh: DeviceMesh) -> list[str]:
    """What breaks the error rule."""
    inputs, names = make_inputs(trial.case), SWITCHES if trial.everything else ("lse",)
    through = ("out", *names)
    request = fa.AuxRequest(**dict.fromkeys(names, True))
    own = Inputs(replace(inputs.problem, aux=request), {n: t for n, t in inputs.incoming.items() if n in through})

    def run(problem: AttentionProblem) -> tuple[Tensor, AuxOutput]:
        m = problem.modifiers
        q, k, v = (placed(t, mesh, trial.placements) for t in (problem.q, problem.k, problem.v))
        out, aux = fa.attention(
            q, k, v, mask=m.mask, scale=m.scale, q_offset=m.q_offset, score_mods=m.score_mods, sinks=m.sinks, dropout=m.dropout, return_aux=request
        )  # fmt: skip
        assert out.placements == trial.placements
        return out.full_tensor(), AuxOutput(**{n: getattr(aux, n).full_tensor() for n in names})

    return violations(inputs, evaluate(run, own, through), through)


def _inputs(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(len(shapes))
    return tuple([torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes])


def _same(function: Callable[..., Any], single: tuple[Tensor, ...], distributed: tuple[Any, ...], others: tuple[Tensor, ...] = ()) -> None:
    """Results and gradients of the same float64 arithmetic, whole; ``others`` are what both calls share."""
    expected, got = function(*single), function(*distributed).full_tensor()
    assert_close(got, expected)
    weight = expected.detach().cos()
    shared = [t for t in others if t.requires_grad]
    grads = torch.autograd.grad((expected * weight).sum(), [*single, *shared])
    assert_close(torch.autograd.grad((got * weight).sum(), [*single, *shared]), grads)


def _softmax(mesh: DeviceMesh) -> None:
    (scores, bias) = _inputs((4, 8, 6, 10), (8, 6, 10))
    lens = torch.tensor([1, 5, 10, 0])
    for p in ((B, H), (Q, R), (H, Q), (K, B)):
        for options in (
            {},
            {"mask": fa.KeyPadding(torch.arange(10) % 3 > torch.arange(4)[:, None] % 2)},
            {"mask": torch.arange(80).view(8, 1, 10) % 7 > 2, "empty_rows": "uniform"},
            {"mask": fa.Causal(), "q_offset": 4, "bias": bias},
            {"mask": fa.ValidLengths(lens), "dropout": fa.Dropout(0.3, seed=3)},
            {"dim": 1, "bias": bias[:, :1]},
        ):
            _same(
                lambda s, o=options: fa.masked_softmax(s, **o),
                (scores,),
                (placed(scores, mesh, p),),
                (bias,) if options.get("bias") is bias else (),
            )
    for shape, p in (((8,), (R, R)), ((6, 8), (B, R)), ((5, 6, 8), (B, H)), ((2, 3, 4, 6, 8), (B, K)), ((2, 3, 4, 6, 8), (Q, H))):
        (scores,) = _inputs(shape)
        for dim in (-1, 0):
            _same(lambda s, d=dim: fa.masked_softmax(s, dim=d), (scores,), (placed(scores, mesh, p),))


def _transfers(mesh: DeviceMesh) -> None:
    """None, forward and backward, whatever lies as q does."""
    q, k, v, bias = _inputs((4, 8, 16, 8), (4, 4, 16, 8), (4, 4, 16, 8), (4, 8, 16, 16))
    lens, keep, slopes = torch.tensor([3, 16, 5, 9]), torch.arange(1024).view(4, 1, 16, 16) % 3 > 0, torch.arange(8.0)
    for p in ((B, H), (H, B), (B, R)):
        rows = tuple([p if p == B else R for p in p])
        tensors = [placed(t, mesh, p).detach().requires_grad_() for t in (q, k, v, bias)]
        masks = (placed(lens, mesh, rows), placed(keep, mesh, rows))
        expected = fa.attention(
            q, k, v, mask=fa.ValidLengths(lens) & fa.Causal() & keep, score_mods=(fa.Bias(bias), fa.ALiBi(slopes)), sinks=slopes
        )
        with CommDebugMode() as transfers:
            mask = fa.ValidLengths(masks[0]) & fa.Causal() & masks[1]
            out = fa.attention(*tensors[:3], mask=mask, score_mods=(fa.Bias(tensors[3]), fa.ALiBi(slopes)), sinks=slopes)
            out.backward(torch.ones_like(out))
            again = fa.scaled_dot_product_attention(*tensors[:3], masks[1], enable_gqa=True)
        assert transfers.get_total_counts() == 0
        assert_close(out.full_tensor(), expected)
        assert_close(again.full_tensor(), fa.scaled_dot_product_attention(q, k, v, keep, enable_gqa=True))


def _attention(mesh: DeviceMesh) -> None:
    """Scorings, normalisers, empty rows, alignment by sequence, masks without a normal form, five dimensions."""
    q, k, v, heads, table, row = _inputs((4, 8, 16, 8), (4, 4, 16, 8), (4, 4, 16, 8), (8, 1, 1), (8, 8), (8,))
    some = fa.ValidLengths(torch.tensor([0, 3, 16, 1]))
    scorings = (fa.DotProduct(heads.exp()), fa.NegativeL2(0.1), fa.NegativeL2(heads.exp()), fa.Additive(table, 0.5), fa.Additive(row))
    for p in ((B, H), (H, R), (Q, H)):
        for options in (
            *({"scoring": scoring} for scoring in scorings),
            *({"normalizer": n} for n in (Sigmoid(-1.0), TopK(3), Hard())),
            *({"mask": some, "empty_rows": e} for e in ("uniform", "softmax")),
            {"mask": fa.Causal() | fa.SlidingWindow(9, 0), "q_offset": torch.tensor([0, 1, 2, 3])},
            {"mask": ~fa.Causal() | (torch.arange(16) % 2 > 0)},
        ):
            distributed = (placed(q, mesh, p), *(placed(t, mesh, keys_of(p)) for t in (k, v)))
            held = options["scoring"].tensors if "scoring" in options else ()
            leaves = tuple([t for t in held if t.is_leaf])
            _same(lambda q, k, v, o=options: fa.attention(q, k, v, **o), (q, k, v), distributed, leaves)
    for p in ((R, R), (B, R)):
        for options in ({"score_mods": (fa.Selective(),)}, {"normalizer": TalkingHeads(table)}):
            _same(lambda q, k, v, o=options: fa.attention(q, k, v, **o), (q, k, v), tuple([placed(t, mesh, p) for t in (q, k, v)]))
    five = _inputs(*[(2, 4, 2, 16, 8)] * 3)
    _same(fa.scaled_dot_product_attention, five, tuple([placed(t, mesh, (B, H)) for t in five]))
    picked = fa.AuxRequest(probs=True, rows=torch.tensor([0, -1]))
    _same(lambda q, k: fa.attention(q, k, k, return_aux=picked)[1].probs, (q, k), tuple([placed(t, mesh, (B, H)) for t in (q, k)]))


def _dropout(mesh: DeviceMesh) -> None:
    """A seed that is drawn is the same for those who compute the same."""
    torch.manual_seed(dist.get_rank())
    out = fa.attention(*(placed(t, mesh, (B, R)) for t in _inputs(*[(2, 4, 16, 8)] * 3)), dropout=fa.Dropout(0.5)).to_local()
    parts = [torch.empty_like(out) for _ in range(RANKS)]
    dist.all_gather(parts, out.contiguous())
    assert torch.equal(parts[0], parts[1])
    assert torch.equal(parts[2], parts[3])


def _compiled(mesh: DeviceMesh) -> None:
    """In one graph, forward and backward; double backward."""
    tensors = tuple([placed(t, mesh, (B, H)).detach().requires_grad_() for t in _inputs((4, 8, 16, 8), (4, 4, 16, 8), (4, 4, 16, 8))])
    lens = torch.tensor([3, 4, 5, 16])

    def attend(*tensors: Any) -> Any:
        mask, dropout = fa.Causal() & fa.ValidLengths(lens), fa.Dropout(0.2, seed=1)
        return fa.attention(*tensors, mask=mask, score_mods=(fa.SoftCap(5.0),), dropout=dropout)

    def gradients(function: Any, **options: Any) -> Any:
        return torch.autograd.grad(function(*tensors).to_local().square().sum(), tensors, **options)

    plain = gradients(attend, create_graph=True)
    compiled = gradients(torch.compile(attend, backend="aot_eager", fullgraph=True))
    assert_close([g.to_local() for g in compiled], [g.to_local() for g in plain])
    random = torch.compile(lambda x: fa.attention(x, x, x, dropout=fa.Dropout(0.5)).to_local(), backend="aot_eager", fullgraph=True)
    for length in (16, 24, 40):  # the second makes lengths symbols
        (x,) = _inputs((2, 4, length, 8))
        assert random(placed(x, mesh, (B, H))).shape == (1, 2, length, 8)
    twice = torch.autograd.grad(sum(g.to_local().square().sum() for g in plain), tensors)
    assert all(bool(g.to_local().isfinite().all()) for g in twice)


def _refusals(mesh: DeviceMesh) -> None:
    q, k, v = _inputs((4, 8, 16, 8), (4, 4, 16, 8), (4, 4, 16, 8))
    distributed = tuple([placed(t, mesh, (Q, H)) for t in (q, k, v)])
    with pytest.raises(TypeError, match="must all be DTensors, or none of them; got a DTensor, a plain tensor, a plain tensor"):
        fa.attention(distributed[0], k, v)
    other = placed(k, init_device_mesh("cpu", (RANKS,)), (B,))
    with pytest.raises(ValueError, match="q, k and v must be on one mesh"):
        fa.attention(distributed[0], other, other)
    for options, reason in (
        ({"return_aux": fa.AuxRequest(probs=True, rows=torch.tensor([0]))}, "probabilities of some queries are asked for"),
        ({"normalizer": TalkingHeads(torch.eye(8))}, "TalkingHeads mixes heads"),
        (
            {"normalizer": TalkingHeads(torch.eye(8), Gumbel())},
            "TalkingHeads mixes heads; TalkingHeads draws from each rank's own generator",
        ),
        ({"score_mods": (fa.Selective(),)}, "Selective needs head 0 and all earlier queries"),
    ):
        with pytest.raises(fa.UnsupportedError, match=f"compute its own heads and queries; got a call where {reason}"):
            fa.attention(*distributed, **options)  # type: ignore[call-overload]
    whole = (R, R)
    flags, numbers = (placed(t, mesh, whole) for t in (torch.ones(4, 16, dtype=torch.bool), torch.ones(4, 16, dtype=torch.int64)))
    for options in (
        {"mask": fa.KeyPadding(flags)}, {"mask": fa.Documents(numbers)}, {"mask": flags[:, None, None]}, {"mask": fa.PrefixLM(numbers[:, 0])},
        {"score_mods": (fa.Bias(numbers[:, None, None].double()),)}, {"score_mods": (fa.ALiBi(numbers[0, :8].double()),)},
        {"sinks": numbers[0, :8].double()}, {"q_offset": numbers[:, 0]}, {"dropout": fa.Dropout(0.1, numbers[0, 0])},
        {"scoring": fa.DotProduct(numbers[0, 0].double())},
    ):  # fmt: skip
        with pytest.raises(TypeError, match="must be a tensor of this process; got a DTensor"):
            fa.attention(q, k, v, **options)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="q must be a tensor of this process; got a DTensor"):
        context_parallel_attention(*distributed)
    with pytest.raises(TypeError, match=r"got a DTensor within a torch\.func transform"):
        torch.func.grad(lambda x: fa.attention(x, x, x).sum().to_local())(distributed[0])
    # What one rank finds wrong is wrong for all of them.
    for wrong, message in ((lambda t: fa.PrefixLM(t[:, 0]), r"must be >= 0"), (fa.Documents, "one run of equal ids")):
        rows = torch.zeros(4, 16, dtype=torch.int64)
        rows[3, ::2] = -1
        with pytest.raises(ValueError, match=message):
            wrong(placed(rows, mesh, (B, R)))


def _outside(some: DeviceMesh) -> None:
    """Ranks that a mesh leaves out have nothing, and wait for nobody."""
    q, scores = (placed(t, some, (H,)) for t in _inputs((2, 4, 16, 8), (2, 4, 16, 16)))
    whole, _ = _inputs((2, 4, 16, 8), (2, 4, 16, 16))
    out, weights = fa.attention(q, q, q, mask=fa.Causal(), dropout=fa.Dropout(0.5)), fa.masked_softmax(scores, fa.Causal())
    assert out.shape == whole.shape and weights.shape == scores.shape
    inside = some.get_coordinate() is not None
    assert out.to_local().numel() == (whole.numel() // 2 if inside else 0)


def found() -> dict[str, list[str]]:
    """What failed in each trial; everything else is asserted."""
    meshes = {1: init_device_mesh("cpu", (RANKS,)), 2: init_device_mesh("cpu", (2, 2))}
    result = {trial.name: failures(trial, meshes[len(trial.placements)]) for trial in trials()}
    for check in (_softmax, _transfers, _attention, _dropout, _compiled, _refusals):
        check(meshes[2])
    _outside(DeviceMesh("cpu", [0, 1]))
    return result
