"""The gradient of a bias in heads that the one-pass backward left to the plain passes."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fused_attn.backends.triton import arguments
from fused_attn.backends.triton.attention_bwd import Arriving
from fused_attn.backends.triton.attention_bwd_bias import _attention_bwd_bias_kernel


@triton.jit
def _redo_bias_kernel(
    redo, q, k, v, dout, dbias, stats, delta, dprobs, dscores, PLACE: tl.constexpr, mask, score, dropout, sizes, tile
):  # fmt: skip
    """One program per tile of a bias that has every dimension; it ends at once unless redo [batch, key heads] flags its head."""
    bh = tl.program_id(0) // (tl.cdiv(sizes.q_len, tile.q) * tl.cdiv(sizes.kv_len, tile.kv))
    if tl.load(redo + bh // sizes.group) != 0:
        _attention_bwd_bias_kernel(
            q, k, v, dout, dbias, stats, delta, dprobs, dscores, (1, 1, 1, 1), PLACE, False, False, mask, score, dropout, sizes, tile
        )  # fmt: skip


def redo_bias(arriving: Arriving, redo: Tensor, dbias: Tensor, place: int) -> None:
    """Writes the gradient of the bias at ``place`` once more where ``redo``, int32 [batch, kv_heads], flags a key head."""
    batch, heads, _, _ = arriving.call.shape
    plan, kernel = arriving.plan("bwd_bias"), _redo_bias_kernel
    args: tuple[Any, ...] = (redo, *arriving.operands, arguments.matrix(dbias), *arriving.scores, place)
    plan.launch(kernel, plan.q_tiles * plan.kv_tiles * batch * heads, args)
