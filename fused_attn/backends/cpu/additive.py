"""Additive scores sum_d w_d tanh(q_d + k_d) of one tile and their gradients, in blocks that stay in cache.

Autograd through the [rows, keys, head_dim] array would keep three of its size; here one block of it is in memory, made again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of one block, 4 MB of float32. Forward/with backward of float32 B2 H4 L512 D64, one core: 2^17 134/469 ms, 2^18 119/408, 2^19 107/365,
# 2^20 102/349, 2^21 102/355; two cores: 2^19 74/269, 2^20 65/227, 2^21 68/218. Where other processes want the same cores, every parallel
# region waits for the thread that is not running: 2^19 530/1780, 2^20 330/1080. Plain torch holds 1 GB, in which a block more is nothing.
BLOCK = 1 << 20
# Mean of |q| and of |k|, added, from which on tanh(x) is taken as 2 sigmoid(2 x) - 1: 0.3 ns per element on two cores against 1.3. Its error is
# half an eps whatever x is, which is tanh's own where x is of the order of 1; below, tanh keeps its digits.
BY_SIGMOID = 0.25


def scores(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """Scores [batch, heads, rows, keys].

    Args:
        q: [batch, heads, rows, head_dim].
        k: [batch, kv_heads, keys, head_dim]; query head n meets key head n // (heads // kv_heads).
        weight: [1, heads, 1, head_dim].
    """
    batch, heads, rows, head_dim = q.shape
    pairs, groups = batch * k.shape[1], heads // max(1, k.shape[1])
    weights = weight.expand(batch, -1, -1, -1).reshape(pairs, groups, head_dim)
    result: Tensor = _Scores.apply(k.shape[1], q.reshape(pairs, groups, rows, head_dim), k.reshape(pairs, k.shape[2], head_dim), weights)  # type: ignore[no-untyped-call]
    return result.view(batch, heads, rows, k.shape[2])


class _Scores(torch.autograd.Function):
    """q [pairs, groups, rows, head_dim], k [pairs, keys, head_dim] and weight [pairs, groups, head_dim] to [pairs, groups, rows, keys]."""

    @staticmethod
    def forward(ctx: Any, kv_heads: int, q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, weight)
        ctx.kv_heads = kv_heads
        result = q.new_zeros((*q.shape[:3], k.shape[1]))
        for (p, g, rows, keys), bent in _blocks(q, k, kv_heads):
            part = torch.matmul(bent.view(bent.shape[0], -1, bent.shape[3]), weight[p, g, :, None])
            result[p, g, rows, keys] = part.view(bent.shape[:3])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, weight = ctx.saved_tensors
        dq, dk, dweight = (torch.zeros_like(t) if need else None for t, need in zip((q, k, weight), ctx.needs_input_grad[1:], strict=True))
        sums = grad.sum(3), grad.sum(2)
        for (p, g, rows, keys), bent in _blocks(q, k, ctx.kv_heads):
            ds = grad[p, g, rows, keys].contiguous()
            if dweight is not None:
                dweight[p, g] += torch.bmm(ds.view(ds.shape[0], 1, -1), bent.view(ds.shape[0], -1, bent.shape[3]))[:, 0]
            bent.square_().mul_(ds[..., None])
            if dq is not None:
                dq[p, g, rows] -= bent.sum(2)
            if dk is not None:
                dk[p, keys].addcmul_(bent.sum(1), weight[p, g, None], value=-1)
        # The derivative of tanh is 1 - tanh^2: so far the second part.
        if dq is not None:
            dq.add_(sums[0][..., None]).mul_(weight[:, :, None])
        if dk is not None:
            dk.add_(torch.bmm(sums[1].mT, weight))
        return None, dq, dk, dweight


def _blocks(q: Tensor, k: Tensor, kv_heads: int) -> Iterator[tuple[tuple[slice, int, slice, slice], Tensor]]:
    """(pairs, group, rows, keys) and tanh(q + k) of each block, [pairs, rows, keys, head_dim]."""
    pairs, groups, rows, head_dim = q.shape
    width, kv_len = max(1, head_dim), k.shape[1]
    sizes = q.abs().mean((1, 2, 3)) + k.abs().mean((1, 2)) if q.dtype == torch.float32 else q.new_zeros(pairs)
    by_sigmoid = (sizes >= BY_SIGMOID).view(-1, kv_heads).all(1).repeat_interleave(kv_heads)
    quick = by_sigmoid.tolist()
    some_keys = max(1, min(kv_len, BLOCK // width))
    some_rows = max(1, min(rows, BLOCK // (some_keys * width)))
    # Heads of one sequence at most, and the same for every sequence, so that its bits are those of a batch of one.
    some_pairs = kv_heads if kv_heads * rows * kv_len * width <= BLOCK else 1
    minus_one, room = q.new_full((), -1.0), q.new_empty(some_pairs * some_rows * some_keys * head_dim)
    q, k = (torch.where(by_sigmoid.view(-1, *[1] * (t.dim() - 1)), 2 * t, t) for t in (q, k))
    for p, g, i, j in product(range(0, pairs, some_pairs), range(groups), range(0, rows, some_rows), range(0, kv_len, some_keys)):
        where = slice(p, p + some_pairs), g, slice(i, i + some_rows), slice(j, j + some_keys)
        left, right = q[where[0], g, where[2], None], k[where[0], None, where[3]]
        shape = (left.shape[0], left.shape[1], right.shape[2], head_dim)
        sums = torch.add(left, right, out=room[: shape[0] * shape[1] * shape[2] * head_dim].view(shape))
        yield where, torch.add(minus_one, sums.sigmoid_(), alpha=2, out=sums) if quick[p] else sums.tanh_()
