"""The blocked backend: plain torch operations on tiles, O(length) memory, on whatever device torch has."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.backends.base import (
    AuxTensors,
    Forward,
    Gradients,
    Incoming,
    authored_refusals,
    composition_refusals,
    device_type,
    transform_refusal,
)
from fused_attn.backends.cpu import attention, softmax
from fused_attn.checks import is_traced
from fused_attn.lowering import LoweredAttention, LoweredSoftmax
from fused_attn.problem import AttentionProblem, SoftmaxProblem
from fused_attn.score_mods import ADDED
from fused_attn.scoring import Additive

# Scores (batch * heads * q_len * kv_len) up to which eager's few large operations beat tiles whose own cost is per operation, in time
# eager / tiles at 2 quiet threads, float32, head_dim 64 (benchmarks/results/cpu/targets.json). Modifications, sinks or dropout without gradients:
# 0.6 at 2^9, 0.70 at 2^18, 0.85 to 0.94 at 2^22, 1.2 to 1.9 at 2^24; with gradients 0.45 to 0.54 at 2^18, 0.65 to 0.94 at 2^22, 1.0 to 1.5 at 2^24.
# Tensor masks with gradients 0.56 to 0.74 at 2^11, 0.72 to 0.85 at 2^13, 0.99 to 1.14 at 2^15; without gradients, and plain windows, tiles are
# never behind. Beyond 2^21 eager's arrays, 8 MB each, are what a backend of O(length) memory is there to avoid.
EAGER_MODIFIED = 1 << 20
EAGER_MODIFIED_GRAD = 1 << 21
EAGER_MASKED_GRAD = 1 << 13
# Where probabilities are given out, which are as large (scores that go on to the next layer are kept once, which eager does not): 0.44 at 2^18, 0.65 at 2^22, 1.26 at 2^24; with gradients 0.71, 0.85, 1.37.
EAGER_GIVEN = 1 << 22
EAGER_SCORES = 1 << 17
# Modifications that only add and want no gradient run on torch's flash kernel on the CPU; one thread, eager / that: 0.91 to 1.36 at 2^14, 1.03 to
# 1.48 at 2^15, 1.27 to 1.51 at 2^17; with gradients 0.72 to 0.94 at 2^14, 0.97 to 1.08 at 2^15, 1.1 to 1.35 at 2^16.
EAGER_ADDED = 1 << 14
EAGER_ADDED_GRAD = 1 << 15
# The same for additive attention in scores times head_dim, which is what it computes; one thread, head_dim 16 and 64: 0.64 at 2^13, 0.8 at
# 2^15, 1.14 at 2^17, 1.55 to 5.8 from 2^18 on; with gradients 0.45 at 2^15, 0.6 at 2^17, 0.87 to 1.04 at 2^19, 1.3 at 2^20, 1.7 to 2.5 beyond.
EAGER_ADDITIVE = 1 << 16
EAGER_ADDITIVE_GRAD = 1 << 19
_TOO_SMALL = "eager is faster on a problem this small"


def small_problem(problem: AttentionProblem | SoftmaxProblem) -> str | None:
    """Why eager is the better choice for a small problem, or None; a compiler or tracer had better see one operation than choices by size."""
    terms = problem.modifiers
    if isinstance(problem, SoftmaxProblem) or torch.compiler.is_compiling() or is_traced():
        return None
    if isinstance(terms.scoring, Additive):
        limit = EAGER_ADDITIVE_GRAD if problem.requires_grad else EAGER_ADDITIVE
        return _TOO_SMALL if prod(problem.shape) * problem.q.shape[3] <= limit else None
    scored = terms.scoring is not None and (not terms.scoring.lowers or bool(terms.scoring.kernels))
    if problem.aux is not None and (problem.aux.probs or problem.aux.scores):
        limit = EAGER_SCORES if problem.aux.scores else EAGER_GIVEN
    elif scored or terms.sinks is not None or terms.dropout is not None or terms.normalizer is not None or _are_computed(problem):
        limit = EAGER_MODIFIED_GRAD if problem.requires_grad else EAGER_MODIFIED
    elif terms.score_mods:
        limit = EAGER_ADDED_GRAD if problem.requires_grad else EAGER_ADDED
    elif terms.mask is not None and not terms.mask.positional and problem.requires_grad:
        limit = EAGER_MASKED_GRAD
    else:
        return None
    return _TOO_SMALL if prod(problem.shape) <= limit else None


def _are_computed(problem: AttentionProblem) -> bool:
    """Whether there are modifications that torch's flash kernel does not take as a sum."""
    mods = problem.modifiers.score_mods
    is_flash = device_type(problem) == "cpu" and problem.q.shape[3] == problem.v.shape[3]
    added = all(set(m.kernels or (m.name,)) <= set(ADDED) and not any(t.requires_grad for t in m.tensors) for m in mods)
    return bool(mods) and not (is_flash and added)


class BlockedBackend:
    """Every mask, score modification, sink, dropout and auxiliary output, on tensors of any device; see ``base.Backend``."""

    name = "blocked"
    evaluates_rules = True

    def refusals(self, problem: AttentionProblem | SoftmaxProblem) -> list[str]:
        return transform_refusal(problem) + authored_refusals(problem) + composition_refusals(problem)

    def reluctance(self, problem: AttentionProblem | SoftmaxProblem) -> str | None:
        if device_type(problem) == "cpu":
            return "the cpu backend runs the same operations, and its library where it can"
        return small_problem(problem)

    def notes(self, problem: AttentionProblem | SoftmaxProblem) -> list[str]:
        """What ``explain`` says beside its choice."""
        return [] if device_type(problem) == "cpu" else ["plain torch operations, blocked; not tried on this device"]

    def attention_fwd(self, call: LoweredAttention) -> Forward:
        return attention.attention_fwd(call)

    def attention_aux(self, call: LoweredAttention, forward: Forward, request: AuxRequest) -> AuxTensors:
        return attention.attention_aux(call, request)

    def attention_bwd(self, call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
        return attention.attention_bwd(call, forward, incoming, needs)

    def stats_shape(self, call: LoweredAttention) -> tuple[int, ...]:
        return (0,)

    def softmax_fwd(self, call: LoweredSoftmax) -> tuple[Tensor, Tensor | None]:
        return softmax.softmax_fwd(call)

    def softmax_bwd(self, call: LoweredSoftmax, result: Tensor, dout: Tensor, needs: tuple[bool, ...]) -> Gradients:
        return softmax.softmax_bwd(call, result, dout, needs)
