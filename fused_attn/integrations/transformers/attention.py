"""What ``transformers.AttentionInterface`` calls: its arguments as those of ``fused_attn.attention``, its keywords honoured or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.checks import described
from fused_attn.dropout import Dropout
from fused_attn.functional import attention
from fused_attn.integrations.transformers.masks import RowMask
from fused_attn.masks import Causal, Dense, Documents, Mask, SlidingWindow
from fused_attn.problem import UnsupportedError
from fused_attn.score_mods import Bias, ScoreMod, SoftCap
from fused_attn.scoring import DotProduct

# Keywords of models that say nothing about attention's values once q, k, v and the mask are there.
HARMLESS = frozenset(
    (
        "cache_position", "cross_attention_states", "deterministic", "encoder_attention_mask", "encoder_hidden_states", "input_ids", "kernel_options",
        "labels", "logits_to_keep", "max_length_k", "max_length_q", "mm_token_type_ids", "num_items_in_batch", "output_hidden_states",
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


@dataclass(frozen=True)
class Attend:
    """``transformers.AttentionInterface``'s function, on one backend.

    Args:
        backend: "auto", or a name that runs or raises, never falls back.
        collector: where models say what their hooks collect: ``get()`` gives a mapping whose keys name outputs, or None.
    """

    backend: str = "auto"
    collector: Any = None

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | Tensor | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one layer.

        Args:
            module: the layer; its ``is_causal`` counts where the keyword is None, True without either.
            query: [batch, heads, q_len, head_dim].
            key: [batch, kv_heads, kv_len, head_dim], not repeated.
            value: [batch, kv_heads, kv_len, value_dim].
            attention_mask: a ``RowMask``, a bool tensor (True may attend) or a float tensor (added) [batch|1, heads|1, q_len, kv_len], or
                None: causal from the first key on where the layer is causal and there are several queries, otherwise everything.
            dropout: chance of removal.
            scaling: factor of the scores; 1/sqrt(head_dim) for None.
            is_causal: whether the layer is causal; counts without a mask only.
            **options: ``softcap``, ``position_bias`` [batch|1, heads, q_len, kv_len], ``s_aux`` or ``sinks`` [heads], ``sliding_window``
                (without a mask; a mask holds it already), ``indices`` [batch, q_len, n] of the keys that a query may attend to,
                ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``output_attentions``.

        Returns:
            out [batch, q_len, heads, value_dim], contiguous, and the weights [batch, heads, q_len, kv_len] before dropout where the
            call or the model's hooks ask for them, otherwise None.

        Raises:
            UnsupportedError: a keyword that changes the meaning is not known here.
            ValueError, TypeError: as ``fused_attn.attention``.
        """
        _refuse(options)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        q_len, kv_len = query.shape[2], key.shape[2]
        causal = bool(causal) and attention_mask is None and q_len > 1
        bias = options.get("position_bias")
        if causal and kv_len > q_len:  # an empty static cache: its other keys are zeros
            key, value = key[:, :, :q_len], value[:, :, :q_len]
            bias = None if bias is None else bias[..., :q_len]
        if query.shape[0] == 1 < key.shape[0]:
            query = query.expand(key.shape[0], -1, -1, -1)
        mask, additive = _masks(attention_mask, causal, options, (query, key))
        out, aux = attention(
            query,
            key,
            value,
            mask=mask,
            **_factor(scaling),
            q_offset=None if q_len == key.shape[2] else key.shape[2] - q_len,
            score_mods=_score_mods(options.get("softcap"), bias, additive),
            sinks=_sinks(options),
            dropout=Dropout(dropout) if dropout else None,
            return_aux=AuxRequest(probs=self._is_asked(options)),
            backend=self.backend,
        )
        return out.transpose(1, 2).contiguous(), aux.probs

    def _is_asked(self, options: Mapping[str, Any]) -> bool:
        """Whether somebody wants the weights: this call, or hooks of a model that tells its attention nothing (GPT-2)."""
        if options.get("output_attentions"):
            return True
        collected = None if self.collector is None else self.collector.get()
        return collected is not None and any(["attentions" in name for name in collected])


def _refuse(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _KNOWN or name in HARMLESS or value is None or value is False:
            continue
        if name in REFUSED:
            raise UnsupportedError(f"{name} must be None for fused_attn; got {described(value)}. Attention would have to {REFUSED[name]}")
        raise UnsupportedError(
            f"keywords of attention must be known to fused_attn, for one may change its meaning; got {name}={described(value)}. "
            "Leave it out, or use attn_implementation='sdpa'."
        )


_KNOWN = frozenset(
    ("softcap", "position_bias", "s_aux", "sinks", "sliding_window", "indices", "cu_seq_lens_q", "cu_seq_lens_k", "output_attentions")
)


def _factor(scaling: float | Tensor | None) -> dict[str, Any]:
    return {"scoring": DotProduct(scaling)} if isinstance(scaling, Tensor) else {"scale": scaling}


def _score_mods(softcap: float | None, *biases: Tensor | None) -> tuple[ScoreMod, ...]:
    """The cap comes before whatever is added."""
    caps = () if softcap is None else (SoftCap(softcap),)
    return (*caps, *[Bias(bias) for bias in biases if bias is not None])


def _sinks(options: Mapping[str, Any]) -> Tensor | None:
    """One logit per head, [heads]."""
    given = [name for name in ("s_aux", "sinks") if options.get(name) is not None]
    if not given:
        return None
    sinks: Tensor = options[given[0]]
    if sinks.dim() > 1 and sinks.numel() != max(sinks.shape):
        raise UnsupportedError(
            f"{given[0]} must be one logit per head for fused_attn; got {described(sinks)}. Use attn_implementation='eager' for sinks per query."
        )
    return sinks.reshape(-1)


def _masks(
    attention_mask: Tensor | None, causal: bool, options: Mapping[str, Any], tensors: tuple[Tensor, Tensor]
) -> tuple[Mask | None, Tensor | None]:
    """What may attend, and what a float mask adds."""
    query, key = tensors
    q_len, kv_len = query.shape[2], key.shape[2]
    additive, masks = None, []
    if isinstance(attention_mask, RowMask):
        if tuple(attention_mask.shape[2:]) != (q_len, kv_len):
            raise ValueError(
                f"attention_mask must have shape [batch, 1, q_len, kv_len] with {q_len} queries and {kv_len} keys; got "
                f"{list(attention_mask.shape)}. Cut mask.dense() and pass the part."
            )
        masks.append(attention_mask.mask)
    elif attention_mask is not None and attention_mask.is_floating_point():
        additive = attention_mask
    elif attention_mask is not None:
        masks.append(Dense(attention_mask))
    elif causal:
        masks.append(Causal())
    window = options.get("sliding_window")
    if attention_mask is None and window is not None and 0 < window < kv_len:
        masks.append(SlidingWindow(window - 1, None if causal else window - 1))
    masks += [made for made in (_chosen(options.get("indices"), (q_len, kv_len)), _documents(options, (q_len, kv_len))) if made is not None]
    result = masks[0] if masks else None
    for mask in masks[1:]:
        result = result & mask
    return result, additive


def _chosen(indices: Tensor | None, sizes: tuple[int, int]) -> Mask | None:
    """The keys at ``indices`` [batch, q_len, n]; a negative one chooses nothing. One byte per pair."""
    if indices is None:
        return None
    q_len, kv_len = sizes
    if indices.dim() != 3 or indices.shape[1] != q_len:
        raise ValueError(f"indices must have shape [batch, q_len, n] with {q_len} queries; got {described(indices)}. Choose keys per query.")
    keep = torch.zeros((indices.shape[0], q_len, kv_len + 1), dtype=torch.bool, device=indices.device)
    keep = keep.scatter(-1, torch.where(indices < 0, kv_len, indices).long(), True)
    return Dense(keep[:, None, :, :kv_len])


def _documents(options: Mapping[str, Any], sizes: tuple[int, int]) -> Mask | None:
    """Sequences packed into one, as cumulative lengths."""
    cu_q, cu_k = options.get("cu_seq_lens_q"), options.get("cu_seq_lens_k")
    if cu_q is None and cu_k is None:
        return None
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together; got one of them. Pass the same tensor twice for self-attention.")
    return Documents.from_cu_seqlens(cu_q, cu_k, total=sizes)
