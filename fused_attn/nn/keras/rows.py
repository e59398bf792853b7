"""Attention whose rows without keys are those of a layer that subtracts a large number where a pair may not attend.

There a row of nothing but masked keys is the softmax of its own scores minus 1e9: in float64 almost that of the scores themselves, in float32 that of
scores rounded to multiples of 64, which are all equal while they are below 32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.checks import captured, described
from fused_attn.functional import attention
from fused_attn.lowering import stat_dtype
from fused_attn.masks import Causal, Dense
from fused_attn.score_mods import Bias

EmptyRows = Literal["zero", "uniform", "softmax", "unmasked"]
EMPTY_ROWS = ("zero", "uniform", "softmax", "unmasked")
_SUBTRACTED = 1e9
# Added by Keras to masked scores on its fused path in float16: 0.7 of almost the least, as float16 rounds it.
_FLOAT16_FILL = 45856.0


def of_fused_path(dtype: torch.dtype) -> EmptyRows | float:
    """Keras' habit on its fused path, where so much is added to masked scores that nothing is left of them but in float16."""
    return _FLOAT16_FILL if dtype == torch.float16 else "softmax"


def check_empty_rows(empty_rows: Any) -> None:
    """A ValueError unless it is a policy or None."""
    if empty_rows is not None and empty_rows not in EMPTY_ROWS:
        raise ValueError(
            f"empty_rows must be one of {', '.join(EMPTY_ROWS)} or None; got {described(empty_rows)}. None is the layer's habit."
        )


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, empty_rows: EmptyRows | float, return_probs: bool = False, **options: Any
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``fused_attn.attention`` with one policy more, "unmasked" or the number to subtract, and with the probabilities where they are asked for.

    Rows without keys are a call of their own, in which they attend to every key and all others to none. It is left out where one can see that there
    is no such row: on a CPU, outside a compiler, or from a mask that is only causal.

    Example:
        >>> q, v = torch.zeros(1, 1, 2, 4), torch.tensor([[[[1.0], [3.0]]]])
        >>> out, _ = attend(q, q, v, empty_rows="unmasked", mask=torch.tensor([[True, False], [False, False]]))
        >>> out.flatten()
        tensor([1., 2.])
    """
    subtracted = _SUBTRACTED if empty_rows == "unmasked" else empty_rows
    if isinstance(subtracted, str) or options.get("mask") is None or isinstance(options["mask"], Causal):
        policy = subtracted if isinstance(subtracted, str) else "zero"
        if not return_probs:
            return attention(q, k, v, empty_rows=policy, **options), None
        out, aux = attention(q, k, v, empty_rows=policy, return_aux=AuxRequest(probs=True), **options)
        return out, aux.probs
    out, aux = attention(q, k, v, return_aux=AuxRequest(probs=return_probs, lse=True), **options)
    assert aux.lse is not None
    is_empty = aux.lse.detach() == -torch.inf
    if is_empty.device.type == "cpu" and not captured(is_empty) and not bool(is_empty.any()):
        return out, aux.probs
    offset = Bias(torch.full((1, 1, 1, 1), -subtracted, dtype=stat_dtype(q.dtype), device=q.device))
    options = {**options, "mask": Dense(is_empty[..., None]), "score_mods": (offset,)}
    rest, probs = attend(q, k, v, empty_rows="zero", return_probs=return_probs, **options)
    return out + rest, None if aux.probs is None or probs is None else aux.probs + probs
