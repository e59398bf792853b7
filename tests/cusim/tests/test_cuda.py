"""Hand-written CUDA C++ compiled by nvcc: results, and planted faults that the checks must catch."""

import contextlib
import functools
import shutil
from pathlib import Path

import cusim
import numpy as np
import pytest
import torch

CU = Path(__file__).parent / "cu"
pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
MODES = [{"async_mode": "late"}, {"async_mode": "early"}, {"async_mode": "random", "sched": "random", "seed": 5}]
IDS = ["late", "early", "random"]


@functools.lru_cache(None)
def mod(name, arch, *defs):
    return cusim.Module(cusim.compile_cuda((CU / name).read_text(), arch, [f"-D{d}" for d in defs]))


def basic():
    return mod("basic.cu", "sm_90")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("threads", [64, 256])
def test_block_sum(arch, threads):
    x = torch.randn(5000)
    y = torch.zeros(1)
    mod("basic.cu", arch).launch("block_sum", 3, threads, [x, y, 5000], threads=2)
    torch.testing.assert_close(y[0], x.sum(), atol=1e-3, rtol=1e-4)


def collatz(v):
    n = 0
    while v != 1:
        v, n = (3 * v + 1 if v & 1 else v // 2), n + 1
    return n


@pytest.mark.parametrize("sched", ["rr", "random"])
def test_divergence(sched):
    x = torch.arange(1, 301, dtype=torch.int32)
    y = torch.zeros(300, dtype=torch.int32)
    basic().launch("diverge", 3, 128, [x, y, 300], sched=sched)
    for i in range(300):
        v = i + 1
        r = collatz(v)
        r = [r + 1, r * 3, -r, r ^ 0x55, r << 2, r * r, r - 9][v % 7]
        e = r + ((v * 5) & 15) * v
        if v % 3:
            assert y[i] == e, i
        else:
            assert e <= y[i] <= e + 32


def test_warp_ops():
    x = torch.arange(64, dtype=torch.int32) * 37 % 50
    y = torch.zeros(256, dtype=torch.int32)
    basic().launch("warp_ops", 1, 64, [x, y])
    xs = x.numpy().astype(np.uint32)
    M = 0xFFFFFFFF
    for t in range(64):
        w, l = t // 32 * 32, t % 32
        v = int(xs[t])
        assert y[t] == int(xs[w : w + 32].sum())
        assert (int(y[64 + t]) & M) == sum(1 << k for k in range(32) if xs[w + k] % 4 == v % 4)
        assert y[128 + t] == int(7 in xs[w : w + 32]) + 2
        pb = [(v >> 8 * k) & 255 for k in range(4)] + [l & 255, 0, 0, 0]
        perm = sum(pb[(0x3715 >> 4 * k) & 7] << 8 * k for k in range(4))
        rev = int(f"{v:032b}"[::-1], 2)
        ffs = (v & -v).bit_length()
        e = (
            int(xs[w + (l + 5) % 32])
            + int(xs[t - 3] if l >= 3 else v)
            + perm
            + rev
            + (32 - v.bit_length())
            + ffs
            + bin(v).count("1")
            + (((l << 32 | v) << 7) >> 32 & M)
        )
        assert (int(y[192 + t]) - e) & M == 0


def test_params_and_halves():
    import struct

    o = torch.zeros(8)
    big = struct.pack("<5f i d", 1, 2, 3, 4, 5, 7, 2.5)
    basic().launch("params", 1, 5, [big, -3, -300, 1 << 40, o])
    assert o[:5].tolist() == [12, 2.5, -3, -300, float(1 << 40)]
    a, b = torch.randn(64).half(), torch.randn(64).half()
    h = torch.zeros(64).half()
    p, q = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    r = torch.zeros(64).bfloat16()
    basic().launch("halves", 1, 32, [a, b, h, p, q, r, 32])
    assert torch.equal(h, (a.double() * b.double() + torch.maximum(a, -b).double()).half())
    assert torch.equal(r, (p.double() * q.double() + torch.minimum(p, q).double()).bfloat16())


def test_printf_assert():
    r = basic().launch("say", 1, 32, [3])
    assert r.output == "t 0 of 3: 1.50 ok 123456789012\nt 1 of 3: 1.50 ok 123456789012\n"
    with pytest.raises(cusim.SimError, match="assertion failed: n < 5"):
        basic().launch("say", 1, 32, [9])


def test_atomics():
    f, h, u, l, v = (
        torch.zeros(1),
        torch.zeros(2).half(),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(4),
    )
    basic().launch("atom", 2, 64, [f, h, u, l, v], threads=2)
    assert (
        f[0] == 128
        and h.tolist() == [128, 256]
        and u.tolist()[:2] == [189, 128 % 10]
        and u[2] > 0
        and u[3] == 0
        and l[0] == 640
        and v.tolist() == [128, 256, 384, 512]
    )


def test_locks_and_grid_sync():
    lock, c = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    basic().launch("spin_lock", 2, 64, [lock, c])
    assert c[0] == 128
    for sched in ("rr", "random"):
        x, y = torch.zeros(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
        basic().launch("grid_sync", 6, 64, [x, y], cooperative=True, sched=sched)
        assert y.tolist() == [21] * 6


def bulk(*defs, **opt):
    x = torch.arange(4096, dtype=torch.float32)
    y, z = torch.zeros(4096), torch.ones(4096)
    mod("bulk.cu", "sm_90a", *defs).launch("copy", 4, 128, [x, y, z], **opt)
    return torch.equal(y, 2 * x + 1) and torch.equal(z, 2 * x + 2)


@pytest.mark.parametrize("mode", MODES, ids=IDS)
def test_bulk(mode):
    assert bulk(**mode)


def test_bulk_faults():
    for d, txt in (("NO_PROXY_FENCE", "fence.proxy.async"), ("NO_READ_WAIT", "bulk store source read"), ("NO_SYNC", "race")):
        with pytest.raises(cusim.SimError, match=txt) as e:
            bulk(d)
        assert e.value.kind == "race"
    assert not bulk("NO_READ_WAIT", checks=False)


@pytest.mark.parametrize("sched", ["rr", "random"])
def test_named_barriers(sched):
    x = torch.arange(640, dtype=torch.int32)
    y = torch.zeros(640, dtype=torch.int32)
    for seed in range(3):
        basic().launch("named", 1, 128, [x, y, 10], sched=sched, seed=seed)
        assert torch.equal(y.view(10, 64), x.view(10, 64).flip(1) * 2)


def fails(kind, m, *a, **k):
    with pytest.raises(cusim.SimError) as e:
        m.launch(*a, **k)
    assert e.value.kind == kind, str(e.value)
    return str(e.value)


def test_faults_basic():
    m = basic()
    x = torch.zeros(64)
    assert "ends" in fails("global-oob", m, "oob", 1, 32, [x, 40]) and "k.cu:" in fails("global-oob", m, "oob", 1, 32, [x, 1000])
    fails("misaligned", m, "misaligned", 1, 1, [x])
    fails("shared-oob", m, "smem_oob", 1, 32, [x], shared=1024)
    fails("uninitialised", m, "uninit", 1, 64, [x])
    m.launch("uninit", 1, 64, [x], checks=["-uninit"])
    t = fails("deadlock", m, "deadlock", 1, 128, [torch.zeros(1, dtype=torch.int32)])
    assert "barrier 1 (32 of 64" in t and "barrier 0" in t
    fails("divergence", m, "diverged_barrier", 1, 32, [torch.zeros(1, dtype=torch.int32)])
    a = ("block_sum", 1, 256, [torch.randn(5000), torch.zeros(1), 5000])
    fails("uninitialised", mod("basic.cu", "sm_90", "NO_SYNC"), *a)
    fails("race", mod("basic.cu", "sm_90", "NO_SYNC"), *a, checks=["-uninit"])
    fails(
        "deadlock",
        mod("basic.cu", "sm_90", "NO_RELEASE_ORDER"),
        "named",
        1,
        128,
        [torch.arange(640, dtype=torch.int32), torch.zeros(640, dtype=torch.int32), 10],
    )


def gemm80(*defs, M=100, N=72, K=96, **opt):
    torch.manual_seed(0)
    a, b = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()
    c = torch.zeros(M, N)
    r = mod("mma_gemm.cu", "sm_80", *defs).launch("gemm", (2, 2), 128, [a, b, c, M, N, K], **opt)
    return (c - a.float() @ b.float().T).abs().max().item(), r


@pytest.mark.parametrize("mode", MODES, ids=IDS)
def test_mma_gemm(mode):
    assert gemm80(**mode)[0] < 1e-3


def test_mma_gemm_faults():
    for d, kind in (("NO_WAIT", "race"), ("NO_SYNC2", "race"), ("OOB", "global-oob")):
        with pytest.raises(cusim.SimError) as e:
            gemm80(d)
        assert e.value.kind == kind, str(e.value)
    assert not gemm80("NO_WAIT", checks=False)[0] < 1  # and the late mode alone makes the result wrong
    assert gemm80("NO_WAIT", checks=False, async_mode="early")[0] < 1e-3


def gemm90(*defs, M=200, N=136, K=320, **opt):
    torch.manual_seed(0)
    a, b = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()
    c = torch.zeros(M, N)
    ta, tb = cusim.tensor_map(a, (64, 128), 128), cusim.tensor_map(b, (64, 128), 128)
    r = mod("hopper_gemm.cu", "sm_90a", *defs).launch("gemm", (2, 2), 384, [ta, tb, c, M, N, K], shared=3 * 32768 + 2048, **opt)
    return (c - a.float() @ b.float().T).abs().max().item(), r


@pytest.mark.parametrize("mode", MODES, ids=IDS)
def test_hopper_gemm(mode):
    assert gemm90(**mode)[0] < 1e-3


@pytest.mark.parametrize(
    ("d", "kind"),
    [
        ("NO_WG_WAIT", {"wgmma", "race"}),
        ("NO_FULL_WAIT", {"race", "uninitialised"}),
        ("NO_EMPTY_WAIT", {"race", "mbarrier"}),
        ("NO_INIT_SYNC", {"race", "mbarrier"}),
        ("WRONG_BYTES", {"deadlock"}),
        ("NO_WG_FENCE", {"wgmma"}),
    ],
)
def test_hopper_gemm_faults(d, kind):
    with pytest.raises(cusim.SimError) as e:
        gemm90(d)
    assert e.value.kind in kind, str(e.value)


def test_hopper_faults_change_results():
    """Without any check, the late mode alone exposes the missing waits."""
    for d in ("NO_WG_WAIT", "NO_FULL_WAIT"):
        with contextlib.suppress(cusim.SimError):
            assert not gemm90(d, checks=False)[0] < 1


def attn90(*defs, N=256, causal=False, BH=2, **opt):
    import math

    torch.manual_seed(0)
    D = 64
    q, k, v = (torch.randn(BH, N, D).bfloat16() for _ in range(3))
    o = torch.zeros_like(q)
    lse = torch.zeros(BH, N)
    sc = 1 / math.sqrt(D)
    maps = [cusim.tensor_map(x, (64, 64, 1), 128) for x in (q, k, v)]
    r = mod("fa_sm90.cu", "sm_90a", *defs).launch(
        "attn", (-(-N // 64), BH), 128, [*maps, o, lse, N, sc, int(causal)], shared=5 * 8192 + 64, **opt
    )
    s = q.float() @ k.float().transpose(-1, -2) * sc
    if causal:
        s = s.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -math.inf)
    return max((o.float() - torch.softmax(s, -1) @ v.float()).abs().max().item(), (lse - torch.logsumexp(s, -1)).abs().max().item()), r


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@pytest.mark.parametrize(("N", "causal"), [(256, False), (200, True), (64, False)])
def test_hopper_attention(N, causal, mode):
    e, r = attn90(N=N, causal=causal, **mode)
    assert e < 2e-2
    assert r.seconds < 2


@pytest.mark.parametrize("d", ["NO_WAIT1", "NO_LAST_WAIT"])
def test_hopper_attention_faults(d):
    with pytest.raises(cusim.SimError) as e:
        attn90(d)
    assert e.value.kind == "wgmma", str(e.value)
    assert not attn90(d, checks=False)[0] < 2e-2


def test_counters():
    _, r = gemm80(M=128, N=128, K=96, counters=True)
    s = r.stats
    assert s["mma_flops_16bit"] == 2 * 128 * 128 * 96
    x = torch.zeros(32)
    for stride, ways in ((1, 1), (2, 2), (32, 32), (33, 1)):
        s = basic().launch("banks", 1, 32, [x, stride], counters=True).stats
        assert s["smem_wavefronts"] == 2 * ways and s["smem_ideal_wavefronts"] == 2
    y = torch.zeros(32 * 8)
    for stride, sectors in ((1, 4), (8, 32)):
        assert basic().launch("strided", 1, 32, [y, stride], counters=True).stats["gmem_sectors"] == sectors
    _e, r = gemm90(M=256, N=256, K=320, counters=True)
    assert r.stats["mma_flops_16bit"] == 2 * 256 * 256 * 320 and r.stats["tma_bytes"] == 4 * 5 * 32768
    assert cusim.roofline(r.stats)["estimate_only"]
