"""``torch.nn.functional.scaled_dot_product_attention`` in this package's words: its arguments, its broadcasting, its classes of errors."""

from __future__ import annotations

from typing import Any

from torch import Size, Tensor, broadcast_shapes
from torch import bool as torch_bool

from fused_attn.checks import as_number, described, is_causal_bias, is_sharded, require_broadcastable, require_device, require_tensor
from fused_attn.dropout import Dropout
from fused_attn.masks import Causal, Dense, Mask
from fused_attn.problem import DTYPES, require_input
from fused_attn.score_mods import Bias, ScoreMod


class ArgumentError(RuntimeError, ValueError):
    """What torch reports as a RuntimeError about values and shapes, and the rest of this package as a ValueError."""


class ArgumentTypeError(RuntimeError, TypeError):
    """What torch reports as a RuntimeError about a tensor's dtype or layout, and the rest of this package as a TypeError."""


_ADVICE = {
    "scale": "Pass a float or a 0-d tensor without gradient, or multiply the inputs by a tensor instead (that is differentiable).",
    "dropout_p": "Pass a chance in [0, 1].",
}


def parse(tensors: tuple[Any, Any, Any], attn_mask: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options with plain numbers. Raises what torch's argument parser raises, a TypeError for what is no tensor, number or bool."""
    query, key, value = tensors
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            require_input(name, tensor)
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        _require_mask(attn_mask)
    for name in ("is_causal", "enable_gqa"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} must be a bool; got {described(options[name])}. Pass True or False.")
    scale, dropout_p = options["scale"], options["dropout_p"]
    if (scale is None or type(scale) is float) and type(dropout_p) is float:
        return options
    return {**options, "scale": None if scale is None else _number("scale", scale), "dropout_p": _number("dropout_p", dropout_p)}


def _number(name: str, value: object) -> float:
    """A float as torch reads it: also from a bool and from a 0-d tensor, but for one whose gradient would be lost."""
    if type(value) is bool or (isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad):
        return float(value)
    return as_number(name, value, _ADVICE[name])


def as_attention(tensors: tuple[Any, Any, Any], attn_mask: Any, options: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any], Size]:
    """One parsed call as (q, k, v), keywords of ``attention``, and the leading dimensions of the result."""
    is_causal, dropout_p = options["is_causal"], options["dropout_p"]
    if attn_mask is not None and is_causal:
        # torch: a ValueError where the mask is a CausalBias, exactly RuntimeError elsewhere.
        kind = ArgumentError if is_causal_bias(attn_mask) else RuntimeError
        raise kind(
            "_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True; got both. Combine them: mask & causal, as one attn_mask."
        )
    lead, (q, k, v) = _as_4d(tensors, options["enable_gqa"])
    mask: Mask | None = Causal() if is_causal else None
    mods: tuple[ScoreMod, ...] = ()
    q_offset = 0 if is_causal else None
    if is_causal_bias(attn_mask):
        mask, q_offset = Causal(), _offset(attn_mask, q.shape[2], k.shape[2])
    elif attn_mask is not None:
        attn_mask = _mask_as_4d(attn_mask, lead, q, k)
        if attn_mask.dtype == torch_bool:
            mask = Dense(attn_mask)
        else:
            mods = (Bias(attn_mask),)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be in [0, 1]; got {dropout_p}. It is the chance of removal, not of keeping.")
    dropout = Dropout(dropout_p) if dropout_p else None
    return (q, k, v), {"mask": mask, "scale": options["scale"], "q_offset": q_offset, "score_mods": mods, "dropout": dropout}, lead


def _offset(bias: Any, q_len: int, kv_len: int) -> int:
    """Where a ``torch.nn.attention.bias.CausalBias`` puts query 0. Its data means nothing; its variant and its lengths do."""
    variant = getattr(bias, "variant", None)
    if variant is None:
        raise ValueError(
            "attn_mask must be a CausalBias as causal_upper_left(...) and causal_lower_right(...) make it; got one without a variant, "
            "which moves and views of it lose. Make it anew."
        )
    if variant.name == "UPPER_LEFT":
        return 0
    if (bias.seq_len_q, bias.seq_len_kv) != (q_len, kv_len):
        raise ValueError(
            f"a lower-right CausalBias must be made for these lengths, ({q_len}, {kv_len}); got ({bias.seq_len_q}, {bias.seq_len_kv}). "
            f"Write causal_lower_right({q_len}, {kv_len})."
        )
    return kv_len - q_len


def _as_4d(tensors: tuple[Any, ...], enable_gqa: bool) -> tuple[Size, tuple[Tensor, ...]]:
    """Broadcasts leading dimensions (but for grouped heads) and makes them [batch, heads]; also returns those of the output."""
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        if require_input(name, tensor).dim() < 2:
            raise ValueError(
                f"{name} must be a tensor [..., length, dim]; got {tensor.dim()}-D {list(tensor.shape)}. Insert the missing dimensions with unsqueeze."
            )
    query, key, value = tensors
    alike = (
        query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1] == value.shape[1]
    )
    if alike and (enable_gqa or query.shape[1] == key.shape[1]):
        return query.shape[:2], tensors
    shapes = [list(t.shape) for t in tensors]
    common = -3 if enable_gqa else -2
    if enable_gqa and min(t.dim() for t in tensors) < 3:
        raise ValueError(
            f"query, key and value must be at least 3-D for enable_gqa; got {shapes}. Insert the missing dimensions with unsqueeze."
        )
    try:
        lead = broadcast_shapes(*(t.shape[:common] for t in tensors))
    except RuntimeError:
        raise ValueError(
            f"query, key and value must broadcast in all but the last two dimensions; got {shapes}. Pass enable_gqa=True for fewer key heads."
        ) from None
    wide = [t.expand(*lead, *t.shape[common:]) for t in tensors]
    if enable_gqa and key.shape[-3] != value.shape[-3]:
        wide[1:] = [_repeated(t, query.shape[-3]) for t in wide[1:]]
    return wide[0].shape[:-2], tuple(t[(None,) * (4 - t.dim())] if t.dim() < 4 else t.flatten(0, t.dim() - 4) for t in wide)


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    """Each key head repeated for its group of query heads: what different numbers of key and value heads need."""
    kv_heads = tensor.shape[-3]
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads; got {heads} query heads and {kv_heads} key/value heads. Project them alike.")
    return tensor.repeat_interleave(heads // kv_heads, -3)


def _require_mask(attn_mask: object) -> Tensor:
    advice = "Use torch.as_tensor(...); bool keeps where True, float adds."
    return require_tensor("attn_mask", attn_mask, (torch_bool, *DTYPES), "a bool or float tensor", advice)


def _mask_as_4d(attn_mask: object, lead: Size, q: Tensor, k: Tensor) -> Tensor:
    """Any mask that broadcasts to [..., q_len, kv_len] as [batch|1, heads|1, q_len|1, kv_len|1]."""
    mask = _require_mask(attn_mask)
    require_broadcastable("attn_mask", mask, (*lead, q.shape[2], k.shape[2]), "[..., q_len, kv_len]")
    if not is_sharded(q):
        require_device("attn_mask", mask, q.device)
    mask = mask[(None,) * (max(len(lead), 2) + 2 - mask.dim())]
    outer = mask.shape[:-3]
    if len(outer) > 1 and outer != lead[:-1] and any(n != 1 for n in outer):
        mask = mask.expand(*lead[:-1], *mask.shape[-3:])
    return mask.flatten(0, mask.dim() - 4)
