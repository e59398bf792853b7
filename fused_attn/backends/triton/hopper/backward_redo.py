"""Heads that the one-pass backward left: the plain passes once more, whose programs for all other heads end at once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_attn.backends.triton import arguments
from fused_attn.backends.triton.attention_bwd import _attention_bwd_dkdv_kernel, _attention_bwd_dq_kernel
from fused_attn.backends.triton.attention_bwd_bias import _attention_bwd_bias_kernel
from fused_attn.lowering import LoweredAttention


@triton.jit
def _redo_dq_kernel(skipped, q, k, v, dout, dq, stats, delta, dprobs, dscores, small, mask, score, dropout, sizes, tile):
    bh = tl.program_id(0) // tl.cdiv(sizes.q_len, tile.q)
    if tl.load(skipped + bh // sizes.group) != 0:
        _attention_bwd_dq_kernel(q, k, v, dout, dq, stats, delta, dprobs, dscores, small, mask, score, dropout, sizes, tile)


@triton.jit
def _redo_dkdv_kernel(skipped, q, k, v, dout, dk, dv, stats, delta, dprobs, dscores, small, mask, score, dropout, sizes, tile):
    if tl.load(skipped + tl.program_id(0) // tl.cdiv(sizes.kv_len, tile.kv)) != 0:
        _attention_bwd_dkdv_kernel(q, k, v, dout, dk, dv, stats, delta, dprobs, dscores, small, mask, score, dropout, sizes, tile)


@triton.jit
def _redo_bias_kernel(
    skipped, q, k, v, dout, dbias, stats, delta, dprobs, dscores, PLACE: tl.constexpr, mask, score, dropout, sizes, tile
):  # fmt: skip
    """Of a bias with every dimension: one program per tile of it."""
    bh = tl.program_id(0) // (tl.cdiv(sizes.q_len, tile.q) * tl.cdiv(sizes.kv_len, tile.kv))
    if tl.load(skipped + bh // sizes.group) != 0:
        _attention_bwd_bias_kernel(
            q, k, v, dout, dbias, stats, delta, dprobs, dscores, (1, 1, 1, 1), PLACE, False, False, mask, score, dropout, sizes, tile
        )  # fmt: skip


def redo(call: LoweredAttention, arriving: Any, skipped: Tensor, grads: tuple[Tensor, Tensor, Tensor], dbias: Tensor | None, place: int) -> None:
    """dq, dk and dv of the heads of ``skipped`` [batch, key heads], and the gradient of the bias at ``place``, once more."""
    batch, heads, _, _ = call.shape
    small, (dq, dk, dv) = arguments.small_tile(call), (arguments.matrix(t) for t in grads)
    plan, kernel = arriving.plan("bwd_dq"), _redo_dq_kernel
    plan.launch(kernel, plan.q_tiles * batch * heads, (skipped, *arriving.operands, dq, *arriving.scores, small))
    plan, kernel = arriving.plan("bwd_dkdv"), _redo_dkdv_kernel
    plan.launch(kernel, plan.kv_tiles * batch * call.k.shape[1], (skipped, *arriving.operands, dk, dv, *arriving.scores, small))
    if dbias is not None:
        plan, kernel = arriving.plan("bwd_bias"), _redo_bias_kernel
        args = (skipped, *arriving.operands, arguments.matrix(dbias), *arriving.scores, place)
        plan.launch(kernel, plan.q_tiles * plan.kv_tiles * batch * heads, args)
