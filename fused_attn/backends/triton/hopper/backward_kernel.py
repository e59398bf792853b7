"""Attention backward on Hopper in one pass: 128 keys stay in shared memory, query tiles pass by; dq is summed in global memory by TMA.

Warps: two consumers of 64 keys (4 warps each), a producer (1) that loads query tiles, a reducer (1) that adds dq tiles to global memory.
Consumers compute transposed tiles (keys x queries), so that P^T and dS^T are A operands in registers for dv and dk; only dS goes through
shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from .backward_rows import FOLD, PANEL
from .backward_tile import coordinates, cut, dropout_words, from_delta, probabilities, score_gradients
from .compat import aggregate, fence_async_global, tma_add, tma_load, tma_store, wait_reads, wait_writes
from .dropout import marked, thinned_by
from .keep import load_words
from .registers import held, pinned, written
from .roles import Ring, bell, ring
from .stream import room
from .walk import rank, route_of, steps_of, total, visited


@aggregate
class Shared:
    """Shared memory of one CTA and the barriers that hand it over."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor
    minus: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor
    dq: gl.shared_memory_descriptor
    keys_here: gl.shared_memory_descriptor
    queries: Ring
    ds_ring: Ring
    dq_ring: Ring

    @gluon.constexpr_function
    def __init__(self, k, v, q, dout, lse, minus, ds, dq, keys_here, queries, ds_ring, dq_ring):
        self.k, self.v, self.q, self.dout = k, v, q, dout
        self.lse, self.minus, self.ds, self.dq = lse, minus, ds, dq
        self.keys_here, self.queries, self.ds_ring, self.dq_ring = keys_here, queries, ds_ring, dq_ring


@gluon.jit
def producer(k, v, q, dout, lse, minus, starts, ends, bias, shared, rows, biases, block, skipped, lists, mask, sizes, tile):
    """Loads the keys and values once, then what belongs to each query tile."""
    route = route_of(block, skipped, lists, mask, sizes, tile)
    mbarrier.expect(shared.keys_here, k.block_type.nbytes + v.block_type.nbytes)
    first = route.kv_tile * tile.kv
    tma_load(k, [route.b, route.kv_h, first, 0], shared.keys_here, shared.k.index(0))
    tma_load(v, [route.b, route.kv_h, first, 0], shared.keys_here, shared.v.index(0))
    for part in gl.static_range(2):
        for member in range(sizes.group):
            h = route.kv_h * sizes.group + member
            low, high = steps_of(route, member, sizes, part == 0)
            for i in range(low, high):
                row = visited(route, i - low, lists, sizes, tile, part == 0) * tile.q
                shared.queries.wait_empty(i)
                full = shared.queries.full_at(i)
                st = shared.queries.stage(i)
                SPANS: gl.constexpr = 8 * tile.q if part == 1 and len(rows) > 0 else 0
                BIAS: gl.constexpr = bias.block_type.nbytes if bias is not None else 0
                mbarrier.expect(full, q.block_type.nbytes + dout.block_type.nbytes + 8 * tile.q + SPANS + BIAS)
                if SPANS > 0:
                    tma_load(starts, [route.b * lists.own_rows, row], full, rows[0].index(st))
                    tma_load(ends, [route.b * lists.own_rows, row], full, rows[1].index(st))
                if bias is not None:
                    its_batch, its_head = gl.minimum(route.b, bias.shape[0] - 1), gl.minimum(h, bias.shape[1] - 1)
                    tma_load(bias, [its_batch, its_head, row, first], full, biases[0].index(st))
                tma_load(q, [route.b, h, row, 0], full, shared.q.index(st))
                tma_load(lse, [route.b, h, row], full, shared.lse.index(st))
                tma_load(dout, [route.b, h, row, 0], full, shared.dout.index(st))
                tma_load(minus, [route.b, h, row], full, shared.minus.index(st))


@gluon.jit
def reducer(dq, dbias, turns, shared, biases, block, skipped, lists, mask, sizes, tile):
    """Adds both halves of each dq tile to global memory, in ascending order of key tiles if there are ``turns``; writes tiles of dbias."""
    route = route_of(block, skipped, lists, mask, sizes, tile)
    q_tiles = (sizes.q_len + tile.q - 1) // tile.q
    for part in gl.static_range(2):
        for member in range(sizes.group):
            h = route.kv_h * sizes.group + member
            low, high = steps_of(route, member, sizes, part == 0)
            for i in range(low, high):
                q_tile = visited(route, i - low, lists, sizes, tile, part == 0)
                turn = turns
                if turns is not None:
                    turn = turns + (route.b * sizes.heads + h).to(gl.int64) * q_tiles + q_tile
                    await_turn(turn, rank(route, q_tile, lists, mask, sizes, tile))
                for w in gl.static_range(2):
                    mbarrier.wait(shared.dq_ring.full.index(w), i & 1)
                    tma_add(
                        dq,
                        [route.b, h, first_panel(w, tile.q, tile.d), (q_tile * tile.q + first_row(w, tile.q, tile.d)) // FOLD, 0],
                        shared.dq.index(w),
                    )
                AFTER: gl.constexpr = 1 if dbias is not None else 0
                if dbias is not None:
                    to = [route.b, h, q_tile * tile.q, route.kv_tile * tile.kv]
                    tma_store(dbias, to, biases[0].index(shared.queries.stage(i)))
                wait_reads(AFTER + 1)
                mbarrier.arrive(shared.dq_ring.empty.index(0), count=1)
                wait_reads(AFTER)
                mbarrier.arrive(shared.dq_ring.empty.index(1), count=1)
                if dbias is not None:
                    wait_reads(0)
                    shared.queries.release(i)
                if turns is not None:
                    pass_turn(turn)
    wait_reads(0)


@gluon.jit
def await_turn(turn, mine):
    """Spins until ``turn`` says ``mine``; what follows in the asynchronous proxy may not start before."""
    now = gl.atomic_add(turn, 0, sem="acquire", scope="gpu")
    while now != mine:
        now = gl.atomic_add(turn, 0, sem="acquire", scope="gpu")
    fence_async_global(now)


@gluon.jit
def pass_turn(turn):
    """Hands the tile to the next key tile, once the sums are in memory."""
    one = wait_writes(gl.to_tensor(1))
    gl.atomic_add(turn, one, sem="release", scope="gpu")


@gluon.constexpr_function
def dq_shape(queries, columns):
    """Rows and columns of a dq tile that one consumer computes: half of the rows, where there are 128, and all columns, or the other way round.

    Half of the rows reads 48 instead of 64 KB of shared memory per tile of 128 queries at head size 64.
    """
    q, d = int(queries), int(columns)
    return (64, d) if q == 128 else (q, d // 2)


@gluon.constexpr_function
def first_row(w, queries, columns):
    """Where a consumer's part of a dq tile begins."""
    rows, _ = dq_shape(queries, columns)
    return int(w) * rows if rows < int(queries) else 0


@gluon.constexpr_function
def first_panel(w, queries, columns):
    """Where it begins in panels of columns."""
    _, own = dq_shape(queries, columns)
    return int(w) * own // int(PANEL.value) if own < int(columns) else 0


@gluon.jit
def folded(dq):
    """[rows, columns] as tiles of ``sums``: [1, 1, columns / PANEL, rows / FOLD, FOLD * PANEL]."""
    ROWS: gl.constexpr = dq.shape[0] // FOLD
    COLUMNS: gl.constexpr = dq.shape[1] // PANEL
    parts = dq.reshape([ROWS, FOLD, COLUMNS, PANEL]).permute((2, 0, 1, 3))
    return parts.reshape([1, 1, COLUMNS, ROWS, FOLD * PANEL])


@gluon.jit
def fixed_tiles(shared, zero, W: gl.constexpr, tile):
    """This consumer's values; what its part of dq multiplies, keys and dS.

    ``zero`` is 0, which the compiler may not know: descriptors of tiles that never change are hoisted out of the loop otherwise, and spill.
    There is room for those of dS where query tiles have 64 rows (70 warp instructions less per 64 x 64 scores, Triton 3.7), but at 128
    rows they make 2 to 4 local accesses in a trip.
    """
    SHAPE: gl.constexpr = dq_shape(tile.q, tile.d)
    keys = shared.k.index(zero).reshape([tile.kv, tile.d])
    values = shared.v.index(zero).reshape([tile.kv, tile.dv])
    if SHAPE[0] < tile.q:
        of_keys = keys
        of_ds = shared.ds.index(zero).slice(W * SHAPE[0], SHAPE[0], dim=1)
    else:
        of_keys = keys.slice(W * SHAPE[1], SHAPE[1], dim=1)
        of_ds = shared.ds.index(0)
    return values.slice(W * 64, 64), of_keys, of_ds


@gluon.jit
def products(i, W: gl.constexpr, shared, tile):
    """Raw scores [64 keys, queries] of the CTA's i-th query tile, which is there, on their way."""
    LS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, tile.q, 16])
    q = shared.q.index(shared.queries.stage(i)).reshape([tile.q, tile.d])
    k = shared.k.index(i >> 30).reshape([tile.kv, tile.d]).slice(W * 64, 64)
    return warpgroup_mma(k, q.permute((1, 0)), gl.zeros((64, tile.q), gl.float32, LS), use_acc=False, is_async=True)


@gluon.jit
def step(
    dk, dv, s, i, n, count, h, W: gl.constexpr, shared, rows, biases, route, lists, given, mask, score, dropout, sizes, tile,
    EARLY: gl.constexpr, HELD: gl.constexpr, READ: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dk [64, tile.d] and dv [64, tile.dv] and what one query tile adds to them; its part of dq goes to the reducer."""
    SHAPE: gl.constexpr = dq_shape(tile.q, tile.d)
    DTYPE: gl.constexpr = shared.k.dtype
    LS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, tile.q, 16])
    LQ: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SHAPE[1], 16])
    OF_K: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dk.type.layout, k_width=2)
    OF_V: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dv.type.layout, k_width=2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LS)
    # With dropout delta stays outside of the product: pairs that were removed have it too.
    APART: gl.constexpr = dropout is not None
    PLACED: gl.constexpr = MASKED or APART or len(score.functions) > 0 or given.dprobs is not None or given.dscores is not None
    zeros = gl.zeros((64, tile.q), gl.float32, LS)
    st = shared.queries.stage(i)
    q = shared.q.index(st).reshape([tile.q, tile.d])
    dout = shared.dout.index(st).reshape([tile.q, tile.dv])
    v, of_keys, of_ds = fixed_tiles(shared, i >> 30, W, tile)
    if not EARLY:
        shared.queries.wait_full(i)
    # dP comes later with dropout: its registers are those of the random words.
    # dP - delta comes out of the tensor cores: the accumulator starts at -delta. That saves an addition per score, and the registers in which
    # a column's delta (tile.q / 4 per lane) would wait. In registers before S begins: ptxas else may write the last of them behind it, and then
    # waits for S before dP. Where a bias is READ per score that makes 282 local accesses in a trip instead of 70 (head size 128, Triton 3.7).
    if not APART and not READ:
        dp = written(from_delta(shared, st, tile, LS))
    if not EARLY:
        s = products(i, W, shared, tile)
    if not APART:
        if READ:
            dp = from_delta(shared, st, tile, LS)
        dp = warpgroup_mma(v, dout.permute((1, 0)), dp, is_async=True)
    if not EARLY:
        s = warpgroup_mma_wait(0 if APART else 1, deps=(s,))
    # Read here, not earlier: these too are tile.q / 4 registers.
    lse = shared.lse.index(st).reshape([tile.q]).load(COLUMNS)
    at, words, spans, tiles, its_place = None, None, None, None, None
    if PLACED:
        q_tile = visited(route, n, lists, sizes, tile, not MASKED)
        at = coordinates(h, q_tile, W, route, mask, sizes, tile, LS)
    if len(biases) > 0:
        its_place = biases[0].index(st).reshape([tile.q, tile.kv]).slice(W * 64, 64, dim=1).permute((1, 0))
        # Only a bias looks for a tile, and there is but one.
        tiles = (its_place.load(LS),) * len(score.functions)
    p = probabilities(s, lse, at, tiles, score)
    if MASKED:
        if len(rows) > 0:
            spans = (rows[0].index(st).reshape([tile.q]), rows[1].index(st).reshape([tile.q]))
        if mask.dense:
            first = route.kv_tile * tile.kv + W * 64
            words = load_words(mask.keep, route.b, h, first, sizes.kv_len, q_tile * tile.q, sizes.q_len, 1, tile.q)
        p = cut(p, at, words, spans, mask, sizes)
    weights = p
    if APART:
        drawn = dropout_words(dropout, at, q_tile, route.kv_tile * tile.kv + W * 64, sizes, tile, LS)
        p = marked(p, drawn, dropout)
        weights = gl.maximum(p, 0.0)
    if HELD:
        pb = gl.convert_layout(held(weights.to(DTYPE)), OF_V)
    else:
        pb = gl.convert_layout(pinned(weights.to(DTYPE)), OF_V)
    if APART:
        dv = warpgroup_mma(pb, dout, dv, is_async=True)
        dp = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp, dv = warpgroup_mma_wait(0, deps=(dp, dv))
        dp = gl.fma(thinned_by(dp, p), dropout.factor, shared.minus.index(st).reshape([tile.q]).load(COLUMNS)[None, :])
        p = gl.abs(p)
    else:
        dp = warpgroup_mma_wait(0, deps=(dp,))
        dv = warpgroup_mma(pb, dout, dv, is_async=True)
    ds = score_gradients(p, dp, s, at, tiles, its_place, words, spans, given, mask, score, sizes, MASKED).to(DTYPE)
    mbarrier.wait(shared.ds_ring.empty, (i & 1) ^ 1)
    # Beside a bias's tile there is no room for four addresses that never change: 2 local accesses in a trip at head size 128 (Triton 3.7).
    UNKNOWN: gl.constexpr = len(biases) > 0
    shared.ds.index(i >> 30 if UNKNOWN else 0).slice(W * 64, 64).store(ds)
    fence_async_shared()
    mbarrier.arrive(shared.ds_ring.full, count=1)
    dk = warpgroup_mma(gl.convert_layout(ds, OF_K), q, dk, is_async=True)
    mbarrier.wait(shared.ds_ring.full, i & 1)
    dq = warpgroup_mma(of_ds.permute((1, 0)), of_keys, gl.zeros(SHAPE, gl.float32, LQ), use_acc=False, is_async=True)
    dv, dk = warpgroup_mma_wait(1, deps=(dv, dk))
    if EARLY:
        following = gl.minimum(i + 1, count - 1)
        shared.queries.wait_full(following)
        s = products(following, W, shared, tile)
        dq = warpgroup_mma_wait(1, deps=(dq,))
        shared.queries.release(i)
    else:
        shared.queries.release(i)
        dq = warpgroup_mma_wait(0, deps=(dq,))
    mbarrier.arrive(shared.ds_ring.empty, count=1)
    mbarrier.wait(shared.dq_ring.empty.index(W), (i & 1) ^ 1)
    shared.dq.index(W).store(folded(dq))
    fence_async_shared()
    mbarrier.arrive(shared.dq_ring.full.index(W), count=1)
    if EARLY:
        s = warpgroup_mma_wait(0, deps=(s,))
    return dk, dv, s


@gluon.jit
def consumer(
    W: gl.constexpr, dk_out, dv_out, broke, shared, rows, biases, block, skipped, lists, given, mask, score, dropout, sizes, tile,
    EARLY: gl.constexpr, HELD: gl.constexpr, READ: gl.constexpr,
):  # fmt: skip
    """64 keys: sums dk and dv over the query tiles, full ones first, and writes them over its keys and values."""
    route = route_of(block, skipped, lists, mask, sizes, tile)
    DTYPE: gl.constexpr = shared.k.dtype
    dk = gl.zeros((64, tile.d), gl.float32, gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, tile.d, 16]))
    dv = gl.zeros((64, tile.dv), gl.float32, gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, tile.dv, 16]))
    dk, dv = written(dk), written(dv)
    mbarrier.wait(shared.keys_here, 0)
    count = total(route, sizes)
    s = gl.zeros((64, tile.q), gl.float32, gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, tile.q, 16]))
    if EARLY:
        if count > 0:
            shared.queries.wait_full(0)
            s = warpgroup_mma_wait(0, deps=(products(gl.to_tensor(0), W, shared, tile),))
    for part in gl.static_range(2):
        for member in range(sizes.group):
            low, high = steps_of(route, member, sizes, part == 0)
            h = route.kv_h * sizes.group + member
            for i in range(low, high):
                dk, dv, s = step(
                    dk, dv, s, i, i - low, count, h, W, shared, rows, biases, route, lists, given, mask, score, dropout, sizes, tile,
                    EARLY, HELD, READ, part == 1,
                )  # fmt: skip
    if nans(dk) + nans(dv) > 0:
        gl.store(broke + route.b * (sizes.heads // sizes.group) + route.kv_h, 1)
    # The other consumer reads all of K for dq until its last product is done.
    mbarrier.wait(shared.ds_ring.empty, (total(route, sizes) & 1) ^ 1)
    shared.k.index(0).reshape([tile.kv, tile.d]).slice(W * 64, 64).store((dk * score.scale).to(DTYPE))
    if dropout is not None:
        dv = dv * dropout.factor
    shared.v.index(0).reshape([tile.kv, tile.dv]).slice(W * 64, 64).store(dv.to(DTYPE))
    fence_async_shared()
    to = [route.b, route.kv_h, route.kv_tile * tile.kv + W * 64, 0]
    tma_store(dk_out, to, shared.k.index(0).slice(W * 64, 64, dim=2))
    tma_store(dv_out, to, shared.v.index(0).slice(W * 64, 64, dim=2))
    wait_reads(0)


@gluon.jit
def nans(x):
    """More than 0 where a 2-D tile holds a NaN."""
    return gl.max(gl.max((x != x).to(gl.int32), 1), 0)


@gluon.jit
def _attention_bwd_hopper_kernel(
    q, k, v, dout, dq, dk, dv, lse, minus, starts, ends, bias, dbias, skipped, broke, lists, turns, ticket, given, mask, score, dropout, sizes, tile,
    STAGES: gl.constexpr, CONSUMER: gl.constexpr, EARLY: gl.constexpr, HELD: gl.constexpr, READ: gl.constexpr,
):  # fmt: skip
    """One CTA per key tile and key head, key tiles of a head after each other.

    dq: float32 sums in panels, see ``PANEL``, box that of ``folded``; lse and minus: log2 of the rows' sums and -delta,
    float32 [batch, heads, q_len rounded up], box [1, 1, tile.q]; skipped, broke: int32 [batch, key heads], heads that others do, and
    heads whose dk or dv has a NaN; turns: int32 zeros [batch, heads, query tiles] where dq is summed in order, with an int32 zero
    ``ticket``; starts, ends: int32 [batch|1, q_len rounded up], box [1, tile.q], where tensors give the rows' intervals; bias, dbias: one
    modification and its gradient, box [1, 1, tile.q, tile.kv], see ``Given``; CONSUMER: registers of a thread of the second consumer; READ: whether
    a bias does not arrive so, but is read per score.
    """
    shared = Shared(
        gl.allocate_shared_memory(k.dtype, [1, 1, 1, tile.kv, tile.d], k.layout),
        gl.allocate_shared_memory(k.dtype, [1, 1, 1, tile.kv, tile.dv], v.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, tile.q, tile.d], q.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, tile.q, tile.dv], dout.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, tile.q], lse.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, tile.q], minus.layout),
        gl.allocate_shared_memory(k.dtype, [1, tile.kv, tile.q], gl.NVMMASharedLayout.get_default_for([tile.kv, tile.q], k.dtype)),
        room(dq, 2),
        bell(1),
        ring(STAGES, 1, 2 if dbias is None else 3),
        Ring(bell(2), bell(2), 1),
        ring(2, 1, 1),
    )
    rows = ()
    if starts is not None:
        rows = (  # type: ignore[assignment]
            gl.allocate_shared_memory(gl.int32, [STAGES, 1, tile.q], starts.layout),
            gl.allocate_shared_memory(gl.int32, [STAGES, 1, tile.q], ends.layout),
        )
    biases = ()
    if bias is not None:
        biases = (gl.allocate_shared_memory(bias.dtype, [STAGES, 1, 1, tile.q, tile.kv], bias.layout),)  # type: ignore[assignment]
    fence_async_shared()
    block = gl.program_id(0)
    if ticket is not None:
        # CTAs are numbered as they start: whoever waits, waits for CTAs that run already.
        block = gl.atomic_add(ticket, 1)
    # Each role finds the route by itself: numbers handed over lie in shared memory, where some of them would be read beyond their end.
    gl.warp_specialize([
        (consumer, (0, dk, dv, broke, shared, rows, biases, block, skipped, lists, given, mask, score, dropout, sizes, tile, EARLY, HELD, READ)),
        (consumer, (1, dk, dv, broke, shared, rows, biases, block, skipped, lists, given, mask, score, dropout, sizes, tile, EARLY, HELD, READ)),
        (producer, (k, v, q, dout, lse, minus, starts, ends, bias, shared, rows, biases, block, skipped, lists, mask, sizes, tile)),
        (reducer, (dq, dbias, turns, shared, biases, block, skipped, lists, mask, sizes, tile)),
    ], [4, 1, 1], [CONSUMER, 24, 24])  # fmt: skip
