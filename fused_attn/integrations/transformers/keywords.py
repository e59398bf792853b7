"""Keywords that models of the transformers package hand to attention: what each means, which mean nothing, which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_attn.checks import described
from fused_attn.masks import Dense, Documents, Mask
from fused_attn.problem import UnsupportedError

# Keywords of models that say nothing about attention's values once q, k, v and the mask are there.
HARMLESS = frozenset(
    (
        "cache_position", "cross_attention_states", "deterministic", "encoder_attention_mask", "encoder_hidden_states", "input_ids", "kernel_options",
        "labels", "layer_idx", "logits_to_keep", "max_length_k", "max_length_q", "mm_token_type_ids", "num_items_in_batch", "output_hidden_states",
        "output_router_logits", "past_key_values", "position_embeddings", "position_ids", "return_dict", "seq_idx", "target_dtype", "token_type_ids",
        "use_cache",
    )
)  # fmt: skip
# What attention would have to do for a keyword that is refused.
REFUSED = {
    "block_indices": "attend to chosen blocks of keys, of a size that is not said. Give the choice as a mask, or use attn_implementation='sdpa'.",
    "cache": "read keys and values from pages (continuous batching). Use attn_implementation='sdpa' there.",
    "head_mask": "scale the weights of whole heads. Use attn_implementation='eager', or scale their outputs.",
    "layer_head_mask": "scale the weights of whole heads. Use attn_implementation='eager', or scale their outputs.",
    "use_top_left_mask": "align its causal mask as an old FlashAttention did. Pass the mask itself.",
}
HONOURED = frozenset(
    ("softcap", "position_bias", "s_aux", "sinks", "sliding_window", "indices", "cu_seq_lens_q", "cu_seq_lens_k", "output_attentions")
)


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for a keyword that is given and is neither honoured nor harmless; None and False give nothing.

    Example:
        >>> refuse_unknown({"use_cache": True, "head_mask": None, "softcap": 30.0})
        >>> refuse_unknown({"block_indices": torch.zeros(1, 2, 3, 4)})
        Traceback (most recent call last):
            ...
        fused_attn.problem.UnsupportedError: block_indices must be None for fused_attn; got torch.float32 [1, 2, 3, 4]. ...
    """
    for name, value in options.items():
        if name in HONOURED or name in HARMLESS or value is None or value is False:
            continue
        if name in REFUSED:
            raise UnsupportedError(f"{name} must be None for fused_attn; got {described(value)}. Attention would have to {REFUSED[name]}")
        raise UnsupportedError(
            f"keywords of attention must be known to fused_attn, for one may change its meaning; got {name}={described(value)}. "
            "Leave it out, or use attn_implementation='sdpa'."
        )


def sinks_of(options: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """One logit per head, [heads], or one per query, [batch|1, heads, q_len, 1]."""
    sinks, other = options.get("s_aux"), options.get("sinks")
    if sinks is not None and other is not None:
        raise ValueError("s_aux and sinks must not be given together; got both. They are two names of the same logits.")
    sinks = other if sinks is None else sinks
    if sinks is None:
        return None, None
    return (None, sinks) if sinks.dim() == 4 and (sinks.shape[0] > 1 or sinks.shape[2] > 1) else (sinks.reshape(-1), None)


def shared_with_sinks(lse: Tensor | None, sinks: Tensor, out: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Output and weights, where each query's sink takes its part: exp(lse) / (exp(lse) + exp(sink)) of them stays."""
    assert lse is not None
    share = torch.sigmoid(lse[..., None] - sinks.to(lse.dtype))
    return (out * share).to(out.dtype), None if probs is None else (probs * share).to(probs.dtype)


def chosen_keys(indices: Tensor | None, sizes: tuple[int, int]) -> Mask | None:
    """The keys at ``indices`` [batch, q_len, n]; one that is no key chooses nothing. One byte per pair."""
    if indices is None:
        return None
    q_len, kv_len = sizes
    if indices.dim() != 3 or indices.shape[1] != q_len:
        raise ValueError(
            f"indices must have shape [batch, q_len, n] with {q_len} queries; got {described(indices)}. Choose keys per query."
        )
    keep = torch.zeros((indices.shape[0], q_len, kv_len + 1), dtype=torch.bool, device=indices.device)
    keep = keep.scatter(-1, torch.where((indices < 0) | (indices > kv_len), kv_len, indices).long(), True)
    return Dense(keep[:, None, :, :kv_len])


def packed_documents(options: Mapping[str, Any], sizes: tuple[int, int]) -> Mask | None:
    """Sequences packed into one, as cumulative lengths."""
    cu_q, cu_k = options.get("cu_seq_lens_q"), options.get("cu_seq_lens_k")
    if cu_q is None and cu_k is None:
        return None
    if cu_q is None or cu_k is None:
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must be given together; got one of them. Pass the same tensor twice for self-attention."
        )
    return Documents.from_cu_seqlens(cu_q, cu_k, total=sizes)
