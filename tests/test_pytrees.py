"""Masks, modifications and outputs as pytrees, and graphs that outlive the call: export, vmap and fake tensors reach their tensors."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import fused_attn as fa
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.score_mods import ScoreMod
from fused_attn.testing import vocabulary
from tests.test_transforms import BATCH, DIM, HEADS, LENGTH, close, leaf, qkv

GRID = Grid((BATCH, HEADS, LENGTH, LENGTH), torch.device("cpu"))
OBJECTS = {**vocabulary(Mask, GRID), **vocabulary(ScoreMod, GRID), "Dropout": fa.Dropout(0.1, seed=torch.tensor(3))}


@dataclass(frozen=True)
class Odd(Mask):
    """A user's mask, with a check that a rebuilt object must not run."""

    table: Tensor
    width: int

    def __post_init__(self) -> None:
        if not isinstance(self.table, Tensor):
            raise TypeError("a table")

    def keep(self, grid: Grid) -> Tensor:
        return self.table[grid.kv_idx] < self.width


class Plain(Mask):
    def __init__(self, limit: Tensor) -> None:
        self.limit = limit

    def keep(self, grid: Grid) -> Tensor:
        return grid.kv_idx < self.limit


OBJECTS |= {
    "Odd": Odd(torch.arange(LENGTH), 4),
    "Plain": Plain(torch.tensor(4)),
    "And": fa.Causal() & fa.ValidLengths(torch.tensor([3, 9])),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_pytrees(name: str) -> None:
    thing = OBJECTS[name]
    leaves, structure = pytree.tree_flatten(thing)
    assert all(isinstance(x, Tensor) for x in leaves)
    rebuilt = pytree.tree_unflatten(leaves, structure)
    assert type(rebuilt) is type(thing) and all(a is b for a, b in zip(pytree.tree_leaves(rebuilt), leaves, strict=True))
    assert pytree.tree_structure(rebuilt) == structure
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure
    # tree_map may put anything in, and what it put in is found again.
    for filler in (None, 0, object(), "text"):
        filled = pytree.tree_map(lambda _, filler=filler: filler, thing)
        assert pytree.tree_leaves(filled) == [filler] * len(leaves)
    assert len(pytree.tree_flatten_with_path(thing)[0]) == len(leaves)


@pytest.mark.quick
def test_objects_go_through_vmap() -> None:
    q = torch.randn(4, BATCH, HEADS, LENGTH, DIM)

    def attend(q: Tensor, mask: Any, mods: Any) -> Tensor:
        return fa.attention(q, q, q, mask=mask, score_mods=mods)

    lens, tables, bias = torch.randint(0, 10, (4, BATCH)), torch.randint(0, 9, (4, LENGTH)), torch.randn(4, LENGTH, LENGTH)
    for mask, mods in (
        (lambda i: fa.Causal() & fa.ValidLengths(lens[i]), lambda i: ()),
        (lambda i: Odd(tables[i], 4), lambda i: (fa.SoftCap(3.0), fa.Bias(bias[i]))),
        (lambda i: Plain(lens[i, 0]), lambda i: ()),
    ):
        stacked = (mask(slice(None)) if i == 0 else mods(slice(None)) for i in range(2))
        if isinstance(mask(0), Plain):
            stacked = iter((Plain(lens[:, 0]), ()))
        want = torch.stack([attend(q[i], mask(i), mods(i)) for i in range(4)])
        close([torch.vmap(attend)(q, *stacked)], [want])


@pytest.mark.quick
def test_outputs_go_through_transforms() -> None:
    q = torch.randn(4, BATCH, HEADS, LENGTH, DIM)

    def attend(q: Tensor) -> Any:
        return fa.attention(q, q, q, mask=fa.Causal(), return_aux=fa.AuxRequest(probs=True, lse=True))

    out, aux = torch.vmap(attend)(q)
    assert isinstance(aux, fa.AuxOutput) and aux.scores is None
    close([out, aux.probs, aux.lse], [torch.stack(parts) for parts in zip(*((o, a.probs, a.lse) for o, a in map(attend, q)), strict=True)])

    def loss(q: Tensor) -> tuple[Tensor, Any]:
        out, aux = attend(q)
        return out.sin().sum(), aux

    grad, aux = torch.func.grad(loss, has_aux=True)(q[0])
    close([aux.lse], [attend(q[0])[1].lse])
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(q[0])[1]
    assert isinstance(compiled, fa.AuxOutput) and compiled.lse.equal(attend(q[0])[1].lse)
    assert grad.shape == q[0].shape


class Attend(torch.nn.Module):
    def forward(self, q: Tensor, mask: Any, mods: Any) -> Any:
        return fa.attention(q, q, q, mask=mask, score_mods=mods, return_aux=fa.AuxRequest(lse=True))


def test_objects_go_through_export_and_back() -> None:
    inputs = [
        (
            torch.randn(BATCH, HEADS, LENGTH, DIM),
            fa.Causal() & fa.ValidLengths(torch.tensor(lens)),
            (fa.SoftCap(3.0), fa.Bias(torch.randn(9, 9))),
        )
        for lens in ([3, 9], [7, 0])
    ]
    program = torch.export.export(Attend(), inputs[0])
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for module, arguments in itertools.product((program.module(), torch.export.load(file).module()), inputs):
        (out, aux), (want, more) = module(*arguments), Attend()(*arguments)
        close([out, aux.lse.nan_to_num(neginf=0)], [want, more.lse.nan_to_num(neginf=0)])


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exported_programs_have_gradients(strict: bool) -> None:
    class Everything(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
            request = fa.AuxRequest(probs=True, lse=True)
            out, aux = fa.attention(q, k, v, mask=fa.Causal(), score_mods=(fa.Bias(bias),), sinks=sinks, return_aux=request)
            return out, aux.probs, aux.lse, fa.masked_softmax(bias)

    inputs = [*qkv(), leaf(HEADS, LENGTH, LENGTH), leaf(HEADS)]
    program = torch.export.export(Everything(), tuple(inputs), strict=strict).run_decompositions()

    def evaluated(module: Any) -> list[Tensor]:
        outputs = module(*inputs)
        return [*outputs, *torch.autograd.grad(sum(t.sin().sum() for t in outputs), inputs)]

    close(evaluated(program.module()), evaluated(Everything()), scale=4)


@pytest.mark.quick
def test_fake_tensors_reach_inside_masks() -> None:
    mode = FakeTensorMode()
    q, mask = pytree.tree_map_only(
        Tensor, mode.from_tensor, (qkv()[0], fa.Documents(torch.arange(9) // 4) & fa.ValidLengths(torch.tensor([3, 9])))
    )
    with mode:
        assert fa.attention(q, q, q, mask=mask).shape == q.shape
