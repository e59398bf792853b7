"""What a block's rows leave: output, lse, statistics, and a flag where the plain kernel has to do them again."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..primitives import LOG2E
from .compat import tma_store, wait_reads
from .modifications import exponents
from .stream import flat, packed_heads

# The largest base whose rounding (2^-24 of it) leaves exponentials between 2^-2 and 2^2 at a row's maximum.
LIMIT = gl.constexpr(2.0**26)
# The smallest float32 with all its bits is 2^-126: of a sum above this one, 2^20 products that vanished are not a part in 1000.
FLOOR = gl.constexpr(2.0**-96)


@gluon.jit
def with_sink(hi, l, sink, lift):
    """Bases and sums with a key of that score added, and what the accumulator must be multiplied by."""
    new = gl.maximum(hi, gl.fma(sink, LOG2E, lift * -1.0))
    base = gl.where(new == float("-inf"), 0.0, new)
    shrink = gl.exp2(hi - base)
    return new, gl.fma(l, shrink, gl.exp2(gl.fma(sink, LOG2E, base * -1.0) - lift)), shrink


@gluon.jit
def store_statistics(hi, l, empty, lse, stats, at, inside, total, score):
    """lse, and (m, l) in the kernel's unit: m is rounded, and l takes the difference. hi lies ``lift`` below log2 of the largest exponential."""
    _, lift = exponents(score)
    none = l == 0.0
    ln2 = 1.0 / LOG2E
    gl.store(lse + at, gl.where(none, float("-inf"), gl.fma(hi + lift, ln2, gl.log(l))), mask=inside)
    m = (hi + lift) / score.factor
    exact = l * gl.exp2(gl.fma(m, score.factor * -1.0, hi) + lift)
    gl.store(stats + at, gl.where(hi == float("-inf"), float("-inf"), m), mask=inside)
    gl.store(stats + total + at, gl.where(empty, 0.0, exact), mask=inside)


@gluon.jit
def wrong(hi, l, start, end, score):
    """Rows whose base is too large for one rounding, whose sum overflowed, or whose scores were finite and -inf times the factor."""
    bad = ((gl.abs(hi) > LIMIT) & (hi != float("-inf"))) | (hi != hi) | ((l - l) != 0.0)
    if len(score.functions) > 0:
        bad = bad | ((hi == float("-inf")) & (start < end))
    else:
        bad = bad | ((hi == float("-inf")) & (start < end) & (score.factor > 1.0))
    return bad


@gluon.jit
def settled(hi, l, sink, start, end, score, dropout, BOUNDED: gl.constexpr):
    """Bases and sums with a sink, or None; what the accumulator is multiplied by; which rows have no scores, and which to do again."""
    bad = wrong(hi, l, start, end, score)
    empty = l == 0.0
    shrink = 1.0
    if sink is not None:
        hi, l, shrink = with_sink(hi, l, sink, exponents(score)[1])
        bad = bad | ((gl.abs(hi) > LIMIT) & (hi != float("-inf"))) | ((l - l) != 0.0)
        if BOUNDED:
            # Elsewhere a row's largest exponential is 1, and what a sink shrinks to nothing is nothing.
            bad = bad | ((shrink < FLOOR) & ~empty)
    inverse = shrink / gl.where(l == 0.0, 1.0, l)
    if dropout is not None:
        inverse = inverse * dropout.factor
    return hi, l, inverse, empty, bad


@gluon.jit
def strayed(o, result, l, inside, BOUNDED: gl.constexpr, AXIS: gl.constexpr):
    """Which rows to do again for what became of their accumulators o, of which ``result`` is made, where l is the sum without a sink.

    Not a number, or infinite: the row met a value that it may not attend to. BOUNDED exponentials are as far from 1 as 2^72 and 2^-72, and so
    products with finite values overflow as well, and those with small values vanish; ``inside`` tells columns of values from padding.
    """
    bad = gl.sum(result * 0.0, AXIS) != 0.0
    if BOUNDED:
        least = gl.min(gl.where(inside, gl.abs(o), float("inf")), AXIS)
        bad = bad | ((least < FLOOR) & (l > 0.0) & (l < 1.0))
    return bad


@gluon.jit
def store_part(o, hi, l, outputs, first_row, total, row, O, sizes, PACK: gl.constexpr):
    """Accumulator, base and sum of one part of the keys, for ``split.combine_kernel``; outputs = (bases and sums, accumulators, ...)."""
    b, h, _, _, _, first, _ = row
    statistics, accumulators, _, _ = outputs
    RS: gl.constexpr = hi.type.layout
    RO: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    _, query, at = places(b, h, first, sizes, PACK, RS)
    gl.store(statistics + first_row + at, hi, mask=query < sizes.q_len)
    gl.store(statistics + total + first_row + at, l, mask=query < sizes.q_len)
    _, query, at = places(b, h, first, sizes, PACK, RO)
    cols = gl.arange(0, o.shape[1], gl.SliceLayout(0, o.type.layout))
    width = O.shape[4] if PACK > 1 else O.shape[3]
    inside = (query < sizes.q_len)[:, None] & (cols < width)[None, :]
    gl.store(accumulators + (first_row + at)[:, None] * width + cols[None, :], o, mask=inside)


@gluon.jit
def places(b, h, first, sizes, PACK: gl.constexpr, LAYOUT: gl.constexpr):
    """(head, query, index among the rows of all heads) of each of 64 rows from ``first`` on; the head is a number where PACK is 1."""
    r = gl.arange(0, 64, LAYOUT)
    head = h
    if PACK > 1:
        head = h + r % PACK
    query = (first + r) // PACK
    return head, query, (b * sizes.heads + head).to(gl.int64) * sizes.q_len + query


@gluon.jit
def store(
    C: gl.constexpr, o, hi, l, O, outputs, shared, total, row, mask, score, dropout, sizes, BOUNDED: gl.constexpr, OWN_OUT: gl.constexpr
):
    """What 64 rows leave, ``row`` as in ``online``; outputs = (lse, stats, sinks, redo). Q of the next tile arrives meanwhile."""
    RS: gl.constexpr = hi.type.layout
    RO: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    PACK: gl.constexpr = packed_heads(shared.q.tiles.shape)
    b, h, rows, start, end, first, _ = row
    lse, stats, sinks, redo = outputs
    head, _, at = places(b, h, first, sizes, PACK, RS)
    inside = rows < sizes.q_len
    sink = None
    if sinks is not None:
        sink = gl.load(sinks + head).to(gl.float32)
    keys = gl.convert_layout(l, RO)
    hi, l, inverse, empty, bad = settled(hi, l, sink, start, end, score, dropout, BOUNDED)
    # 0 * NaN: an empty row is zeros whatever its values hold.
    result = gl.where(gl.convert_layout(empty, RO)[:, None], 0.0, o * gl.convert_layout(inverse, RO)[:, None])
    cols = gl.arange(0, result.shape[1], gl.SliceLayout(0, o.type.layout))
    width = O.shape[4] if PACK > 1 else O.shape[3]
    if mask.restricts or BOUNDED:
        bad = bad | gl.convert_layout(strayed(o, result, keys, (cols < width)[None, :], BOUNDED, 1), RS)
    gl.store(redo + (b * sizes.heads + head) * ((sizes.q_len + 63) // 64) + rows // 64, rows * 0 + 1, mask=bad & inside)
    store_statistics(hi, l, empty, lse, stats, at, inside, total, score)
    if sinks is not None:
        # float32 beside the 16-bit output: columns of ``stats`` [2 + value_dim, batch, heads, q_len].
        _, query, of_row = places(b, h, first, sizes, PACK, RO)
        wide = stats + (cols.to(gl.int64) + 2)[None, :] * total + of_row[:, None]
        gl.store(wide, result, mask=(query < sizes.q_len)[:, None] & (cols < width)[None, :])
    if OWN_OUT:
        wait_reads(0)
    out = shared.out.index(C)
    flat(out).store(result.to(shared.out.dtype))
    fence_async_shared()
    if PACK > 1:
        tma_store(O, [b, h // PACK, first // PACK, 0, 0], out)
    else:
        tma_store(O, [b, h, first, 0], out)
