"""torch's own flash kernel for CPU tensors, where it computes the same function as the tiles.

Its advantages: one parallel region per call and no temporary outside the first-level caches. Measured (float32, B1 H8 D64, one core, its
time / the tiles' time): forward L = 1024 0.7, 2048 0.95; backward L = 1024 0.8, 2048 1.1; at L = 16 it saves two thirds of
the call's time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn.backends.base import Forward, Gradients, Incoming
from fused_attn.backends.cpu.tiles import TILE, MaskTiles, is_finite
from fused_attn.checks import has_finite_products
from fused_attn.layout import laid_out_like
from fused_attn.lowering import LoweredAttention

# Its backward sees a row's sum only through lse; float32 keeps log S to 4e-6 below this size, and loses it at 1e6.
LARGEST_LSE = 64.0
# A row of fewer keys than a vector register holds (16 float32 in 512 bits) takes another code path, in which a row of NaN gives zeros.
NAN_SAFE_KEYS = 16
# Below, a row of a mask often has one key; its score gradient is then exactly 0, and the kernel leaves delta's rounding instead.
BACKWARD_KEYS = 64
_flash = torch._scaled_dot_product_flash_attention_for_cpu  # bound directly, 4 us cheaper per call than through torch.ops


def no_stats(lse: Tensor) -> Tensor:
    """Row statistics that this backend does not keep: backward recomputes rows, or needs lse alone.

    Made anew, because a tensor kept for all calls would belong to whatever mode (inference, fake tensors) the first of them ran in.
    """
    return lse.new_empty(0)


def suits(call: LoweredAttention) -> bool:
    """Whether the kernel can take the call: plain, square causal, or with a mask that is small enough to be a tensor.

    It leaks NaN through a mask and loses a NaN in q when a row of keys fills no vector (torch 2.13), computes 16-bit products in 16 bits and
    knows neither grouped heads nor another value_dim.
    """
    terms, (q, k, v) = call.terms, (call.q, call.k, call.v)
    if terms.entries or terms.normalizer is not None or terms.sinks is not None or terms.dropout is not None or q.dtype.itemsize < 4:
        return False
    if q.shape[1] != k.shape[1] or q.shape[3] != v.shape[3] or not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return False
    kv_len = k.shape[2]
    size = q.shape[1] * q.shape[2] * kv_len
    if q.numel() * size == 0:
        return False
    if terms.mask.is_trivial:
        return kv_len >= NAN_SAFE_KEYS or is_finite(q)
    return (size <= TILE or _is_causal(call)) and is_finite(v) and has_finite_products(q, k)


def forward(call: LoweredAttention) -> Forward | None:
    """The output and lse, -inf in rows without keys; None where a row may hold scores of -inf alone, of which the kernel makes NaN."""
    if call.terms.mask.is_trivial:
        out, lse = _flash(call.q, call.k, call.v, scale=call.terms.scale)
        if not is_finite(lse):
            return None
        return Forward(out, lse.contiguous(), no_stats(lse))
    limit = _additive(call)
    out, lse = _flash(call.q, call.k, call.v, 0.0, limit is None, attn_mask=limit, scale=call.terms.scale)
    if limit is not None:
        lse.masked_fill_(limit.amax(-1) == -torch.inf, -torch.inf)
    return Forward(out, lse.contiguous(), no_stats(lse))


def suits_backward(call: LoweredAttention, result: Forward, incoming: Incoming) -> bool:
    """Whether its backward is right as well: lse is of ordinary size, and nothing arrives but at the output."""
    others = (incoming.dlse, incoming.dprobs, incoming.dscores)
    if incoming.dout is None or any(t is not None for t in others) or not suits(call):
        return False
    if call.terms.mask.is_trivial:
        return call.shape[3] >= NAN_SAFE_KEYS and float(result.lse.abs().amax()) <= LARGEST_LSE
    if call.shape[3] < BACKWARD_KEYS or not has_finite_products(incoming.dout, call.v):
        return False
    return float(result.lse.masked_fill(result.lse == -torch.inf, 0.0).abs().amax()) <= LARGEST_LSE


def backward(call: LoweredAttention, result: Forward, dout: Tensor, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of q, k and v, and None for the sinks that are not there."""
    limit = _additive(call)
    lse = result.lse if limit is None else result.lse.masked_fill(result.lse == -torch.inf, 0.0)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout if dout.stride(3) == 1 else dout.contiguous(), call.q, call.k, call.v, result.out, lse, 0.0, _is_causal(call),
        attn_mask=limit, scale=call.terms.scale,
    )  # fmt: skip
    inputs = (call.q, call.k, call.v)
    return *(laid_out_like(g, t) if need else None for g, t, need in zip(grads, inputs, needs, strict=False)), None


def _is_causal(call: LoweredAttention) -> bool:
    mask, offset = call.terms.mask, call.terms.q_offset
    others = (mask.left, mask.kv_start, mask.kv_end, mask.keep)
    aligned = isinstance(offset, int) and offset == 0 and call.q.shape[2] == call.k.shape[2]
    return aligned and mask.right == 0 and not mask.rules and all(t is None for t in others)


def _additive(call: LoweredAttention) -> Tensor | None:
    """0 where a key may be attended and -inf elsewhere, [batch, heads, q_len, kv_len] with stride 0 where it repeats."""
    if call.terms.mask.is_trivial or _is_causal(call):
        return None
    batch, heads, q_len, kv_len = call.shape
    region = ((0, batch), (0, heads), (0, q_len), (0, kv_len))
    ((_, limit),) = MaskTiles(call.terms.mask, call.grid, call.q.dtype).limits(region, (kv_len, 0))
    return limit.clamp(max=0.0).expand(call.shape)
