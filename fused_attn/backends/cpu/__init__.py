"""The cpu backend: the library of ``csrc/cpu`` where it is there and takes the call, else plain torch operations on blocks; O(length) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.backends.base import AuxTensors, Forward, Gradients, Incoming, device_type
from fused_attn.backends.cpu import attention_blocks, attention_native, library, softmax_native
from fused_attn.backends.cpu.blocked import BlockedBackend, small_problem
from fused_attn.lowering import LoweredAttention, LoweredSoftmax
from fused_attn.problem import AttentionProblem, SoftmaxProblem


class CpuBackend(BlockedBackend):
    """Every mask, score modification, sink, dropout and auxiliary output, on CPU tensors; see ``base.Backend``."""

    name = "cpu"

    def refusals(self, problem: AttentionProblem | SoftmaxProblem) -> list[str]:
        device = device_type(problem)
        return [*([] if device == "cpu" else [f"it runs on CPU tensors only, not on {device}"]), *super().refusals(problem)]

    def reluctance(self, problem: AttentionProblem | SoftmaxProblem) -> str | None:
        """On the library no problem is too small: eager / cpu was 1.3 and more from 2^9 scores on, whatever was asked for (2 threads, head_dim 64)."""
        if isinstance(problem, SoftmaxProblem) or (library.isa() and attention_native.takes_problem(problem)):
            return None
        return small_problem(problem)

    def notes(self, problem: AttentionProblem | SoftmaxProblem) -> list[str]:
        """Why the compiled library does not run the problem."""
        target = problem.target
        failure = library.failure() if target is None else "" if target.library else library.NOT_BUILT
        if not failure and isinstance(problem, AttentionProblem) and not attention_native.takes_problem(problem):
            failure = attention_native.LIMITS
        if not failure and isinstance(problem, SoftmaxProblem) and torch.float64 in {t.dtype for t in problem.inputs}:
            failure = softmax_native.LIMITS
        return [f"{failure}; plain torch operations run instead"] if failure else []

    def attention_fwd(self, call: LoweredAttention) -> Forward:
        return attention_blocks.attention_fwd(call)[0] if attention_native.takes(call) else super().attention_fwd(call)

    def attention_out(self, call: LoweredAttention) -> Tensor:
        """The output, for who wants nothing else."""
        return attention_blocks.attention_out(call) if attention_native.takes(call) else super().attention_fwd(call).out

    def attention_aux(self, call: LoweredAttention, forward: Forward, request: AuxRequest) -> AuxTensors:
        if attention_native.takes(call):
            return attention_blocks.attention_fwd(call, request)[1]
        return super().attention_aux(call, forward, request)

    def attention_fwd_aux(self, call: LoweredAttention, request: AuxRequest) -> tuple[Forward, AuxTensors]:
        """Both in one pass of the library."""
        if attention_native.takes(call):
            return attention_blocks.attention_fwd(call, request)
        forward = super().attention_fwd(call)
        return forward, super().attention_aux(call, forward, request)

    def attention_bwd(self, call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
        if forward.stats.dim() == 4 and attention_native.takes(call):
            return attention_blocks.attention_bwd(call, forward, incoming, needs)
        return super().attention_bwd(call, forward, incoming, needs)

    def stats_shape(self, call: LoweredAttention) -> tuple[int, ...]:
        return attention_native.stats_shape(call) if attention_native.takes(call) else super().stats_shape(call)

    def softmax_fwd(self, call: LoweredSoftmax) -> tuple[Tensor, Tensor | None]:
        return softmax_native.softmax_fwd(call) if softmax_native.takes(call) else super().softmax_fwd(call)

    def softmax_bwd(self, call: LoweredSoftmax, result: Tensor, dout: Tensor, needs: tuple[bool, ...]) -> Gradients:
        if softmax_native.takes(call):
            return softmax_native.softmax_bwd(call, result, dout, needs)
        return super().softmax_bwd(call, result, dout, needs)
