"""Which query tiles a tile of keys meets in the backward, and in which order: those without a mask first, then the mixed ones."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fused_attn.backends.triton.masks import mixed_tiles, query_bounds, query_shift

from .compat import aggregate


class Lists(NamedTuple):
    """Query tiles by key tile where more than windows decides, made by ``visits.lists``.

    Args:
        tiles: int32 [batch|1, key heads|1, key tiles, query tiles]: full ones from the front, mixed ones from the back.
        counts: int32 [batch|1, key heads|1, key tiles, 2]: how many of both.
        ranks: int32 like ``tiles``, at [key tile, query tile]: how many key tiles before meet the query tile. Any tensor where
            nobody asks: None is what Triton 3.6 cannot compare the tuple with.
        batch: key tiles from one batch to the next, 0 where all share the lists.
        head: key tiles from one key head to the next, 0 where all share the lists.
        own_rows: 1 where each batch has its own rows' intervals, 0 where all share them.
    """

    tiles: Any
    counts: Any
    ranks: Any
    batch: Any
    head: Any
    own_rows: Any


@aggregate
class Route:
    """The way of one key tile of one key head through the query tiles of the group's heads: first all full tiles, then all mixed ones.

    ``full`` and ``mixed`` tiles per head; the mixed ones lie from ``first`` on, after ``left`` of them from ``resume`` on, the full ones
    from ``split`` on; or all of them in row ``row`` of the lists.
    """

    b: gl.tensor
    kv_h: gl.tensor
    kv_tile: gl.tensor
    full: gl.tensor
    mixed: gl.tensor
    left: gl.tensor
    first: gl.tensor
    split: gl.tensor
    resume: gl.tensor
    row: gl.tensor

    @gluon.constexpr_function
    def __init__(self, b, kv_h, kv_tile, full, mixed, left, first, split, resume, row):
        self.b, self.kv_h, self.kv_tile = b, kv_h, kv_tile
        self.full, self.mixed, self.left = full, mixed, left
        self.first, self.split, self.resume, self.row = first, split, resume, row


@gluon.jit
def route_of(block, skipped, lists, mask, sizes, tile):
    """The route of a CTA; without tiles where ``skipped`` [batch, key heads] says so."""
    kv_tiles, kv_heads = (sizes.kv_len + tile.kv - 1) // tile.kv, sizes.heads // sizes.group
    kv_tile, bh = block % kv_tiles, block // kv_tiles
    b, kv_h = bh // kv_heads, bh % kv_heads
    row = kv_tile
    if lists is None:
        low, split, resume, high = query_bounds(mask, b, kv_tile * tile.kv, sizes, False, tile)
        # Keys beyond the end are zeros, whose probabilities may be anything.
        cut = (kv_tile + 1) * tile.kv > sizes.kv_len
        split, resume = gl.where(cut, high, split), gl.where(cut, high, resume)
        left, right = mixed_tiles(low, split, resume, high, tile.q)
        full, mixed = (resume - split + tile.q - 1) // tile.q, left + right
        first, split, resume = low // tile.q, split // tile.q, resume // tile.q
    else:
        row = b * lists.batch + kv_h * lists.head + kv_tile
        full, mixed = gl.load(lists.counts + row * 2), gl.load(lists.counts + row * 2 + 1)
        left, first, split, resume = full, full, full, full
    wanted = (gl.load(skipped + bh) == 0).to(gl.int32)
    return Route(b, kv_h, kv_tile, full * wanted, mixed * wanted, left, first, split, resume, row)


@gluon.jit
def steps_of(route, member, sizes, FULL: gl.constexpr):
    """The numbers [first, last) of a group member's steps with full or with mixed tiles."""
    if FULL:
        first, each = member * route.full, route.full
    else:
        first, each = sizes.group * route.full + member * route.mixed, route.mixed
    return first, first + each


@gluon.jit
def total(route, sizes):
    """How many steps there are."""
    return sizes.group * (route.full + route.mixed)


@gluon.jit
def visited(route, n, lists, sizes, tile, FULL: gl.constexpr):
    """The n-th full or mixed query tile."""
    if lists is not None:
        q_tiles = (sizes.q_len + tile.q - 1) // tile.q
        if not FULL:
            n = q_tiles - 1 - n
        q_tile = gl.load(lists.tiles + route.row.to(gl.int64) * q_tiles + n)
    elif FULL:
        q_tile = route.split + n
    else:
        q_tile = gl.where(n < route.left, route.first + n, route.resume + n - route.left)
    return q_tile


@gluon.jit
def rank(route, q_tile, lists, mask, sizes, tile):
    """How many key tiles before this one meet a query tile."""
    if lists is not None:
        q_tiles = (sizes.q_len + tile.q - 1) // tile.q
        return gl.load(lists.ranks + route.row.to(gl.int64) * q_tiles + q_tile)
    else:
        before = route.kv_tile
        if mask.left is not None:
            # The first key tile whose window reaches the tile's first query or a later one; windows move on with the keys.
            reached = gl.maximum(q_tile * tile.q + query_shift(mask, route.b) - mask.left, 0)
            before = before - (reached // tile.kv).to(gl.int32)
        return before
