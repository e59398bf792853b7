"""Attention's forward on Hopper: from a lowered call to launches."""

from __future__ import annotations

from typing import Any, NamedTuple

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
from .forward_kernel import forward_kernel
from .keep import mask_arguments
from .launch import launch
from .lists import tile_lists
from .modifications import fast, is_bounded, loaded_bias
from .online import BITS_ONLY, BOTH_ENDS, END_ONLY
from .order import processors
from .replay import Recording, again
from .tile_shapes import ForwardTiles
from .tiles import FORWARD, padded

# Rows of the smaller tiles, by which packing is judged.
_PACKED_ROWS = 128
# Modifications that read nothing per score.
_OF_PLACE = ("softcap", "alibi", "level")
# Keys and values that a group of heads may bring into the L2 cache together, in bytes: of 50 MB, with room for queries and outputs.
_L2 = 32 * 2**20


class Shape(NamedTuple):
    """How a call is cut: padded head sizes, heads in a tile's rows, the modification whose bias arrives in tiles or -1, tiles, parts of the keys."""

    head_dim: int
    value_dim: int
    packed: int
    bias: int
    tiles: ForwardTiles
    parts: int

    @classmethod
    def of(cls, call: LoweredAttention) -> Shape:
        """By sizes of heads, groups and lengths alone, so that a batch's slice is a batch of one."""
        head_dim, value_dim, packed = padded(call.q.shape[-1]), padded(call.v.shape[-1]), packed_heads(call)
        size = max(head_dim, value_dim)
        bias = loaded_bias(call)[0] if packed == 1 and (size, "bias") in FORWARD else -1
        reads = any(mod.name not in _OF_PLACE and place != bias for place, mod in enumerate(call.terms.mods))
        heavy = call.terms.dropout is not None or call.terms.mask.keep is not None or packed > 1 or reads
        kind = "bias" if bias >= 0 else "heavy" if heavy else "plain"
        tiles = FORWARD[size, kind]
        if head_dim != value_dim:
            tiles = tiles._replace(own_out=True)  # O does not fit Q's place, and what is smaller than the table's leaves room
        return cls(head_dim, value_dim, packed, bias, tiles, split.parts(call.shape[3], size, call.shape[2] * packed))

    def blocks(self, q_len: int) -> int:
        """Blocks of 64 rows of one batch and head, or group of packed heads."""
        return -(-q_len * self.packed // 64)

    def rows(self, tensor: Tensor, dim: int) -> Tiles:
        """q or out in blocks of 64 rows, which hold the heads of a group where they are packed."""
        if self.packed == 1:
            return Tiles(tensor, (1, 1, 64, dim))
        return Tiles(tensor.unflatten(1, (-1, self.packed)).transpose(2, 3), (1, 1, 64 // self.packed, self.packed, dim))


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


def _ends(call: LoweredAttention) -> int:
    """What the mask may cut of a tile, see ``online``. Bits say themselves where the keys end, unless one stands for all keys."""
    mask = call.terms.mask
    if mask.left is not None or mask.kv_start is not None:
        return int(BOTH_ENDS.value)
    # A column that stands for all keys, one alone or an expanded one, is packed into bits that are set beyond the end as well.
    keep = mask.keep
    by_bits = keep is not None and keep.shape[3] == call.shape[3] > 1 and keep.stride(3) != 0
    return int((BITS_ONLY if by_bits and mask.right is None and mask.kv_end is None else END_ONLY).value)


def reasons(call: LoweredAttention) -> list[str]:
    """Why this pass of an eligible call runs on the plain kernels; empty if it does not."""
    if all(mod.name in BUILT_IN for mod in call.terms.mods):
        return []
    return modifications.reasons(arguments.scores(call.terms, call.grid, call.q.dtype))


def reach(call: LoweredAttention, mask: arguments.MaskArgs, shape: Shape) -> Tensor | None:
    """The kernel's ``bounds``: a list of key tiles under a dense mask; int32 [batch|1, 1, blocks, 4] where tensors decide, see ``block_bounds``."""
    if mask.keep is not None:
        return tile_lists(call, mask, shape.tiles.consumers, shape.packed, shape.tiles.keys)
    if mask.kv_start is None and mask.kv_end is None:
        return None
    batches = [t.shape[0] for t in (call.terms.mask.kv_start, call.terms.mask.kv_end, call.terms.q_offset) if isinstance(t, Tensor)]
    table = call.q.new_empty((max(batches), 1, shape.blocks(call.shape[2]), 4), dtype=torch.int32)
    args = (arguments.matrix(table), mask, arguments.sizes(call), shape.packed, shape.tiles.keys)
    run(bounds_kernel, table.shape[0] * table.shape[2], call.q.device, args, {"num_warps": 2})
    return table


def attention_fwd(call: LoweredAttention, stats_shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and stats as the plain kernel's ``attention_fwd``, and by it where a row needs more than one rounding per exponent."""
    if reasons(call):
        return plain.attention_fwd(call, stats_shape)
    batch, heads, q_len, _ = call.shape
    out = empty_out(call.q, call.v.shape[-1])
    lse = call.q.new_empty((batch, heads, q_len), dtype=torch.float32)
    stats = call.q.new_empty(stats_shape, dtype=torch.float32)
    blocks = -(-q_len // 64)
    # One allocation of zeros for the counter of the queue and, 16 bytes on, the flags.
    zeros = torch.zeros(4 + batch * heads * blocks, dtype=torch.int32, device=call.q.device)
    redo = zeros[4:].view(batch, heads, blocks)
    into, key = Forward(out, lse, stats), kind(call)
    if key is None:
        _start(call, Shape.of(call), into, redo, zeros, launch)
        plain.run(call, into, redo)
        return into

    def start(recording: Recording) -> None:
        _start(call, Shape.of(call), into, redo, zeros, recording.start)
        plain.run(call, into, redo, recording.of)

    again(_kept, key, (call.q, call.k, call.v, *into, zeros, redo), start)
    return into


# Launches by ``kind``.
_kept: dict[tuple[Any, ...], Recording] = {}


def kind(call: LoweredAttention, device: str = "cuda") -> tuple[Any, ...] | None:
    """All that decides the launches of a call but its tensors' addresses; None where terms have tensors too, or there is no GPU."""
    q, k, v, terms = call.q, call.k, call.v, call.terms
    mask, offset = terms.mask, terms.q_offset
    if terms.entries or terms.dropout is not None or terms.sinks is not None or mask.kv_start is not None or mask.kv_end is not None:
        return None
    if mask.keep is not None or mask.rules or isinstance(offset, Tensor) or q.device.type != device:
        return None
    size = max(padded(q.shape[-1]), padded(v.shape[-1]))
    sizes = (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride())
    tables = (FORWARD[size, "plain"], FORWARD[size, "heavy"])
    return q.device, q.dtype, sizes, mask.left, mask.right, terms.scale, offset, tables


def _start(call: LoweredAttention, shape: Shape, into: Forward, redo: Tensor, counter: Tensor, launching: Any) -> None:
    """Launches the forward by ``launching``, ``launch`` or what keeps it, and what merges parts of the keys."""
    batch, heads, q_len, kv_len = call.shape
    tiles, terms = shape.tiles, call.terms
    mask, score = mask_arguments(terms), fast(arguments.scores(terms, call.grid, call.q.dtype))
    shared, sizes = (mask, score, arguments.dropout(terms, call.shape)), arguments.sizes(call)
    # Of float16 probabilities neither 2^72 nor 2^-72 is left.
    bounded = is_bounded(score) and call.q.dtype == torch.bfloat16
    partial = split.room(call, shape.parts) if shape.parts > 1 else None
    descriptors = (
        shape.rows(call.q, shape.head_dim),
        Tiles(call.k, (1, 1, tiles.keys, shape.head_dim)),
        Tiles(call.v, (1, 1, tiles.keys, shape.value_dim)),
        shape.rows(into.out, shape.value_dim),
        Tiles(terms.mods[shape.bias].tensors[0], (1, 1, 64, tiles.keys)) if shape.bias >= 0 else None,
    )
    in_cache = max(1, _L2 // (kv_len * (shape.head_dim + shape.value_dim) * call.q.element_size()))
    several = batch * heads // shape.packed * shape.parts
    together = min(several, in_cache * sizes.group // shape.packed * shape.parts)
    args = (
        *descriptors, *(partial or (into.lse, into.stats)), terms.sinks, redo, counter, arguments.matrix(reach(call, mask, shape)),
        several, together, None if partial is None else shape.parts, *shared, sizes,
        tiles.consumers, tiles.keys, tiles.stages, tiles.registers, _ends(call), bounded, tiles.ahead, tiles.own_out, shape.bias,
    )  # fmt: skip
    work = several * -(-shape.blocks(q_len) // tiles.consumers)
    launching(forward_kernel, (min(work, processors(call.q.device)),), args, 4)
    if partial is not None:
        split.combine(call, partial, (into.out, into.lse, into.stats, terms.sinks, redo), shared, bounded, shape.value_dim)
