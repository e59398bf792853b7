"""From a call with keys in pages, or in one piece, to the launches of split-key decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fused_attn.backends.base import Forward
from fused_attn.backends.triton import BUILT_IN, arguments, config, launch
from fused_attn.layout import empty_out
from fused_attn.lowering import LoweredAttention
from fused_attn.paged_call import LoweredPaged

from . import tiles
from .kernels import _combine_kernel, _split_kernel


class Pages(NamedTuple):
    """The block table [batch, most pages] with its strides, keys of a page, and pages that there are; a table of None where a batch is a page.

    ``last`` is the constant that has to come last, as in ``arguments.MaskArgs``.
    """

    table: Any
    batch: Any
    col: Any
    size: Any
    count: Any
    last: Any

    @classmethod
    def of(cls, call: LoweredPaged) -> Pages:
        """Those of a call."""
        table, last = call.block_table, tl.constexpr(True)
        if table is None:
            return cls(None, 0, 0, 1, 0, last)
        return cls(table, table.stride(0), table.stride(1), call.k.shape[2], call.k.shape[0], last)


def attention_paged(call: LoweredPaged) -> tuple[Tensor, Tensor]:
    """out and lse; rows whose keys end beyond those that there are, or that attend to a key without a page, are NaN."""
    out = empty_out(call.q, call.v.shape[-1])
    lse = call.q.new_empty(call.shape[:3], dtype=torch.float32)
    _run(call, out, lse, None)
    return out, lse


def attention_fwd(call: LoweredAttention, stats_shape: tuple[int, ...]) -> Forward:
    """What ``attention_fwd.attention_fwd`` gives, for few queries."""
    paged = LoweredPaged(call.q, call.k, call.v, None, call.terms)
    out = empty_out(call.q, call.v.shape[-1])
    lse = call.q.new_empty(call.shape[:3], dtype=torch.float32)
    stats = call.q.new_empty(stats_shape, dtype=torch.float32)
    _run(paged, out, lse, stats)
    return Forward(out, lse, stats)


def packs(call: LoweredPaged) -> bool:
    """Whether a group's heads share a tile: a user's function of a modification, or one that reads columns, is promised a single head."""
    return all(mod.name in BUILT_IN for mod in call.terms.mods) and not arguments.by_columns(call.terms)


def _run(call: LoweredPaged, out: Tensor, lse: Tensor, stats: Tensor | None) -> None:
    (batch, heads, q_len, kv_len), terms = call.shape, call.terms
    kv_heads = call.k.shape[1]
    total = batch * heads * q_len
    if total == 0:
        return
    packed = packs(call)
    rows = q_len * (heads // kv_heads) if packed else q_len
    head_size = max(call.q.shape[-1], call.v.shape[-1])
    chip = launch.target_chip or config.chip_of(call.q.device)
    chosen = tiles.lookup(chip, call.q.dtype, head_size, arguments.by_columns(terms))
    chosen = chosen._replace(block_q=tiles.block_rows(rows, chosen.block_q))
    splits = call.num_splits or tiles.parts(kv_len)
    sums = lse.new_empty((2, splits, total))
    outs = lse.new_empty((splits, total, call.v.shape[-1]))
    whole = LoweredAttention(call.q, call.k, call.v, terms)
    mask, score = arguments.mask(terms, None), arguments.scores(terms, call.grid, call.q.dtype)
    shared = (mask, score, arguments.Sizes(heads, heads // kv_heads, q_len, kv_len), arguments.tile(whole, chosen, has_summary=False))
    small = arguments.tile(whole, config.TileConfig(chosen.block_q, 16, 0, 0, 32), has_summary=False)
    q, k, v, result = (arguments.matrix(t) for t in (call.q, call.k, call.v, out))
    programs = -(-rows // chosen.block_q) * splits * batch * (kv_heads if packed else heads)
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    args = (q, k, v, sums, outs, splits, total, Pages.of(call), small, *shared, packed)
    launch.run(_split_kernel, programs, call.q.device, args, options)
    strict = stats is None and terms.mask.kv_end is not None
    wide = stats is not None and stats.shape[0] > 2
    parts = (result, lse, stats, terms.sinks, splits, *shared, max(2, 1 << (splits - 1).bit_length()), strict, wide)
    launch.run(_combine_kernel, total, call.q.device, (sums, outs, *parts), {"num_warps": 2, "num_stages": 1})
