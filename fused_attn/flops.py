"""What torch's ``FlopCounterMode`` counts for attention: the same as for its own attention, whatever a mask leaves out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

Shape = tuple[int, ...]


def announce() -> None:
    """Tells the counters in force the ops' formulas.

    Counters copy torch's registry when they are made, and torch's module of them imports Triton, so that it is not imported from here.
    """
    if torch.compiler.is_compiling():
        return
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    if torch.ops.fused_attn.attention_fwd not in counting.flop_registry:
        for name, formula in _FORMULAS.items():
            counting.register_flop_formula(getattr(torch.ops.fused_attn, name))(formula)
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if isinstance(counter, counting.FlopCounterMode):
            for name in _FORMULAS:
                op = getattr(torch.ops.fused_attn, name)
                counter.flop_registry.setdefault(op, counting.flop_registry[op])


def _sizes(q: Shape, k: Shape, v: Shape) -> tuple[int, int, int]:
    """Scores, head_dim and value_dim."""
    batch, heads, q_len, head_dim = q
    return batch * heads * q_len * k[2], head_dim, v[3]


def _forward(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    scores, head_dim, value_dim = _sizes(q, k, v)
    return 2 * scores * (head_dim + value_dim)


def _aux(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    scores, head_dim, _dim = _sizes(q, k, v)
    return 2 * scores * head_dim


def _backward(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Scores again, then the gradients of v, the probabilities, q and k."""
    scores, head_dim, value_dim = _sizes(q, k, v)
    return 2 * scores * (3 * head_dim + 2 * value_dim)


def _paged(q: Shape, k: Shape, v: Shape, table: Shape | None, *_: Any, **__: Any) -> int:
    """Of all keys that a sequence has room for."""
    keys = k[2] * (1 if table is None else table[1])
    return _forward(q, (*k[:2], keys, k[3]), v)


_FORMULAS: dict[str, Callable[..., int]] = {
    "attention_fwd": _forward,
    "attention_aux": _aux,
    "attention_bwd": _backward,
    "paged_attention_fwd": _paged,
}
