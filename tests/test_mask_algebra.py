"""``&``, ``|`` and ``~`` of masks, and masks without an interval form: against Python loops over pairs, and what they cost."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fused_attn as fa
from fused_attn import backends, mask_rules
from fused_attn.backends.cpu import blocks, flash_blocks, tiles
from fused_attn.lowering import Grid, KernelMask
from fused_attn.masks import Mask, from_mask_mod
from fused_attn.testing import EVERYTHING, check_inputs, inputs_of, vocabulary
from fused_attn_bench.measure import peak_bytes
from tests.test_definition import MEANINGS

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")


class Checkers(Mask):
    """A user's mask that is no interval."""

    positional: ClassVar[bool] = True

    def keep(self, grid: Grid) -> Tensor:
        return (grid.q_pos - grid.kv_idx) % 2 == 0


@dataclass(frozen=True)
class Scattered(Mask):
    """A user's mask that holds a tensor and differs between heads."""

    steps: Tensor

    def keep(self, grid: Grid) -> Tensor:
        step = self.steps[slice(*grid.ranges[1]), None, None]
        return (grid.q_idx * 3 + grid.kv_idx) % step < 2


@dataclass(frozen=True)
class Late(Mask):
    """A user's mask whose pattern is one run of keys per row."""

    start: int

    def keep(self, grid: Grid) -> Tensor:
        return grid.kv_idx >= self.start + grid.q_idx // 2


MEANINGS[Checkers] = lambda m, b, h, i, p, j: (p - j) % 2 == 0
MEANINGS[Scattered] = lambda m, b, h, i, p, j: (i * 3 + j) % int(m.steps[h]) < 2
MEANINGS[Late] = lambda m, b, h, i, p, j: j >= m.start + i // 2


def by_loops(mask: Mask, grid: Grid) -> Tensor:
    """The meaning, pair by pair."""
    batch, heads, q_len, kv_len = grid.shape
    offset = grid.q_offset.tolist() if isinstance(grid.q_offset, Tensor) else [grid.q_offset] * batch
    meaning = MEANINGS[type(mask)]
    rows = [
        meaning(mask, b, h, i, i + offset[b], j)
        for b, h, i, j in itertools.product(range(batch), range(heads), range(q_len), range(kv_len))
    ]
    return torch.tensor(rows, dtype=torch.bool).view(grid.shape)


def holds(mask: Mask, grid: Grid) -> KernelMask:
    """The lowered mask, after all its forms were compared with the loops."""
    want, lowered = by_loops(mask, grid), mask.lower(grid)
    settled = lowered.settled(grid)
    for form in (mask, lowered, settled, settled.as_tensors(grid)):
        assert form.allowed(grid).expand(grid.shape).equal(want)
    region = tuple((0, max(1, n - 1)) for n in grid.shape[:2]) + tuple((n // 3, n) for n in grid.shape[2:])
    assert settled.allowed(grid.at(*region)).expand([b - a for a, b in region]).equal(want[tuple(slice(*r) for r in region)])
    assert settled.as_tensors(grid).rules == ()
    return settled


GRIDS = {
    "square": Grid((2, 2, 7, 7), CPU),
    "long": Grid((2, 2, 5, 9), CPU, 4),
    "tensor": Grid((2, 2, 5, 9), CPU, torch.tensor([-3, 6])),
    "short": Grid((2, 1, 9, 4), CPU, -2),
}


@pytest.mark.parametrize("name", GRIDS)
def test_unions_and_complements_of_the_vocabulary(name: str) -> None:
    grid, turn = GRIDS[name], list(GRIDS).index(name)
    known = {**vocabulary(Mask, grid), "Checkers": Checkers()}
    for mask in known.values():
        holds(~mask, grid)
        assert ~~mask is mask
    for (a, first), (b, second) in itertools.combinations(known.items(), 2):
        if zlib.crc32(f"{a}{b}".encode()) % len(GRIDS) == turn:  # every pair on one of the grids
            holds(first | second, grid)
            holds(~(first & second) & ~second, grid)


def interval(form: KernelMask) -> bool:
    return not form.has_pairs


PREFIX, BLOCKS = fa.PrefixLM(torch.tensor([2, 4])), fa.BidirectionalBlocks(torch.tensor([-1, 0, 0, 0, -1, 3, 3]))
JOINING = {
    "windows": fa.SlidingWindow(1, 0) | fa.SlidingWindow(0, 3),
    "causal-window": fa.Causal() | fa.Band(3),
    "causal-prefix": fa.Causal() | PREFIX,
    "causal-blocks": fa.Causal() | BLOCKS,
    "window-blocks": fa.SlidingWindow(1, 0) | BLOCKS,
    "bridged": fa.ValidLengths(torch.tensor([3, 3])) | (~fa.Causal() & ~fa.ValidLengths(torch.tensor([5, 5]))) | fa.Chunked(7),
    "not-causal": ~fa.Causal(),
    "not-lengths": ~fa.ValidLengths(torch.tensor([2, 9])),
    "far-past": fa.Causal() & ~fa.SlidingWindow(2, 0),
    "user": Late(2),
    "user-not": ~Late(2),
    "user-or": Late(6) | ~fa.Causal(),
    "everything": fa.Causal() | ~fa.Causal(),
    "nothing": fa.Causal() & ~fa.Causal(),
    "mask-mod": from_mask_mod(lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 3)),
}


@pytest.mark.parametrize("mask", JOINING.values(), ids=JOINING.keys())
def test_what_is_one_run_per_row_becomes_intervals(mask: Mask) -> None:
    assert interval(holds(mask, GRIDS["square"]))


def test_windows_join_without_a_look_at_values() -> None:
    form = (fa.SlidingWindow(4, None) | fa.SlidingWindow(2, 1) | fa.Band(3)).lower(GRIDS["square"])
    assert (form.left, form.right, form.kv_start, form.kv_end) == (4, None, None, None)
    assert (~fa.Causal()).lower(Grid((1, 1, 4, 4), torch.device("meta"))).kv_start.shape == (1, 4)


def test_broadcast_tensors_stay_broadcast() -> None:
    grid = GRIDS["square"]
    padding, rows = fa.KeyPadding(torch.arange(14).view(2, 7) % 3 > 0), fa.Dense((torch.arange(7) % 2 == 0)[:, None])
    assert holds(~padding, grid).keep.shape == (2, 1, 1, 7)
    assert holds(~fa.Dense(torch.eye(7, dtype=torch.bool)), grid).keep.shape == (1, 1, 7, 7)
    assert holds(padding | ~padding, grid).keep.shape == (2, 1, 1, 7)
    raw = (padding & rows).lower(grid)
    assert raw.keep.shape == (2, 1, 1, 7) and len(raw.rules) == 1 and raw.as_tensors(grid).keep.shape == (2, 1, 7, 7)
    both = holds(padding & rows, grid)
    assert both.rules == () and both.keep.shape == (2, 1, 1, 7)
    assert holds(padding | rows, grid).rules
    assert holds(fa.Dense(torch.rand(2, 2, 7, 1) > 0.4) & padding, grid).rules


def test_the_shape_that_a_rule_needs() -> None:
    grid = Grid((2, 3, 6, 6), CPU)
    for mask, shape in (
        (Checkers(), (1, 1, 6, 6)),
        (Scattered(torch.tensor([3, 4, 5])), (1, 3, 6, 6)),
        (from_mask_mod(lambda b, h, q_idx, kv_idx: (kv_idx + b) % 2 == 0), (2, 1, 1, 6)),
        (from_mask_mod(lambda b, h, q_idx, kv_idx: (q_idx + h) % 2 == 0), (1, 3, 6, 1)),
    ):
        assert mask.lower(grid).as_tensors(grid).keep.shape == shape


def test_de_morgan_and_flatness() -> None:
    a, b, c = fa.Causal(), fa.Band(2), fa.ValidLengths(torch.tensor([3]))
    assert ~(a & b) == ~a | ~b and ~(a | b) == ~a & ~b
    assert ((a | b) | c).masks == (a | (b | c)).masks == (a, b, c)
    tensor = torch.eye(7, dtype=torch.bool)
    assert (tensor | a) == (fa.Dense(tensor) | a) and (a | tensor) == a | fa.Dense(tensor)
    assert (~c | a).positional and not (~c).positional
    holds(tensor | a, GRIDS["square"])
    for wrong in (3, "causal", torch.eye(4)):
        with pytest.raises(TypeError, match="mask must"):
            a | wrong


def test_a_truth_value_is_refused() -> None:
    for ask in (lambda: bool(fa.Causal()), lambda: fa.Causal() and fa.Band(2), lambda: not fa.Causal(), lambda: fa.Causal() or None):
        with pytest.raises(TypeError, match="combined with &"):
            ask()


@dataclass(frozen=True)
class Named(Mask):
    lens: Tensor
    name: str

    def keep(self, grid: Grid) -> Tensor:
        return grid.kv_idx < self.lens[0]


class Loose(Mask):
    def __init__(self, limit: Any) -> None:
        self.limit = limit


def test_equal_masks_are_equal() -> None:
    lens, keep = torch.tensor([1, 2]), torch.eye(4, dtype=torch.bool)

    def makers(t: Any) -> list[Mask]:
        return [
            fa.Causal(), fa.SlidingWindow(2, None), fa.ValidLengths(t(lens)), fa.Dense(t(keep)), fa.PrefixLM(t(lens)), fa.PrefixLM(2),
            fa.Causal() & fa.Dense(t(keep)), fa.Causal() | fa.ValidLengths(t(lens)), ~fa.ValidLengths(t(lens)), Named(t(lens), "a"), Loose(t(lens)),
            Loose({"a": [t(lens), 3]}), fa.Documents(t(lens)), fa.Documents(t(lens), t(lens)), from_mask_mod(MASK_MOD),
        ]  # fmt: skip

    first, second = makers(lambda t: t), makers(torch.clone)
    for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second)):
        assert (a == b) is (i == j) and (a != b) is (i != j)
        assert i != j or hash(a) == hash(b)
    assert len({*first, *second}) == len(first)
    assert fa.ValidLengths(lens) != fa.ValidLengths(lens.int()) and fa.ValidLengths(lens) != fa.ValidLengths(lens + 1)
    assert fa.Causal() != 3 and Named(lens, "a") != Named(lens, "b") and Loose(np.ones(2)) != Loose(np.ones(2))
    meta = torch.ones(2, device="meta")
    assert Loose(meta) == Loose(meta) != Loose(meta.clone())


def MASK_MOD(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx + kv_idx) % 3 != 0


def qkv(length: int = 20, kv_len: int | None = None, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, 2, n, 8) for n in (length, kv_len or length, kv_len or length)]


RULED = {
    "checkers": Checkers(),
    "heads": Scattered(torch.tensor([3, 4])),
    "causal-heads": fa.Causal() & Scattered(torch.tensor([5, 4])),
    "union": fa.SlidingWindow(2, 0) | fa.ValidLengths(torch.tensor([3, 9])),
    "complement": ~fa.Band(3) & fa.ValidLengths(torch.tensor([20, 11])),
    "joined": fa.Causal() | fa.BidirectionalBlocks(torch.arange(20) // 3 % 4 * (torch.arange(20) < 12) - 1),
    "product": fa.Dense((torch.arange(20) % 3 > 0)[:, None]) & fa.KeyPadding(torch.arange(40).view(2, 20) % 7 > 0) & Checkers(),
    "mask-mod": from_mask_mod(MASK_MOD),
    "mask-mod-or": fa.Causal() | from_mask_mod(lambda b, h, q_idx, kv_idx: (kv_idx + b + h) % 5 == 0),
    "nothing": Checkers() & ~Checkers(),
}


@pytest.mark.parametrize("mask", RULED.values(), ids=RULED.keys())
def test_every_backend_and_gradient(mask: Mask, backend: str) -> None:
    check_inputs(inputs_of(*qkv(), mask=mask), backend)


@pytest.mark.parametrize("mask", RULED.values(), ids=RULED.keys())
def test_masked_softmax(mask: Mask, backend: str) -> None:
    scores = torch.randn(2, 2, 20, 20, requires_grad=True)
    allowed = by_loops(mask, Grid((2, 2, 20, 20), CPU))
    want = scores.masked_fill(~allowed, -torch.inf).softmax(-1).masked_fill(~allowed, 0.0).nan_to_num(0.0)
    got = fa.masked_softmax(scores, mask, backend=backend)
    torch.testing.assert_close(got, want)
    incoming = torch.randn_like(got)
    (grad,) = torch.autograd.grad(got, scores, incoming)
    torch.testing.assert_close(grad, got.detach() * (incoming - (got.detach() * incoming).sum(-1, keepdim=True)))


@pytest.mark.parametrize("name", ["causal-heads", "product", "mask-mod-or"])
def test_tiles_of_many_rows(name: str) -> None:
    """More rows than one tile holds, several batches, and the answers of one tile not taken for another's."""
    mask = {
        "causal-heads": RULED["causal-heads"], "mask-mod-or": RULED["mask-mod-or"],
        "product": fa.Dense(torch.rand(1, 2, 700, 1) > 0.3) & fa.KeyPadding(torch.rand(2, 700) > 0.3),
    }[name]  # fmt: skip
    leaves = [t.requires_grad_() for t in qkv(700)]
    results = []
    for backend in ("eager", "cpu"):
        out, aux = fa.attention(*leaves, mask=mask, return_aux=EVERYTHING, backend=backend)
        results.append([out, aux.probs, aux.column_sums, *torch.autograd.grad(out.sin().sum() + aux.probs.sin().sum(), leaves)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-4)


def test_double_backward_and_batched_gradients(kernel_backend: str) -> None:
    mask = fa.Causal() | Scattered(torch.tensor([3, 4]))
    leaves = [t.requires_grad_() for t in qkv(6, batch=1)]

    def second(backend: str) -> list[Tensor]:
        out = fa.attention(*leaves, mask=mask, backend=backend)
        grads = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return [out, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)]

    for want, got in zip(second("eager"), second(kernel_backend), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    out = fa.attention(*leaves, mask=mask, backend=kernel_backend)
    incoming = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, leaves, incoming, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for one, all_of_them in zip(torch.autograd.grad(out, leaves, incoming[i], retain_graph=True), batched, strict=True):
            torch.testing.assert_close(all_of_them[i], one)


@pytest.mark.parametrize("name", ["checkers", "joined", "complement", "product", "mask-mod", "heads"])
def test_compiled(name: str, kernel_backend: str) -> None:
    leaves = [t.requires_grad_() for t in qkv()]

    torch._dynamo.reset()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fa.attention(q, k, v, mask=RULED[name], backend=kernel_backend)

    got, want = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves), run(*leaves)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sin().sum(), leaves), torch.autograd.grad(want.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_masks_as_arguments_of_compiled_functions() -> None:
    torch._dynamo.reset()
    q = qkv()[0]
    run = torch.compile(lambda q, mask: fa.attention(q, q, q, mask=mask), backend="aot_eager", fullgraph=True)
    for mask in (
        fa.Causal() | fa.Band(3),
        ~fa.ValidLengths(torch.tensor([3, 9])) | fa.Causal(),
        fa.Causal() & ~fa.Band(2),
        fa.Causal() | BLOCKS_20,
    ):
        torch.testing.assert_close(run(q, mask), fa.attention(q, q, q, mask=mask))
        leaves, structure = pytree.tree_flatten(mask)
        assert all(isinstance(t, Tensor) for t in leaves) and pytree.tree_unflatten(leaves, structure) == mask


BLOCKS_20 = fa.BidirectionalBlocks(torch.arange(20) // 4 - 1)


def test_a_backend_of_ones_own_gets_tensors(counting: Any) -> None:
    seen = []

    class Recording(type(counting)):
        name = "recording"

        def __getattr__(self, name: str) -> Any:
            if name == "evaluates_rules":
                raise AttributeError(name)
            return super().__getattr__(name)

        def attention_fwd(self, call: Any) -> Any:
            seen.append(call.terms.mask)
            return self.inner.attention_fwd(call)

    backends.register(Recording(backends.get("cpu")))
    try:
        q = qkv()[0]
        got = fa.attention(q, q, q, mask=Checkers(), backend="recording")
    finally:
        backends.unregister("recording")
    assert seen[0].rules == () and seen[0].keep.shape == (1, 1, 20, 20)
    torch.testing.assert_close(got, fa.attention(q, q, q, mask=Checkers(), backend="eager"))


def test_tensors_of_rules_must_not_change_before_backward() -> None:
    q = qkv(kv_len=20)[0].requires_grad_()
    pairs, steps = torch.rand(20, 1) > 0.5, torch.tensor([3, 4])
    for mask, tensor in ((fa.Dense(pairs) & fa.KeyPadding(torch.rand(2, 20) > 0.5) & Checkers(), pairs), (Scattered(steps), steps)):
        out = fa.attention(q, q, q, mask=mask, backend="cpu")
        tensor.copy_(tensor.clone())
        with pytest.raises(RuntimeError, match="modified in place"):
            out.sum().backward()


def test_memory_without_an_interval_form(monkeypatch: pytest.MonkeyPatch) -> None:
    # Small blocks, so that temporaries of a block are small beside a byte per pair at a length that takes no minute.
    monkeypatch.setattr(tiles, "TILE", 1 << 15)
    monkeypatch.setattr(flash_blocks, "ROOM", 1 << 15)
    monkeypatch.setattr(mask_rules, "BLOCK", 1 << 15)
    monkeypatch.setattr(blocks, "WRITTEN", 1 << 15)
    length = 2560
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    incoming = torch.randn(1, 1, length, 8)
    rows, columns = fa.Dense((torch.arange(length) % 3 > 0)[:, None]), fa.Dense((torch.arange(length) % 5 > 0)[None, :])
    mask = fa.Causal() & ((rows & columns) | fa.Band(2))

    def both() -> Any:
        out = fa.attention(q, k, v, mask=mask, backend="cpu")
        return torch.autograd.grad(out, (q, k, v), incoming)

    _, peak = peak_bytes(both, CPU)
    assert peak < length * length // 2
    grid = Grid((1, 1, length, length), CPU)
    keep, peak = peak_bytes(lambda: Checkers().lower(grid).as_tensors(grid).keep, CPU)
    assert keep.shape == (1, 1, length, length) and peak < length * length + (6 << 20)
    form, peak = peak_bytes(lambda: Late(100).lower(grid).settled(grid), CPU)
    assert interval(form) and peak < 6 << 20
