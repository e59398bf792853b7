"""Triton kernels whose compiled PTX is known to be good: the oracle for the simulator."""

import triton
import triton.language as tl


@triton.jit
def add(X, Y, Z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Z + i, tl.load(X + i, mask=i < n) + tl.load(Y + i, mask=i < n), mask=i < n)


@triton.jit
def softmax(X, Y, stride, n, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x = tl.load(X + r * stride + i, mask=i < n, other=-float("inf")).to(tl.float32)
    x = tl.exp(x - tl.max(x, 0))
    tl.store(Y + r * stride + i, (x / tl.sum(x, 0)).to(Y.dtype.element_ty), mask=i < n)


@triton.jit
def layernorm(X, W, B, Y, n, eps, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    m = i < n
    x = tl.load(X + r * n + i, mask=m, other=0.0).to(tl.float32)
    mu = tl.sum(x, 0) / n
    d = tl.where(m, x - mu, 0.0)
    rs = 1 / tl.sqrt(tl.sum(d * d, 0) / n + eps)
    y = d * rs * tl.load(W + i, mask=m).to(tl.float32) + tl.load(B + i, mask=m).to(tl.float32)
    tl.store(Y + r * n + i, y.to(Y.dtype.element_ty), mask=m)


@triton.jit
def matmul(A, B, C, M, N, K, sam, sak, sbk, sbn, scm, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr):
    pm = tl.program_id(0)
    pn = tl.program_id(1)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    a = A + rm[:, None] * sam + rk[None, :] * sak
    b = B + rk[:, None] * sbk + rn[None, :] * sbn
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(a, mask=(rm[:, None] < M) & (rk[None, :] + k < K), other=0.0)
        y = tl.load(b, mask=(rk[:, None] + k < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PREC)
        a += BK * sak
        b += BK * sbk
    tl.store(C + rm[:, None] * scm + rn[None, :], acc.to(C.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def matmul_tma(A, B, C, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    pm = tl.program_id(0)
    pn = tl.program_id(1)
    da = tl.make_tensor_descriptor(A, shape=[M, K], strides=[K, 1], block_shape=[BM, BK])
    db = tl.make_tensor_descriptor(B, shape=[N, K], strides=[K, 1], block_shape=[BN, BK])
    dc = tl.make_tensor_descriptor(C, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(da.load([pm * BM, k]), db.load([pn * BN, k]).T, acc)
    dc.store([pm * BM, pn * BN], acc.to(tl.bfloat16))


@triton.jit
def attn_fwd(Q, K, V, O, LSE, sh, N, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    pid = tl.program_id(0)
    bh = tl.program_id(1)
    off = bh.to(tl.int64) * sh
    rm = pid * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    q = tl.load(Q + off + rm[:, None] * D + rd[None, :], mask=rm[:, None] < N, other=0.0)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    qs = scale * 1.4426950408889634
    hi = tl.minimum((pid + 1) * BM, N) if CAUSAL else N
    for n in range(0, hi, BN):
        rn = n + tl.arange(0, BN)
        k = tl.load(K + off + rn[None, :] * D + rd[:, None], mask=rn[None, :] < N, other=0.0)
        s = tl.dot(q, k) * qs
        s = tl.where(rn[None, :] < N, s, -float("inf"))
        if CAUSAL:
            s = tl.where(rm[:, None] >= rn[None, :], s, -float("inf"))
        mn = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - mn[:, None])
        a = tl.exp2(m - mn)
        l = l * a + tl.sum(p, 1)
        acc = acc * a[:, None]
        v = tl.load(V + off + rn[:, None] * D + rd[None, :], mask=rn[:, None] < N, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc)
        m = mn
    tl.store(O + off + rm[:, None] * D + rd[None, :], (acc / l[:, None]).to(O.dtype.element_ty), mask=rm[:, None] < N)
    tl.store(LSE + bh * N + rm, m / 1.4426950408889634 + tl.log(l), mask=rm < N)


@triton.jit
def attn_bwd(Q, K, V, DO, LSE, DELTA, DQ, DK, DV, sh, N, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """One program per key block; dQ is accumulated with float atomics."""
    pid = tl.program_id(0)
    bh = tl.program_id(1)
    off = bh.to(tl.int64) * sh
    rn = pid * BN + tl.arange(0, BN)
    rd = tl.arange(0, D)
    k = tl.load(K + off + rn[:, None] * D + rd[None, :])
    v = tl.load(V + off + rn[:, None] * D + rd[None, :])
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for m0 in range(0, N, BM):
        rm = m0 + tl.arange(0, BM)
        q = tl.load(Q + off + rm[:, None] * D + rd[None, :])
        do = tl.load(DO + off + rm[:, None] * D + rd[None, :])
        lse = tl.load(LSE + bh * N + rm)
        dl = tl.load(DELTA + bh * N + rm)
        p = tl.exp(tl.dot(q, tl.trans(k)) * scale - lse[:, None])
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv)
        ds = (p * (tl.dot(do, tl.trans(v)) - dl[:, None]) * scale).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk)
        tl.atomic_add(DQ + off + rm[:, None] * D + rd[None, :], tl.dot(ds, k))
    tl.store(DK + off + rn[:, None] * D + rd[None, :], dk)
    tl.store(DV + off + rn[:, None] * D + rd[None, :], dv)


@triton.jit
def histogram(X, H, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n, other=0)
    tl.atomic_add(H + x, 1, mask=i < n)


@triton.jit
def column_sum_max(X, S, MX, n, BLOCK: tl.constexpr, COLS: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, COLS)
    x = tl.load(X + r[:, None] * COLS + c[None, :], mask=r[:, None] < n, other=0.0)
    tl.atomic_add(S + c, tl.sum(x, 0))
    tl.atomic_max(MX + c, tl.max(x, 0))


@triton.jit
def scan_sort(X, Y, Z, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i)
    tl.store(Y + i, tl.cumsum(x, 0))
    tl.store(Z + i, tl.sort(x))


@triton.jit
def math_mix(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n, other=1.0)
    y = (
        tl.sin(x)
        + tl.cos(x) * tl.exp(-x * x)
        + tl.log(tl.abs(x) + 1)
        + tl.sqrt(tl.abs(x))
        + tl.rsqrt(tl.abs(x) + 1)
        + tl.erf(x)
        + tl.sigmoid(x)
        + tl.floor(x * 3)
        + tl.ceil(x)
    )
    tl.store(Y + i, y, mask=i < n)


@triton.jit
def int_mix(X, Y, Z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n, other=1)
    y = tl.load(Y + i, mask=i < n, other=1)
    r = (x * y + (x // y) - (x % y)) ^ (x << 3) | (y >> 2) & (x + 7)
    r = r + tl.umulhi(x.to(tl.uint32), y.to(tl.uint32)).to(tl.int32)
    r = r + (x.to(tl.int64) * y.to(tl.int64) >> 11).to(tl.int32)
    tl.store(Z + i, r, mask=i < n)
