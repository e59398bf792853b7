"""The cuda backend: CUDA C++ kernels of ``csrc/``, compiled on request (``python -m fused_attn build``) into one library.

The library's operators take the normal form flattened, as the ops of ``fused_attn.ops`` do. It serves compute capability 8.0 and later,
and loads on a torch without CUDA too, where nothing can run on it.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.backends.base import (
    AuxTensors,
    Forward,
    Gradients,
    Incoming,
    Yields,
    allows_tf32,
    authored_refusals,
    capability_refusal,
    composition_refusals,
    device_type,
    gradients_without_scores,
    has_wgmma,
    sink_gradient,
    transform_refusal,
)
from fused_attn.layout import empty_out
from fused_attn.lowering import LoweredAttention, LoweredSoftmax
from fused_attn.problem import AttentionProblem, SoftmaxProblem
from fused_attn.score_mods import in_own_shape, on_device

MAX_HEAD_DIM = 256
MAX_MODS = 8
# Score modifications that csrc/include/fused_attn/score_mod.cuh knows, and whether their tensor gets a gradient: what the library at hand
# says once it is loaded, and what one built from these sources says.
MODS: dict[str, bool] = {}
BUILT_MODS = {"softcap": False, "alibi": False, "level": False, "bias": True}
_MOD_TENSORS = 6  # place of the modifications' tensors in Terms.flatten()
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_NOT_BUILT = "the native library is not built (python -m fused_attn build)"


def library_path() -> Path:
    """Where the compiled library lies: ``FUSED_ATTN_LIBRARY``, or beside the package's modules."""
    return Path(os.environ.get("FUSED_ATTN_LIBRARY") or Path(__file__).parents[1] / "_native.so")


@functools.cache
def _load(named: str) -> str:
    """Loads the library once; the reason why it cannot be used, or an empty string. ``named``: FUSED_ATTN_LIBRARY."""
    path = library_path()
    if not path.is_file():
        failure = path.with_name("_native_failure.txt")  # what setup.py leaves
        reason = f"; the build during installation failed: {failure.read_text().strip()}" if failure.is_file() else ""
        return f"{_NOT_BUILT}{reason}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the native library {path} does not load: {error}"
    traced = torch._C._get_tracing_state()
    # A trace that the first call stands in has no room for an operator that returns text.
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        listed = torch.ops.fused_attn_cuda.score_mods()
    finally:
        torch._C._set_tracing_state(traced)  # type: ignore[attr-defined]
    entries = (entry.split(":") for entry in listed.split(","))
    MODS.update((name, has_gradient == "1") for name, has_gradient in entries)
    return ""


def _failure() -> str:
    # Every call comes through here: comparing text takes 1 us, making a Path and comparing it took 7.
    return _load(os.environ.get("FUSED_ATTN_LIBRARY", ""))


# torch.compile runs it while tracing instead of tracing through the load (what torch.compiler.assume_constant_result sets).
_failure._dynamo_marked_constant = True  # type: ignore[attr-defined]


class CudaBackend:
    """Kernels written in CUDA C++; see ``csrc/``."""

    name = "cuda"
    device_type = "cuda"

    def refusals(self, problem: AttentionProblem | SoftmaxProblem) -> list[str]:
        """Every reason why these kernels cannot run the problem."""
        device, target = device_type(problem), problem.target
        if device != self.device_type:
            return [f"it runs on {self.device_type.upper()} tensors only, not on {device}"]
        failure = _failure() if target is None else "" if target.library else _NOT_BUILT
        if failure:
            return [failure]
        reasons = transform_refusal(problem) + capability_refusal(problem)
        dtype = problem.inputs[0].dtype
        if dtype not in _DTYPES:
            reasons.append(f"{str(dtype).removeprefix('torch.')} is computed by cpu, blocked and eager only")
        if isinstance(problem, AttentionProblem):
            sizes = (problem.q.shape[-1], problem.v.shape[-1])
            if not all(1 <= size <= MAX_HEAD_DIM for size in sizes):
                reasons.append(f"head_dim and value_dim must be in [1, {MAX_HEAD_DIM}]; got {sizes[0]} and {sizes[1]}")
            if problem.aux is not None and problem.aux.scores_dtype == torch.float64:
                reasons.append("scores in float64 are given out by triton, cpu and eager only")
            if dtype == torch.float32 and allows_tf32():
                reasons.append("TF32 is asked for, and these kernels compute float32 to its full precision")
        return reasons + authored_refusals(problem) + composition_refusals(problem) + _mod_refusals(problem)

    def reluctance(self, problem: AttentionProblem | SoftmaxProblem) -> Yields | None:
        """These kernels multiply with mma.sync, Triton's on Hopper with wgmma; in float32 neither does."""
        if isinstance(problem, SoftmaxProblem) or problem.q.dtype.itemsize != 2 or not has_wgmma(problem):
            return None
        return Yields("triton", "on compute capability 9.0 Triton's wgmma kernels issue 1.7 to 4 times fewer instructions in 16 bits")

    def call(self, name: str, *args: Any) -> Any:
        """Runs an operator of the library."""
        return getattr(torch.ops.fused_attn_cuda, name)(*args)

    def stats_shape(self, call: LoweredAttention) -> tuple[int, ...]:
        # Two statistics per row; where 16-bit outputs would cost the sinks' gradient its accuracy, the float32 output as well.
        wide = call.terms.sinks is not None and call.q.dtype.itemsize < 4
        return (2 + call.v.shape[-1] * wide, *call.shape[:3])

    def attention_fwd(self, call: LoweredAttention) -> Forward:
        out = empty_out(call.q, call.v.shape[-1])
        return Forward(out, *self.call("attention_fwd", call.q, call.k, call.v, *_flat(call), out))

    def attention_aux(self, call: LoweredAttention, forward: Forward, request: AuxRequest) -> AuxTensors:
        probs, scores, _, *per_row = request.flags
        wanted = (probs, scores, *per_row)
        numbers = [*map(int, wanted), request.numbers[-1]]
        tensors = self.call("attention_aux", call.q, call.k, call.v, *_flat(call), forward.stats, numbers)
        return AuxTensors(*(t if want else None for t, want in zip(tensors, wanted, strict=True)))

    def attention_bwd(self, call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
        if 0 in call.shape:
            return gradients_without_scores(call, incoming, needs)
        # The 16-bit kernels read score gradients of any of the three dtypes; those of float32 have no register left to.
        wide = incoming.dscores is not None and call.q.dtype == torch.float32
        dscores = incoming.dscores.float() if wide and incoming.dscores is not None else incoming.dscores
        arriving = (incoming.dout, incoming.dlse, incoming.dprobs, dscores, incoming.probs)
        keys = needs[1] or needs[2]  # one launch writes both
        dq, dk, dv = _room(call.q, needs[0]), _room(call.k, keys), _room(call.v, keys)
        flat = _flat(call)
        dmods = [torch.empty_like(t) if need else t.new_empty(0) for t, need in zip(flat[_MOD_TENSORS], needs[4:], strict=True)]
        delta, *sums = self.call("attention_bwd", call.q, call.k, call.v, *flat, forward.out, forward.stats, *arriving, dq, dk, dv, dmods)
        for room, partial in zip(dmods, sums, strict=True):
            if partial.numel() > 0:
                room.copy_(partial.sum_to_size(room.shape))
        dsinks = sink_gradient(call, forward.stats, delta) if needs[3] else None
        left = iter([g if need else None for g, need in zip(dmods, needs[4:], strict=True)])
        shaped = [g for m in call.terms.mods for g in in_own_shape(tuple([next(left) for _ in m.tensors]), m, call.grid)]
        narrowed = (None if g is None or t is None else g.to(t.dtype) for g, t in zip(shaped, call.terms.parameters[1:], strict=True))
        return dq, dk if needs[1] else None, dv if needs[2] else None, dsinks, *narrowed

    def softmax_fwd(self, call: LoweredSoftmax) -> tuple[Tensor, Tensor | None]:
        out = torch.empty_like(call.scores)
        probs = self.call("softmax_fwd", call.scores, *_flat(call), call.log, call.uniform_empty, out)
        return out, probs if call.terms.dropout else None

    def softmax_bwd(self, call: LoweredSoftmax, result: Tensor, dout: Tensor, needs: tuple[bool, ...]) -> Gradients:
        dscores = _room(call.scores, needs[0])
        biases, wanted = call.terms.parameters[1:], any(needs[1:])
        sums = self.call("softmax_bwd", call.scores, *_flat(call), result, dout, call.log, call.uniform_empty, dscores, wanted)
        return dscores, *(torch.empty_like(t).copy_(sums.sum(0)) if wanted and t is not None else None for t in biases)


def _room(tensor: Tensor, wanted: bool) -> Tensor | None:
    return torch.empty_like(tensor) if wanted else None


def _flat(call: LoweredAttention | LoweredSoftmax) -> tuple[Any, ...]:
    """The flattened terms with every tensor in a shape and a dtype that the kernels read."""
    terms = replace(call.terms, mods=tuple(on_device(m, call.grid) for m in call.terms.mods)) if call.terms.mods else call.terms
    q_offset, kv_start, kv_end, keep, seed, sinks, mod_tensors, *scalars = terms.flatten()
    offset = None if q_offset is None else q_offset.to(torch.int64).contiguous()
    return offset, kv_start, kv_end, keep, seed, None if sinks is None else _narrow(sinks), [_narrow(t) for t in mod_tensors], *scalars


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _mod_refusals(problem: AttentionProblem | SoftmaxProblem) -> list[str]:
    mods, scoring, reasons = problem.modifiers.score_mods, problem.modifiers.scoring, []
    known = MODS if problem.target is None else BUILT_MODS
    count = 0 if scoring is None else len(scoring.kernels)
    if scoring is not None and not scoring.lowers:
        reasons.append(f"{type(scoring).__name__} is no dot product (give it a lower), and the CUDA kernels compute nothing else")
    count += isinstance(problem, AttentionProblem) and problem.empty_rows == "softmax"  # Level
    for mod in mods:
        kernels = mod.kernels or (mod.name,)
        count += len(kernels)
        if not set(kernels) <= set(known):
            reasons.append(f"{type(mod).__name__} has no CUDA function (csrc/include/fused_attn/score_mod.cuh)")
        elif not all(known[k] for k in kernels) and any(t.requires_grad for t in mod.tensors):
            reasons.append(f"{type(mod).__name__} has no gradient for its tensor in CUDA")
    if problem.modifiers.normalizer is not None and problem.modifiers.normalizer.name:
        reasons.append(f"{type(problem.modifiers.normalizer).__name__} is no softmax, and the CUDA kernels compute nothing else")
    if count > MAX_MODS:
        reasons.append(f"at most {MAX_MODS} score modifications fit a kernel's arguments; got {count}")
    return reasons
