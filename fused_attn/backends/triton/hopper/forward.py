"""Attention's forward on Hopper: from a lowered call to launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn.backends.base import Forward
from fused_attn.backends.triton import BUILT_IN, arguments
from fused_attn.backends.triton import attention_fwd as plain
from fused_attn.backends.triton.launch import run
from fused_attn.layout import empty_out
from fused_attn.lowering import LoweredAttention

from . import modifications, split
from .bounds import bounds_kernel
from .descriptors import Tiles
from .eligible import strides_reason
from .forward_kernel import forward_kernel
from .keep import mask_arguments
from .launch import launch
from .lists import tile_lists
from .modifications import fast, is_bounded
from .online import BITS_ONLY, BOTH_ENDS, END_ONLY

# Rows of the smaller tiles, by which packing is judged.
_PACKED_ROWS = 128
# Keys and values that a group of heads may bring into the L2 cache together, in bytes: of 50 MB, with room for queries and outputs.
_L2 = 32 * 2**20
# Simulated and compiled without a device: the processors of a whole chip.
_PROCESSORS = 132


class ForwardTiles(NamedTuple):
    """Consumers of 64 query rows, keys per tile, stages of K and V, registers of a consumer, and whether O has shared memory of its own."""

    consumers: int
    keys: int
    stages: int
    registers: int
    own_out: bool


# By the larger padded head size, and for calls whose bias arrives in tiles (at head size 256 there is no room for them).
_TILES = {
    64: ForwardTiles(3, 128, 2, 160, True),
    128: ForwardTiles(2, 128, 2, 240, True),
    256: ForwardTiles(2, 64, 2, 240, False),
}


_WITH_BIAS = {64: ForwardTiles(2, 128, 2, 240, True), 128: ForwardTiles(2, 128, 2, 240, False)}
# Dropout's counters, words of a dense mask and heads of rows need registers: at head size 64 three consumers with 160 each make 200 and 13 local accesses in
# a trip, two with 240 none.
_HEAVY = {64: ForwardTiles(2, 128, 2, 240, True)}


def _tiles(call: LoweredAttention) -> ForwardTiles:
    """The configuration of a call."""
    size = max(padded(call.q.shape[-1]), padded(call.v.shape[-1]))
    if _bias_of(call) >= 0:
        return _WITH_BIAS[size]
    heavy = call.terms.dropout is not None or call.terms.mask.keep is not None or packed_heads(call) > 1
    return (heavy and _HEAVY.get(size)) or _TILES[size]


def _bias_of(call: LoweredAttention) -> int:
    """Which modification is a 16-bit bias of the scores' own shape that TMA can load; -1 where none is, or where there is no room for it."""
    size = max(padded(call.q.shape[-1]), padded(call.v.shape[-1]))
    if packed_heads(call) > 1:
        return -1
    for number, mod in enumerate(call.terms.mods):
        if mod.name == "bias" and size in _WITH_BIAS:
            (bias,) = mod.tensors
            if bias.dtype in (torch.float16, torch.bfloat16) and bias.shape[2:] == call.shape[2:] and not strides_reason(bias):
                return number
    return -1


def packed_heads(call: LoweredAttention) -> int:
    """How many heads share a tile's rows: the group of a key head where that halves the tiles at least, else 1."""
    _, heads, q_len, _ = call.shape
    group = heads // call.k.shape[1]
    keep = call.terms.mask.keep
    same = all(mod.name in BUILT_IN for mod in call.terms.mods) and (keep is None or keep.shape[1] == 1)
    if group & (group - 1) or not 1 < group <= 64 or not same:
        return 1
    packed, apart = -(-q_len * group // _PACKED_ROWS), group * -(-q_len // _PACKED_ROWS)
    return group if 2 * packed <= apart else 1


def _rows(tensor: Tensor, packed: int, dim: int) -> Tiles:
    """Blocks of 64 rows of q or out, which hold the heads of a group."""
    if packed == 1:
        return Tiles(tensor, (1, 1, 64, dim))
    return Tiles(tensor.unflatten(1, (-1, packed)).transpose(2, 3), (1, 1, 64 // packed, packed, dim))


def padded(dim: int) -> int:
    """The box that a head dimension is loaded as: TMA fills the rest with zeros."""
    return next(size for size in _TILES if dim <= size)


def _ends(call: LoweredAttention) -> int:
    """What the mask may cut of a tile, see ``online``. Bits say themselves where the keys end, unless one stands for all keys."""
    mask = call.terms.mask
    if mask.left is not None or mask.kv_start is not None:
        return int(BOTH_ENDS.value)
    by_bits = mask.keep is not None and mask.keep.shape[3] == call.shape[3]
    return int((BITS_ONLY if by_bits and mask.right is None and mask.kv_end is None else END_ONLY).value)


def reasons(call: LoweredAttention) -> list[str]:
    """Why this pass of an eligible call runs on the plain kernels; empty if it does not."""
    found = modifications.reasons(arguments.scores(call.terms, call.grid, call.q.dtype))
    dropout = call.terms.dropout
    if dropout is not None and dropout.counters(call.shape)[1]:
        found.append("the first key's dropout stands inside a group of four")
    return found


def blocks(call: LoweredAttention) -> int:
    """Blocks of 64 query rows."""
    return -(-call.shape[2] // 64)


def bounds(call: LoweredAttention, mask: arguments.MaskArgs, keys: int) -> Tensor | None:
    """Key tiles that each block of rows reaches, int32 [batch|1, 1, blocks, 4], where tensors decide; see ``bounds.block_bounds``."""
    if mask.kv_start is None and mask.kv_end is None:
        return None
    batches = [t.shape[0] for t in (call.terms.mask.kv_start, call.terms.mask.kv_end, call.terms.q_offset) if isinstance(t, Tensor)]
    packed = packed_heads(call)
    table = call.q.new_empty((max(batches), 1, -(-call.shape[2] * packed // 64), 4), dtype=torch.int32)
    args = (arguments.matrix(table), mask, arguments.sizes(call), packed, keys)
    run(bounds_kernel, table.shape[0] * table.shape[2], call.q.device, args, {"num_warps": 2})
    return table


def processors(device: torch.device) -> int:
    """Streaming multiprocessors, each of which runs one CTA."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _PROCESSORS


def attention_fwd(call: LoweredAttention, stats_shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and stats as the plain kernel's ``attention_fwd``, and by it where a row needs more than one rounding per exponent."""
    if reasons(call):
        return plain.attention_fwd(call, stats_shape)
    batch, heads, q_len, kv_len = call.shape
    head_dim, value_dim = padded(call.q.shape[-1]), padded(call.v.shape[-1])
    chosen, number, packed = _tiles(call), _bias_of(call), packed_heads(call)
    if not chosen.own_out:  # O takes the place of Q, so their tiles have one width
        head_dim = value_dim = max(head_dim, value_dim)
    out = empty_out(call.q, call.v.shape[-1])
    lse = call.q.new_empty((batch, heads, q_len), dtype=torch.float32)
    stats = call.q.new_empty(stats_shape, dtype=torch.float32)
    redo = torch.zeros((batch, heads, blocks(call)), dtype=torch.int32, device=call.q.device)
    mask, score = mask_arguments(call.terms), fast(arguments.scores(call.terms, call.grid, call.q.dtype))
    table = tile_lists(call, mask, chosen.consumers, packed, chosen.keys) if mask.keep is not None else bounds(call, mask, chosen.keys)
    tiles = (
        _rows(call.q, packed, head_dim),
        Tiles(call.k, (1, 1, chosen.keys, head_dim)),
        Tiles(call.v, (1, 1, chosen.keys, value_dim)),
        _rows(out, packed, value_dim),
        Tiles(call.terms.mods[number].tensors[0], (1, 1, 64, chosen.keys)) if number >= 0 else None,
    )
    in_cache = max(1, _L2 // (kv_len * (head_dim + value_dim) * call.q.element_size()))
    together = min(batch * heads // packed, in_cache * (heads // call.k.shape[1]) // packed)
    # Of float16 probabilities neither 2^72 nor 2^-72 is left.
    bounded = is_bounded(score) and call.q.dtype == torch.bfloat16
    work = batch * heads // packed * -(-q_len * packed // (64 * chosen.consumers))
    splits = split.parts(kv_len, max(head_dim, value_dim), q_len * packed)
    partial, limit = (split.room(call, splits), splits) if splits > 1 else (None, None)
    work = work * splits
    shared = (mask, score, arguments.dropout(call.terms, call.shape))
    args = (
        *tiles, *(partial or (lse, stats)), call.terms.sinks, redo, arguments.matrix(table), batch * heads // packed * splits, together, limit,
        *shared, arguments.sizes(call),
        chosen.consumers, chosen.keys, chosen.stages, chosen.registers, _ends(call), bounded, chosen.own_out, number,
    )  # fmt: skip
    launch(forward_kernel, (min(work, processors(call.q.device)),), args)
    if partial is not None:
        split.combine(call, partial, (out, lse, stats, call.terms.sinks, redo), shared, value_dim)
    plain.run(call, Forward(out, lse, stats), redo)
    return out, lse, stats
