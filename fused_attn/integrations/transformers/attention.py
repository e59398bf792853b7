"""What ``transformers.AttentionInterface`` calls: its arguments as those of ``fused_attn.attention``."""

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
from fused_attn.integrations.transformers.keywords import chosen_keys, packed_documents, refuse_unknown, shared_with_sinks, sinks_of
from fused_attn.integrations.transformers.mask_tensor import RowMask
from fused_attn.integrations.transformers.models import leaves_masks_to_attention
from fused_attn.masks import And, Causal, Dense, Mask, SlidingWindow
from fused_attn.score_mods import Bias, ScoreMod, SoftCap
from fused_attn.scoring import DotProduct


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
            module: the layer; its ``is_causal`` counts where the keyword is None, True without either, and only in models that leave their
                masks to attention.
            query: [batch, heads, q_len, head_dim].
            key: [batch, kv_heads, kv_len, head_dim], not repeated.
            value: [batch, kv_heads, kv_len, value_dim].
            attention_mask: a ``RowMask``, a bool tensor (True may attend) or a float tensor (added) [batch|1, heads|1, q_len, kv_len], or
                None: causal from the first key on where the layer is causal and there are several queries, otherwise everything.
            dropout: chance of removal.
            scaling: factor of the scores; 1/sqrt(head_dim) for None.
            is_causal: whether the layer is causal; counts without a mask only.
            **options: ``softcap``; ``position_bias`` [batch|1, heads, q_len, kv_len]; ``s_aux`` or ``sinks`` [heads] or
                [batch|1, heads, q_len, 1]; ``sliding_window`` (without a mask; a mask holds it already); ``indices`` [batch, q_len, n]
                of the keys that a query may attend to; ``cu_seq_lens_q`` and ``cu_seq_lens_k``; ``output_attentions``.

        Returns:
            out [batch, q_len, heads, value_dim], contiguous, and the weights [batch, heads, q_len, kv_len] before dropout where the
            call or the model's hooks ask for them, otherwise None.

        Raises:
            UnsupportedError: a keyword that changes the meaning is not known here.
            ValueError, TypeError: as ``fused_attn.attention``.
        """
        refuse_unknown(options)
        causal = _is_causal(module) if is_causal is None else is_causal
        q_len, kv_len = query.shape[2], key.shape[2]
        causal = bool(causal) and attention_mask is None and q_len > 1
        bias = options.get("position_bias")
        if causal and kv_len > q_len:  # an empty static cache: its other keys are zeros
            key, value = key[:, :, :q_len], value[:, :, :q_len]
            bias = None if bias is None else bias[..., :q_len]
        if query.shape[0] == 1 < key.shape[0]:
            query = query.expand(key.shape[0], -1, -1, -1)
        mask, additive = _masks(attention_mask, causal, options, (query, key))
        sinks, sinks_of_queries = sinks_of(options)
        out, aux = attention(
            query,
            key,
            value,
            mask=mask,
            **_factor(scaling),
            q_offset=0 if causal else key.shape[2] - q_len,
            score_mods=_score_mods(options.get("softcap"), bias, additive),
            sinks=sinks,
            dropout=Dropout(dropout) if dropout else None,
            return_aux=AuxRequest(probs=self._is_asked(options), lse=sinks_of_queries is not None),
            backend=self.backend,
        )
        probs = aux.probs
        if sinks_of_queries is not None:
            out, probs = shared_with_sinks(aux.lse, sinks_of_queries, out, probs)
        return out.transpose(1, 2).contiguous(), probs

    def _is_asked(self, options: Mapping[str, Any]) -> bool:
        """Whether somebody wants the weights: this call, or hooks of a model that tells its attention nothing (GPT-2)."""
        if options.get("output_attentions"):
            return True
        collected = None if self.collector is None else self.collector.get()
        return collected is not None and any("attentions" in name for name in collected)


def _is_causal(module: Any) -> bool:
    """What None for a mask means to a layer: everything, where its model makes a mask for each of its causal layers."""
    config = getattr(module, "config", None)
    return bool(getattr(module, "is_causal", True)) and (config is None or leaves_masks_to_attention(type(config)))


def _factor(scaling: float | Tensor | None) -> dict[str, Any]:
    return {"scoring": DotProduct(scaling)} if isinstance(scaling, Tensor) else {"scale": scaling}


def _score_mods(softcap: float | None, *biases: Tensor | None) -> tuple[ScoreMod, ...]:
    """The cap comes before whatever is added."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None; got {softcap}. None caps nothing.")
    caps = () if softcap is None else (SoftCap(softcap),)
    return (*caps, *[Bias(bias) for bias in biases if bias is not None])


def _masks(
    attention_mask: Tensor | None, causal: bool, options: Mapping[str, Any], tensors: tuple[Tensor, Tensor]
) -> tuple[Mask | None, Tensor | None]:
    """What may attend, and what a float mask adds."""
    query, key = tensors
    q_len, kv_len = query.shape[2], key.shape[2]
    additive: Tensor | None = None
    masks: list[Mask] = []
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
        if attention_mask.dtype != torch.bool:
            raise TypeError(f"attention_mask must be bool or floating point; got {described(attention_mask)}. Write attention_mask.bool().")
        masks.append(Dense(attention_mask))
    elif causal:
        masks.append(Causal())
    window = options.get("sliding_window")
    if attention_mask is None and window is not None and 0 < window < kv_len:
        masks.append(SlidingWindow(window - 1, None if causal else window - 1))
    named = (chosen_keys(options.get("indices"), (q_len, kv_len)), packed_documents(options, (q_len, kv_len)))
    masks += [mask for mask in named if mask is not None]
    return (And(tuple(masks)) if masks else None), additive
