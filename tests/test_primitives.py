"""The device functions of csrc/include/fused_attn, each run alone on the simulator, against torch or the definition in a comment."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import build, dropout
from tests import simulated_cuda

INCLUDE = build.SOURCES / "include"
HEADERS = sorted(p for folder in (INCLUDE, build.SOURCES / "cuda") for p in folder.rglob("*.*h"))
DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}

needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="there is no CUDA compiler (nvcc)")
simulated = pytest.mark.skipif(bool(simulated_cuda.missing()), reason=simulated_cuda.missing())


def ptx(source: Path, *flags: str) -> str:
    nvcc, _ = build.require_nvcc()
    command = [nvcc, "-ptx", "-arch=compute_80", "-std=c++20", f"-I{build.SOURCES}", f"-I{INCLUDE}", *flags, "-o", "-", "-x", "cu", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_nvcc
@pytest.mark.peers
@pytest.mark.parametrize("header", HEADERS, ids=[str(h.relative_to(build.SOURCES)) for h in HEADERS])
def test_a_header_compiles_alone(header: Path) -> None:
    ptx(header)


@pytest.fixture(scope="module")
def run() -> Any:
    """Launches a kernel of primitives.cu with one block; the first argument after its name is the number of threads."""
    cusim = simulated_cuda.simulator()
    module = cusim.Module(ptx(Path(__file__).with_name("primitives.cu"), "-lineinfo"))
    return lambda kernel, threads, *args, **options: module.launch(kernel, grid=1, block=threads, args=args, counters=True, **options).stats


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else 111, dtype=dtype)


@simulated
def test_cp_async(run: Any) -> None:
    """Fewer than 16 bytes: the rest is zero."""
    source, to = torch.randint(1, 256, (32, 16), dtype=torch.uint8), poisoned(32, 16, dtype=torch.uint8)
    count = torch.arange(32, dtype=torch.int32) % 17
    run("cp_async", 32, to, source, count)
    assert torch.equal(to, torch.where(torch.arange(16) < count[:, None], source, 0))


@simulated
def test_the_simulator_reports_planted_faults(run: Any) -> None:
    """Otherwise its silence elsewhere would say nothing."""
    error = simulated_cuda.simulator().SimError
    source, to = torch.zeros(32, 4), poisoned(32, 4)
    with pytest.raises(error, match=r"cp\.async") as caught:
        run("cp_async_unawaited", 32, to, source)
    assert caught.value.kind == "race"
    with pytest.raises(error) as caught:
        run("cp_async", 32, to, source.flatten()[1:], torch.zeros(32, dtype=torch.int32), memory=[source])
    assert caught.value.kind == "misaligned"
    with pytest.raises(error) as caught:
        run("cp_async", 32, to, source[:31].clone(), torch.full((32,), 16, dtype=torch.int32))
    assert caught.value.kind == "global-oob"


@simulated
def test_ldmatrix(run: Any) -> None:
    """Register j of lane l holds row l / 4, columns 2 (l % 4) and one more, of tile j; transposed: rows and columns swapped."""
    source, to = torch.randint(-9999, 9999, (16, 16), dtype=torch.int16), poisoned(2, 32, 4, dtype=torch.int32)
    run("ldmatrix", 32, to, source)
    tiles = source.view(2, 8, 2, 8).permute(2, 0, 1, 3).reshape(4, 8, 8)  # columns outermost: the lanes' addresses say so
    for got, tile in ((to[0], tiles), (to[1], tiles.mT)):
        want = tile.reshape(4, 32, 2).transpose(0, 1)  # [lane, tile, pair]
        assert torch.equal(got.contiguous().view(torch.int16).view(32, 4, 2), want)


@simulated
@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_mma(name: str, run: Any) -> None:
    a, b = (torch.randint(-8, 9, shape).to(DTYPES[name]) for shape in ((16, 16), (16, 8)))
    d = poisoned(16, 8)
    run(f"mma_{name}", 32, d, a, b)
    assert torch.equal(d, a.float() @ b.float())


@simulated
def test_ex2(run: Any) -> None:
    x = torch.cat([torch.linspace(-20, 20, 29), torch.tensor([-math.inf, -200.0, 0.0])])
    y = poisoned(32)
    run("ex2", 32, y, x)
    torch.testing.assert_close(y, torch.exp2(x), rtol=2**-22, atol=0)  # the unit's documented error: 2 units in the last place


@simulated
@pytest.mark.parametrize("layout", ["vector", "offset", "strided", "narrow"])
@pytest.mark.parametrize("name", DTYPES)
def test_tile(name: str, layout: str, run: Any) -> None:
    """Rows outside [low, high) and columns beyond the matrix are zero, in 16-byte copies or one by one; broken values are found and cleaned.

    Rows that are zero come from copies of no bytes, whose addresses have to be aligned too: the simulator reports it.
    """
    cols = 51 if layout == "narrow" else 64
    storage = torch.randn(80 * 130 + 8).to(DTYPES[name])
    start, row, col = {"vector": (0, 128, 1), "offset": (1, 128, 1), "strided": (0, 130, 2), "narrow": (0, 51, 1)}[layout]
    matrix = storage.as_strided((80, cols), (row, col), start)
    matrix[45, 3], matrix[46, 50], matrix[47, 0] = math.nan, math.inf, -math.inf
    low, high, first = 41, 60, 33
    tile, broken, back = poisoned(32, 64, dtype=DTYPES[name]), poisoned(1, dtype=torch.int32), poisoned(80, cols, dtype=DTYPES[name])
    run(f"tile_{name}", 64, tile, broken, back, matrix, row, col, low, high, cols, first, memory=[storage])
    want = torch.zeros(32, 64, dtype=DTYPES[name])
    want[low - first : high - first, :cols] = matrix[low:high]
    torch.testing.assert_close(tile, want, rtol=0, atol=0, equal_nan=True)
    assert int(broken) == 1
    torch.testing.assert_close(back[first:high], want[: high - first, :cols].nan_to_num(0, 0, 0), rtol=0, atol=0)
    assert back[:first].isnan().all() and back[high:].isnan().all()


@simulated
@pytest.mark.parametrize("name", DTYPES)
def test_products_of_tiles(name: str, run: Any) -> None:
    """Against float64; float32 errs like a float32 sum, not like bfloat16. Fragments of any type meet no bank twice."""
    a, b = torch.randn(16, 64).to(DTYPES[name]), torch.randn(32, 64).to(DTYPES[name])
    s, acc = poisoned(16, 32), poisoned(16, 64)
    stats = run(f"product_{name}", 32, s, acc, a, b)
    want = a.double() @ b.double().T
    eager = (a.float() @ b.float().T - want).abs().max()
    assert (s - want).abs().max() <= 2 * eager + 2**-23 * want.abs().max()
    # s goes on as the left operand: rounded to 16 bits there, whole in float32.
    left = s.to(DTYPES[name])
    again = left.double() @ b.double()
    assert (acc - again).abs().max() <= 2 * (left.float() @ b.float() - again).abs().max() + 2**-23 * again.abs().max()
    assert stats["smem_wavefronts"] == stats["smem_ideal_wavefronts"]


@simulated
@pytest.mark.parametrize("lanes", [2, 8, 32, 128, 1024])
def test_reduce(lanes: int, run: Any) -> None:
    threads = max(lanes, 64)
    x, both = torch.randn(threads), poisoned(2, threads)
    run(f"reduce_{lanes}", threads, both, x)
    groups = x.view(-1, lanes)
    torch.testing.assert_close(both[0].view(-1, lanes), groups.double().sum(1, keepdim=True).expand_as(groups).float())
    assert torch.equal(both[1].view(-1, lanes), groups.amax(1, keepdim=True).expand_as(groups))


@simulated
@pytest.mark.parametrize("scale", [0.125, -0.5, 1e30])
def test_online_softmax(scale: float, run: Any) -> None:
    """Scores that are huge and equal have exponentials of exactly 1."""
    x = torch.randn(32)
    to = poisoned(4, 32)
    run("online_softmax", 32, to, x, float(x[0]), scale)
    torch.testing.assert_close(to[0].view(8, 4), x.view(8, 4).amax(1, keepdim=True).expand(8, 4))
    torch.testing.assert_close(to[1].view(8, 4), x.view(8, 4).sum(1, keepdim=True).expand(8, 4))
    scores = x.double() * torch.tensor(scale).double()
    torch.testing.assert_close(to[2], (scores - scores[0]).exp().float(), rtol=1e-5, atol=1e-30)
    assert to[2, 0] == 1
    torch.testing.assert_close(to[3], scores.float())


@simulated
@pytest.mark.parametrize("left", [-1, 0, 2])
@pytest.mark.parametrize("right", [-1, 0, 3])
@pytest.mark.parametrize("shift", [0, 4, -3, 2**31 + 2, -(2**40)])
def test_mask(left: int, right: int, shift: int, run: Any) -> None:
    """Against the definition, pair by pair; one row past the last is empty."""
    q_len, kv_len, b = 6, 9, 1
    # Beyond 32 bits there is one per batch; elsewhere one for all.
    shifts, per_batch = torch.tensor([100, shift]), abs(shift) >= 2**31
    start, end = torch.randint(-2, 5, (2, q_len), dtype=torch.int32), torch.randint(4, 12, (2, q_len), dtype=torch.int32)
    keep, summary = torch.randint(0, 2, (2, q_len, kv_len), dtype=torch.uint8) * 7, torch.randint(0, 3, (2, 4), dtype=torch.int8)
    intervals, allowed, states = (poisoned(*s, dtype=torch.int32) for s in ((q_len + 1, 2), (q_len, kv_len), (4,)))
    run(
        "mask",
        32,
        intervals,
        allowed,
        states,
        shifts,
        start,
        end,
        keep,
        summary,
        left,
        right,
        0 if per_batch else shift,
        int(per_batch),
        q_len,
        kv_len,
        b,
    )
    for q in range(q_len):
        position, found = q + shift, []
        for kv in range(kv_len):
            inside = (left < 0 or kv >= position - left) and (right < 0 or kv <= position + right)
            if inside and start[b, q] <= kv < end[b, q]:
                found.append(kv)
            assert allowed[q, kv] == (kv in found and keep[b, q, kv] != 0)
        assert list(range(*intervals[q].tolist())) == found
    assert intervals[q_len].tolist() == [0, 0]
    assert torch.equal(states, summary[b].int())


SOFTCAP, ALIBI, BIAS = 0, 1, 2  # ModKind of params.h


@simulated
@pytest.mark.parametrize("kinds", [[SOFTCAP], [ALIBI], [BIAS], [BIAS, SOFTCAP], [SOFTCAP, BIAS, SOFTCAP, ALIBI], []], ids=str)
def test_score_modifications(kinds: list[int], run: Any) -> None:
    """Values and gradients against autograd in float64."""
    q_len, cap, shift, slope = 5, 2.5, 3, torch.tensor([0.25])
    x, bias = torch.randn(q_len, 32) * 3, torch.randn(q_len, 32).half()
    x[0, :4] = torch.tensor([0.0, 1e-6, 300.0, -300.0])
    distance = (torch.arange(q_len)[:, None] + shift - torch.arange(32)).abs()
    steps = {
        SOFTCAP: lambda s: cap * torch.tanh(s / cap),
        ALIBI: lambda s: s - slope.double() * distance,
        BIAS: lambda s: s + bias.double(),
    }
    for down_to in range(len(kinds) + 1):
        scores, grads = poisoned(q_len, 32), poisoned(q_len, 32)
        args = (x, slope, bias, torch.tensor(kinds or [0], dtype=torch.int32), len(kinds), cap, shift, q_len, down_to)
        run("score_mod", 32, scores, grads, *args)
        before = x.double()
        for kind in kinds[:down_to]:
            before = steps[kind](before)
        before.requires_grad_()
        after = before
        for kind in kinds[down_to:]:
            after = steps[kind](after)
        torch.testing.assert_close(scores, after.detach().float(), rtol=2e-6, atol=1e-12)
        (want,) = torch.autograd.grad(after.sum(), before)
        torch.testing.assert_close(grads, want.float(), rtol=1e-5, atol=2e-6)


@simulated
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("kv_len", [1, 4, 7])
def test_philox(kv_len: int, shift: int, run: Any) -> None:
    """The words of fused_attn/dropout.py, for rows whose counter needs more than 32 bits and seeds that use all 64."""
    rows, row, seed = 6, 2**33 + 5, torch.tensor(-0x123456789ABCDEF)
    words, factors = poisoned(rows, kv_len, dtype=torch.int32), poisoned(rows, kv_len)
    run("philox", 32, words, factors, seed, row, rows, kv_len, shift, dropout.threshold(0.4), 1 / 0.6)
    groups = -(-(kv_len + shift) // 4)
    counter = (row + torch.arange(rows))[:, None] * groups + torch.arange(groups)
    want = torch.stack(dropout.philox(counter, seed), -1).flatten(1)[:, shift : shift + kv_len]
    assert torch.equal(words.long() & 0xFFFFFFFF, want)
    torch.testing.assert_close(factors, (want >= dropout.threshold(0.4)).float() / 0.6)


@simulated
def test_element_types(run: Any) -> None:
    x, to = torch.randn(32), poisoned(3, 32)
    stored = [poisoned(32, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    run("tensor", 32, to, x, *stored)
    for got, kept in zip(to, stored, strict=True):
        assert torch.equal(kept, x.to(kept.dtype)) and torch.equal(got, kept.float())
