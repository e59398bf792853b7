"""Explicit Hopper kernels in Gluon: TMA, mbarriers, asynchronous wgmma, warp specialisation."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def producer(da, db, sA, sB, full, empty, K, pm, pn, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, ST: gl.constexpr):
    i = 0
    for k in range(0, K, BK):
        st = i % ST
        mbarrier.wait(empty.index(st), ((i // ST) & 1) ^ 1)
        mbarrier.expect(full.index(st), da.block_type.nbytes + db.block_type.nbytes)
        tma.async_copy_global_to_shared(da, [pm * BM, k], full.index(st), sA.index(st))
        tma.async_copy_global_to_shared(db, [pn * BN, k], full.index(st), sB.index(st))
        i += 1


@gluon.jit
def consumer(
    dc, sA, sB, sC, full, empty, K, pm, pn, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, ST: gl.constexpr, NW: gl.constexpr
):
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BN, 16])
    acc = gl.zeros((BM, BN), gl.float32, L)
    i = 0
    for _k in range(0, K, BK):
        st = i % ST
        mbarrier.wait(full.index(st), (i // ST) & 1)
        acc = warpgroup_mma(sA.index(st), sB.index(st).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(st), count=1)
        i += 1
    sC.store(acc.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(dc, [pm * BM, pn * BN], sC)
    tma.store_wait(0)


@gluon.jit
def ws_matmul(A, B, C, M, N, K, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, ST: gl.constexpr):
    LA: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], gl.bfloat16)
    LB: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BK], gl.bfloat16)
    LC: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN], gl.bfloat16)
    da = tma.make_tensor_descriptor(A, [M, K], [K, 1], [BM, BK], LA)
    db = tma.make_tensor_descriptor(B, [N, K], [K, 1], [BN, BK], LB)
    dc = tma.make_tensor_descriptor(C, [M, N], [N, 1], [BM, BN], LC)
    sA = gl.allocate_shared_memory(gl.bfloat16, [ST, BM, BK], LA)
    sB = gl.allocate_shared_memory(gl.bfloat16, [ST, BN, BK], LB)
    sC = gl.allocate_shared_memory(gl.bfloat16, [BM, BN], LC)
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    pm = gl.program_id(0)
    pn = gl.program_id(1)
    gl.warp_specialize(
        [
            (consumer, (dc, sA, sB, sC, full, empty, K, pm, pn, BM, BN, BK, ST, 4)),
            (producer, (da, db, sA, sB, full, empty, K, pm, pn, BM, BN, BK, ST)),
        ],
        [1],
        [40],
    )
