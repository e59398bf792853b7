"""Probabilities and scores of whole rows on Hopper: products by warpgroups, and tiles that leave while the next ones are computed.

The pass writes q_len * kv_len numbers: 64 x 64 of 16 bits take a processor 560 clocks of the memory's time, in which it can issue 2200 warp
instructions. So every key tile is computed, reached or not, with the arithmetic of the plain kernels, whose functions these are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..masks import query_shift, row_intervals
from ..primitives import pointers
from ..score_tile import probabilities, row_statistics
from .compat import tma_store, wait_reads
from .forward_kernel import accumulator
from .keep import kept_place, load_words
from .modifications import whole_scores
from .order import Order
from .stream import flat, room, stream


@gluon.jit
def within(s, place, count, OTHER: gl.constexpr):
    """s where 0 <= place < count, else OTHER; in PTX as ``online.cut``."""
    asm: gl.constexpr = "{.reg .pred in; setp.lt.u32 in, $2, $3; selp.f32 $0, $1, $4, in;}"
    return gl.inline_asm_elementwise(asm, "=f,f,r,r,f", [s, place, count, OTHER], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def allowed_place(i, row, place_of, mask, choice, sizes, BN: gl.constexpr):
    """Each key's place in its row's interval, int32 [64, BN]: at least ``count`` as an unsigned number where a query may not attend."""
    b, h, _, start, _ = row
    cols = i * BN + gl.arange(0, BN, gl.SliceLayout(0, accumulator(BN)))
    place = cols[None, :] - start[:, None]
    if mask.dense:
        words = load_words(mask.keep, b, h, place_of[2], choice.row_count, i * BN, sizes.kv_len, 1, BN, choice.rows)
        place = kept_place(place, words, BN)
    return place


@gluon.jit
def coalesced(x, out, place_of, kv_first, choice, sizes):
    """Writes x [64, columns] to a matrix of any row length: each warp along one of its 16 rows after the other."""
    b, h, first = place_of
    layout: gl.constexpr = gl.BlockedLayout([16, 1], [1, 32], [4, 1], [1, 0])
    rows = first + gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    cols = kv_first + gl.arange(0, x.shape[1], gl.SliceLayout(0, layout))[None, :]
    inside = (rows < choice.row_count) & (cols < sizes.kv_len)
    gl.store(pointers(out, b, h, rows, cols), gl.convert_layout(x.to(out.ptr.dtype.element_ty), layout), mask=inside)


@gluon.jit
def leave(x, C: gl.constexpr, output, place_of, i, choice, sizes):
    """Key tile i of an output (descriptor, shared memory, matrix), by TMA where it has a descriptor; ``wait_reads`` came before."""
    descriptor, tiles, out = output
    if descriptor is not None:
        tile = tiles.index(C)
        flat(tile).store(x.to(descriptor.dtype))
        fence_async_shared()
        tma_store(descriptor, [place_of[0], place_of[1], place_of[2], i * x.shape[1]], tile)
    else:
        coalesced(x, out, place_of, i * x.shape[1], choice, sizes)


@gluon.jit
def place_in(index, order, choice):
    """(batch, head of the outputs, head of the call, query tile) of a piece of work."""
    bh, tile = order.place(index)
    b, place = bh // choice.head_count, bh % choice.head_count
    h = place
    if choice.heads is not None:
        h = gl.load(choice.heads + place)
    return b, place, h, tile


@gluon.jit
def producer(Q, K, queries, keys, order, choice, sizes, NC: gl.constexpr, BN: gl.constexpr):
    """Loads Q of one query tile after the other, and all keys for each."""
    turn = 0
    n = 0
    while order.index(turn) < order.total():
        b, place, h, tile = place_in(order.index(turn), order, choice)
        for c in gl.static_range(NC):
            queries.load(Q, [b, place, (tile * NC + c) * 64, 0], turn * NC + c)
        for i in range((sizes.kv_len + BN - 1) // BN):
            keys.load(K, [b, h // sizes.group, i * BN, 0], n)
            n += 1
        turn += 1


@gluon.jit
def key_tile(i, n, C: gl.constexpr, carry, q, keys, row, place_of, statistics, outputs, mask, score, choice, sizes, BN: gl.constexpr):
    """Computes and gives out key tile i, the CTA's n-th; carry = (top, broken, entropy) of the rows, [64] each."""
    top, broken, entropy = carry
    probs, given, top_out, entropy_out = outputs
    b, h, rows, start, end = row
    keys.ring.wait_full(n)
    s = warpgroup_mma(q, keys.tile(n).permute((1, 0)), gl.zeros((64, BN), gl.float32, accumulator(BN)), use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    keys.ring.release(n)
    cols = i * BN + gl.arange(0, BN, gl.SliceLayout(0, accumulator(BN)))
    inside = (rows < sizes.q_len)[:, None] & (cols < sizes.kv_len)[None, :]
    s = whole_scores(s, score, (b, h, rows[:, None], (rows + query_shift(mask, b))[:, None], cols[None, :], inside))
    place = allowed_place(i, row, place_of, mask, choice, sizes, BN)
    count = gl.maximum(end - start, 0)[:, None]
    s = within(s, place, count, float("-inf"))
    # Selected, not multiplied: in a row that attended to a NaN even exp(-inf) / sum is one.
    p = within(probabilities(s, statistics[0], statistics[1], score), place, count, 0.0)
    unit = score.scale if score.raw else 1.0
    wait_reads(0)
    if probs[2] is not None:
        leave(p, C, probs, place_of, i, choice, sizes)
    if given[2] is not None:
        leave(s * unit, C, given, place_of, i, choice, sizes)
    if top_out is not None:
        # The maximum loses NaN.
        broken = gl.maximum(broken, gl.max((s != s).to(gl.int32), 1))
        top = gl.maximum(top, gl.max(s, 1))
    if entropy_out is not None:
        entropy -= gl.sum(gl.where(p > 0.0, p * gl.log(gl.where(p > 0.0, p, 1.0)), p), 1)
    return top, broken, entropy


@gluon.jit
def consumer(C: gl.constexpr, outputs, queries, keys, order, stats, mask, score, choice, sizes, NC: gl.constexpr, BN: gl.constexpr):
    """Computes the C-th 64 rows of one query tile after the other."""
    layout: gl.constexpr = gl.SliceLayout(1, accumulator(BN))
    turn = 0
    n = 0
    while order.index(turn) < order.total():
        b, place, h, tile = place_in(order.index(turn), order, choice)
        first = (tile * NC + C) * 64
        rows = first + gl.arange(0, 64, layout)
        if choice.rows is not None:
            rows = gl.load(choice.rows + rows, mask=rows < choice.row_count, other=sizes.q_len)
        inside = rows < sizes.q_len
        start, end = row_intervals(mask, b, rows, sizes)
        row = (b, h, rows, start, end)
        statistics = row_statistics(stats, b, h, rows, inside, score)
        carry = (gl.full((64,), float("-inf"), gl.float32, layout), gl.zeros((64,), gl.int32, layout), gl.zeros((64,), gl.float32, layout))
        queries.ring.wait_full(turn * NC + C)
        q = flat(queries.tiles.index(C))
        for i in range((sizes.kv_len + BN - 1) // BN):
            carry = key_tile(i, n, C, carry, q, keys, row, (b, place, first), statistics, outputs, mask, score, choice, sizes, BN)
            n += 1
        queries.ring.release(turn * NC + C)
        top, broken, entropy = carry
        unit = score.scale if score.raw else 1.0
        if outputs[2] is not None:
            top = gl.where(broken > 0, float("nan"), top * unit)
            gl.store(pointers(outputs[2], b, h, rows, rows * 0), top, mask=inside)
        if outputs[3] is not None:
            gl.store(pointers(outputs[3], b, h, rows, rows * 0), entropy, mask=inside)
        turn += 1
    wait_reads(0)


@gluon.jit
def rows_kernel(
    Q, K, P, S, stats, probs, given, top_out, entropy_out, work, mask, score, choice, sizes,
    NC: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Q, K are descriptors with boxes of 64 and BN rows, P and S of the outputs' [64, BN] tiles or None where their rows are not TMA's.

    probs, given (scores), top_out and entropy_out ([batch, heads, q_len, 1]) are matrices, absent ones None. Q and the outputs are those of
    the choice (``rows.Choice``), everything else is the call's; work counts the choice's heads of all batches.
    """
    queries, keys = stream(Q, NC, 1), stream(K, STAGES, NC)
    P_tiles, S_tiles = None, None
    if P is not None:
        P_tiles = room(P, NC)
    if S is not None:
        S_tiles = room(S, NC)
    fence_async_shared()
    tiles = (choice.row_count + 64 * NC - 1) // (64 * NC)
    order = Order(gl.to_tensor(work), gl.to_tensor(tiles), gl.to_tensor(gl.minimum(sizes.group, choice.head_count)))
    outputs = ((P, P_tiles, probs), (S, S_tiles, given), top_out, entropy_out)
    gl.warp_specialize([
        (consumer, (0, outputs, queries, keys, order, stats, mask, score, choice, sizes, NC, BN)),
        (consumer, (1, outputs, queries, keys, order, stats, mask, score, choice, sizes, NC, BN)),
        (producer, (Q, K, queries, keys, order, choice, sizes, NC, BN)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
