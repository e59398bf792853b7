"""Known-good PTX from Triton's ahead-of-time compiler, simulated and compared with PyTorch."""

import math

import pytest
import torch

pytest.importorskip("triton")
import cusim.triton as ct
import triton_kernels as tk

MODES = [{"async_mode": "late"}, {"async_mode": "early"}, {"async_mode": "random", "sched": "random", "seed": 3}]
IDS = ["late", "early", "random"]
ARCH = [80, 90]


@pytest.mark.parametrize("arch", ARCH)
def test_add(arch):
    n = 1000
    x, y = torch.randn(n), torch.randn(n)
    z = torch.zeros(n)
    ct.run(tk.add, (4,), [x, y, z, n], {"X": "*fp32", "Y": "*fp32", "Z": "*fp32", "n": "i32"}, {"BLOCK": 256}, arch)
    assert torch.equal(z, x + y)


@pytest.mark.parametrize("arch", ARCH)
@pytest.mark.parametrize("dt", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("warps", [1, 4, 8])
def test_softmax(arch, dt, warps):
    x = torch.randn(5, 300).to(dt)
    y = torch.zeros_like(x)
    t = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dt]
    ct.run(tk.softmax, (5,), [x, y, 300, 300], {"X": t, "Y": t, "stride": "i32", "n": "i32"}, {"BLOCK": 512}, arch, num_warps=warps)
    torch.testing.assert_close(
        y.float(), torch.softmax(x.float(), -1), atol=1e-6 if dt == torch.float32 else 4e-3, rtol=1e-2 if dt != torch.float32 else 1e-5
    )


def test_layernorm():
    x = torch.randn(6, 200).bfloat16()
    w, b = torch.randn(200).bfloat16(), torch.randn(200).bfloat16()
    y = torch.zeros_like(x)
    ct.run(
        tk.layernorm,
        (6,),
        [x, w, b, y, 200, 1e-5],
        {"X": "*bf16", "W": "*bf16", "B": "*bf16", "Y": "*bf16", "n": "i32", "eps": "fp32"},
        {"BLOCK": 256},
        80,
    )
    torch.testing.assert_close(y.float(), torch.nn.functional.layer_norm(x.float(), (200,), w.float(), b.float()), atol=3e-2, rtol=2e-2)


TYPES = {
    "bf16": (torch.bfloat16, "*bf16"),
    "fp16": (torch.float16, "*fp16"),
    "tf32": (torch.float32, "*fp32"),
    "ieee": (torch.float32, "*fp32"),
    "e4m3": (torch.float8_e4m3fn, "*fp8e4nv"),
    "e5m2": (torch.float8_e5m2, "*fp8e5"),
    "tf32x3": (torch.float32, "*fp32"),
}


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@pytest.mark.parametrize("trans", ["nn", "nt", "tn"])
@pytest.mark.parametrize("ty", ["bf16", "fp16", "tf32", "e5m2", "e4m3"])
@pytest.mark.parametrize("arch", ARCH)
def test_matmul(arch, ty, trans, mode):
    if ty == "e4m3" and arch == 80:
        pytest.skip("no e4m3 on sm_80")
    torch.manual_seed(1)
    M, N, K = 130, 96, 160
    dt, t = TYPES[ty]
    a = torch.randn(M, K).to(dt) if trans[0] == "n" else torch.randn(K, M).to(dt).T
    b = torch.randn(K, N).to(dt) if trans[1] == "n" else torch.randn(N, K).to(dt).T
    c = torch.zeros(M, N)
    ct.run(
        tk.matmul,
        (3, 2),
        [a, b, c, M, N, K, a.stride(0), a.stride(1), b.stride(0), b.stride(1), N],
        {
            "A": t,
            "B": t,
            "C": "*fp32",
            "M": "i32",
            "N": "i32",
            "K": "i32",
            "sam": "i32",
            "sak": "i32",
            "sbk": "i32",
            "sbn": "i32",
            "scm": "i32",
        },
        {"BM": 64, "BN": 64, "BK": 64 if ty[0] == "e" else 32, "PREC": "tf32"},
        arch,
        num_warps=4,
        sim=mode,
    )
    torch.testing.assert_close(c, a.float() @ b.float(), atol=0.06 if ty == "tf32" else 2e-3, rtol=1e-2)


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@pytest.mark.parametrize("arch", ARCH)
@pytest.mark.parametrize("prec", ["ieee", "tf32x3"])
def test_matmul_f32(arch, prec, mode):
    torch.manual_seed(1)
    M, N, K = 64, 64, 64
    a, b, c = torch.randn(M, K), torch.randn(K, N), torch.zeros(M, N)
    ct.run(
        tk.matmul,
        (1, 1),
        [a, b, c, M, N, K, K, 1, N, 1, N],
        {
            "A": "*fp32",
            "B": "*fp32",
            "C": "*fp32",
            "M": "i32",
            "N": "i32",
            "K": "i32",
            "sam": "i32",
            "sak": "i32",
            "sbk": "i32",
            "sbn": "i32",
            "scm": "i32",
        },
        {"BM": 64, "BN": 64, "BK": 32, "PREC": prec},
        arch,
        sim=mode,
    )
    torch.testing.assert_close(c, a @ b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("warps", [4, 8])
def test_matmul_tma(mode, stages, warps):
    torch.manual_seed(2)
    M, N, K = 200, 136, 192
    a, b = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()
    c = torch.zeros(M, N).bfloat16()
    ct.run(
        tk.matmul_tma,
        (2, 2),
        [a, b, c, M, N, K],
        {"A": "*bf16", "B": "*bf16", "C": "*bf16", "M": "i32", "N": "i32", "K": "i32"},
        {"BM": 128, "BN": 128, "BK": 64},
        90,
        num_warps=warps,
        num_stages=stages,
        sim=mode,
    )
    torch.testing.assert_close(c.float(), (a.float() @ b.float().T), atol=0.1, rtol=2e-2)


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("arch", ARCH)
def test_attention_forward(arch, D, causal, mode):
    torch.manual_seed(0)
    B, H, N = 1, 2, 250
    q, k, v = (torch.randn(B, H, N, D).bfloat16() for _ in range(3))
    o = torch.zeros_like(q)
    lse = torch.zeros(B, H, N)
    scale = 1 / math.sqrt(D)
    ct.run(
        tk.attn_fwd,
        (4, B * H),
        [q, k, v, o, lse, N * D, N, scale],
        {"Q": "*bf16", "K": "*bf16", "V": "*bf16", "O": "*bf16", "LSE": "*fp32", "sh": "i64", "N": "i32", "scale": "fp32"},
        {"D": D, "BM": 64, "BN": 64, "CAUSAL": causal},
        arch,
        num_warps=4,
        sim=mode,
    )
    s = q.float() @ k.float().transpose(-1, -2) * scale
    if causal:
        s = s.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -math.inf)
    torch.testing.assert_close(o.float(), torch.softmax(s, -1) @ v.float(), atol=1e-2, rtol=2e-2)
    torch.testing.assert_close(lse, torch.logsumexp(s, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@pytest.mark.parametrize("arch", ARCH)
def test_attention_backward(arch, mode):
    torch.manual_seed(0)
    B, H, N, D = 1, 2, 128, 64
    scale = 1 / math.sqrt(D)
    q, k, v, do = (torch.randn(B, H, N, D).half() for _ in range(4))
    qf, kf, vf = (x.float().requires_grad_() for x in (q, k, v))
    s = qf @ kf.transpose(-1, -2) * scale
    o = torch.softmax(s, -1) @ vf
    o.backward(do.float())
    lse = torch.logsumexp(s, -1).detach().contiguous()
    delta = (o * do.float()).sum(-1).detach().contiguous()
    dq, dk, dv = (torch.zeros(B, H, N, D) for _ in range(3))
    ct.run(
        tk.attn_bwd,
        (2, B * H),
        [q, k, v, do, lse, delta, dq, dk, dv, N * D, N, scale],
        {
            "Q": "*fp16",
            "K": "*fp16",
            "V": "*fp16",
            "DO": "*fp16",
            "LSE": "*fp32",
            "DELTA": "*fp32",
            "DQ": "*fp32",
            "DK": "*fp32",
            "DV": "*fp32",
            "sh": "i64",
            "N": "i32",
            "scale": "fp32",
        },
        {"D": D, "BM": 64, "BN": 64},
        arch,
        num_warps=4,
        sim=mode,
    )
    for g, r in ((dq, qf.grad), (dk, kf.grad), (dv, vf.grad)):
        torch.testing.assert_close(g, r, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("threads", [1, 2])
def test_atomics(threads):
    x = torch.randint(0, 37, (1000,), dtype=torch.int32)
    h = torch.zeros(37, dtype=torch.int32)
    ct.run(tk.histogram, (8,), [x, h, 1000], {"X": "*i32", "H": "*i32", "n": "i32"}, {"BLOCK": 128}, 80, sim={"threads": threads})
    assert torch.equal(h, torch.bincount(x, minlength=37).int())
    x = torch.randn(500, 32)
    s = torch.zeros(32)
    m = torch.full((32,), -9e9)
    ct.run(
        tk.column_sum_max,
        (8,),
        [x, s, m, 500],
        {"X": "*fp32", "S": "*fp32", "MX": "*fp32", "n": "i32"},
        {"BLOCK": 64, "COLS": 32},
        80,
        sim={"threads": threads},
    )
    torch.testing.assert_close(s, x.sum(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(m, torch.maximum(x.max(0).values, torch.zeros(32)))


def test_scan_sort_math():
    x = torch.randn(256)
    y, z = torch.zeros(256), torch.zeros(256)
    ct.run(tk.scan_sort, (1,), [x, y, z], {"X": "*fp32", "Y": "*fp32", "Z": "*fp32"}, {"BLOCK": 256}, 90)
    torch.testing.assert_close(y, x.cumsum(0), atol=1e-4, rtol=1e-4)
    assert torch.equal(z, x.sort().values)
    x = torch.randn(1000) * 3
    y = torch.zeros(1000)
    ct.run(tk.math_mix, (4,), [x, y, 1000], {"X": "*fp32", "Y": "*fp32", "n": "i32"}, {"BLOCK": 256}, 80)
    r = (
        x.sin()
        + x.cos() * (-x * x).exp()
        + (x.abs() + 1).log()
        + x.abs().sqrt()
        + (x.abs() + 1).rsqrt()
        + x.erf()
        + x.sigmoid()
        + (x * 3).floor()
        + x.ceil()
    )
    torch.testing.assert_close(y, r, atol=1e-4, rtol=1e-4)


def test_integers():
    x = torch.randint(-(2**31), 2**31 - 1, (1000,), dtype=torch.int32)
    y = torch.randint(1, 2**20, (1000,), dtype=torch.int32)
    z = torch.zeros(1000, dtype=torch.int32)
    ct.run(tk.int_mix, (4,), [x, y, z, 1000], {"X": "*i32", "Y": "*i32", "Z": "*i32", "n": "i32"}, {"BLOCK": 256}, 90)
    X, Y = x.long(), y.long()

    def w(v):
        return ((v + 2**31) % 2**32) - 2**31

    q = torch.div(X, Y, rounding_mode="trunc")
    r = w(w(X * Y + q - (X - q * Y)) ^ w(X << 3) | (Y >> 2) & w(X + 7))
    r = w(r + w(((X % 2**32) * (Y % 2**32)) >> 32) + w((X * Y) >> 11))
    assert torch.equal(z.long(), r)


@pytest.mark.parametrize("mode", MODES, ids=IDS)
def test_cluster_matmul(mode):
    """num_ctas=2: a cluster of two blocks per program."""
    torch.manual_seed(2)
    M, N, K = 128, 128, 128
    a, b = torch.randn(M, K).half(), torch.randn(K, N).half()
    c = torch.zeros(M, N)
    ct.run(
        tk.matmul,
        (1, 1),
        [a, b, c, M, N, K, K, 1, N, 1, N],
        {
            "A": "*fp16",
            "B": "*fp16",
            "C": "*fp32",
            "M": "i32",
            "N": "i32",
            "K": "i32",
            "sam": "i32",
            "sak": "i32",
            "sbk": "i32",
            "sbn": "i32",
            "scm": "i32",
        },
        {"BM": 128, "BN": 128, "BK": 64, "PREC": "tf32"},
        90,
        num_warps=4,
        num_ctas=2,
        sim=mode,
    )
    torch.testing.assert_close(c, a.float() @ b.float(), atol=2e-3, rtol=1e-2)
