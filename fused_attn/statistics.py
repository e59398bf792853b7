"""Gradients of what attention says of its rows and columns (largest scores, column sums, entropies), for every backend.

Rows are recomputed by the definition a block at a time, O(block * kv_len) memory, and only where a gradient arrives at a statistic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.backends import eager
from fused_attn.backends.base import Gradients, Incoming
from fused_attn.layout import laid_out_like
from fused_attn.lowering import LoweredAttention, Range, stat_dtype
from fused_attn.vocabulary import modifiers_of, with_parameters

# Scores of a block: 16 MB of float32, and autograd keeps some nine of that size (75 MB at its peak with two heads of 1024 keys).
BLOCK = 1 << 22


def gradients(call: LoweredAttention, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of (q, k, v, sinks, *mod tensors) through the statistics alone, None where not needed."""
    inputs = (call.q, call.k, call.v, *call.terms.parameters)
    totals = [
        torch.zeros_like(t, dtype=stat_dtype(t.dtype)) if need and t is not None else None for t, need in zip(inputs, needs, strict=True)
    ]
    for batches, rows in _blocks(call):
        _add(call, incoming, (batches, rows), totals)
    return tuple(g if g is None or t is None else laid_out_like(g.to(t.dtype), t) for g, t in zip(totals, inputs, strict=True))


def _blocks(call: LoweredAttention) -> Iterator[tuple[Range, Range]]:
    """Batches and rows; all batches at once where a modification's own code may hold a tensor of them."""
    batch, heads, q_len, kv_len = call.shape
    together = any(m.layout is not None for m in call.terms.entries)
    # A scoring's own code may hold head_dim values for each score.
    each = 1 if call.terms.scoring is None else max(1, call.q.shape[3])
    step = max(1, BLOCK // max(1, heads * kv_len * each * (batch if together else 1)))
    for b0, b1 in [(0, batch)] if together else [(b, b + 1) for b in range(batch)]:
        for start in range(0, q_len, step):
            yield (b0, b1), (start, min(start + step, q_len))


def _add(call: LoweredAttention, incoming: Incoming, block: tuple[Range, Range], totals: list[Tensor | None]) -> None:
    batches, rows = slice(*block[0]), slice(*block[1])
    _, heads, _, kv_len = call.shape
    asked = [g is not None for g in incoming.statistics]
    grid = call.grid.at(block[0], (0, heads), block[1], (0, kv_len))
    dtype = stat_dtype(call.q.dtype)
    parts = (call.q[batches, :, rows].to(dtype), call.k[batches].to(dtype), None, *call.terms.parameters)
    leaves = [None if t is None else t.detach().requires_grad_(g is not None) for t, g in zip(parts, totals, strict=True)]
    q, k = leaves[:2]
    assert q is not None
    assert k is not None
    with torch.enable_grad():
        modifiers = modifiers_of(with_parameters(call.terms, leaves[3:]))
        found = eager.Rows.of((q, eager.repeated(k, heads)), modifiers, grid, call.terms.mask.dense(grid))
        aux = found.aux(AuxRequest.of((False, False, False, *asked)), dtype)
    pairs = [
        (t, g[batches, :, rows] if place != 1 else g[batches])
        for place, (t, g) in enumerate(zip((aux.max_scores, aux.column_sums, aux.entropy), incoming.statistics, strict=True))
        if t is not None and g is not None and t.requires_grad
    ]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    if not wanted or not pairs:
        return
    grads = torch.autograd.grad([t for t, _ in pairs], wanted, [g.to(t.dtype) for t, g in pairs], allow_unused=True)
    left = iter(grads)
    for place, (leaf, total) in enumerate(zip(leaves, totals, strict=True)):
        if leaf is None or total is None or not leaf.requires_grad:
            continue
        grad = next(left)
        if grad is not None:
            target = total[batches, :, rows] if place == 0 else total[batches] if place == 1 else total
            target.add_(grad)
