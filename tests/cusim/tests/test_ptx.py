"""Instruction groups, one small PTX kernel per case, against NumPy."""

import cusim
import numpy as np
import pytest
import torch

N = 256
REG = {"b16": "%rs", "b32": "%r", "b64": "%rd", "f32": "%f", "f64": "%fd"}
SIZE = {"b16": 2, "b32": 4, "b64": 8, "f32": 4, "f64": 8}


def run(body, ins, out, target="sm_90a"):
    """body uses a0,a1,a2 (inputs) and d (output); ins: list of (type, array); out: (type, dtype)"""
    decl = "".join(f".reg .{t} a{i};\n" for i, (t, _) in enumerate(ins)) + f".reg .{out[0]} d;\n"
    ld = "".join(f"ld.param.u64 %p, [P{i}]; mad.lo.u64 %p, %t, {SIZE[t]}, %p; ld.global.{t} a{i}, [%p];\n" for i, (t, _) in enumerate(ins))
    params = ", ".join([f".param .u64 P{i}" for i in range(len(ins))] + [".param .u64 PO"])
    ptx = f""".version 8.7
.target {target}
.address_size 64
.visible .entry k({params}) {{
.reg .b64 %p, %t; .reg .b32 %x, x<8>; .reg .pred p, q, pp<4>; .reg .b16 h<8>; .reg .b64 y<8>; .reg .f32 f<8>;
{decl}
mov.u32 %x, %tid.x; cvt.u64.u32 %t, %x;
{ld}
{body}
ld.param.u64 %p, [PO]; mad.lo.u64 %p, %t, {SIZE[out[0]]}, %p; st.global.{out[0]} [%p], d;
ret;
}}
"""
    o = np.zeros(N, dtype=out[1])
    cusim.Module(ptx).launch("k", 1, N, [np.ascontiguousarray(a) for _, a in ins] + [o])
    return o


rng = np.random.default_rng(0)


def u32():
    v = rng.integers(0, 2**32, N, dtype=np.uint32)
    v[:8] = [0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    return v


def u64():
    v = rng.integers(0, 2**64, N, dtype=np.uint64)
    v[:4] = [0, 1, 2**63, 2**64 - 1]
    return v


def small(n):
    return rng.integers(0, n, N).astype(np.uint32)


A, B, C = u32(), u32()[::-1].copy(), u32()
A64, B64 = u64(), u64()[::-1].copy()


def i32(x):
    return x.astype(np.int32)


def i64(x):
    return x.astype(np.int64)


def obj(x):
    return x.astype(object)


M32 = 2**32 - 1


def tou(v):
    return np.array([int(x) & M32 for x in v], dtype=np.uint32)


def s(x):
    x = int(x) & M32
    return x - 2**32 if x >> 31 else x


def s16(x):
    x = int(x) & 0xFFFF
    return x - 2**16 if x >> 15 else x


def trunc_div(a, b):
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


INT2 = {
    "add.u32 d, a0, a1;": lambda a, b: a + b,
    "sub.s32 d, a0, a1;": lambda a, b: a - b,
    "mul.lo.s32 d, a0, a1;": lambda a, b: a * b,
    "mul.hi.u32 d, a0, a1;": lambda a, b: (a * b) >> 32,
    "mul.hi.s32 d, a0, a1;": lambda a, b: (s(a) * s(b)) >> 32,
    "min.s32 d, a0, a1;": lambda a, b: min(s(a), s(b)),
    "max.u32 d, a0, a1;": max,
    "min.relu.s32 d, a0, a1;": lambda a, b: max(min(s(a), s(b)), 0),
    "max.relu.s32 d, a0, a1;": lambda a, b: max(s(a), s(b), 0),
    "and.b32 d, a0, a1;": lambda a, b: a & b,
    "xor.b32 d, a0, a1;": lambda a, b: a ^ b,
    "lop3.b32 d, a0, a1, 12345, 0xE8;": lambda a, b: (a & b) | (a & 12345) | (b & 12345),
    "add.sat.s32 d, a0, a1;": lambda a, b: max(-(2**31), min(2**31 - 1, s(a) + s(b))),
    "shl.b32 d, a0, x0;": None,
    "popc.b32 d, a0;": lambda a, b: bin(a).count("1"),
    "clz.b32 d, a0;": lambda a, b: 32 - a.bit_length(),
    "brev.b32 d, a0;": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 d, a0;": lambda a, b: a.bit_length() - 1 if a else M32,
    "bfind.s32 d, a0;": lambda a, b: (lambda v: v.bit_length() - 1 if v else M32)(~s(a) & M32 if s(a) < 0 else a),
    "abs.s32 d, a0;": lambda a, b: abs(s(a)),
    "neg.s32 d, a0;": lambda a, b: -s(a),
    "not.b32 d, a0;": lambda a, b: ~a,
    "cnot.b32 d, a0;": lambda a, b: int(a == 0),
    "mad.lo.u32 d, a0, a1, a0;": lambda a, b: a * b + a,
    "mad.hi.u32 d, a0, a1, a0;": lambda a, b: ((a * b) >> 32) + a,
    "sad.u32 d, a0, a1, 7;": lambda a, b: abs(a - b) + 7,
    "prmt.b32 d, a0, a1, 0x7531;": lambda a, b: sum((((b << 32 | a) >> (8 * k)) & 255) << (8 * i) for i, k in enumerate((1, 3, 5, 7))),
    "prmt.b32 d, a0, a1, 0xF08C;": lambda a, b: (
        lambda y: sum((255 if y[k & 7] & 128 else 0) << (8 * i) if k & 8 else y[k] << (8 * i) for i, k in enumerate((12, 8, 0, 15)))
    )([((b << 32 | a) >> (8 * k)) & 255 for k in range(8)]),
    "shf.l.wrap.b32 d, a0, a1, 9;": lambda a, b: ((b << 32 | a) << 9) >> 32,
    "shf.r.clamp.b32 d, a0, a1, 40;": lambda a, b: b,
    "shf.r.wrap.b32 d, a0, a1, 40;": lambda a, b: (b << 32 | a) >> 8,
    "dp4a.s32.u32 d, a0, a1, 5;": lambda a, b: (
        5 + sum((lambda x: x - 256 if x > 127 else x)(a >> 8 * k & 255) * (b >> 8 * k & 255) for k in range(4))
    ),
    "bmsk.clamp.b32 d, 4, 7;": lambda a, b: 0x7F0,
    "szext.clamp.s32 d, a0, 5;": lambda a, b: (a & 31) - (32 if a & 16 else 0),
    "mul24.lo.u32 d, a0, a1;": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "add.cc.u32 x1, a0, a1; addc.u32 d, 0, 0;": lambda a, b: (a + b) >> 32,
    "sub.cc.u32 x1, a0, a1; subc.u32 d, 0, 0;": lambda a, b: -int(a < b),
    "setp.lt.s32 p, a0, a1; selp.b32 d, a0, a1, p;": lambda a, b: min(s(a), s(b)),
    "setp.hi.u32 p|q, a0, a1; selp.b32 d, 1, 2, q;": lambda a, b: 2 if a > b else 1,
    "set.ge.u32.s32 d, a0, a1;": lambda a, b: M32 if s(a) >= s(b) else 0,
    "setp.ne.u32 p, a0, 0; setp.eq.and.u32 q, a1, a1, !p; selp.u32 d, 1, 0, q;": lambda a, b: int(a == 0),
    "slct.u32.s32 d, a0, a1, a0;": lambda a, b: a if s(a) >= 0 else b,
    "max.relu.s16x2 d, a0, a1;": lambda a, b: sum(max(s16(a >> k), s16(b >> k), 0) << k for k in (0, 16)),
    "min.s16x2 d, a0, a1;": lambda a, b: sum((min((a >> k & 0xFFFF ^ 0x8000), (b >> k & 0xFFFF ^ 0x8000)) ^ 0x8000) << k for k in (0, 16)),
}


@pytest.mark.parametrize("ins", [k for k, v in INT2.items() if v])
def test_int(ins):
    f = INT2[ins]
    assert np.array_equal(run(ins, [("b32", A), ("b32", B)], ("b32", np.uint32)), tou(f(int(a), int(b)) for a, b in zip(A, B)))


def test_int_shift_div_wide_field():
    S = small(70)
    D = np.maximum(B >> 7, 1)
    assert np.array_equal(
        run("shl.b32 d, a0, a1;", [("b32", A), ("b32", S)], ("b32", np.uint32)),
        tou(int(a) << int(k) if k < 32 else 0 for a, k in zip(A, S)),
    )
    assert np.array_equal(
        run("shr.s32 d, a0, a1;", [("b32", A), ("b32", S)], ("b32", np.uint32)), tou(s(a) >> int(k) for a, k in zip(A, S))
    )
    assert np.array_equal(
        run("shr.u64 d, a0, a1;", [("b64", A64), ("b32", S)], ("b64", np.uint64)),
        np.array([int(a) >> int(k) for a, k in zip(A64, S)], dtype=np.uint64),
    )
    assert np.array_equal(
        run("div.s32 d, a0, a1;", [("b32", A), ("b32", D)], ("b32", np.uint32)), tou(trunc_div(s(a), s(b)) for a, b in zip(A, D))
    )
    assert np.array_equal(
        run("rem.s32 d, a0, a1;", [("b32", A), ("b32", D)], ("b32", np.uint32)),
        tou(s(a) - s(b) * trunc_div(s(a), s(b)) for a, b in zip(A, D)),
    )
    assert np.array_equal(
        run("div.u64 d, a0, a1;", [("b64", A64), ("b64", D.astype(np.uint64))], ("b64", np.uint64)), A64 // D.astype(np.uint64)
    )
    assert np.array_equal(
        run("mad.wide.s32 d, a0, a1, a2;", [("b32", A), ("b32", B), ("b64", A64)], ("b64", np.uint64)),
        np.array([(s(a) * s(b) + int(c)) % 2**64 for a, b, c in zip(A, B, A64)], dtype=np.uint64),
    )
    assert np.array_equal(
        run("mul.hi.u64 d, a0, a1;", [("b64", A64), ("b64", B64)], ("b64", np.uint64)),
        np.array([int(a) * int(b) >> 64 for a, b in zip(A64, B64)], dtype=np.uint64),
    )
    P, L = small(40), small(40)

    def bfe(a, p, l):
        return (int(a) >> int(p)) & ((1 << int(l)) - 1)

    assert np.array_equal(
        run("bfe.u32 d, a0, a1, a2;", [("b32", A), ("b32", P), ("b32", L)], ("b32", np.uint32)),
        tou(bfe(a, p, l) for a, p, l in zip(A, P, L)),
    )

    def sbfe(a, p, l):
        if l == 0:
            return 0
        v = s(a) >> int(p) if p < 32 else (s(a) >> 31)
        return (v & ((1 << int(l)) - 1)) - ((1 << int(l)) if (v >> (min(int(l), 32) - 1)) & 1 else 0) if l < 32 else v

    assert np.array_equal(
        run("bfe.s32 d, a0, a1, a2;", [("b32", A), ("b32", P), ("b32", L)], ("b32", np.uint32)),
        tou(sbfe(a, p, l) for a, p, l in zip(A, P, L)),
    )
    assert np.array_equal(
        run("bfi.b32 d, a0, a1, 4, 9;", [("b32", A), ("b32", B)], ("b32", np.uint32)),
        tou((int(b) & ~(0x1FF << 4)) | ((int(a) & 0x1FF) << 4) for a, b in zip(A, B)),
    )


F = np.concatenate(
    [
        [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, 0.5, 2.0],
        rng.standard_normal(N - 12) * 10.0 ** rng.integers(-6, 6, N - 12),
    ]
).astype(np.float32)
G = np.roll(F, 7).astype(np.float32)
POS = np.abs(np.where(np.isfinite(F), F, 1)).astype(np.float32) + np.float32(1e-3)


def eqf(a, b):
    return np.array_equal(np.where(np.isnan(a), 7, a), np.where(np.isnan(b), 7, b)) and np.array_equal(
        np.signbit(a) & ~np.isnan(a), np.signbit(b) & ~np.isnan(b)
    )


def ftz(x):
    return np.where(np.abs(x) < 2**-126, np.copysign(np.float32(0), x), x).astype(np.float32)


def test_f32_exact():
    def r(b):
        return run(b, [("f32", F), ("f32", G)], ("f32", np.float32))

    with np.errstate(all="ignore"):
        assert eqf(r("add.f32 d, a0, a1;"), F + G)
        assert eqf(r("mul.rn.f32 d, a0, a1;"), F * G)
        assert eqf(r("div.rn.f32 d, a0, a1;"), F / G)
        assert eqf(r("sub.ftz.f32 d, a0, a1;"), ftz(ftz(F) - ftz(G)))
        assert eqf(r("fma.rn.f32 d, a0, a1, a0;"), (F.astype(np.float64) * G + F).astype(np.float32))
        assert eqf(r("sqrt.rn.f32 d, a0;"), np.sqrt(F))
        assert eqf(r("neg.f32 d, a0;"), -F)
        assert eqf(r("abs.f32 d, a0;"), np.abs(F))
        assert eqf(
            r("min.f32 d, a0, a1;"),
            np.where((F == 0) & (G == 0), np.where(np.signbit(F) | np.signbit(G), np.float32(-0.0), np.float32(0)), np.fmin(F, G)),
        )
        assert eqf(
            r("max.NaN.f32 d, a0, a1;"),
            np.where(np.isnan(F) | np.isnan(G), np.nan, np.where((F == 0) & (G == 0), F + G, np.maximum(F, G))).astype(np.float32),
        )
        sat = np.where(F > 0, np.minimum(F, 1), 0).astype(np.float32)
        assert eqf(r("add.sat.f32 d, a0, 0f00000000;"), sat)
        assert eqf(r("copysign.f32 d, a0, a1;"), np.copysign(G, F))
        ex = F.astype(np.float64) + G.astype(np.float64)
        lo, hi = r("add.rm.f32 d, a0, a1;").astype(np.float64), r("add.rp.f32 d, a0, a1;").astype(np.float64)
        ok = np.isfinite(ex) & (np.abs(ex) < 3e38)
        assert (
            np.all(lo[ok] <= ex[ok])
            and np.all(hi[ok] >= ex[ok])
            and np.all((hi - lo)[ok] <= np.spacing(np.maximum(np.abs(lo), np.abs(hi)).astype(np.float32))[ok])
        )
        z = r("mul.rz.f32 d, a0, a1;").astype(np.float64)
        ex = F.astype(np.float64) * G
        ok = np.isfinite(ex) & (np.abs(ex) < 3e38)
        assert np.all(np.abs(z[ok]) <= np.abs(ex[ok]))
        assert np.array_equal(
            run("setp.ltu.f32 p, a0, a1; selp.u32 d, 1, 0, p;", [("f32", F), ("f32", G)], ("b32", np.uint32)), (~(F >= G)).astype(np.uint32)
        )
        assert np.array_equal(
            run("setp.ne.f32 p, a0, a1; selp.u32 d, 1, 0, p;", [("f32", F), ("f32", G)], ("b32", np.uint32)),
            ((F < G) | (F > G)).astype(np.uint32),
        )
        assert np.array_equal(
            run("testp.subnormal.f32 p, a0; selp.u32 d, 1, 0, p;", [("f32", F)], ("b32", np.uint32)),
            ((np.abs(F) < 2**-126) & (F != 0)).astype(np.uint32),
        )


@pytest.mark.parametrize(
    ("ins", "f"),
    [
        ("ex2.approx.ftz.f32", lambda x: 2.0**x),
        ("lg2.approx.f32", lambda x: np.log2(np.abs(x) + 1e-3)),
        ("rcp.approx.ftz.f32", lambda x: 1 / x),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(np.abs(x) + 1e-3)),
        ("sin.approx.f32", np.sin),
        ("cos.approx.f32", np.cos),
        ("tanh.approx.f32", np.tanh),
        ("sqrt.approx.f32", lambda x: np.sqrt(np.abs(x) + 1e-3)),
    ],
)
def test_f32_approx(ins, f):
    x = (rng.standard_normal(N) * 20).astype(np.float32)
    x[:4] = [1, -1, 0.25, -7.5]
    y = np.abs(x) + np.float32(1e-3) if ins[:2] in ("lg", "rs", "sq") else x
    np.testing.assert_allclose(run(f"{ins} d, a0;", [("f32", y)], ("f32", np.float32)), f(x.astype(np.float64)), rtol=3e-6, atol=1e-6)


def test_ex2_edges():
    x = np.full(N, -0.0, np.float32)
    x[:8] = [np.inf, -np.inf, np.nan, 128, 127.5, -126, -140, -200]
    e = run("ex2.approx.f32 d, a0;", [("f32", x)], ("f32", np.float32))
    assert (
        e[0] == np.inf
        and e[1] == 0
        and np.isnan(e[2])
        and e[3] == np.inf
        and abs(e[4] / 2**127.5 - 1) < 1e-6
        and e[5] == 2.0**-126
        and e[6] == np.float32(2.0**-140)
        and e[7] == 0
        and e[8] == 1
    )
    assert run("ex2.approx.ftz.f32 d, a0;", [("f32", x)], ("f32", np.float32))[6] == 0


def T(x):
    return torch.from_numpy(np.ascontiguousarray(x))


def bf(x):
    return T(x).bfloat16()


def bits16(t):
    return t.view(torch.int16).numpy().view(np.uint16)


OK = np.isfinite(F)


def test_cvt():
    h = bits16(T(F).half())
    b = bits16(bf(F))

    def r(ins, i, o):
        return run(ins, i, o)

    assert np.array_equal(r("cvt.rn.f16.f32 d, a0;", [("f32", F)], ("b16", np.uint16))[OK], h[OK])
    assert np.array_equal(r("cvt.rn.bf16.f32 d, a0;", [("f32", F)], ("b16", np.uint16))[OK], b[OK])
    assert np.array_equal(
        r("cvt.rn.bf16x2.f32 d, a0, a1;", [("f32", F), ("f32", G)], ("b32", np.uint32))[OK & np.isfinite(G)],
        (b.astype(np.uint32) << 16 | bits16(bf(G)))[OK & np.isfinite(G)],
    )
    assert np.array_equal(
        r("cvt.rn.f16x2.f32 d, a0, a1;", [("f32", F), ("f32", G)], ("b32", np.uint32))[OK & np.isfinite(G)],
        (h.astype(np.uint32) << 16 | bits16(T(G).half()))[OK & np.isfinite(G)],
    )
    assert eqf(r("cvt.f32.f16 d, a0;", [("b16", h)], ("f32", np.float32)), T(F).half().float().numpy())
    assert eqf(r("cvt.f32.bf16 d, a0;", [("b16", b)], ("f32", np.float32)), bf(F).float().numpy())
    X = np.where(np.isnan(F), 0, F).astype(np.float64)
    for m, f in (("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)):
        assert np.array_equal(
            r(f"cvt.{m}.s32.f32 d, a0;", [("f32", F)], ("b32", np.int32)),
            np.clip(f(X), -(2**31), 2**31 - 1).astype(np.int64).astype(np.int32),
        ), m
        assert eqf(r(f"cvt.{m}.f32.f32 d, a0;", [("f32", F)], ("f32", np.float32)), f(F))
    assert np.array_equal(
        r("cvt.rzi.u32.f32 d, a0;", [("f32", F)], ("b32", np.uint32)),
        np.clip(np.trunc(X), 0, 2**32 - 1).astype(np.uint64).astype(np.uint32),
    )
    assert np.array_equal(r("cvt.rzi.u8.f32 d, a0;", [("f32", F)], ("b32", np.uint32)), np.clip(np.trunc(X), 0, 255).astype(np.uint32))
    assert np.array_equal(r("cvt.rn.f32.s32 d, a0;", [("b32", A)], ("f32", np.float32)), i32(A).astype(np.float32))
    assert np.array_equal(r("cvt.rn.f32.u64 d, a0;", [("b64", A64)], ("f32", np.float32)), A64.astype(np.float32))
    assert np.array_equal(r("cvt.rn.f64.s64 d, a0;", [("b64", A64)], ("f64", np.float64)), i64(A64).astype(np.float64))
    assert np.array_equal(r("cvt.s64.s32 d, a0;", [("b32", A)], ("b64", np.int64)), i32(A).astype(np.int64))
    assert np.array_equal(r("cvt.s32.s8 d, a0;", [("b32", A)], ("b32", np.int32)), A.astype(np.int8).astype(np.int32))
    assert np.array_equal(r("cvt.sat.u8.s32 d, a0;", [("b32", A)], ("b32", np.uint32)), np.clip(i32(A), 0, 255).astype(np.uint32))
    u = F.view(np.uint32)
    assert np.array_equal(
        r("cvt.rna.tf32.f32 d, a0;", [("f32", F)], ("b32", np.uint32))[OK],
        ((u.astype(np.uint64) + 0x1000) & 0xFFFFE000).astype(np.uint32)[OK],
    )
    for ty, dt in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        lim = 448.0 if ty == "e4m3" else 57344.0
        f, g = (np.clip(np.where(np.isnan(x), 1, x), -lim, lim).astype(np.float32) for x in (F, G))

        def q(x):
            return T(x).to(dt).view(torch.uint8).numpy().astype(np.uint16)

        assert np.array_equal(
            r(
                f"cvt.rn.satfinite.{ty}x2.f32 d, a0, a1;",
                [("f32", np.where(np.isnan(F), 1, F).astype(np.float32)), ("f32", np.where(np.isnan(G), 1, G).astype(np.float32))],
                ("b16", np.uint16),
            ),
            q(f) << 8 | q(g),
        ), ty
        e = np.arange(256, dtype=np.uint16)
        d = T(e.astype(np.uint8)).view(dt).half()
        got = r(f"cvt.rn.f16x2.{ty}x2 d, a0;", [("b16", e << 8 | e)], ("b32", np.uint32))
        w = bits16(d).astype(np.uint32)
        fin = torch.isfinite(d).numpy()
        assert np.array_equal(got[fin], (w << 16 | w)[fin])
    assert eqf(
        r("cvt.rn.f32.f64 d, a0;", [("f64", F.astype(np.float64) * 1.0000001)], ("f32", np.float32)),
        (F.astype(np.float64) * 1.0000001).astype(np.float32),
    )


@pytest.mark.parametrize(("ty", "dt"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_half(ty, dt):
    x, y, z = ((torch.randn(N) * 3).to(dt) for _ in range(3))
    i = [("b16", bits16(v)) for v in (x, y, z)]
    D = torch.float64

    def pair(v):
        return bits16(v).astype(np.uint32) << 16 | bits16(v.flip(0))

    ip = [("b32", pair(v)) for v in (x, y, z)]
    ops = {
        "add": lambda: x + y,
        "mul": lambda: x * y,
        "sub": lambda: x - y,
        "min": lambda: torch.minimum(x, y),
        "max": lambda: torch.maximum(x, y),
    }
    for n, f in ops.items():
        r = ".rn" if n in ("add", "sub", "mul") else ""
        assert np.array_equal(run(f"{n}{r}.{ty} d, a0, a1;", i[:2], ("b16", np.uint16)), bits16(f()))
        assert np.array_equal(run(f"{n}{r}.{ty}x2 d, a0, a1;", ip[:2], ("b32", np.uint32)), pair(f()))
    assert np.array_equal(run(f"fma.rn.{ty} d, a0, a1, a2;", i, ("b16", np.uint16)), bits16((x.to(D) * y.to(D) + z.to(D)).to(dt)))
    assert np.array_equal(
        run(f"fma.rn.relu.{ty}x2 d, a0, a1, a2;", ip, ("b32", np.uint32)), pair((x.to(D) * y.to(D) + z.to(D)).to(dt).relu() + 0)
    )
    assert np.array_equal(run(f"neg.{ty}x2 d, a0;", ip[:1], ("b32", np.uint32)), pair(-x))
    got = torch.from_numpy(run(f"ex2.approx{'.ftz' if ty == 'bf16' else ''}.{ty} d, a0;", i[:1], ("b16", np.uint16)).view(np.int16)).view(
        dt
    )
    torch.testing.assert_close(got.float(), torch.exp2(x.float()), rtol=1e-2, atol=1e-3)


def test_memory_widths():
    src = np.arange(64 * 16, dtype=np.uint8)
    dst = np.zeros_like(src)
    ptx = """.version 8.0
.target sm_80
.address_size 64
.global .align 4 .u32 tab[3] = {10, 20, 30};
.const .align 8 .b64 ptr = tab;
.visible .entry k(.param .u64 P, .param .u64 Q) {
.reg .b64 p, q, t, y<4>; .reg .b32 x, r<8>; .reg .b16 h<8>; .local .align 16 .b8 loc[64]; .shared .align 16 .b8 sm[1024];
ld.param.u64 p, [P]; ld.param.u64 q, [Q]; mov.u32 x, %tid.x; mul.wide.u32 t, x, 16; add.u64 p, p, t; add.u64 q, q, t;
ld.global.v4.u32 {r0, r1, r2, r3}, [p]; st.local.v2.u32 [loc+8], {r0, r1}; st.local.v2.u32 [loc], {r2, r3};
mov.u64 y0, loc; cvta.local.u64 y0, y0; ld.u64 y1, [y0+8]; ld.u64 y2, [y0];
mov.u32 r4, sm; mad.lo.u32 r4, x, 16, r4; st.shared.v2.b64 [r4], {y1, y2}; bar.sync 0;
mov.u64 y3, sm; cvta.shared.u64 y3, y3; xor.b64 t, t, 16; add.u64 y3, y3, t; ld.v4.u16 {h0, h1, h2, h3}, [y3]; ld.v4.b32 {r0, r1, r2, r3}, [y3]; xor.b64 t, t, 16;
st.global.v4.u16 [q], {h0, h1, h2, h3}; ld.shared.u8 r5, [r4+9]; ld.shared.s8 r6, [r4+9];
ld.global.u32 r7, [tab+4]; ld.const.u64 y0, [ptr]; ld.u32 r1, [y0+8]; add.u32 r7, r7, r1;
st.global.u32 [q+8], r3; st.global.u8 [q+12], r5; st.global.u8 [q+13], r7; mov.b32 r0, {h1, h0}; mov.b32 {h4, h5}, r0; st.global.b16 [q+14], h5;
ret; }
"""
    cusim.Module(ptx).launch("k", 1, 64, [src, dst])
    e = src.reshape(64, 16)[np.arange(64) ^ 1].copy()
    o = dst.reshape(64, 16)
    own = src.reshape(64, 16)
    assert (
        np.array_equal(o[:, :8], e[:, :8])
        and np.array_equal(o[:, 8:12], e[:, 12:16])
        and np.array_equal(o[:, 12], own[:, 9])
        and np.all(o[:, 13] == 50)
        and np.array_equal(o[:, 14:16], e[:, :2])
    )


def test_mma_int8_and_f16_accumulators():
    rs = np.random.default_rng(1)
    a = rs.integers(-128, 128, (16, 32)).astype(np.int8)
    b = rs.integers(-128, 128, (8, 32)).astype(np.int8)
    o = np.zeros((16, 8), np.int32)
    ptx = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 A, .param .u64 B, .param .u64 C) {
.reg .b64 a, b, c, t; .reg .b32 l, g, q, x, r<16>;
ld.param.u64 a, [A]; ld.param.u64 b, [B]; ld.param.u64 c, [C]; mov.u32 l, %laneid; shr.u32 g, l, 2; and.b32 q, l, 3; shl.b32 x, g, 5; mad.lo.u32 x, q, 4, x; cvt.u64.u32 t, x; add.u64 a, a, t; add.u64 b, b, t;
ld.global.u32 r0, [a]; ld.global.u32 r1, [a+256]; ld.global.u32 r2, [a+16]; ld.global.u32 r3, [a+272]; ld.global.u32 r4, [b]; ld.global.u32 r5, [b+16];
mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {r6, r7, r8, r9}, {r0, r1, r2, r3}, {r4, r5}, {1, 1, 1, 1};
shl.b32 x, g, 5; mad.lo.u32 x, q, 8, x; cvt.u64.u32 t, x; add.u64 c, c, t; st.global.v2.u32 [c], {r6, r7}; st.global.v2.u32 [c+256], {r8, r9}; ret; }
"""
    cusim.Module(ptx).launch("k", 1, 32, [a, b, o])
    assert np.array_equal(o, a.astype(np.int32) @ b.astype(np.int32).T + 1)


def test_errors():
    head = ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry k() {\n.reg .b32 %r<4>;\n"
    with pytest.raises(cusim.SimError, match="tcgen05"):
        cusim.Module(head + "tcgen05.wait::ld.sync.aligned;\nret;\n}").launch("k", 1, 32)
    with pytest.raises(cusim.SimError, match=r"frobnicate.*\n|PTX line 6"):
        cusim.Module(head + "frobnicate.b32 %r0, %r1;\nret;\n}").launch("k", 1, 32)
    with pytest.raises(cusim.SimError, match="PTX line 6"):
        cusim.Module(head + "add.u32 %r0, %q1, 2;\nret;\n}")
    with pytest.raises(cusim.SimError, match="limit"):
        cusim.Module(head + "L: bra L;\n}").launch("k", 1, 32, max_inst=100000)
