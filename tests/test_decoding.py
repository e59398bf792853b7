"""Decoding from caches: the error rule on every backend, what is never read, what never waits, and what a cache holds."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_attn as fa
from fused_attn import caches, checks, decoding, paged, paged_call
from fused_attn.backends import get
from fused_attn.decoding import Filled, KVCache, PagedKV
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.score_mods import ScoreMod
from fused_attn.testing import EVERYTHING, inputs_of, violations, vocabulary
from fused_attn_bench.judge import rounding
from tests import decoding_matrix, matrix, native, simulated_cuda

ROOT = Path(__file__).parents[1]
BACKENDS = ["eager", "cpu", "blocked", "triton"]
# (q_len, group, (head_dim, value_dim), page size, dtype), lengths 0, 1, in between and full: every value of the lists.
STEPS = [
    (1, 1, (40, 40), 1, torch.float32),
    (2, 4, (64, 64), 3, torch.bfloat16),
    (7, 8, (80, 24), 16, torch.float16),
    (16, 4, (16, 128), 64, torch.float32),
    (1, 8, (256, 256), 256, torch.bfloat16),
    (1, 4, (128, 128), 16, torch.float16),
    (3, 1, (1, 7), 3, torch.float32),
]


def in_pages(k: Tensor, v: Tensor, used: Tensor, size: int) -> PagedKV:
    """The same cache in shuffled pages; entries that no key needs are no pages, and what no key stands in is NaN."""
    batch, _, capacity, _ = k.shape
    columns = capacity // size
    numbers = torch.randperm(batch * columns + 2, device=k.device)[: batch * columns].view(batch, columns)
    beyond = torch.arange(capacity, device=k.device) >= used[:, None]
    stored = []
    for tensor in (k, v):
        pages = tensor.new_full((batch * columns + 2, tensor.shape[1], size, tensor.shape[3]), torch.nan)
        rows = tensor.masked_fill(beyond[:, None, :, None], torch.nan).unflatten(2, (columns, size)).transpose(1, 2)
        pages[numbers.flatten()] = rows.flatten(0, 1)
        stored.append(pages.transpose(1, 2).contiguous().transpose(1, 2))  # as FlashAttention lays them
    needed = torch.arange(columns, device=k.device) * size < used[:, None]
    return PagedKV(stored[0], stored[1], numbers.where(needed, -1).to(torch.int32), used)


def both(k: Tensor, v: Tensor, used: Tensor, size: int) -> dict[str, KVCache | PagedKV]:
    beyond = (torch.arange(k.shape[2], device=k.device) >= used[:, None])[:, None, :, None]
    return {
        "in one piece": KVCache(k.masked_fill(beyond, torch.nan), v.masked_fill(beyond, torch.inf), used),
        "pages": in_pages(k, v, used, size),
    }


def step(
    sizes: tuple[int, int, int, int], dims: tuple[int, int], capacity: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v for (batch, heads, kv_heads, q_len)."""
    batch, heads, kv_heads, q_len = sizes
    shapes = ((heads, q_len, dims[0]), (kv_heads, capacity, dims[0]), (kv_heads, capacity, dims[1]))
    q, k, v = (torch.randn(batch, *shape).to(dtype) for shape in shapes)
    return q, k, v


def hold(q: Tensor, k: Tensor, v: Tensor, used: Tensor, size: int, chosen: str, **options: Any) -> None:
    """Everything decoding gives out, from both caches, within the error rule."""
    mask = options.pop("mask", fa.Causal())
    whole = Filled(used) if mask is None else mask & Filled(used)
    names = [n for n in EVERYTHING.names if n not in ("lse", "entropy") or options.get("normalizer") is None]
    request = fa.AuxRequest(**dict.fromkeys(names, True))
    inputs = inputs_of(q, k, v, mask=whole, q_offset=used.long() - q.shape[2], **options, return_aux=request)
    for title, cache in both(k, v, used, size).items():
        out, aux = decoding.attention(q, cache, mask=mask, **options, return_aux=request, backend=chosen)
        got = {"out": out} | {name: getattr(aux, name) for name in names}
        assert not (broken := violations(inputs, got)), f"{chosen} {title}: {broken}"
        assert torch.equal(out, decoding.attention(q, cache, mask=mask, **options, backend=chosen)), "asking for more changed out"


@pytest.mark.quick
@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize(("q_len", "group", "dims", "size", "dtype"), STEPS, ids=str)
def test_error_rule(q_len: int, group: int, dims: tuple[int, int], size: int, dtype: torch.dtype, chosen: str) -> None:
    capacity = max(size, -(-72 // size) * size)
    q, k, v = step((4, 2 * group, 2, q_len), dims, capacity, dtype)
    used = torch.tensor([0, 1, capacity // 2 + 3, capacity], dtype=torch.int32)
    hold(q, k, v, used, size, chosen, sinks=torch.randn(2 * group) if size == 3 else None)


@pytest.mark.skipif(bool(simulated_cuda.missing()), reason=simulated_cuda.missing() or "never")
def test_cuda_kernels_on_parts_of_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they lie in one piece, and gathered a part at a time."""
    monkeypatch.setattr(paged_call, "_FEWEST", 16)
    monkeypatch.setattr(paged_call.LoweredPaged.parts_of_keys, "__defaults__", (512,))
    q, k, v = step((2, 4, 2, 2), (16, 16), 72, torch.bfloat16)
    hold(q, k, v, torch.tensor([72, 9], dtype=torch.int32), 8, "cuda", score_mods=(fa.SoftCap(2.0),), sinks=torch.randn(4))


GRID = Grid((2, 4, 3, 48), torch.device("cpu"), torch.tensor([45, 14]))
USED = torch.tensor([48, 17], dtype=torch.int32)
MASKS, MODS = vocabulary(Mask, GRID), vocabulary(ScoreMod, GRID)


@pytest.mark.parametrize("chosen", ["cpu", "triton"])
@pytest.mark.parametrize("name", [*MASKS, "union", "complement", "mask_mod"])
def test_every_mask(name: str, chosen: str) -> None:
    others = {"union": fa.Band(3) | fa.PrefixLM(4), "complement": fa.Causal() & ~fa.Band(5)}
    others["mask_mod"] = fa.masks.from_mask_mod(lambda b, h, q, kv: (kv + h) % 3 != 0)
    hold(*step((2, 4, 2, 3), (16, 8), 48), USED, 16, chosen, mask=(MASKS | others)[name])


@pytest.mark.parametrize("chosen", ["cpu", "triton"])
@pytest.mark.parametrize("name", [n for n in MODS if not n.startswith("Selective")])
def test_every_modification(name: str, chosen: str) -> None:
    hold(*step((2, 4, 2, 3), (16, 8), 48), USED, 3, chosen, score_mods=(MODS[name],))


@pytest.mark.quick
@pytest.mark.parametrize("chosen", BACKENDS)
def test_sinks_scale_sigmoid_and_no_mask(chosen: str) -> None:
    tensors = step((2, 4, 2, 3), (16, 8), 48)
    hold(*tensors, USED, 16, chosen, mask=None, scale=-0.4, sinks=torch.randn(4))
    hold(*tensors, USED, 16, chosen, mask=fa.SlidingWindow(9, 0), normalizer=fa.Sigmoid(-1.0))
    hold(*tensors, USED, 16, chosen, mask=fa.SlidingWindow(9, 0), score_mods=(fa.SoftCap(2.0), MODS["ALiBi0"]), sinks=torch.randn(4))


@pytest.mark.quick
@pytest.mark.parametrize("chosen", ["cpu", "triton"])
def test_rows_and_heads_of_the_probabilities(chosen: str) -> None:
    q, k, v = step((2, 4, 2, 3), (16, 8), 48)
    picks = {"rows": torch.tensor([-1]), "heads": torch.tensor([3, 0])}
    want = decoding.attention(q, KVCache(k, v, USED), return_aux=EVERYTHING, backend="eager")[1]
    for cache in both(k, v, USED, 16).values():
        aux = decoding.attention(q, cache, return_aux=fa.AuxRequest(probs=True, column_sums=True, **picks), backend=chosen)[1]
        torch.testing.assert_close(aux.probs, want.probs[:, [3, 0]][:, :, [-1]])
        torch.testing.assert_close(aux.column_sums, want.column_sums)
        assert aux.lse is None


@pytest.mark.quick
@pytest.mark.parametrize("num_splits", [None, 1, 3, 7])
@pytest.mark.parametrize("chosen", ["cpu", "triton"])
def test_batch_slices_equal_batches_of_one(chosen: str, num_splits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_call, "_FEWEST", 16)
    monkeypatch.setattr(paged_call.LoweredPaged.parts_of_keys, "__defaults__", (512,))
    q, k, v = step((3, 4, 2, 2), (16, 16), 96)
    used = torch.tensor([96, 5, 60], dtype=torch.int32)
    options: dict[str, Any] = {"num_splits": num_splits, "backend": chosen, "return_aux": fa.AuxRequest(lse=True, probs=True)}
    for cache in both(k, v, used, 16).values():
        out, aux = decoding.attention(q, cache, **options)
        for b in range(3):
            one = slice(b, b + 1)
            part: KVCache | PagedKV = (
                KVCache(cache.k[one], cache.v[one], used[one])
                if isinstance(cache, KVCache)
                else PagedKV(cache.k, cache.v, cache.block_table[one], used[one])
            )
            got, got_aux = decoding.attention(q[one], part, **options)
            assert torch.equal(got, out[one]) and torch.equal(got_aux.lse, aux.lse[one]) and torch.equal(got_aux.probs, aux.probs[one])


@pytest.mark.quick
@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("chosen", ["cpu", "blocked", "triton"])
def test_a_window_reads_nothing_outside(chosen: str, num_splits: int) -> None:
    """Pages in front of the window are gone, entries and all."""
    q, k, v = step((2, 4, 2, 2), (16, 16), 96)
    used, mask = torch.tensor([90, 50], dtype=torch.int32), fa.Causal() & fa.SlidingWindow(20, 0)
    want = decoding.attention(q, KVCache(k, v, used), mask=mask, sinks=torch.zeros(4), backend="eager")
    cache = in_pages(k, v, used, 8)
    gone = torch.arange(12) < (used[:, None] - 2 - 20) // 8
    pages = cache.block_table[gone].long()
    cache.k[pages], cache.v[pages] = torch.nan, torch.inf
    table = cache.block_table.masked_fill(gone, 2**31 - 1)
    got = decoding.attention(
        q, PagedKV(cache.k, cache.v, table, used), mask=mask, sinks=torch.zeros(4), backend=chosen, num_splits=num_splits
    )
    torch.testing.assert_close(got, want)


@pytest.mark.quick
@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_broken_values_reach_the_rows_that_attend_to_them(dtype: torch.dtype, chosen: str) -> None:
    """Rows of one tile, of which the last alone may attend to the last key; and an infinity comes out as itself."""
    q, k, v = step((1, 4, 2, 3), (16, 16), 48, dtype)
    used = torch.tensor([40], dtype=torch.int32)
    clean = decoding.attention(q, KVCache(k, v, used), backend=chosen)
    for broken, place in ((torch.nan, 39), (torch.inf, 38), (-torch.inf, 0)):
        bad = v.clone()
        bad[0, :, place, 3] = broken
        for cache in both(k, bad, used, 16).values():
            out = decoding.attention(q, cache, backend=chosen)
            reached = torch.zeros_like(out, dtype=torch.bool)
            reached[:, :, max(0, place - 37) :, 3] = True
            torch.testing.assert_close(out[~reached], clean[~reached], rtol=0, atol=8 * torch.finfo(dtype).eps * float(clean.abs().max()))
            torch.testing.assert_close(out[reached], torch.full_like(out[reached], broken), equal_nan=True)
        bad = k.clone()
        bad[0, :, 39, 3] = broken
        out = decoding.attention(q, KVCache(bad, v, used), backend=chosen)
        torch.testing.assert_close(out[:, :, :2], clean[:, :, :2], rtol=0, atol=8 * torch.finfo(dtype).eps * float(clean.abs().max()))


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for a device's, at whose values nobody may look."""
    for module in (caches, decoding, paged):
        monkeypatch.setattr(module, "can_look", lambda tensor: False)

    def refuse(*_: Any) -> Any:
        raise AssertionError("this waits for the device")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(Tensor, name, refuse)


@pytest.mark.quick
def test_nothing_waits_for_a_device(blind: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_form", lambda mask, grid: mask.lower(grid))
    q, k, v = step((2, 4, 2, 1), (16, 16), 48)
    kernel, seen = get("triton").attention_paged, []

    def fake(call: paged_call.LoweredPaged) -> tuple[Tensor, Tensor]:
        seen.append(call)
        return torch.zeros(2, 4, 1, 16), torch.zeros(2, 4, 1)

    assert callable(kernel)
    monkeypatch.setattr(type(get("triton")), "attention_paged", lambda self, call: fake(call))
    used = torch.tensor([3, 9], dtype=torch.int32)
    for cache in (KVCache(k, v, used), PagedKV(k, v, torch.zeros(2, 1, dtype=torch.int32), used.clone())):
        cache.append(*(torch.randn(2, 2, 1, 16) for _ in range(2)))
        request = fa.AuxRequest(lse=True, probs=True, rows=torch.tensor([0]))
        decoding.attention(q, cache, mask=fa.Causal() & fa.SlidingWindow(4, 0), return_aux=request, backend="triton")
    assert len(seen) == 2


@pytest.mark.quick
@pytest.mark.parametrize("chosen", ["cpu", "blocked", "triton"])
def test_more_than_there_is_room_for_is_nan(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device: nothing is written, that sequence is NaN, the others are right. On the CPU: an error."""
    q, k, v = step((2, 2, 1, 1), (8, 8), 16)
    used = torch.tensor([16, 7], dtype=torch.int32)
    new = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 8)
    for cache in (KVCache(k.clone(), v.clone(), used.clone()), in_pages(k, v, used, 4)):
        with pytest.raises(ValueError, match=r"must have room for what is appended; got 1 more tokens for sequences \[0\]"):
            cache.append(*new)
        cache.block_table is not None and cache.block_table[1].copy_(torch.where(cache.block_table[1] < 0, 9, cache.block_table[1]))
        with monkeypatch.context() as patch:
            for module in (caches, decoding, paged):
                patch.setattr(module, "can_look", lambda tensor: False)
            first = cache.k.clone()
            cache.append(*new)
            assert cache.seqused_k.tolist() == [17, 8]
            changed = (cache.k != first) & ~(cache.k.isnan() & first.isnan())
            assert int(changed.any(-1).sum()) == 1, "one row of one sequence"
            for mask in (fa.Causal(), None, fa.Causal() & fa.ValidLengths(torch.tensor([5, 5]))):
                out, aux = decoding.attention(q, cache, mask=mask, backend=chosen, return_aux=EVERYTHING)
                assert out[0].isnan().all() and aux.lse[0].isnan().all() and aux.probs[0].isnan().any() and aux.column_sums[0].isnan().all()
                assert out[1].isfinite().all() and aux.probs[1].isfinite().all()
        with pytest.raises(ValueError, match=r"seqused_k must lie in \[0, 16\]"):
            decoding.attention(q, cache, backend=chosen)


@pytest.mark.quick
@pytest.mark.parametrize("chosen", ["cpu", "triton"])
def test_a_page_that_is_missing_is_nan_on_devices_and_an_error_here(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = step((2, 2, 1, 1), (8, 8), 16)
    cache = in_pages(k, v, torch.tensor([16, 7], dtype=torch.int32), 4)
    cache.block_table[0, 1] = 10**6
    with pytest.raises(ValueError, match="block_table must name one of the 10 pages"):
        decoding.attention(q, cache, backend=chosen)
    for module in (decoding, paged):
        monkeypatch.setattr(module, "can_look", lambda tensor: False)
    out = decoding.attention(q, cache, backend=chosen)
    assert out[0].isnan().all() and out[1].isfinite().all()
    hidden = decoding.attention(q, cache, mask=fa.Dense(torch.arange(16) // 4 != 1), backend=chosen)
    assert hidden.isfinite().all(), "keys that nobody attends to need no page"


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["in one piece", "pages"])
def test_appending(layout: str) -> None:
    k, v = torch.randn(2, 3, 16, 8), torch.randn(2, 3, 16, 4)
    used = torch.tensor([0, 5], dtype=torch.int32)
    cache: KVCache | PagedKV = KVCache.empty((2, 3, 16, 8), value_dim=4)
    if layout == "pages":
        table = torch.randperm(8).view(2, 4).to(torch.int32)
        cache = PagedKV(torch.full((8, 3, 4, 8), torch.nan), torch.full((8, 3, 4, 4), torch.nan), table, used.clone())
    cache.seqused_k.copy_(used)
    version = cache.k._version
    for n in (1, 6, 2):
        cache.append(k[:, :, :n], v[:, :, :n])
    assert cache.seqused_k.tolist() == [9, 14] and cache.k._version > version
    for stored, new in zip((cache.k, cache.v) if isinstance(cache, KVCache) else cache.gathered(), (k, v), strict=True):
        for b, start in enumerate(used.tolist()):
            want = torch.cat([new[b, :, :n] for n in (1, 6, 2)], 1)
            assert torch.equal(stored[b, :, start : start + 9], want)
            assert stored[b, :, start + 9 :].isnan().all() and stored[b, :, :start].isnan().all()


def decode(q: Tensor, k: Tensor, v: Tensor, new: Tensor, used: Tensor) -> tuple[Tensor, ...]:
    cache = KVCache(k.clone(), v.clone(), used.clone())
    cache.append(new, new)
    out, aux = decoding.attention(q, cache, return_aux=fa.AuxRequest(lse=True, probs=True, rows=torch.tensor([0])), backend="cpu")
    return out, aux.lse, aux.probs


def decode_pages(q: Tensor, k: Tensor, v: Tensor, new: Tensor, used: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    cache = PagedKV(k.clone(), v.clone(), table, used.clone())
    cache.append(new, new)
    mask = fa.Causal() & fa.SlidingWindow(6, 0)
    out, aux = decoding.attention(q, cache, mask=mask, return_aux=fa.AuxRequest(column_sums=True), backend="cpu")
    return out, aux.column_sums, cache.k, cache.seqused_k


def _graph_arguments() -> dict[Any, tuple[Tensor, ...]]:
    q, new, used = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8), torch.tensor([9, 4], dtype=torch.int32)
    table = torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32)
    return {
        decode: (q, *torch.randn(2, 2, 2, 16, 8).unbind(0), new, used),
        decode_pages: (q, *torch.randn(2, 6, 2, 4, 8).unbind(0), new, used, table),
    }


@pytest.mark.quick
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", [decode, decode_pages], ids=lambda f: f.__name__)
def test_compiled_without_graph_breaks(function: Any, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    arguments = _graph_arguments()[function]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for got, want in zip(compiled(*arguments), function(*arguments), strict=True):
        assert torch.equal(got, want), "the same operators on the same numbers"


@pytest.mark.quick
@pytest.mark.parametrize("function", [decode, decode_pages], ids=lambda f: f.__name__)
def test_fake_tensors_show_that_no_value_is_looked_at(function: Any) -> None:
    arguments = _graph_arguments()[function]
    want = function(*arguments)
    with FakeTensorMode() as mode:
        got = function(*(mode.from_tensor(t) for t in arguments))
    assert [(t.shape, t.dtype, t.stride()) for t in got] == [(t.shape, t.dtype, t.stride()) for t in want]


@pytest.mark.quick
def test_operations_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v, _, used, table = _graph_arguments()[decode_pages]
    with FlopCounterMode(display=False) as counter:
        decoding.attention(q, PagedKV(k, v, table, used), backend="cpu")
    assert counter.get_total_flops() == 2 * 2 * 4 * 12 * (8 + 8)


@pytest.mark.quick
@pytest.mark.parametrize("with_table", [True, False])
def test_the_ops(with_table: bool) -> None:
    q, k, v, _, used, table = _graph_arguments()[decode_pages]
    if not with_table:
        k, v = (torch.randn(2, 2, 12, 8) for _ in range(2))
    mask = fa.Causal() & Filled(used)
    grid = Grid((2, 4, 1, 12), q.device, used.long() - 1)
    terms = fa.lowering.Terms(mask.lower(grid), 0.3, used.long() - 1, sinks=torch.zeros(4)).flatten()
    pages, tests = (table if with_table else None), ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fused_attn.paged_attention_fwd, (q, k, v, pages, *terms, 0, "cpu"), test_utils=tests)
    numbers = list(EVERYTHING.numbers)
    arguments = (q, k, pages, *terms, torch.tensor([0]), torch.tensor([1, 2]), numbers, "eager")
    torch.library.opcheck(torch.ops.fused_attn.paged_attention_aux, arguments, test_utils=tests)
    mapped = torch.vmap(lambda x: torch.ops.fused_attn.paged_attention_fwd(x, k, v, pages, *terms, 0, "cpu")[0])
    twice = torch.stack((q, -q))
    one = torch.ops.fused_attn.paged_attention_fwd(-q, k, v, pages, *terms, 0, "cpu")[0]
    torch.testing.assert_close(mapped(twice)[1], one)


@pytest.mark.quick
def test_pages_are_gathered_a_bounded_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: no part larger than the bound, none that the window does not reach; in one piece nothing is copied."""
    q, k, v = step((1, 2, 1, 1), (8, 8), 2048)
    used, sizes, original = torch.tensor([2000], dtype=torch.int32), [], paged_call.gathered

    def counting(pages: Tensor, table: Tensor) -> Tensor:
        found = original(pages, table)
        sizes.append(found.shape[2])
        return found

    monkeypatch.setattr(paged_call, "gathered", counting)
    monkeypatch.setattr(paged_call.LoweredPaged.parts_of_keys, "__defaults__", (1024,))
    cache = in_pages(k, v, used, 16)
    want = decoding.attention(q, KVCache(k, v, used), backend="cpu")
    assert sizes == []
    torch.testing.assert_close(decoding.attention(q, cache, backend="cpu"), want)
    assert max(sizes) == 128 and sum(sizes) == 2 * 2048 - 2 * 48
    sizes.clear()
    decoding.attention(q, cache, mask=fa.SlidingWindow(100, 0), backend="cpu")
    assert sum(sizes) <= 2 * 256


@pytest.mark.quick
def test_refusals() -> None:
    q, k, v = step((1, 2, 1, 1), (8, 8), 16)
    cache = KVCache(k, v, torch.tensor([4], dtype=torch.int32))
    with pytest.raises(ValueError, match="must not be asked for gradients"):
        decoding.attention(q.requires_grad_(), cache)
    with torch.no_grad():
        decoding.attention(q, cache)
    q = q.detach()
    with pytest.raises(ValueError, match="Selective needs the scores of all earlier queries"):
        decoding.attention(q, cache, score_mods=(fa.Selective(),))
    for splits, error in ((0, ValueError), (300, ValueError), ("2", TypeError)):
        with pytest.raises(error, match="num_splits must be"):
            decoding.attention(q, cache, num_splits=splits)
    with pytest.raises(TypeError, match="cache must be a KVCache or a PagedKV; got torch"):
        decoding.attention(q, k)
    with pytest.raises(TypeError, match="seqused_k must be an int32 or int64 tensor"):
        KVCache(k, v, torch.tensor([4.0]))
    with pytest.raises(TypeError, match="must share one dtype"):
        KVCache(k, v.half(), cache.seqused_k)
    with pytest.raises(ValueError, match="a page must have room for a token"):
        PagedKV(torch.zeros(2, 1, 0, 8), torch.zeros(2, 1, 0, 8), torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"block_table must be \[batch, most pages\]"):
        PagedKV(k, v, torch.zeros(3, dtype=torch.int32), cache.seqused_k)
    with pytest.raises(ValueError, match=r"k must be \[batch, kv_heads, n, dim\] = \[1, 1, 2, 8\]; got \[1, 2, 2, 8\]"):
        cache.append(torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8))
    with pytest.raises(TypeError, match="the cache's dtype"):
        cache.append(torch.zeros(1, 1, 2, 8).half(), torch.zeros(1, 1, 2, 8).half())
    with pytest.raises(ValueError, match="rows must lie in"):
        decoding.attention(q, cache, return_aux=fa.AuxRequest(probs=True, rows=torch.tensor([1])))


@pytest.mark.quick
def test_caches_are_pytrees() -> None:
    cache = KVCache.empty((1, 2, 8, 4), dtype=torch.float16)
    leaves, spec = torch.utils._pytree.tree_flatten(cache)
    assert [t.shape for t in leaves] == [(1, 2, 8, 4), (1, 2, 8, 4), (1,)]
    assert torch.utils._pytree.tree_unflatten(leaves, spec).k is cache.k
    assert checks.can_look(cache.k)


@pytest.mark.quick
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_queries_take_the_caches_dtype(autocast: torch.dtype) -> None:
    q, k, v = step((1, 2, 1, 1), (8, 8), 16, autocast)
    cache = KVCache(k, v, torch.tensor([4], dtype=torch.int32))
    with torch.autocast("cpu", autocast):
        assert torch.equal(decoding.attention(q.float(), cache), decoding.attention(q, cache))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_of_few_queries_runs_on_the_same_kernels(dtype: torch.dtype, split_calls: list[Any]) -> None:
    """Whoever holds the cache: results, statistics and gradients are those of the flash kernels."""
    from fused_attn.testing import check_inputs

    q, k, v = step((1, 4, 2, 2), (16, 16), 520, dtype)
    options = {"mask": fa.SlidingWindow(500, 0), "q_offset": 518, "score_mods": (fa.SoftCap(2.0), fa.Bias(torch.randn(4, 1, 520)))}
    check_inputs(inputs_of(q, k, v, **options, sinks=torch.randn(4)), "triton", ("out", "lse"), "few queries")
    assert len(split_calls) == 1
    fa.attention(q, k[:, :, :500], v[:, :, :500], backend="triton")
    assert len(split_calls) == 1, "few keys are one program's work"


@pytest.mark.quick
def test_the_cache_of_x_transformers_layers(reached: list[Any]) -> None:
    from fused_attn.nn.x_transformers import Decoder

    options: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8, "attn_kv_heads": 2, "rotary_pos_emb": True}
    stack = Decoder(**options, backend="triton").eval()
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        out, cache = stack(x[:, :3], return_hiddens=True)
        outs, before = [out], len(reached)
        for n in range(3, 6):
            out, cache = stack(x[:, n : n + 1], cache=cache, return_hiddens=True)
            outs.append(out)
        assert [call.shape[2:] for call in reached[before:]] == [(1, n) for n in (4, 5, 6) for _ in range(2)]
        exact = Decoder(**options, backend="eager").eval().double()
        exact.load_state_dict(stack.state_dict())
        want = exact(x.double())
        got_error, plain_error = ((t - want).abs().max() for t in (torch.cat(outs, 1), stack(x)))
        assert got_error <= 2 * plain_error + rounding(want, torch.float32)


@pytest.mark.peers
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed (make demo installs it)")
@pytest.mark.parametrize("implementation", [None, "static"], ids=["dynamic", "static"])
def test_the_caches_of_transformers(implementation: str | None, reached: list[Any]) -> None:
    from fused_attn.integrations.transformers import NAME, register, unregister
    from tests.transformers_families import FAMILIES

    family = FAMILIES["llama"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    register(backend="triton")
    try:
        model = family.model(NAME)
        want = model.generate(**family.inputs(), **options, use_cache=False)
        before = len(reached)
        got = model.generate(**family.inputs(), **options, cache_implementation=implementation)
    finally:
        unregister()
    assert torch.equal(got, want)
    assert sum(call.shape[2] == 1 for call in reached[before:]) == 4 * 2, "every step but the prompt's, in both layers"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("chip", [90, *(pytest.param(c, marks=pytest.mark.peers) for c in (80, 100, 120))])
def test_compiles_without_spills(chip: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    heavy = [] if chip == 90 else ["heavy"]
    command = [sys.executable, "-m", "tests.decoding_aot", str(chip), *heavy]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for report in reports for kernel in report["kernels"]} == {"_split_kernel", "_combine_kernel"}
    assert len(reports) == (7 if heavy else 13)
    for report in reports:
        assert report["complaints"] == [], report
        assert not any(kernel["HGMMA"] for kernel in report["kernels"]), "tiles of a warpgroup would want their operands in whole words"


@pytest.mark.quick
def test_the_record_of_all_versions_is_that_of_the_present_sources() -> None:
    _, _, record = decoding_matrix.PAGE.read_text().partition(decoding_matrix.HEADING)
    assert f"`{decoding_matrix.sources()}`" in record, "make decoding"
    rows = [line.split(" | ") for line in record.splitlines() if ", sm_" in line]
    assert len(rows) == 13 * len(decoding_matrix.CHIPS) and {len(row) for row in rows} == {1 + len(matrix.VERSIONS)}
    assert "FAILS" not in record.partition("\n\n|")[2]


@pytest.mark.slow
@pytest.mark.skipif(bool(native.missing_for_simulator()), reason=native.missing_for_simulator() or "never")
@pytest.mark.parametrize(("chip", "dtype"), [pytest.param(80, "float32", marks=pytest.mark.peers), (90, "bfloat16")])
def test_compiled_kernels_hold_the_error_rule(chip: int, dtype: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.simulated_decoding", str(chip), dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.split() == ["plain", "window", "dense", "additive", "broken", "missing"]


def test_every_step_is_among_the_cases() -> None:
    """The values that the error rule was asked to hold for."""
    q_lens, groups, dims, sizes, dtypes = (set(column) for column in zip(*STEPS, strict=True))
    assert q_lens >= {1, 2, 7, 16} and groups >= {1, 4, 8} and sizes >= {1, 3, 16, 64, 256} and len(dtypes) == 3
    assert {40, 64, 80, 128, 256} <= set(itertools.chain(*dims))
