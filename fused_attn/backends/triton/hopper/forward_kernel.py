"""Attention forward on Hopper: persistent CTAs of NC consumers (64 query rows each) and one producer warp.

A consumer's key loop has three parts, [mixed][full][mixed], which follow from the interval of keys that each row may attend to.
Within a trip the softmax of tile n runs beside the product P V of tile n - 1.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..masks import row_intervals
from .bounds import block_bounds, listed_tiles, tile_reach
from .compat import aggregate, wait_reads
from .online import BOTH_ENDS, END_ONLY, NOTHING, bounded_base, dropped, online, tile_scores
from .order import Order, queue
from .registers import written
from .store import store, store_part
from .stream import Stream, matrix_shape, packed_heads, room, stream


@aggregate
class Shared:
    """Shared memory of one CTA. q and out may be one and the same: then Q of the next query tile waits until O has left.

    ``bias`` has a tile per consumer and key tile, for modification number BIAS; where that is -1, it is some other stream.
    """

    q: Stream
    k: Stream
    v: Stream
    bias: Stream
    out: gl.shared_memory_descriptor
    BIAS: gl.constexpr
    consumers: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, q, k, v, bias, out, BIAS, consumers):
        self.q, self.k, self.v, self.bias, self.out = q, k, v, bias, out
        self.BIAS, self.consumers = gl.constexpr(BIAS), gl.constexpr(consumers)


@gluon.constexpr_function
def accumulator(columns: int) -> gl.NVMMADistributedLayout:
    """How 4 warps hold [64, columns] of a product."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def left_operand(columns: int) -> gl.DotOperandLayout:
    """How they hold the 16-bit left factor of such a product."""
    return gl.DotOperandLayout(operand_index=0, parent=accumulator(columns), k_width=2)


@gluon.jit
def producer(Q, K, V, bias, shared, work, splits, bounds, mask, sizes, NC: gl.constexpr, BN: gl.constexpr):
    """Loads Q of one query tile after the other, and the keys and values that it reaches."""
    PACK: gl.constexpr = packed_heads(shared.q.tiles.shape)
    order, queue = work
    index = gl.program_id(0)
    turn = 0
    n = 0  # key tiles
    while index < order.total():
        bh, tile = order.place(index)
        part, number = None, 0
        if splits is not None:
            number = bh % splits
            part = (number, splits)
            bh = bh // splits
        b, h = bh // (sizes.heads // PACK), bh % (sizes.heads // PACK)
        queue.tell(turn, (b, h, tile, number))
        for c in gl.static_range(NC):
            if PACK > 1:
                shared.q.load(Q, [b, h, (tile * NC + c) * 64 // PACK, 0, 0], turn * NC + c)
            else:
                shared.q.load(Q, [b, h, (tile * NC + c) * 64, 0], turn * NC + c)
        if mask.dense:
            listed, _, last = listed_tiles(bounds, b, h, tile, part)
            first = last * 0
        else:
            first, last = tile_reach(bounds, mask, b, tile, part, sizes, NC, PACK, BN)
        for j in range(first, last):
            i = gl.load(listed + j) if mask.dense else j
            shared.k.load(K, [b, h * PACK // sizes.group, i * BN, 0], n)
            if shared.BIAS >= 0:
                # A batch or head of its own, or one for all.
                place = (gl.minimum(b, bias.shape[0] - 1), gl.minimum(h, bias.shape[1] - 1))
                for c in gl.static_range(NC):
                    shared.bias.load(bias, [place[0], place[1], (tile * NC + c) * 64, i * BN], n * NC + c)
            shared.v.load(V, [b, h * PACK // sizes.group, i * BN, 0], n)
            n += 1
        # The loads are two tiles ahead of the products by now: nobody waits for the counter.
        index = queue.draw()
        turn += 1
    queue.tell(turn, (0, 0, -1, 0))


@gluon.jit
def step(i, n, carry, q, shared, row, mask, score, dropout, sizes, MASK: gl.constexpr, BOUNDED: gl.constexpr, BN: gl.constexpr):
    """Key tile i, the n-th of this CTA: S = Q K^T, O += P V of the tile before, softmax of this one. carry = (o, p, hi, l)."""
    o, p, hi, l = carry
    VD: gl.constexpr = o.shape[1]
    shared.k.ring.wait_full(n)
    s = warpgroup_mma(q, shared.k.tile(n).permute((1, 0)), gl.zeros((64, BN), gl.float32, accumulator(BN)), use_acc=False, is_async=True)
    shared.v.ring.wait_full(n - 1)
    o = warpgroup_mma(p, shared.v.tile(n - 1), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    shared.k.ring.release(n)
    s = tile_scores(s, i, n, row, shared, mask, score, sizes, MASK, BN)
    wide, hi, l, alpha = online(s, hi, l, score, MASK != NOTHING or len(score.functions) > 0, BOUNDED)
    narrow = gl.convert_layout(dropped(wide, i, row, shared, dropout, sizes, BN).to(shared.v.tiles.dtype), left_operand(VD))
    # P, l and alpha are tied to the wait, so that the compiler may not move their arithmetic behind it.
    if BOUNDED:
        o, narrow, l = warpgroup_mma_wait(0, deps=(o, narrow, l))
    else:
        o, narrow, l, alpha = warpgroup_mma_wait(0, deps=(o, narrow, l, alpha))
    shared.v.ring.release(n - 1)
    if not BOUNDED:
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, accumulator(VD)))[:, None]
    return o, narrow, hi, l


@gluon.jit
def skip(n, count, shared, C: gl.constexpr):
    """Gives back key tiles that other consumers of the CTA need and this one does not."""
    for j in range(n, n + count):
        shared.k.pass_over(j)
        if shared.BIAS >= 0:
            shared.bias.pass_over(j * shared.consumers + C)
        shared.v.pass_over(j)


@gluon.jit
def begin(
    i,
    n,
    carry,
    q,
    shared,
    row,
    mask,
    score,
    dropout,
    sizes,
    MASK: gl.constexpr,
    SOME: gl.constexpr,
    BOUNDED: gl.constexpr,
    BN: gl.constexpr,
):
    """The first key tile of a block, or of the rest where there were SOME: its softmax alone. carry = (o, hi, l); ``step`` says what comes out."""
    o, hi, l = carry
    shared.k.ring.wait_full(n)
    s = warpgroup_mma(q, shared.k.tile(n).permute((1, 0)), gl.zeros((64, BN), gl.float32, accumulator(BN)), use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    shared.k.ring.release(n)
    s = tile_scores(s, i, n, row, shared, mask, score, sizes, MASK, BN)
    wide, hi, l, alpha = online(s, hi, l, score, True, BOUNDED)
    p = gl.convert_layout(dropped(wide, i, row, shared, dropout, sizes, BN).to(shared.v.tiles.dtype), left_operand(o.shape[1]))
    if SOME and not BOUNDED:
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, accumulator(o.shape[1])))[:, None]
    return written(o), p, hi, l


@gluon.jit
def finish(n, o, p, shared):
    """O with the product of the CTA's n-th key tile, a block's last."""
    shared.v.ring.wait_full(n)
    o = warpgroup_mma(p, shared.v.tile(n), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=(o,))
    shared.v.ring.release(n)
    return o


@gluon.jit
def attend(n, reach, carry, q, shared, row, mask, score, dropout, sizes, ENDS: gl.constexpr, BOUNDED: gl.constexpr, BN: gl.constexpr):
    """Key tiles (first, split, resume, last), of which the first is the CTA's n-th: O before division, bases and sums. carry = (o, hi, l)."""
    first, split, resume, last = reach
    shift = n - first  # from a key tile's place to its number in this CTA
    APART: gl.constexpr = ENDS == BOTH_ENDS and carry[0].shape[1] > 128
    if APART:
        # One tile after the other: in a third loop that keeps P from trip to trip every full trip has 16 moves (1680 warp instructions per tile, 1612 so).
        rest = gl.maximum(gl.minimum(split, last - 1), first)
        o, hi, l = carry
        for i in range(first, rest):
            o, p, hi, l = begin(i, i + shift, (o, hi, l), q, shared, row, mask, score, dropout, sizes, ENDS, True, BOUNDED, BN)
            o = finish(i + shift, o, p, shared)
        first = rest
        carry = (o, hi, l)
    # The first tile is masked whether it needs it or not: that is cheaper than one more copy of its code.
    o, p, hi, l = begin(first, first + shift, carry, q, shared, row, mask, score, dropout, sizes, ENDS, APART, BOUNDED, BN)
    if ENDS == BOTH_ENDS and not APART:
        for i in range(first + 1, split):
            o, p, hi, l = step(i, i + shift, (o, p, hi, l), q, shared, row, mask, score, dropout, sizes, BOTH_ENDS, BOUNDED, BN)
    for i in range(gl.maximum(split, first + 1), resume):
        o, p, hi, l = step(i, i + shift, (o, p, hi, l), q, shared, row, mask, score, dropout, sizes, NOTHING, BOUNDED, BN)
    for i in range(gl.maximum(resume, first + 1), last):
        o, p, hi, l = step(i, i + shift, (o, p, hi, l), q, shared, row, mask, score, dropout, sizes, END_ONLY, BOUNDED, BN)
    return finish(last + shift - 1, o, p, shared), hi, l


@gluon.jit
def attend_listed(
    n, tiles, carry, q, shared, row, mask, score, dropout, sizes, ENDS: gl.constexpr, BOUNDED: gl.constexpr, BN: gl.constexpr
):
    """``attend`` for the key tiles of a list: its mixed ones, of which any pair may be masked, then its full ones."""
    listed, mixed, count = tiles
    o, p, hi, l = begin(gl.load(listed), n, carry, q, shared, row, mask, score, dropout, sizes, ENDS, False, BOUNDED, BN)
    for j in range(1, mixed):
        i = gl.load(listed + j)
        o, p, hi, l = step(i, n + j, (o, p, hi, l), q, shared, row, mask, score, dropout, sizes, ENDS, BOUNDED, BN)
    for j in range(gl.maximum(mixed, 1), count):
        i = gl.load(listed + j)
        o, p, hi, l = step(i, n + j, (o, p, hi, l), q, shared, row, mask, score, dropout, sizes, NOTHING, BOUNDED, BN)
    return finish(n + count - 1, o, p, shared), hi, l


@gluon.jit
def consumer(
    C: gl.constexpr, O, outputs, shared, work, splits, bounds, mask, score, dropout, sizes,
    NC: gl.constexpr, BN: gl.constexpr, ENDS: gl.constexpr, BOUNDED: gl.constexpr, OWN_OUT: gl.constexpr,
):  # fmt: skip
    """Computes the C-th block of one query tile after the other."""
    VD: gl.constexpr = matrix_shape(O.block_shape)[1]
    PACK: gl.constexpr = packed_heads(shared.q.tiles.shape)
    RS: gl.constexpr = gl.SliceLayout(1, accumulator(BN))
    order, queue = work
    turn = 0
    n = 0
    b, h, tile, number = queue.hear(0)
    while tile >= 0:
        part = None
        if splits is not None:
            part = (number, splits)
        block = tile * NC + C
        rows = (block * 64 + gl.arange(0, 64, RS)) // PACK
        start, end = row_intervals(mask, b, rows, sizes)
        row = (b, h * PACK, rows, start, end, block * 64, C)
        o = gl.zeros((64, VD), gl.float32, accumulator(VD))
        hi = gl.full((64,), float("-inf"), gl.float32, RS)
        l = gl.zeros((64,), gl.float32, RS)
        shared.q.ring.wait_full(turn * NC + C)
        q = shared.q.tile(turn * NC + C)
        if mask.dense:
            listed, mixed, count = listed_tiles(bounds, b, h, tile, part)
            if count > 0:
                o, hi, l = attend_listed(
                    n, (listed, mixed, count), (o, hi, l), q, shared, row, mask, score, dropout, sizes, ENDS, BOUNDED, BN
                )
            n += count
        else:
            any_first, any_last = tile_reach(bounds, mask, b, tile, part, sizes, NC, PACK, BN)
            first, split, resume, last = block_bounds(bounds, mask, b, block, part, sizes, PACK, BN)
            first = gl.minimum(first, any_last)
            last = gl.maximum(last, first)
            skip(n, first - any_first, shared, C)
            n += first - any_first
            if first < last:
                reach = (first, split, resume, last)
                o, hi, l = attend(n, reach, (o, hi, l), q, shared, row, mask, score, dropout, sizes, ENDS, BOUNDED, BN)
            n += last - first
            skip(n, any_last - last, shared, C)
            n += any_last - last
        if BOUNDED:
            hi = bounded_base(l, score)
        if OWN_OUT:
            shared.q.ring.release(turn * NC + C)
        total = order.heads.to(gl.int64) * PACK * sizes.q_len
        if splits is not None:
            # As many rows as all parts have together; part by part.
            store_part(o, hi, l, outputs, number * (total // splits), total, row, O, sizes, PACK)
        else:
            store(C, o, hi, l, O, outputs, shared, total, row, mask, score, dropout, sizes, BOUNDED, OWN_OUT)
            if not OWN_OUT:
                wait_reads(0)
        if not OWN_OUT:
            shared.q.ring.release(turn * NC + C)
        turn += 1
        b, h, tile, number = queue.hear(turn)
    wait_reads(0)


@gluon.jit
def forward_kernel(
    Q, K, V, O, bias, lse, stats, sinks, redo, counter, bounds, heads, together, splits, mask, score, dropout, sizes,
    NC: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, ENDS: gl.constexpr,
    BOUNDED: gl.constexpr, AHEAD: gl.constexpr, OWN_OUT: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Q, K, V, O are descriptors of [batch, heads, rows, dim], boxes of 64 (Q, O) or BN rows; heads counts those of all batches.

    Where q_len is small, the heads of a group are packed into rows: Q and O are then [batch, key heads, queries, group, dim].
    With ``splits`` parts of the keys each is a head of its own, lse takes bases and sums, stats the float32 accumulators; see ``split``.
    ``counter``, an int32 zero, hands out query tiles. ENDS is what the mask may cut of a tile; ``bias`` a descriptor of modification number BIAS in boxes of 64 x BN, or None where that is -1.
    """
    queries = stream(Q, NC * AHEAD, 1)
    if OWN_OUT:
        out = room(O, NC)
    else:
        out = queries.tiles
    keys = stream(K, STAGES, NC)
    if BIAS >= 0:
        biases = stream(bias, STAGES * NC, 1)
    else:
        biases = keys
    shared = Shared(queries, keys, stream(V, STAGES, NC), biases, out, BIAS, NC)
    fence_async_shared()
    tiles = (sizes.q_len * packed_heads(queries.tiles.shape) + 64 * NC - 1) // (64 * NC)
    work = (Order(gl.to_tensor(heads), gl.to_tensor(tiles), gl.to_tensor(together)), queue(counter, NC))
    outputs = (lse, stats, sinks, redo)
    if NC == 2:
        gl.warp_specialize([
            (consumer, (0, O, outputs, shared, work, splits, bounds, mask, score, dropout, sizes, NC, BN, ENDS, BOUNDED, OWN_OUT)),
            (consumer, (1, O, outputs, shared, work, splits, bounds, mask, score, dropout, sizes, NC, BN, ENDS, BOUNDED, OWN_OUT)),
            (producer, (Q, K, V, bias, shared, work, splits, bounds, mask, sizes, NC, BN)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer, (0, O, outputs, shared, work, splits, bounds, mask, score, dropout, sizes, NC, BN, ENDS, BOUNDED, OWN_OUT)),
            (consumer, (1, O, outputs, shared, work, splits, bounds, mask, score, dropout, sizes, NC, BN, ENDS, BOUNDED, OWN_OUT)),
            (consumer, (2, O, outputs, shared, work, splits, bounds, mask, score, dropout, sizes, NC, BN, ENDS, BOUNDED, OWN_OUT)),
            (producer, (Q, K, V, bias, shared, work, splits, bounds, mask, sizes, NC, BN)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
