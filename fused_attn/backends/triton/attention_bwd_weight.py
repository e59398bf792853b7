"""The gradient of additive attention's weight: score gradients times tanh once more, one row per tile of queries, added up by torch."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fused_attn.backends.triton import arguments
from fused_attn.lowering import LoweredAttention

from .additive import dweight
from .attention_bwd_bias import Arriving
from .gradient_tile import gradient_tile, load_keys, load_query_rows
from .masks import query_shift, reach, tile_state
from .primitives import pointers


@triton.jit
def _step(acc, first, near, rows_of, k, v, place, grads, mask, score, dropout, sizes, tile):
    """acc [tile.q, tile.d] and what one tile of keys adds to it."""
    b, kv_h = place[0], place[1] // sizes.group
    kv_idx = first + tl.arange(0, tile.kv)
    kv_ok = (kv_idx >= near[0]) & (kv_idx < near[1])
    k_tile, v_tile = load_keys(k, v, b, kv_h, kv_idx, kv_ok, tile)
    keys_of = (k_tile, v_tile, kv_idx, kv_ok, kv_h, (k, v))
    _, ds = gradient_tile(rows_of, keys_of, place, grads, mask, score, dropout, sizes, True, 0, False, tile)
    return dweight(acc, ds, (rows_of[8][0], b, place[1], place[2], rows_of[7], None), (k, b, kv_h, kv_idx, kv_ok, None), tile)


@triton.jit
def _attention_bwd_weight_kernel(q, k, v, dout, partial, stats, delta, dprobs, dscores, mask, score, dropout, sizes, tile):
    """partial [batch, heads, query tiles, head_dim]: one row per program."""
    tiles = tl.cdiv(sizes.q_len, tile.q)
    q_tile, bh = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // sizes.heads, bh % sizes.heads
    q_idx = q_tile * tile.q + tl.arange(0, tile.q)
    rows_of = load_query_rows(q, dout, stats, delta, mask, score, b, h, q_idx, sizes, tile)
    near = reach(rows_of[5], rows_of[6], sizes)
    place = (b, h, q_idx, query_shift(mask, b), q_tile)
    acc = tl.zeros([tile.q, tile.d], tl.float32)
    for first in tl.range(near[0] // tile.kv * tile.kv, near[1], tile.kv, disable_licm=True):
        if not mask.dense:
            acc = _step(acc, first, near, rows_of, k, v, place, (dprobs, dscores), mask, score, dropout, sizes, tile)
        elif tile_state(mask, b, h, q_tile, first // tile.kv) != 0:
            acc = _step(acc, first, near, rows_of, k, v, place, (dprobs, dscores), mask, score, dropout, sizes, tile)
    cols = tl.arange(0, tile.d)
    tl.store(pointers(partial, b, h, q_tile, cols), tl.sum(acc, 0), mask=cols < tile.head_dim)


def weight_gradient(call: LoweredAttention, arriving: Arriving, weight: Tensor) -> Tensor:
    """The gradient of a weight [1, heads|1, 1, head_dim] in its own shape."""
    batch, heads, _, _ = call.shape
    plan = arriving.plan("bwd_weight")
    partial = weight.new_empty((batch, heads, plan.q_tiles, weight.shape[3]))
    kernel: Any = _attention_bwd_weight_kernel
    plan.launch(kernel, plan.q_tiles * batch * heads, (*arriving.operands, arguments.matrix(partial), *arriving.scores))
    return partial.sum_to_size(weight.shape)
