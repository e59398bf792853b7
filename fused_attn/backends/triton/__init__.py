"""The Triton backend: NVIDIA GPUs from compute capability 8.0 on, and CPU tensors under TRITON_INTERPRET=1."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import replace

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.backends.base import (
    AuxTensors,
    Forward,
    Gradients,
    Incoming,
    capability_refusal,
    composition_refusals,
    device_type,
    has_wgmma,
    transform_refusal,
)
from fused_attn.backends.triton.hopper import eligible
from fused_attn.layout import copied_in_rows, empty_out, laid_out_like
from fused_attn.lowering import KernelMask, LoweredAttention, LoweredSoftmax, Terms
from fused_attn.paged_call import LoweredPaged
from fused_attn.problem import AttentionProblem, SoftmaxProblem

MAX_HEAD_DIM = 256
# The package's own modifications of score_mods.py, and whether their tensor gets a gradient; that file is not imported where Triton is missing.
BUILT_IN = {"softcap": False, "alibi": False, "level": False, "bias": True}

_INSTALLED = importlib.util.find_spec("triton") is not None  # not a cached function, so that torch.compile can trace what reads it


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def interpreter_refusal() -> str:
    """Why Triton's interpreter cannot run here, or nothing: before 3.8 it makes a number of an array of one element, which NumPy 2.5 refuses."""
    import numpy
    import triton

    if int(triton.__version__.split(".")[1]) >= 8 or tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 5):
        return ""
    found = f"got Triton {triton.__version__} and NumPy {numpy.__version__}"
    return f"Triton's interpreter needs Triton 3.8 or NumPy before 2.5; {found} (pip install 'numpy<2.5')"


# As ``base.capability``'s: a compiler runs it while it traces.
interpreter_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


class TritonBackend:
    """Kernels written in Triton; see the modules beside this one."""

    name = "triton"

    def refusals(self, problem: AttentionProblem | SoftmaxProblem) -> list[str]:
        """Every reason why these kernels cannot run the problem."""
        device = device_type(problem)
        if device == "cpu" and (problem.target is not None or not _interpreted()):
            return ["tensors are on the CPU (set TRITON_INTERPRET=1 before the first use to run the interpreter)"]
        if device not in ("cpu", "cuda"):
            return [f"there are no kernels for {device} devices"]
        if not _INSTALLED and problem.target is None:
            return ["Triton is not installed (pip install triton)"]
        if device == "cpu" and interpreter_refusal():
            return [interpreter_refusal()]
        reasons = transform_refusal(problem) + capability_refusal(problem)
        dtype = problem.inputs[0].dtype
        if dtype == torch.float64:
            reasons.append("float64 is computed by cpu, blocked and eager only")
        if isinstance(problem, AttentionProblem):
            reasons += _head_size_refusals(problem)
        return reasons + _scoring_refusals(problem) + _mod_refusals(problem) + composition_refusals(problem)

    def reluctance(self, problem: AttentionProblem | SoftmaxProblem) -> str | None:
        """The interpreter is for debugging."""
        return "the interpreter is slow and meant for debugging" if device_type(problem) == "cpu" else None

    def stats_shape(self, call: LoweredAttention) -> tuple[int, ...]:
        # Two statistics per row; where 16-bit outputs would cost the sinks' gradient its accuracy, the float32 output as well.
        wide = call.terms.sinks is not None and call.q.dtype.itemsize < 4
        return (2 + call.v.shape[-1] * wide, *call.shape[:3])

    def notes(self, problem: AttentionProblem | SoftmaxProblem) -> list[str]:
        """On Hopper, which kernels would run, and why not its own."""
        if isinstance(problem, SoftmaxProblem) or not has_wgmma(problem) or (problem.target is None and _interpreted()):
            return []
        tensors = (problem.q, problem.k, problem.v)
        refused = eligible.reasons(tensors, problem.modifiers)
        unit, reasons = _unit(tensors, not refused), refused or _unfit_functions(problem)
        found = [f"plain Triton kernels, not those for Hopper: {reason}" for reason in reasons] or [
            "kernels for Hopper (TMA, warpgroup products)"
        ]
        named = zip("qkv", tensors, strict=True)
        found += [
            f"{name} is copied first: it {why}" for name, tensor in named if unit and (why := eligible.alignment_reason(tensor, unit))
        ]
        size = max(problem.q.shape[-1], problem.v.shape[-1])
        if not reasons and problem.requires_grad and size > eligible.MAX_BACKWARD_DIM:
            found.append(f"plain Triton kernels for the backward: Hopper's has head sizes up to {eligible.MAX_BACKWARD_DIM}; got {size}")
        return found

    def attention_fwd(self, call: LoweredAttention) -> Forward:
        if _has_few_queries(call):
            from fused_attn.backends.triton.decoding import forward

            return forward.attention_fwd(call, self.stats_shape(call))
        placed, unit = _placed(call)
        if unit == eligible.UNIT:
            from fused_attn.backends.triton.hopper.forward import attention_fwd
        else:
            from fused_attn.backends.triton.attention_fwd import attention_fwd
        out, lse, stats = attention_fwd(placed, self.stats_shape(call))
        if placed is not call:
            out = laid_out_like(out, empty_out(call.q.to("meta"), out.shape[-1]))
        return Forward(out, lse, stats)

    def attention_paged(self, call: LoweredPaged) -> tuple[Tensor, Tensor]:
        from fused_attn.backends.triton.decoding.forward import attention_paged

        return attention_paged(call)

    def attention_aux(self, call: LoweredAttention, forward: Forward, request: AuxRequest) -> AuxTensors:
        placed, unit = _placed(call)
        if unit == eligible.UNIT:
            from fused_attn.backends.triton.hopper.rows import attention_aux
        else:
            from fused_attn.backends.triton.attention_aux import attention_aux
        return attention_aux(placed, forward, request)

    def attention_picked(self, call: LoweredAttention, lse: Tensor, request: AuxRequest) -> AuxTensors | None:
        placed, unit = _placed(call)
        if unit != eligible.UNIT:
            return None
        from fused_attn.backends.triton.hopper.rows import attention_picked

        return attention_picked(placed, lse, request)

    def attention_bwd(self, call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
        placed, unit = _placed(call)
        if unit == eligible.UNIT:
            from fused_attn.backends.triton.hopper.backward import attention_bwd
        else:
            from fused_attn.backends.triton.attention_bwd import attention_bwd
        if incoming.dout is not None:
            incoming = replace(incoming, dout=_in_rows(incoming.dout, unit))
        gradients = attention_bwd(placed, forward, incoming, needs)
        if placed is call:
            return gradients
        inputs = (call.q, call.k, call.v)
        return *(g if g is None else laid_out_like(g, t) for g, t in zip(gradients[:3], inputs, strict=True)), *gradients[3:]

    def softmax_fwd(self, call: LoweredSoftmax) -> tuple[Tensor, Tensor | None]:
        from fused_attn.backends.triton.softmax import softmax_fwd

        return softmax_fwd(call)

    def softmax_bwd(self, call: LoweredSoftmax, result: Tensor, dout: Tensor, needs: tuple[bool, ...]) -> Gradients:
        from fused_attn.backends.triton.softmax import softmax_bwd

        return softmax_bwd(call, result, dout, needs)


# Calls of at most so many queries and at least so many keys go to the split-key kernels: where those make two parts, and a tile's worth of rows.
FEW_QUERIES, MANY_KEYS = 16, 512


def _has_few_queries(call: LoweredAttention) -> bool:
    """Whether the plain kernels would leave most of a chip idle, and read each key once per query head: decoding, whoever holds the cache."""
    _, _, q_len, kv_len = call.shape
    if q_len > FEW_QUERIES or kv_len < MANY_KEYS or call.terms.dropout is not None or 0 in call.shape:
        return False
    from fused_attn.backends.triton import config, launch

    chip = launch.target_chip or (0 if _interpreted() else config.chip_of(call.q.device))
    return chip != eligible.CHIP or bool(eligible.reasons((call.q, call.k, call.v), call.terms))


def _placed(call: LoweredAttention) -> tuple[LoweredAttention, int]:
    """A call as its kernels take it, and the unit of rows in bytes: that of TMA where the kernels for Hopper run it, 0 for any.

    On Hopper q, k and v are copied where their rows are not whole units, for the plain kernels as well in 16 bits: loaded element by element,
    tiles spilled up to 1200 bytes a thread beside warpgroup products, and on an H100 such a forward was wrong (float16, head size 64, rows
    67 elements apart, Triton 3.6.0), the same every time, where aligned rows and tiles that spill 64 bytes were right and the simulator
    finds no fault in the PTX.
    """
    from fused_attn.backends.triton import config, launch

    chip = launch.target_chip or (0 if _interpreted() else config.chip_of(call.q.device))
    tensors, value_dim = (call.q, call.k, call.v), call.v.shape[-1]
    if chip != eligible.CHIP or 0 in call.shape or call.q.element_size() != 2:
        return call, 0
    unit = _unit(tensors, not eligible.reasons(tensors, call.terms))
    if not unit:
        # No row of 16 bits has whole words then, and k comes through registers, element by element. v has to come so, too: where one of them
        # does and the other is copied by the hardware, Triton leaves out a fence before the product (the simulator reports the race).
        v = call.v if value_dim % 2 else copied_in_rows(call.v, value_dim + 1)
        return (call if v is call.v else replace(call, v=v)), 0
    q, k, v = (_in_rows(t, unit) for t in tensors)
    same = q is call.q and k is call.k and v is call.v
    return call if same else replace(call, q=q, k=k, v=v), unit


def _unit(tensors: tuple[Tensor, Tensor, Tensor], hopper: bool) -> int:
    """Of what so many bytes the rows of q, k and v are made for the kernels for Hopper or, on that chip, the plain ones; 0 where they stay."""
    q = tensors[0]
    if q.element_size() != 2 or any(0 in t.shape for t in tensors) or (not hopper and q.shape[-1] % 2):
        return 0
    return eligible.UNIT if hopper else eligible.VECTOR_UNIT


def _in_rows(tensor: Tensor, unit: int) -> Tensor:
    """The tensor, or a copy of it, in rows of whole units of bytes."""
    if not unit or not eligible.alignment_reason(tensor, unit):
        return tensor
    return copied_in_rows(tensor, eligible.VECTOR_UNIT // tensor.element_size())


def _unfit_functions(problem: AttentionProblem) -> list[str]:
    """Which device functions of modifications Gluon does not compile; those of the package it does."""
    mods = problem.modifiers.score_mods
    if not _INSTALLED or _interpreted() or all(set(mod.kernels or (mod.name,)) <= set(BUILT_IN) for mod in mods):
        return []
    from fused_attn.backends.triton import arguments
    from fused_attn.backends.triton.hopper import modifications

    terms = Terms(KernelMask(), 1.0, mods=tuple(score for mod in mods for score in mod.lower(problem.grid)))
    return modifications.reasons(arguments.scores(terms, problem.grid, problem.q.dtype))


def _head_size_refusals(problem: AttentionProblem) -> list[str]:
    sizes = (problem.q.shape[-1], problem.v.shape[-1])
    if all(1 <= size <= MAX_HEAD_DIM for size in sizes):
        return []
    return [f"head_dim and value_dim must be in [1, {MAX_HEAD_DIM}]; got {sizes[0]} and {sizes[1]}"]


def _scoring_refusals(problem: AttentionProblem | SoftmaxProblem) -> list[str]:
    scoring = problem.modifiers.scoring
    if scoring is None or scoring.lowers:
        return []
    from fused_attn.backends.triton import scorings

    if scoring.name not in scorings.FUNCTIONS:
        return [f"{type(scoring).__name__} has no Triton functions (fused_attn.backends.triton.scorings.register)"]
    if not scorings.FUNCTIONS[scoring.name].by_columns and any(t.requires_grad for t in scoring.tensors):
        return [f"{type(scoring).__name__} has no gradient for its tensor in Triton"]
    return []


def _functions() -> tuple[set[str], set[str]]:
    """The modifications with device functions, and those whose tensor gets a gradient; where there is no Triton to ask, the built-in ones."""
    if not _INSTALLED:
        return set(BUILT_IN), {name for name, has_gradient in BUILT_IN.items() if has_gradient}
    from fused_attn.backends.triton import score_mods

    return set(score_mods.FUNCTIONS), set(score_mods.ADDITIVE)


def _mod_refusals(problem: AttentionProblem | SoftmaxProblem) -> list[str]:
    functions, additive = _functions()
    reasons = []
    for mod in problem.modifiers.score_mods:
        kernels = mod.kernels or (mod.name,)
        if not set(kernels) <= functions:
            reasons.append(f"{type(mod).__name__} has no Triton functions (fused_attn.backends.triton.score_mods.register)")
        elif not set(kernels) <= additive and any(t.requires_grad for t in mod.tensors):
            reasons.append(f"{type(mod).__name__} has no gradient for its tensor in Triton")
    return reasons
