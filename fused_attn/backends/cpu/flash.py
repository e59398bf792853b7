"""torch's own flash kernel for CPU tensors, where it computes the same function as the tiles.

Its advantages: one parallel region per call and no temporary outside the first-level caches. Measured beside the tiles, the tiles' time / its
time, forward and with backward, one thread of a busy machine, B1 H4 D64: float32 windows of 16, 64 and 256 keys each side at L = 2048 1.16/1.09,
1.15/1.05, 1.16/1.08; bfloat16 (converted) at L = 1024 1.44/1.10, with a dense mask 1.24/1.02, at L = 256 1.28/1.05 and 1.18/0.94.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn.backends.base import Forward, Gradients, Incoming
from fused_attn.backends.cpu import devices
from fused_attn.backends.cpu.flash_blocks import Block, Blocks
from fused_attn.backends.cpu.tiles import is_finite
from fused_attn.checks import has_finite_products
from fused_attn.layout import empty_out, laid_out_like
from fused_attn.lowering import LoweredAttention, stat_dtype
from fused_attn.score_mods import ADDED

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
    """Whether the kernel can take the call: any mask, and modifications that add to the scores.

    It leaks NaN through a mask, loses a NaN in q when a row of keys fills no vector (torch 2.13), and knows no other value_dim.
    """
    terms, (q, k, v) = call.terms, (call.q, call.k, call.v)
    if terms.scoring is not None or terms.normalizer is not None or terms.sinks is not None or terms.dropout is not None:
        return False
    if not devices.at_hand(q) or any(m.name not in ADDED or m.layout is not None for m in terms.mods):
        return False
    if q.shape[3] != v.shape[3] or not q.stride(3) == k.stride(3) == v.stride(3) == 1 or 0 in (q.numel(), k.numel()):
        return False
    if terms.mask.is_trivial and not terms.mods:
        return k.shape[2] >= NAN_SAFE_KEYS or is_finite(q)
    return is_finite(v) and has_finite_products(q, k)


class _Operands:
    """q, k, v and what follows them, cut to blocks as the kernel takes them: [n, groups, rows, dim], a group of query heads per key head.

    Without groups these are the batches and heads. With groups n counts pairs of a batch and a key head, whose keys have stride 0 along
    the groups, so that nothing is copied.
    """

    def __init__(self, call: LoweredAttention) -> None:
        self.call, self.dtype = call, stat_dtype(call.q.dtype)
        self.groups = call.q.shape[1] // call.k.shape[1]
        self.q, self.k, self.v = (t.to(self.dtype) for t in (call.q, call.k, call.v))

    def rows(self, tensor: Tensor, block: Block) -> Tensor:
        """The block's part of [batch, heads, q_len, ...]."""
        batches, heads, queries, _ = (slice(*r) for r in block.region)
        part = tensor[batches, heads, queries]
        return part if self.groups == 1 else part.unflatten(1, (-1, self.groups)).flatten(0, 1)

    def keys(self, tensor: Tensor, block: Block) -> Tensor:
        """The block's part of [batch, kv_heads, kv_len, ...]."""
        part = self.own_keys(tensor, block)
        return part if self.groups == 1 else part.flatten(0, 1)[:, None].expand(-1, self.groups, -1, -1)

    def own_keys(self, tensor: Tensor, block: Block) -> Tensor:
        """The same, one per key head."""
        batches, (h0, h1), _, keys = block.region
        return tensor[slice(*batches), h0 // self.groups : h1 // self.groups, slice(*keys)]

    def spread(self, block: Block, values: Tensor) -> Tensor:
        """[batch|1, heads|1, rows|1, ...] of a block as [n, groups, rows, ...], with stride 0 where it repeats."""
        whole = values.expand([end - start for start, end in block.region][: values.dim()])
        return whole if self.groups == 1 else whole.unflatten(1, (-1, self.groups)).flatten(0, 1)

    def _additive(self, block: Block) -> Tensor | None:
        return None if block.additive is None else self.spread(block, block.additive)

    def write_rows(self, target: Tensor, block: Block, values: Tensor) -> None:
        """Puts [n, groups, rows, ...] into its place in [batch, heads, q_len, ...]."""
        batches, heads, queries, _ = (slice(*r) for r in block.region)
        part = target[batches, heads, queries]
        if self.groups == 1:
            part.copy_(values)
        else:
            part.unflatten(1, (-1, self.groups)).copy_(values.unflatten(0, (part.shape[0], -1)))

    def add_keys(self, target: Tensor, block: Block, values: Tensor) -> None:
        """Adds [n, groups, keys, ...] to its place in [batch, kv_heads, kv_len, ...]."""
        part = self.own_keys(target, block)
        part.add_(values if self.groups == 1 else values.sum(1).view(part.shape))

    def attended(self, block: Block) -> tuple[Tensor, Tensor]:
        """The block's output and lse, [n, groups, rows, dim] and [n, groups, rows]; lse of a row without keys is not told."""
        q, k, v = self.rows(self.q, block), self.keys(self.k, block), self.keys(self.v, block)
        return _flash(q, k, v, 0.0, block.is_causal, attn_mask=self._additive(block), scale=self.call.terms.scale)

    def differentiated(self, block: Block, dout: Tensor, result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the block's q, k and v, from its part of dout and of the output and lse."""
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        q, k, v = self.rows(self.q, block), self.keys(self.k, block), self.keys(self.v, block)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            dout, q, k, v, *result, 0.0, block.is_causal, attn_mask=self._additive(block), scale=self.call.terms.scale
        )


def _may_lose_nan(block: Block, is_modified: bool) -> bool:
    """Whether what is added holds a NaN among the last keys, which may fill no vector."""
    return is_modified and block.additive is not None and bool(block.additive[..., -NAN_SAFE_KEYS:].isnan().any())


def forward(call: LoweredAttention) -> Forward | None:
    """The output and lse, -inf in rows without keys.

    None where the result would not be right: NaN, or a row of scores of -inf alone, of which the kernel makes NaN.
    """
    work, blocks, results = _Operands(call), Blocks(call, stat_dtype(call.q.dtype)), None
    for block in blocks:
        if _may_lose_nan(block, bool(call.terms.mods)):
            return None
        out, lse = work.attended(block)
        # The kernel gives rows without keys an lse of 0; looking for these first saves reading everything that was added once more.
        if block.additive is not None and not bool((lse.abs() > 0).all()):
            lse.masked_fill_(work.spread(block, block.additive.amax(-1) == -torch.inf), -torch.inf)
        if out.shape == call.q.shape and out.dtype == call.q.dtype:
            results = out, lse.contiguous()
            continue
        results = results or (empty_out(call.q, call.v.shape[3]), call.q.new_empty(call.shape[:3], dtype=work.dtype))
        for target, part in zip(results, (out, lse), strict=True):
            work.write_rows(target, block, part)
    assert results is not None
    return Forward(*results, no_stats(results[1])) if _is_sound(call, *results) else None


def _is_sound(call: LoweredAttention, out: Tensor, lse: Tensor) -> bool:
    if call.terms.mask.is_trivial and not call.terms.mods:
        return is_finite(lse)
    # Only what is added may be NaN or infinite here.
    return not call.terms.mods or (is_finite(out) and bool((lse < torch.inf).all()))


def suits_backward(call: LoweredAttention, result: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> bool:
    """Whether its backward is right as well: lse is of ordinary size, nothing arrives but at the output, no modification is learned."""
    others = (incoming.dlse, incoming.dprobs, incoming.dscores)
    if incoming.dout is None or any(t is not None for t in others) or any(needs[3:]) or not suits(call):
        return False
    if call.terms.mask.is_trivial and not call.terms.mods:
        return call.shape[3] >= NAN_SAFE_KEYS and float(result.lse.abs().amax()) <= LARGEST_LSE
    if call.shape[3] < BACKWARD_KEYS or not has_finite_products(incoming.dout, call.v):
        return False
    return float(result.lse.masked_fill(result.lse == -torch.inf, 0.0).abs().amax()) <= LARGEST_LSE


def backward(call: LoweredAttention, result: Forward, dout: Tensor, needs: tuple[bool, ...]) -> Gradients | None:
    """Gradients of q, k and v, and None for sinks and modifications; None where a modification's NaN would reach them."""
    work, blocks = _Operands(call), Blocks(call, stat_dtype(call.q.dtype))
    grads: tuple[Tensor, Tensor, Tensor] | None = None
    lse, dout = result.lse, dout.to(work.dtype)
    if not call.terms.mask.is_trivial or call.terms.mods:
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
    for block in blocks:
        # What was rounded to 16 bits is too coarse for the sum of out * dout, from which every score's gradient is subtracted.
        of_rows = work.rows(result.out, block) if call.q.dtype == work.dtype else work.attended(block)[0]
        parts = work.differentiated(block, work.rows(dout, block), (of_rows, work.rows(lse, block)))
        if parts[0].shape == call.q.shape and parts[1].shape == call.k.shape:
            grads = parts
            continue
        dk, dv = (grads[1:]) if grads else (torch.zeros_like(t, dtype=work.dtype) for t in (call.k, call.v))
        grads = (grads[0] if grads else torch.empty_like(call.q)), dk, dv
        work.write_rows(grads[0], block, parts[0])
        work.add_keys(grads[1], block, parts[1])
        work.add_keys(grads[2], block, parts[2])
    assert grads is not None
    if call.terms.mods and not is_finite(*grads):
        return None
    inputs = (call.q, call.k, call.v)
    found = (laid_out_like(g.to(t.dtype), t) if need else None for g, t, need in zip(grads, inputs, needs, strict=False))
    return *found, *(None for _ in call.terms.parameters)
