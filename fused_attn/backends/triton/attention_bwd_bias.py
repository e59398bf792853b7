"""The gradient of a bias: score gradients once more, added up over what the bias broadcasts along, straight into its own shape."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_attn.backends.triton import arguments
from fused_attn.backends.triton.launch import Plan
from fused_attn.layout import laid_out_like
from fused_attn.lowering import LoweredAttention

from .gradient_tile import gradient_tile, load_keys, load_query_rows, touches
from .masks import query_shift
from .primitives import pointers


@triton.jit
def _attention_bwd_bias_kernel(
    q,
    k,
    v,
    dout,
    dbias,
    stats,
    delta,
    dprobs,
    dscores,
    steps,
    PLACE: tl.constexpr,
    OVER_Q: tl.constexpr,
    OVER_KV: tl.constexpr,
    mask,
    score,
    dropout,
    sizes,
    tile,
):
    """Score gradients before modification PLACE, added up over what the bias broadcasts along.

    A program owns one (query tile, key tile, batch, head) of those that ``dbias`` has and walks over the others: steps is
    (query tiles, key tiles, batches, heads) to walk over, each 1 where dbias has the dimension.
    """
    q_tiles, kv_tiles = tl.cdiv(sizes.q_len, tile.q), tl.cdiv(sizes.kv_len, tile.kv)
    own_q, own_kv, own_heads = q_tiles // steps[0], kv_tiles // steps[1], sizes.heads // steps[3]
    own = tl.program_id(0)
    q_own, kv_own = own % own_q, own // own_q % own_kv
    h_own, b_own = own // (own_q * own_kv) % own_heads, own // (own_q * own_kv * own_heads)
    total = tl.zeros([tile.q, tile.kv], tl.float32)
    for step in range(steps[0] * steps[1] * steps[2] * steps[3]):
        q_tile, kv_tile = q_own + step % steps[0], kv_own + step // steps[0] % steps[1]
        outer = step // (steps[0] * steps[1])
        h, b = h_own + outer % steps[3], b_own + outer // steps[3]
        if touches(mask, b, h, q_tile * tile.q, kv_tile * tile.kv, kv_tile, sizes, tile):
            q_idx, kv_idx = q_tile * tile.q + tl.arange(0, tile.q), kv_tile * tile.kv + tl.arange(0, tile.kv)
            rows_of = load_query_rows(q, dout, stats, delta, mask, score, b, h, q_idx, sizes, tile)
            kv_ok = kv_idx < sizes.kv_len
            k_tile, v_tile = load_keys(k, v, b, h // sizes.group, kv_idx, kv_ok, tile)
            place = (b, h, q_idx, query_shift(mask, b), q_tile)
            keys_of = (k_tile, v_tile, kv_idx, kv_ok, h // sizes.group, (k, v))
            _, ds = gradient_tile(rows_of, keys_of, place, (dprobs, dscores), mask, score, dropout, sizes, True, PLACE, False, tile)
            total += ds
    q_idx, kv_idx = q_own * tile.q + tl.arange(0, tile.q), kv_own * tile.kv + tl.arange(0, tile.kv)
    if not OVER_Q and not OVER_KV:
        inside = (q_idx < sizes.q_len)[:, None] & (kv_idx < sizes.kv_len)[None, :]
        tl.store(pointers(dbias, b_own, h_own, q_idx[:, None], kv_idx[None, :]), total.to(dbias.ptr.dtype.element_ty), mask=inside)
    elif OVER_KV:
        tl.store(pointers(dbias, b_own, h_own, q_idx, q_idx * 0), tl.sum(total, 1).to(dbias.ptr.dtype.element_ty), mask=q_idx < sizes.q_len)
    else:
        tl.store(
            pointers(dbias, b_own, h_own, kv_idx * 0, kv_idx), tl.sum(total, 0).to(dbias.ptr.dtype.element_ty), mask=kv_idx < sizes.kv_len
        )


class Arriving(Protocol):
    """The arguments that every pass of the backward shares."""

    operands: tuple[Any, ...]
    scores: tuple[Any, ...]

    def plan(self, stage: str) -> Plan: ...


def bias_gradient(call: LoweredAttention, arriving: Arriving, place: int, bias: Tensor) -> Tensor:
    """The gradient of a bias [batch|1, heads|1, q_len|1, kv_len|1] in its own shape."""
    batch, heads, q_len, kv_len = call.shape
    plan = arriving.plan("bwd_bias")
    over_kv = bias.shape[3] == 1 and kv_len > 1
    over_q = bias.shape[2] == 1 and q_len > 1 and not over_kv
    if over_q or over_kv:
        # Sums over rows or columns leave one value per (batch, head, row): O(length), added up over the rest by torch.
        shape = (batch, heads, q_len, 1) if over_kv else (batch, heads, 1, kv_len)
        steps = (1, plan.kv_tiles, 1, 1) if over_kv else (plan.q_tiles, 1, 1, 1)
        result = bias.new_empty(shape, dtype=torch.float32)
    else:
        steps = (1, 1, batch // bias.shape[0], heads // bias.shape[1])
        result = torch.empty_like(bias)
    programs = plan.q_tiles * plan.kv_tiles * batch * heads // (steps[0] * steps[1] * steps[2] * steps[3])
    constants = (steps, place, over_q, over_kv)
    plan.launch(_attention_bwd_bias_kernel, programs, (*arriving.operands, arguments.matrix(result), *arriving.scores, *constants))
    return laid_out_like(result.sum_to_size(bias.shape).to(bias.dtype), bias)
