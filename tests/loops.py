"""Attention row by row in float64 over the pairs that may attend, and nothing else: what edges are held to.

A pair that may not attend is never computed, so nothing in it can reach a result; a row whose allowed scores are all -inf is an empty one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AUX = ("probs", "scores", "lse", "max_scores", "column_sums", "entropy")


@dataclass(frozen=True)
class Call:
    """Operands in float64: q [batch, heads, q_len, head_dim], k and v with kv_heads, keep [batch, heads, q_len, kv_len].

    ``mods`` are functions (scores [n], b, h, q, keys [n]) -> scores [n], applied after the scale.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    scale: float
    mods: tuple[Any, ...] = ()
    sinks: Tensor | None = None


def _row(call: Call, b: int, h: int, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys that row (b, h, i) may attend to, their scores, and the sink where there is one."""
    kv_h = h // (call.q.shape[1] // call.k.shape[1])
    keys = call.keep[b, h, i].nonzero()[:, 0]
    scores = (call.k[b, kv_h, keys] * call.q[b, h, i]).sum(-1) * call.scale
    for mod in call.mods:
        scores = mod(scores, b, h, i, keys)
    return keys, scores, None if call.sinks is None else call.sinks[h]


def attention(call: Call) -> dict[str, Tensor]:
    """out and every auxiliary output, differentiable as ``fused_attn.attention`` says."""
    batch, heads, q_len, _ = call.q.shape
    kv_len, value_dim = call.v.shape[2:]
    result = {
        "out": call.q.new_zeros(batch, heads, q_len, value_dim),
        "probs": call.q.new_zeros(batch, heads, q_len, kv_len),
        "scores": call.q.new_full((batch, heads, q_len, kv_len), -torch.inf),
        "lse": call.q.new_full((batch, heads, q_len), -torch.inf),
        "max_scores": call.q.new_full((batch, heads, q_len), -torch.inf),
        "entropy": call.q.new_zeros(batch, heads, q_len),
    }
    sums = call.q.new_zeros(batch, heads, kv_len)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, q_len))).tolist() if call.q.shape[:3].numel() else ():
        keys, scores, sink = _row(call, b, h, i)
        at = (torch.tensor(b), torch.tensor(h), torch.tensor(i))
        columns = scores if sink is None else torch.cat((scores, sink[None]))
        if not bool((scores != -torch.inf).any()):
            if sink is not None:
                result["lse"] = result["lse"].index_put(at, sink)
            continue
        result["scores"] = result["scores"].index_put((*at, keys), scores)
        result["max_scores"][b, h, i] = scores.detach().max()
        top = columns.detach().max()
        weights = (columns - top).exp()
        probs = (weights / weights.sum())[: len(keys)]
        v = call.v[b, h // (call.q.shape[1] // call.k.shape[1]), keys]
        result["out"] = result["out"].index_put(at, (probs[:, None] * v).sum(0))
        result["probs"] = result["probs"].index_put((*at, keys), probs)
        result["lse"] = result["lse"].index_put(at, weights.sum().log() + top)
        result["entropy"][b, h, i] = torch.special.entr(probs.detach()).sum()
        sums[b, h, keys] += probs.detach()
    return result | {"column_sums": sums}


def differences(got: Tensor, right: Tensor, tolerance: float, is_gradient: bool = False) -> str:
    """Where a result is not the right one: in NaN, in infinities, or by more than ``tolerance`` of the largest number; "" if nowhere.

    In gradients NaN and infinities are one: inf - inf comes and goes with the order of a sum.
    """
    got, right = got.double(), right.double()
    if got.shape != right.shape:
        return f"shape {list(got.shape)} instead of {list(right.shape)}"
    finite = right.isfinite()
    bound = tolerance * (1 + (right[finite].abs().max() if finite.any() else 0.0))
    same = ~got.isfinite() if is_gradient else (got == right) | (got.isnan() & right.isnan())
    wrong = torch.where(finite, ~((got - right).abs() <= bound), ~same)
    if not wrong.any():
        return ""
    place = tuple(wrong.nonzero()[0].tolist())
    return f"{int(wrong.sum())} elements, first {place}: {float(got[place])} instead of {float(right[place])}"
