"""Score modifications on the device: for each name a value function and, unless the gradient is the identity, a gradient function.

``value(scores, args, at)`` and ``gradient(grads, scores, args, at)`` get float32 tiles. ``args`` holds the modification's scalars, then
its tensors as matrices; ``at`` is (b, h, query indices, query positions, key indices, inside) with index vectors that broadcast against
each other in either orientation. Add your own with ``register``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .primitives import base, is_finite, pointers, tanh


@triton.jit
def softcap(scores, args, at):
    """args: (cap,)."""
    return args[0] * tanh(scores / args[0])


@triton.jit
def softcap_gradient(grads, scores, args, at):
    """args: (cap,); the derivative of cap * tanh(s / cap)."""
    bent = tanh(scores / args[0])
    return grads * tl.fma(-bent, bent, 1.0)


@triton.jit
def alibi(scores, args, at):
    """args: (slopes [batch|1, heads, 1, 1],)."""
    slope = tl.load(base(args[0], at[0], at[1])).to(tl.float32)
    return tl.fma(tl.abs(at[3] - at[4]).to(tl.float32), -slope, scores)


@triton.jit
def bias(scores, args, at):
    """args: (bias [batch|1, heads|1, q_len|1, kv_len|1],)."""
    return scores + tl.load(pointers(args[0], at[0], at[1], at[2], at[4]), mask=at[5], other=0.0).to(tl.float32)


@triton.jit
def level(scores, args, at):
    """Zeros, whatever the scores are."""
    return tl.zeros_like(scores)


@triton.jit
def level_gradient(grads, scores, args, at):
    """As if nothing had happened, but for scores that are not finite."""
    return tl.where(is_finite(scores), grads, 0.0)


# name: (value function, gradient function or None for the identity)
FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "softcap": (softcap, softcap_gradient),
    "alibi": (alibi, None),
    "bias": (bias, None),
    "level": (level, level_gradient),
}
# Names whose one tensor gets a gradient: that of the scores at its place, reduced to the tensor's shape.
ADDITIVE = frozenset({"bias"})


def register(name: str, value: Any, gradient: Any = None) -> None:
    """Gives a score modification of your own its device functions, both made with ``triton.jit``."""
    FUNCTIONS[name] = (value, gradient)


@triton.jit
def apply(scores, score, at, COUNT: tl.constexpr):
    """The first COUNT modifications, in order."""
    for i in tl.static_range(COUNT):
        scores = score.functions[i](scores, score.mods[i], at)
    return scores


@triton.jit
def pull_back(grads, scores, score, at, DOWN_TO: tl.constexpr):
    """Gradients after all modifications to gradients before modification DOWN_TO; ``scores`` are those before the first one."""
    COUNT: tl.constexpr = len(score.functions)
    for i in tl.static_range(COUNT - DOWN_TO):
        if score.gradients[COUNT - 1 - i] is not None:
            before = apply(scores, score, at, COUNT - 1 - i)
            grads = score.gradients[COUNT - 1 - i](grads, before, score.mods[COUNT - 1 - i], at)
    return grads
