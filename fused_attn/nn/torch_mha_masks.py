"""What ``nn.MultiheadAttention`` calls masks, checked as torch checks them, in this package's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.checks import described
from fused_attn.masks import And, Causal, Dense, KeyPadding, Mask, Not, Or, ValidLengths
from fused_attn.score_mods import Bias, ScoreMod

if TYPE_CHECKING:
    from fused_attn.nn.torch_mha import MultiheadAttention


@dataclass(frozen=True)
class Masks:
    """A call's masks. Floating-point ones are added to the scores, bool ones are True where a pair is left out.

    Args:
        padding: [batch, kv_len], or None.
        pairs: [q_len, kv_len] or [batch, heads, q_len, kv_len], or None.
        is_causal: whether keys after the query's index are left out instead of what ``pairs`` says.
        sizes: batch and kv_len, without the keys that the layer itself adds.
        device: the inputs'.
    """

    padding: Tensor | None
    pairs: Tensor | None
    is_causal: bool
    sizes: tuple[int, int]
    device: torch.device

    @classmethod
    def check(
        cls, layer: MultiheadAttention, tensors: tuple[Tensor, ...], padding: Tensor | None, pairs: Tensor | None, is_hint: bool
    ) -> Masks:
        """Raises AssertionError, RuntimeError or TypeError where torch does; ``is_hint`` says that the mask is the causal one."""
        _check_masks(padding, pairs)
        query, key, _ = tensors
        is_batched = query.dim() == 3
        _check_ranks(layer, tensors, padding, pairs)
        _check_sizes(layer, tensors)
        along, across = (1, 0) if layer.batch_first or not is_batched else (0, 1)
        batch = query.shape[across] if is_batched else 1
        q_len, kv_len = (t.shape[along] if is_batched else t.shape[0] for t in (query, key))
        if padding is not None:
            padding = padding if is_batched else padding[None]
            if padding.shape != (batch, kv_len):
                raise AssertionError(
                    f"key_padding_mask must be [batch, kv_len] = {[batch, kv_len]}; got {list(padding.shape)}. Give one entry per key."
                )
        is_causal = is_hint and padding is None
        if pairs is not None and not is_causal:
            pairs = _checked_pairs(pairs, layer.num_heads, (batch, q_len, kv_len))
        return cls(padding, pairs, is_causal, (batch, kv_len), query.device)

    def of_attention(self, kv_len: int) -> tuple[Mask | None, tuple[ScoreMod, ...]]:
        """Mask and modifications for ``kv_len`` keys, the last of which the layer added: every query may attend to those."""
        batch, given = self.sizes
        masks: list[Mask] = []
        mods: list[ScoreMod] = []
        if self.is_causal:
            masks.append(
                Causal() if kv_len == given else Or((Causal(), Not(ValidLengths(torch.full((batch,), given, device=self.device)))))
            )
        elif self.pairs is not None:
            pairs = F.pad(self.pairs, (0, kv_len - given)) if kv_len > given else self.pairs
            masks += [Dense(~pairs)] if pairs.dtype == torch.bool else []
            mods += [] if pairs.dtype == torch.bool else [Bias(pairs)]
        if self.padding is not None:
            padding = F.pad(self.padding, (0, kv_len - given)) if kv_len > given else self.padding
            masks += [KeyPadding(~padding)] if padding.dtype == torch.bool else []
            mods += [] if padding.dtype == torch.bool else [Bias(padding[:, None, None, :])]
        return And(tuple(masks)) if masks else None, tuple(mods)


def _check_masks(padding: Tensor | None, pairs: Tensor | None) -> None:
    for name, mask in (("key_padding_mask", padding), ("attn_mask", pairs)):
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"{name} must be a tensor or None; got {described(mask)}. Convert it with torch.tensor.")
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(
                f"{name} must be bool (True = left out) or floating point (added to the scores); got {described(mask)}. Convert it with .to(torch.bool)."
            )


def _check_ranks(layer: MultiheadAttention, tensors: tuple[Tensor, ...], padding: Tensor | None, pairs: Tensor | None) -> None:
    ranks = [t.dim() for t in tensors]
    if ranks not in ([2, 2, 2], [3, 3, 3]):
        raise AssertionError(
            f"query, key and value must all be 2-D (one sequence) or all 3-D (a batch); got {ranks} dimensions. Insert the batch with unsqueeze."
        )
    if padding is not None and padding.dim() != ranks[0] - 1:
        raise AssertionError(
            f"key_padding_mask must be {ranks[0] - 1}-D for {ranks[0]}-D inputs; got {described(padding)}. Leave the batch out exactly where query does."
        )
    if pairs is None:
        return
    if pairs.dim() not in (2, 3):
        raise AssertionError(
            f"attn_mask must be 2-D [q_len, kv_len] or 3-D [batch * num_heads, q_len, kv_len]; got {described(pairs)}. Reshape it."
        )
    shape = (layer.num_heads, tensors[0].shape[0], tensors[1].shape[0])
    if ranks[0] == 2 and pairs.dim() == 3 and pairs.shape != shape:
        raise AssertionError(
            f"attn_mask must be [num_heads, q_len, kv_len] = {list(shape)} for inputs without a batch; got {list(pairs.shape)}. Give one per head."
        )


def _check_sizes(layer: MultiheadAttention, tensors: tuple[Tensor, ...]) -> None:
    query, key, value = tensors
    if query.shape[-1] != layer.embed_dim:
        raise AssertionError(
            f"query must have embed_dim = {layer.embed_dim} features; got {query.shape[-1]}. Project it, or build the layer for that size."
        )
    end = 3 if layer.in_proj_weight is not None else -1
    if key.shape[:end] != value.shape[:end]:
        raise AssertionError(
            "key and value must have one shape, or differ in the last dimension only where kdim or vdim say so; "
            f"got {list(key.shape)} and {list(value.shape)}. Slice them alike."
        )
    error = RuntimeError if layer.in_proj_weight is not None else AssertionError
    for name, given, option, wanted in (("key", key, "kdim", layer.kdim), ("value", value, "vdim", layer.vdim)):
        if given.shape[-1] != wanted:
            raise error(
                f"{name} must have {option} = {wanted} features; got {given.shape[-1]}. Project it, or build the layer for that size."
            )
    across = 0 if layer.batch_first else 1
    if query.dim() == 3 and query.shape[across] != key.shape[across]:
        raise RuntimeError(
            f"query and key must share the batch size; got {query.shape[across]} and {key.shape[across]} in dimension {across}. Check batch_first."
        )


def _checked_pairs(pairs: Tensor, heads: int, sizes: tuple[int, int, int]) -> Tensor:
    """attn_mask as [q_len, kv_len] or [batch, heads, q_len, kv_len]."""
    batch, q_len, kv_len = sizes
    shape = (q_len, kv_len) if pairs.dim() == 2 else (batch * heads, q_len, kv_len)
    if pairs.shape != shape:
        raise RuntimeError(
            f"attn_mask must have shape {list(shape)} here ([q_len, kv_len] or [batch * num_heads, q_len, kv_len]); got {list(pairs.shape)}. "
            "Reshape or expand it."
        )
    return pairs if pairs.dim() == 2 else pairs.unflatten(0, (batch, heads))
