"""The cpu backend: attention and masked softmax on CPU tensors, O(length) memory."""

from __future__ import annotations

from fused_attn.backends.base import device_type
from fused_attn.backends.cpu.blocked import BlockedBackend, small_problem
from fused_attn.problem import AttentionProblem, SoftmaxProblem


class CpuBackend(BlockedBackend):
    """Every mask, score modification, sink, dropout and auxiliary output, on CPU tensors; see ``base.Backend``."""

    name = "cpu"

    def refusals(self, problem: AttentionProblem | SoftmaxProblem) -> list[str]:
        device = device_type(problem)
        return [*([] if device == "cpu" else [f"it runs on CPU tensors only, not on {device}"]), *super().refusals(problem)]

    def reluctance(self, problem: AttentionProblem | SoftmaxProblem) -> str | None:
        return small_problem(problem)
