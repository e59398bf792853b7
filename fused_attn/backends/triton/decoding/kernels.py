"""Split-key decoding (Flash-Decoding, Dao et al. 2023) over pages of keys (PagedAttention, arXiv 2309.06180).

The query rows of a key head's whole group are one tile: row r is query head ``kv_head * group + r // q_len``, query ``r % q_len``. A program
walks over one part of the keys that any of its rows reaches, and leaves each row's maximum, sum and accumulated values; a second kernel
adds the parts up in their order. What ``primitives``, ``masks`` and ``score_mods`` take as scalars (heads, pages) are vectors here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_attn.backends.triton.masks import allowed, query_shift, reach, row_intervals
from fused_attn.backends.triton.primitives import LOG2E, any_true, cleaned, count_broken, dot, load_rows, pointers
from fused_attn.backends.triton.score_mods import apply
from fused_attn.backends.triton.score_tile import base_of, excess, exponentials, product, sigmoid


@triton.jit
def _places(pages, b, kv_idx, ok):
    """Page and row within it of keys [tile.kv], and which of them have a page. Without a table a batch is a page."""
    if pages.table is None:
        return b, kv_idx, ok
    else:
        number = kv_idx // pages.size
        entry = pages.table + b.to(tl.int64) * pages.batch + number.to(tl.int64) * pages.col
        # An entry that none of the keys needs is not read, and one that names no page is not followed.
        page = tl.load(entry, mask=ok, other=0).to(tl.int64)
        return page, kv_idx - number * pages.size, ok & (page >= 0) & (page < pages.count)


@triton.jit
def _tile_scores(first, q_rows, q_source, k, pages, near, interval, place, mask, score, tile):
    """Scores [tile.q, tile.kv] of the keys from ``first`` on, -inf where a row may not attend; where it may; the keys as ``_places`` has them."""
    b, h, q_idx, shift, kv_h, live = place[0], place[1], place[2], place[3], place[4], place[5]
    kv_idx = first + tl.arange(0, tile.kv)
    # Keys beyond the rows' reach are never read, so garbage in padding cannot get in.
    kv_ok = (kv_idx >= near[0]) & (kv_idx < near[1])
    page, row, found = _places(pages, b, kv_idx, kv_ok)
    of_rows = page
    if pages.table is not None:
        of_rows = page[:, None]
    k_tile = load_rows(k, of_rows, kv_h, row, found, tile.head_dim, tile.d)
    if score.by_columns:
        scores = product(q_rows, k_tile, q_source, (k, page, kv_h, row, found, None), score, tile)
    else:
        scores = product(q_rows, k_tile, q_source, (k, of_rows, kv_h, row, found, None), score, tile)
    inside = live[:, None] & kv_ok[None, :]
    at = (b, h, q_idx[:, None], (q_idx + shift)[:, None], kv_idx[None, :], inside)
    scores = apply(scores, score, at, len(score.functions))
    ok = inside & allowed(mask, b, h, q_idx[:, None], kv_idx[None, :], interval[0][:, None], interval[1][:, None], 1)
    if pages.table is not None:
        # What has no page shows where it is attended to.
        scores = tl.where(found[None, :], scores, float("nan"))
    return tl.where(ok, scores, float("-inf")), ok, of_rows, row, found


@triton.jit
def _mended(acc, m, begin, finish, q_rows, q_source, k, v, pages, near, interval, place, mask, score, small):
    """acc once more, exactly, from what each row attends to: 0 * NaN is NaN in a product of whole tiles (see ``mending``).

    An infinity whose weight is 0 is NaN, infinities of one sign are themselves.
    """
    bases = base_of(m, score)
    over = excess(tl.where(m == float("-inf"), 0.0, m), bases)
    clean = tl.zeros_like(acc)
    for first in tl.range(begin, finish, small.kv, num_stages=1, disable_licm=True):
        scores, ok, of_rows, row, found = _tile_scores(first, q_rows, q_source, k, pages, near, interval, place, mask, score, small)
        if score.sigmoid is None:
            p = exponentials(scores, bases)
            if q_rows.dtype == tl.float16:
                p = p * tl.exp2(over * -1.0)[:, None]
        else:
            p = sigmoid(scores, score)
        v_tile = load_rows(v, of_rows, place[4], row, found, small.value_dim, small.dv)
        clean = dot(p.to(v_tile.dtype), cleaned(v_tile), clean, score.precision)
        hits = count_broken(tl.where(ok, 1.0, 0.0), v_tile, tl.zeros_like(acc))
        values = v_tile.to(tl.float32)
        sign = tl.where(values == float("inf"), 1.0, tl.where(values == float("-inf"), -1.0, 0.0))
        signs = dot(tl.where(ok & (p > 0.0), 1.0, 0.0).to(tl.bfloat16), sign.to(tl.bfloat16), tl.zeros_like(acc), "ieee")
        reached = tl.where(tl.abs(signs) == hits, signs * float("inf"), float("nan"))
        clean = tl.where(hits == 0.0, clean, clean + reached)
    return tl.where(acc != acc, clean, acc)


@triton.jit
def _split_kernel(q, k, v, sums, outs, splits, total, pages, small, mask, score, sizes, tile, PACKED: tl.constexpr):
    """One program per block of packed rows, part of the keys, batch and key head (query head where heads are not PACKED).

    k and v are matrices [pages, kv_heads, page_size, dim]. sums [2, splits, total] gets each row's maximum, in the unit of the product, and
    its sum of exponentials, 0 without keys; outs [splits, total, value_dim] what it added up, nothing in rows without keys.
    ``total`` is batch * heads * q_len.
    """
    group = 1
    if PACKED:
        group = sizes.group
    holders, count = sizes.heads // group, sizes.q_len * group
    blocks = tl.cdiv(count, tile.q)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    part, bh = rest % splits, rest // splits
    b, holder = bh // holders, bh % holders
    r = block * tile.q + tl.arange(0, tile.q)
    live = r < count
    # Rows beyond the last one are queries beyond the last one.
    q_idx = tl.where(live, r % sizes.q_len, sizes.q_len)
    if PACKED:
        kv_h = holder
        # All of them name a head that there is, for slopes are read without a mask.
        head_of = holder * group + tl.where(live, r // sizes.q_len, 0)
        h = head_of[:, None]
    else:
        kv_h = holder // sizes.group
        head_of = holder + r * 0
        h = holder
    start, end = row_intervals(mask, b, q_idx, sizes)
    near = reach(start, end, sizes)
    # An equal share of what these rows reach: a window's parts lie within the window.
    first_tile = near[0] // tile.kv * tile.kv
    per_part = tl.cdiv(tl.cdiv(tl.maximum(near[1] - first_tile, 0), tile.kv), splits) * tile.kv
    begin = first_tile + part * per_part
    finish = tl.minimum(begin + per_part, near[1])
    interval, place = (start, end), (b, h, q_idx, query_shift(mask, b), kv_h, live)
    # None comes last for Triton 3.6, as in ``arguments.MaskArgs``: products in slices loop over their sources.
    q_source = (q, b, h, q_idx, live & (start < end), None)
    q_rows = load_rows(q, b, h, q_idx, q_source[4], tile.head_dim, tile.d)
    acc = tl.zeros([tile.q, tile.dv], tl.float32)
    m = tl.full([tile.q], float("-inf"), tl.float32)
    l = tl.zeros([tile.q], tl.float32)
    for first in tl.range(begin, finish, tile.kv, disable_licm=True):
        scores, ok, of_rows, row, found = _tile_scores(first, q_rows, q_source, k, pages, near, interval, place, mask, score, tile)
        if score.sigmoid is None:
            m_new = tl.maximum(m, tl.max(scores, 1))
            bases = base_of(m_new, score)
            p = exponentials(scores, bases)
            if q_rows.dtype == tl.float16:
                # 2^excess, up to 2^32, has no place in float16.
                over = excess(tl.where(m_new == float("-inf"), 0.0, m_new), bases)
                p = p * tl.exp2(over * -1.0)[:, None]
                alpha = tl.exp2(excess(m, bases) - over)
            else:
                # The rounding of m * factor is that of the earlier tiles' base, whose exponentials they summed.
                alpha = tl.exp2(m * bases[1] - bases[0])
            l = l * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            m = m_new
        else:
            p = sigmoid(scores, score)
            l = tl.maximum(l, tl.max(tl.where(ok & (scores != float("-inf")), 1.0, 0.0), 1))
        v_tile = load_rows(v, of_rows, kv_h, row, found, tile.value_dim, tile.dv)
        acc = dot(p.to(v_tile.dtype), v_tile, acc, score.precision)
    if mask.restricts:
        # It is rare, so look only afterwards, as far as this part goes.
        if any_true((acc != acc) & (live & (l == l))[:, None]):
            until = (near[0], finish)
            acc = _mended(acc, m, begin, finish, q_rows, q_source, k, v, pages, until, interval, place, mask, score, small)
    if score.sigmoid is None:
        if q_rows.dtype != tl.float16:
            top = tl.where(m == float("-inf"), 0.0, m)
            true = tl.exp2(excess(top, base_of(top, score)) * -1.0)
            l = l * true
            acc = acc * true[:, None]
    at_row = (b * sizes.heads + head_of).to(tl.int64) * sizes.q_len + q_idx
    of_part = part.to(tl.int64) * total + at_row
    tl.store(sums + of_part, m, mask=live)
    tl.store(sums + of_part + (part * 0 + splits).to(tl.int64) * total, l, mask=live)
    cols = tl.arange(0, tile.dv)
    written = (live & (l != 0.0))[:, None] & (cols < tile.value_dim)[None, :]
    tl.store(outs + of_part[:, None] * tile.value_dim + cols[None, :], acc, mask=written)


@triton.jit
def _combine_kernel(
    sums, outs, out, lse, stats, sinks, splits, mask, score, sizes, tile, PARTS: tl.constexpr, STRICT: tl.constexpr, WIDE: tl.constexpr
):
    """One program per row of out [batch, heads, q_len, value_dim], a matrix; lse and stats [2 or more, batch, heads, q_len] are contiguous.

    PARTS is a power of two not below ``splits``. STRICT: rows whose keys end beyond those that there are get NaN. WIDE: the output in
    float32 stands behind the two statistics, see ``attention_fwd.wide_output``.
    """
    at, total = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    q_idx, bh = (at % sizes.q_len).to(tl.int32), (at // sizes.q_len).to(tl.int32)
    b, h = bh // sizes.heads, bh % sizes.heads
    number = tl.arange(0, PARTS)
    m_of = tl.load(sums + number * total + at, mask=number < splits, other=float("-inf"))
    l_of = tl.load(sums + (number + splits) * total + at, mask=number < splits, other=0.0)
    highest = tl.max(m_of, 0)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32)
        highest = tl.maximum(highest, sink)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    if score.sigmoid is None:
        # A part without keys adds nothing; a sum that is NaN shows.
        l = tl.sum(tl.where(l_of == 0.0, 0.0, l_of * tl.exp2((m_of - base) * score.factor)), 0)
    else:
        l = tl.max(l_of, 0)
    empty = l == 0.0
    if sinks is not None:
        l = l + tl.exp2((sink - base) * score.factor)
    cols = tl.arange(0, tile.dv)
    acc = tl.zeros([tile.dv], tl.float32)
    for part in range(splits):
        l_part = tl.load(sums + (part + splits) * total + at)
        inside = cols < tl.where(l_part == 0.0, 0, tile.value_dim)
        values = tl.load(outs + (part * total + at) * tile.value_dim + cols, mask=inside, other=0.0)
        if score.sigmoid is None:
            weight = tl.exp2((tl.load(sums + part * total + at) - base) * score.factor)
            values = tl.where(l_part == 0.0, 0.0, values * weight)
        acc += values
    safe = tl.where(l == 0.0, 1.0, l)
    result = tl.where(empty, 0.0, acc / safe)
    row_lse = tl.where(l == 0.0, float("-inf"), base * (score.factor / LOG2E) + tl.log(safe))
    if STRICT:
        beyond = tl.load(pointers(mask.kv_end, b, b * 0, q_idx, q_idx * 0)) > sizes.kv_len
        result = tl.where(beyond, float("nan"), result)
        row_lse = tl.where(beyond, float("nan"), row_lse)
    tl.store(pointers(out, b, h, q_idx, cols), result.to(out.ptr.dtype.element_ty), mask=cols < tile.value_dim)
    tl.store(lse + at, row_lse)
    if stats is not None:
        tl.store(stats + at, highest)
        tl.store(stats + total + at, tl.where(empty, 0.0, l))
        if WIDE:
            tl.store(stats + (cols + 2) * total + at, result, mask=cols < tile.value_dim)
