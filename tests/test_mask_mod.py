"""FlexAttention's functions as masks, the masks of chunks, blocks and packed queries, and what every mask does at its edges."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import fused_attn as fa
from fused_attn.lowering import Grid
from fused_attn.masks import Mask, from_mask_mod
from fused_attn.testing import check_inputs, inputs_of, vocabulary
from tests.test_mask_algebra import CPU, Checkers, by_loops, holds, qkv

pytestmark = pytest.mark.quick
TABLE, IDS = torch.arange(20) % 3, torch.arange(20) // 6

MASK_MODS: dict[str, Callable[..., Tensor]] = {
    "table": lambda b, h, q_idx, kv_idx: TABLE[q_idx] != TABLE[kv_idx],
    "documents": lambda b, h, q_idx, kv_idx: IDS[q_idx] == IDS[kv_idx],
    "reduces": lambda b, h, q_idx, kv_idx: (TABLE[:4] + kv_idx).sum() % 5 < TABLE[q_idx].max() + 1,
    "constant": lambda b, h, q_idx, kv_idx: torch.tensor(True),
    "like": lambda b, h, q_idx, kv_idx: b.new_zeros((), dtype=torch.bool),
    "two-tables": lambda b, h, q_idx, kv_idx: torch.stack((q_idx, kv_idx)).amax() % (2 + b + h) == 0,
}


@pytest.mark.parametrize("name", MASK_MODS)
def test_functions_mean_what_they_say_of_one_pair(name: str, backend: str) -> None:
    mask = from_mask_mod(MASK_MODS[name])
    holds(mask, Grid((2, 3, 5, 7), CPU))
    holds(mask & fa.ValidLengths(torch.tensor([3, 6])), Grid((2, 3, 5, 7), CPU, 2))
    check_inputs(inputs_of(*qkv(), mask=mask), backend)


def test_functions_mean_what_flex_attention_takes_from_them() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    for function in MASK_MODS.values():
        want = flex.create_mask(function, 2, 3, 5, 7, device="cpu")
        assert from_mask_mod(function).allowed(Grid((2, 3, 5, 7), CPU)).expand(2, 3, 5, 7).equal(want)
    assert from_mask_mod(flex.noop_mask).picture(2, 2) == "##\n##"


def test_functions_get_query_indices_whatever_the_offset() -> None:
    mask = from_mask_mod(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx)
    q, k, v = qkv(5, 9)
    torch.testing.assert_close(fa.attention(q, k, v, mask=mask), fa.attention(q, k, v, mask=fa.Causal(), q_offset=0))


def test_functions_in_compiled_calls_and_pytrees() -> None:
    torch._dynamo.reset()
    leaves = [t.requires_grad_() for t in qkv()]

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        mask = from_mask_mod(lambda b, h, q_idx, kv_idx: table[q_idx] <= table[kv_idx])
        return fa.attention(q, k, v, mask=mask & fa.Causal())

    got, want = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves, TABLE), run(*leaves, TABLE)
    for a, b in zip((got, *torch.autograd.grad(got.sum(), leaves)), (want, *torch.autograd.grad(want.sum(), leaves)), strict=True):
        torch.testing.assert_close(a, b)
    mask = from_mask_mod(MASK_MODS["table"])
    leaves, structure = pytree.tree_flatten(mask)
    assert leaves == [] and pytree.tree_unflatten(leaves, structure) == mask == from_mask_mod(MASK_MODS["table"])
    assert mask != from_mask_mod(MASK_MODS["constant"])


@pytest.mark.parametrize("mask", [from_mask_mod(MASK_MODS["table"]), Checkers() | fa.Chunked(4), ~fa.Band(3)], ids=["mod", "or", "not"])
def test_graphs_hold_masks_without_intervals(mask: Mask) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return fa.attention(q, q, q, mask=mask, backend="cpu")

    q = qkv(9)[0]
    want = Attend()(q)
    for graph in (torch.export.export(Attend(), (q,)).module(), torch.jit.trace(Attend(), (q,)), make_fx(Attend())(q)):
        torch.testing.assert_close(graph(q), want)
    torch._dynamo.reset()
    dynamic = torch.compile(Attend(), backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (9, 12):
        q = qkv(length)[0]
        torch.testing.assert_close(dynamic(q), Attend()(q))


def test_wrong_functions_are_named() -> None:
    with pytest.raises(TypeError, match="mask_mod must be a function"):
        from_mask_mod(torch.ones(2, 2, dtype=torch.bool))
    for wrong in (lambda b, h, q_idx, kv_idx: q_idx - kv_idx, lambda b, h, q_idx, kv_idx: True, lambda b, h, q_idx, kv_idx: q_idx < TABLE):
        with pytest.raises(TypeError, match="mask_mod must return a bool tensor"):
            fa.attention(*qkv(), mask=from_mask_mod(wrong))


NEW = {
    "chunked": fa.Chunked(6),
    "llama4": fa.Causal() & fa.Chunked(8),
    "block-causal": fa.BlockCausal(7),
    "images": fa.Causal() | fa.BidirectionalBlocks(torch.tensor([[-1, -1, *[4] * 6, *[-7] * 8, *[1] * 4], [0, 0, *[9] * 12, *[-2] * 6]])),
    "images-16": fa.BidirectionalBlocks((torch.arange(20) // 5 - 1).to(torch.int8)),
    "documents": fa.Documents(torch.arange(20) // 6, torch.arange(20).flip(0) // 3),
    "documents-batch": fa.Documents(torch.arange(20) // 6, torch.randint(-1, 5, (2, 20), generator=torch.Generator().manual_seed(1))),
    "documents-unsorted": fa.Documents(torch.tensor([[7] * 4 + [2] * 9 + [5] * 7, [0] * 20]), torch.arange(20) % 8),
}


@pytest.mark.parametrize("name", NEW)
def test_new_masks(name: str, backend: str) -> None:
    assert not holds(NEW[name], Grid((2, 2, 20, 20), CPU)).has_pairs
    for offset in (0, -3, 30, torch.tensor([-25, 4])):
        holds(NEW[name], Grid((2, 1, 20, 20), CPU, offset))
    check_inputs(inputs_of(*qkv(), mask=NEW[name]), backend)


def test_queries_with_ids_of_their_own_need_no_offset(backend: str) -> None:
    mask = fa.Documents.from_cu_seqlens(torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 6, 9], dtype=torch.int32))
    assert not mask.positional
    assert not holds(mask, Grid((2, 2, 5, 9), CPU)).has_pairs
    q, k, v = qkv(5, 9)
    out = fa.attention(q, k, v, mask=mask, backend=backend)
    for rows, keys in (((0, 2), (0, 4)), ((2, 5), (6, 9))):
        want = fa.attention(q[:, :, slice(*rows)], k[:, :, slice(*keys)], v[:, :, slice(*keys)], backend="eager")
        torch.testing.assert_close(out[:, :, slice(*rows)], want)


def test_cumulative_lengths_and_their_totals() -> None:
    cu, cu_k = torch.tensor([0, 2, 5]), torch.tensor([0, 1, 7])
    assert fa.Documents.from_cu_seqlens(cu, total=np.int64(5)) == fa.Documents.from_cu_seqlens(cu)
    both = fa.Documents.from_cu_seqlens(cu, cu_k, total=(5, 7))
    assert (both.q_ids.tolist(), both.ids.tolist()) == ([0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1])
    for arguments, total, error, message in (
        ((cu,), 4, ValueError, "total must be the last element of cu_seqlens"),
        ((cu, cu_k), (5, 6), ValueError, "total must be the last element of cu_k"),
        ((cu, cu_k), (6, 7), ValueError, "total must be the last element of cu_q"),
        ((cu, cu_k), 5, TypeError, "pair"),
        ((cu, cu_k[:2]), None, ValueError, "same documents"),
        ((cu, torch.tensor([1, 2, 3])), None, ValueError, "cu_k must start at 0"),
    ):
        with pytest.raises(error, match=message):
            fa.Documents.from_cu_seqlens(*arguments, total=total)
    torch._dynamo.reset()
    run = torch.compile(lambda cu: fa.Documents.from_cu_seqlens(cu, total=5).ids, backend="aot_eager", fullgraph=True)
    assert run(cu).equal(fa.Documents.from_cu_seqlens(cu).ids)
    with pytest.raises(RuntimeError, match="total must be the last element"):
        run(torch.tensor([0, 2, 4]))


SIZES = [s for s in itertools.product((0, 2), (0, 1), (0, 3), (0, 4)) if 0 in s]


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_sizes_of_zero(shape: tuple[int, int, int, int], per_batch: bool) -> None:
    grid = Grid(shape, CPU, torch.arange(shape[0]) if per_batch else 1)
    known = [*vocabulary(Mask, grid).values(), Checkers(), from_mask_mod(MASK_MODS["two-tables"])]
    for mask in (*known, *(~m for m in known), *(fa.Causal() | m for m in known), *(m & known[i - 1] for i, m in enumerate(known))):
        mask.check(grid)
        settled = mask.lower(grid).settled(grid)
        for form in (mask, settled, settled.as_tensors(grid)):
            assert form.allowed(grid).expand(shape).shape == shape
        assert all(t.dtype == torch.int64 and t.expand(shape[0], -1).shape == (shape[0], shape[2]) for t in settled.row_intervals(grid))


@pytest.mark.parametrize("size", SIZES[::3], ids=str)
def test_calls_with_sizes_of_zero(size: tuple[int, int, int, int], backend: str) -> None:
    batch, heads, q_len, kv_len = size
    q, k, v = (torch.randn(batch, heads, n, 8, requires_grad=True) for n in (q_len, kv_len, kv_len))
    for mask in (Checkers(), ~fa.Band(2) | fa.Chunked(3), from_mask_mod(MASK_MODS["table"]), fa.Documents(IDS[:kv_len])):
        out = fa.attention(q, k, v, mask=mask, q_offset=torch.arange(batch), backend=backend)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert out.shape == q.shape and (out == 0).all() and all((g == 0).all() for g in grads)


FAR = (2**31 - 1, 2**31, 2**40, -(2**31), -(2**40))


@pytest.mark.parametrize("offset", FAR, ids=str)
def test_offsets_beyond_32_bits(offset: int, backend: str) -> None:
    grid = Grid((2, 1, 4, 5), CPU, torch.tensor([offset, 2]))
    masks = [m for m in vocabulary(Mask, grid).values() if m.positional]
    for mask in (*masks, *(~m for m in masks), Checkers(), fa.Causal() | fa.Chunked(2)):
        holds(mask, grid)
    q, k, v = (torch.randn(2, 1, n, 8) for n in (4, 5, 5))
    for mask in (fa.Causal(), fa.SlidingWindow(3, 0), fa.Chunked(2)):
        got = fa.attention(q, k, v, mask=mask, q_offset=grid.q_offset, backend=backend)
        torch.testing.assert_close(got, fa.attention(q, k, v, mask=by_loops(mask, grid), backend="eager"))


@pytest.mark.parametrize("far", FAR, ids=str)
def test_tensors_beyond_32_bits(far: int) -> None:
    grid = Grid((2, 1, 4, 5), CPU)
    masks = [fa.ValidLengths(torch.tensor([far, 2])), fa.ValidLengths(torch.tensor([float(far), torch.inf], dtype=torch.float64))]
    masks += [fa.PrefixLM(torch.tensor([far, 3]))] if far > 0 else []
    masks += [
        fa.Documents(torch.tensor([far, far, 3, 2, 2])),
        fa.Documents(torch.tensor([far, 0, 1, 2, 3]), torch.tensor([far, -far, 3, 0])),
    ]
    masks += [fa.BidirectionalBlocks(torch.tensor([far, far, 3, -1, -1]))]
    for mask in masks:
        if not any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in vars(mask).values()):
            holds(mask, grid)
        settled = mask.lower(grid)
        assert all(
            t is None or (t.dtype == torch.int32 and int(t.min()) >= 0 and int(t.max()) <= 5) for t in (settled.kv_start, settled.kv_end)
        )
        assert settled.allowed(grid).expand(grid.shape).equal(mask.allowed(grid).expand(grid.shape))


class Index:
    def __index__(self) -> int:
        return 3


@pytest.mark.parametrize("three", [np.int64(3), np.uint8(3), np.array(3), Index()], ids=lambda x: type(x).__name__)
def test_whatever_is_an_integer_is_one(three: Any) -> None:
    made = (fa.SlidingWindow(three, three), fa.Band(three), fa.PrefixLM(three), fa.Chunked(three), fa.BlockCausal(three))
    assert made == (fa.SlidingWindow(3, 3), fa.Band(3), fa.PrefixLM(3), fa.Chunked(3), fa.BlockCausal(3))
    assert all(type(value) is int for mask in made for value in vars(mask).values())
    for wrong in (True, np.bool_(True), np.float64(3), torch.tensor(3), np.array([3])):
        for make in (fa.Band, fa.Chunked, fa.BlockCausal, lambda n: fa.SlidingWindow(n, 0), fa.Causal if wrong is None else fa.Band):
            with pytest.raises(TypeError, match="must be an int"):
                make(wrong)


def test_values_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="lens must be numbers; got NaN"):
        fa.ValidLengths(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="prefix must be >= 0"):
        fa.PrefixLM(torch.tensor([2, -1]))
    with pytest.raises(ValueError, match="one run of equal ids"):
        fa.BidirectionalBlocks(torch.tensor([0, -1, 0]))
    fa.BidirectionalBlocks(torch.tensor([-1, 0, -1, 1, -2, -1]))
    torch._dynamo.reset()
    run = torch.compile(lambda n: fa.PrefixLM(n).lower(Grid((2, 1, 4, 4), CPU)).kv_end, backend="aot_eager", fullgraph=True)
    assert run(torch.tensor([2, 1])).tolist() == [[2, 2, 3, 4], [1, 2, 3, 4]]
    with pytest.raises(RuntimeError, match="prefix must be >= 0"):
        run(torch.tensor([2, -1]))


def test_padding_in_the_place_of_pairs_is_named() -> None:
    q = torch.randn(2, 3, 6, 8)
    with pytest.raises(ValueError, match=re.escape("KeyPadding(mask)")):
        fa.attention(q, q, q, mask=torch.ones(2, 6, dtype=torch.bool))
    square = torch.randn(6, 1, 6, 8)
    keep = torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(fa.attention(square, square, square, mask=keep), square)  # 2-D is always [q_len, kv_len]


def test_explain_says_what_a_mask_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(2, 2, 256, 8)

    def notes(mask: Any) -> str:
        return "\n".join(fa.explain(q, q, q, mask=mask).notes)

    for mask in (fa.Causal() | fa.Band(3), ~fa.Causal(), fa.Causal() | fa.BidirectionalBlocks(torch.arange(256) // 9), torch.eye(256) > 0):
        assert notes(mask) == ""
    product = fa.KeyPadding(torch.rand(2, 256) > 0.5) & fa.Dense(torch.rand(256, 1) > 0.5)
    for mask in (Checkers(), ~fa.Band(3), fa.ValidLengths(torch.tensor([3, 4])) | ~fa.ValidLengths(torch.tensor([30, 40]))):
        assert "evaluated in blocks" in notes(mask)
    assert notes(product) == ""  # a row's keep is one run, all keys or none
    from fused_attn import backends

    monkeypatch.setattr(type(backends.get("cpu")), "evaluates_rules", False)
    assert "0.0625 MiB" in notes(Checkers())
    assert "0.25 MiB" in notes(product | fa.Band(2) & from_mask_mod(lambda b, h, q_idx, kv_idx: (q_idx + b + h) % 2 == 0))


def test_a_trace_is_right_at_other_lengths() -> None:
    table = torch.rand(64) < 0.7

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fa.attention(q, k, v, mask=from_mask_mod(lambda b, h, i, j: (i >= j) & (table[j] | (i == j))), backend="cpu")

    x, y = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 7, 4)
    traced = torch.jit.trace(attend, (x, x, x), check_trace=False)
    torch.testing.assert_close(traced(y, y, y), attend(y, y, y))


def test_functions_that_branch_or_take_other_arguments() -> None:
    q = torch.randn(1, 1, 4, 4)
    with pytest.raises(TypeError, match=r"must not branch on its indices.*Write &"):
        fa.attention(q, q, q, mask=from_mask_mod(lambda b, h, i, j: (i >= j) and (j > 0)))
    with pytest.raises(TypeError, match=r"must take \(b, h, q_idx, kv_idx\)"):
        from_mask_mod(lambda b, i, j: i >= j)
