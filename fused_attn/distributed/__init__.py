"""Attention over a sequence that several processes share, on torch.distributed: NCCL on GPUs, gloo on CPUs.

Every rank holds its part of the queries, keys and values and gets its part of the output, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxOutput, AuxRequest
from fused_attn.checks import described
from fused_attn.distributed import exchange, ring
from fused_attn.distributed.plan import Plan
from fused_attn.distributed.shards import Order, Shards
from fused_attn.distributed.traffic import Traffic, counted
from fused_attn.dropout import Dropout
from fused_attn.functional import in_autocast_dtype, is_autocast
from fused_attn.masks import Mask
from fused_attn.normalizers import Normalizer
from fused_attn.score_mods import ScoreMod

__all__ = ["Shards", "Traffic", "context_parallel_attention", "counted"]

_EXCHANGES = {"gather": exchange.gather_attention, "heads": exchange.heads_attention}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Any = None,
    *,
    method: Literal["ring", "gather", "heads"] = "ring",
    order: Order = "contiguous",
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    score_mods: Sequence[ScoreMod] = (),
    sinks: Tensor | None = None,
    dropout: Dropout | None = None,
    normalizer: Normalizer | None = None,
    return_aux: AuxRequest | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AuxOutput]:
    """``fused_attn.attention`` of a sequence that the ranks of a group share; every rank calls it, with the same arguments but its own rows.

    Args:
        q: this rank's queries [batch, heads, length / ranks, head_dim], in the order of ``Shards``.
        k: this rank's keys [batch, kv_heads, length / ranks, head_dim].
        v: this rank's values [batch, kv_heads, length / ranks, value_dim].
        group: a process group, a DeviceMesh with one dimension, or None for all ranks.
        method: "ring": keys and values pass by, O(length / ranks) memory; "gather": every rank gets all keys and values; "heads": every
            rank computes some heads on the whole sequence (Ulysses). The ring gathers where more than lse is asked for.
        order: "contiguous", or "zigzag", which gives every rank the same work under a causal mask.
        mask: of the whole sequence, the same on every rank: ``Causal()``, ``Documents(ids)`` with ids of all positions, ...
        scale: factor of the scores; 1/sqrt(head_dim) by default.
        score_mods: of the whole sequence, the same on every rank; a ``Bias`` may have this rank's rows alone,
            [batch|1, heads|1, length / ranks, length].
        sinks: logits [heads], the same on every rank.
        dropout: with a seed, the same on every rank, it removes what a single device would; without one, each rank draws its own.
        normalizer: None for the softmax, or ``Sigmoid()``.
        return_aux: what to return besides, of this rank's rows; column_sums are their share of the whole.
        backend: "auto", or a name that runs or raises, never falls back.

    Returns:
        out [batch, heads, length / ranks, value_dim], or (out, AuxOutput) exactly when ``return_aux`` is given. Gradients of what is the same on
        every rank (sinks, slopes, whole biases) are this rank's share; they add up to the whole, as data-parallel gradients do.

    Raises:
        ValueError, TypeError: the arguments contradict each other, or torch.distributed is not initialised.
        UnsupportedError: the problem needs whole rows in one place, or the backend refuses it.
        RuntimeError: another rank failed, or did not come within the group's timeout.

    Example:
        >>> import tempfile, torch.distributed as dist
        >>> from fused_attn import Causal, attention
        >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
        >>> q, k, v = torch.randn(3, 1, 2, 8, 16).unbind(0)
        >>> torch.allclose(context_parallel_attention(q, k, v, mask=Causal()), attention(q, k, v, mask=Causal()), atol=1e-6)
        True
        >>> dist.destroy_process_group()
    """
    if method not in ("ring", *_EXCHANGES):
        raise ValueError(f"method must be 'ring', 'gather' or 'heads'; got {described(method)}. 'ring' takes the least memory.")
    options = {
        "mask": mask, "scale": scale, "q_offset": None, "score_mods": score_mods, "sinks": sinks, "dropout": dropout, "normalizer": normalizer,
        "return_aux": return_aux,
    }  # fmt: skip
    if is_autocast(q):
        with torch.autocast(q.device.type, enabled=False):
            out, aux = _attention(in_autocast_dtype(q, k, v), (group, method, order), options, backend)
    else:
        out, aux = _attention((q, k, v), (group, method, order), options, backend)
    return out if return_aux is None else (out, aux)


def _attention(tensors: tuple[Any, ...], shared: tuple[Any, str, Order], options: dict[str, Any], backend: str) -> tuple[Tensor, AuxOutput]:
    (q, k, v), (group, method, order), request = tensors, shared, options["return_aux"]
    plan = Plan.of((q, k, v), group, order, options, backend)
    if method != "ring" or (request is not None and request.needs_pass):
        return _EXCHANGES["gather" if method == "ring" else method](plan, q, k, v)
    out, lse = ring.attention(plan, q, k, v)
    return out, AuxOutput(lse=lse if request is not None and request.lse else None)
