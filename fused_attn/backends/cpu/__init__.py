"""The cpu backend: plain torch operations on tiles that stay in cache, O(length) memory."""

from __future__ import annotations

from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.backends.base import AuxTensors, Forward, Gradients, Incoming, transform_refusal
from fused_attn.backends.cpu import attention, softmax
from fused_attn.lowering import LoweredAttention, LoweredSoftmax
from fused_attn.problem import AttentionProblem, SoftmaxProblem


class CpuBackend:
    """Every mask, score modification, sink, dropout and auxiliary output, on CPU tensors; see ``base.Backend``."""

    name = "cpu"

    def refusals(self, problem: AttentionProblem | SoftmaxProblem) -> list[str]:
        device = problem.device.type
        reasons = [] if device == "cpu" else [f"it runs on CPU tensors only, not on {device}"]
        return reasons + transform_refusal(problem)

    def reluctance(self, problem: AttentionProblem | SoftmaxProblem) -> str | None:
        return None

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
