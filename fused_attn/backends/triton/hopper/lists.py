"""Which key tiles a CTA visits under a dense mask: a list that its producer and its consumers read alike."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_attn.backends.triton import arguments
from fused_attn.backends.triton.launch import run
from fused_attn.backends.triton.masks import full_range, reach, row_intervals
from fused_attn.backends.triton.primitives import pointers
from fused_attn.lowering import LoweredAttention

# Key tiles that a program looks at together.
_CHUNK = tl.constexpr(128)
# What stands before the tiles' numbers: how many are mixed, and how many full.
HEAD = tl.constexpr(2)


@triton.jit
def _kinds(chunk, block, b, h, interval, mask, sizes, PACK: tl.constexpr, BN: tl.constexpr):
    """Which of the key tiles ``chunk`` the 64 rows of a block reach, and which they may attend to throughout; int32 each."""
    q_idx = (block * 64 + tl.arange(0, 64)) // PACK
    start, end = interval
    low, high = reach(start, end, sizes)
    full_low, full_high = full_range(start, end, q_idx, sizes)
    some, every = chunk * 0, chunk * 0 + 2
    for j in tl.static_range(BN // 64):
        kv_block = chunk * (BN // 64) + j
        there = kv_block * 64 < sizes.kv_len
        state = tl.load(pointers(mask.summary, b, h, b * 0 + block // PACK, kv_block), mask=there, other=0).to(tl.int32)
        some, every = tl.maximum(some, state), tl.minimum(every, tl.where(there, state, 2))
    reached = (some > 0) & (chunk * BN < high) & (chunk * BN + BN > low)
    full = (every == 2) & (chunk * BN >= full_low) & (chunk * BN + BN <= full_high)
    return reached.to(tl.int32), full.to(tl.int32)


@triton.jit
def _list_kernel(lists, mask, heads, sizes, NC: tl.constexpr, PACK: tl.constexpr, BN: tl.constexpr):
    """One program per tile of NC blocks of 64 rows, PACK of them for each query; lists [batch|1, heads|1, query tiles, HEAD + key tiles] and mask.summary are matrices."""
    tiles, kv_tiles = tl.cdiv(sizes.q_len * PACK, 64 * NC), tl.cdiv(sizes.kv_len, BN)
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // heads, bh % heads
    at = pointers(lists, b, h, tile, b * 0)
    done = b * 0
    for want_full in tl.static_range(2):
        before = done
        for first in range(0, kv_tiles, _CHUNK):
            chunk = first + tl.arange(0, _CHUNK)
            reached, full = chunk * 0, chunk * 0 + 1
            for c in tl.static_range(NC):
                # A block beyond the end reaches nothing and spoils nothing.
                block = tl.minimum(tile * NC + c, (sizes.q_len * PACK - 1) // 64)
                interval = row_intervals(mask, b, (block * 64 + tl.arange(0, 64)) // PACK, sizes)
                of_block, all_of_block = _kinds(chunk, block, b, h, interval, mask, sizes, PACK, BN)
                reached, full = tl.maximum(reached, of_block), tl.minimum(full, all_of_block)
            chosen = reached * (full if want_full else 1 - full)
            tl.store(at + HEAD + done + tl.cumsum(chosen, 0) - 1, chunk, mask=chosen > 0)
            done += tl.sum(chosen, 0)
        tl.store(at + want_full, done - before)


def tile_lists(call: LoweredAttention, mask: arguments.MaskArgs, consumers: int, packed: int, keys: int) -> Tensor:
    """Numbers of mixed and of full key tiles, then the tiles, mixed ones first, for each tile of 64 * consumers rows.

    Args:
        call: with a dense mask.
        mask: with the states of 64 x 64 tiles as its summary, see ``keep.mask_arguments``.
        consumers: blocks of 64 rows in a tile.
        packed: rows of each query; more than one only where the mask is the same for all heads.
        keys: in a key tile.

    Returns:
        int32 [batch|1, heads|1, query tiles, HEAD + key tiles].
    """
    keep, form = call.terms.mask.keep, call.terms.mask
    assert keep is not None
    _, _, q_len, kv_len = call.shape
    batch = max(t.shape[0] for t in (keep, form.kv_start, form.kv_end, call.terms.q_offset) if isinstance(t, Tensor))
    shape = (batch, keep.shape[1], -(-q_len * packed // (64 * consumers)), HEAD.value + -(-kv_len // keys))
    lists = torch.empty(shape, dtype=torch.int32, device=keep.device)
    args = (arguments.matrix(lists), mask, keep.shape[1], arguments.sizes(call), consumers, packed, keys)
    run(_list_kernel, shape[0] * shape[1] * shape[2], keep.device, args, {"num_warps": 4})
    return lists
