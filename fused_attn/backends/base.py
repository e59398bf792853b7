"""What a backend is: a name, reasons to refuse, and kernels for the normal form."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.kernel_score import unlowerable
from fused_attn.lowering import LoweredAttention, LoweredSoftmax
from fused_attn.problem import AttentionProblem, SoftmaxProblem
from fused_attn.score_mods import SCORE_MODS, is_authored
from fused_attn.scoring import SCORINGS
from fused_attn.selective import is_selective


class Forward(NamedTuple):
    """What attention's forward leaves: out [batch, heads, q_len, value_dim], lse [batch, heads, q_len] and backend-private row statistics."""

    out: Tensor
    lse: Tensor
    stats: Tensor


class AuxTensors(NamedTuple):
    """What the auxiliary pass produces; None where not asked for."""

    probs: Tensor | None = None
    scores: Tensor | None = None
    max_scores: Tensor | None = None
    column_sums: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Incoming:
    """Gradients that arrive at attention's backward; None means zero. ``probs`` is the forward's own output, saved for ``dprobs``.

    Backends see the first four; what arrives at the statistics is the business of ``statistics``.
    """

    dout: Tensor | None
    dlse: Tensor | None = None
    dprobs: Tensor | None = None
    dscores: Tensor | None = None
    probs: Tensor | None = None
    dmax_scores: Tensor | None = None
    dcolumn_sums: Tensor | None = None
    dentropy: Tensor | None = None

    @property
    def statistics(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What arrives at the largest scores, the column sums and the entropies."""
        return self.dmax_scores, self.dcolumn_sums, self.dentropy

    @property
    def reaches_kernels(self) -> bool:
        """Whether anything arrives at what backends differentiate."""
        return any(t is not None for t in (self.dout, self.dlse, self.dprobs, self.dscores))


Gradients = tuple[Tensor | None, ...]


class Yields(NamedTuple):
    """A reluctance in favour of the backend named ``to``: it holds where ``auto`` would run the problem there, and nowhere else."""

    to: str
    reason: str


class Backend(Protocol):
    """Kernels for the normal form on some devices.

    ``needs`` says which of (q, k, v, sinks, *mod_tensors) or (scores, *mod_tensors) want a gradient; the result has one entry
    for each, None where not wanted. Results are laid out by the rule of ``layout.py``; row statistics are the backend's own
    business, but their shape must be ``stats_shape``. A backend that makes auxiliary outputs in the forward's own pass has
    ``attention_fwd_aux(call, request) -> (Forward, AuxTensors)`` besides, and one to which it matters that nobody wants lse and statistics
    ``attention_out(call) -> Tensor``. ``attention_picked(call, lse, request) -> AuxTensors | None`` computes the rows and heads of probabilities
    and scores that a request picks, or leaves them to the definition; there is nothing to differentiate then. A backend that has ``evaluates_rules = True`` gets masks with rules, evaluated
    region by region; any other gets them as ``keep``. One that reads keys in pages has ``attention_paged(call) -> (out, lse)`` for a
    ``paged_call.LoweredPaged``; for others ``paged`` gathers parts of them. What one that has ``notes(problem)`` says there, ``explain`` repeats.
    """

    name: str

    def refusals(self, problem: AttentionProblem | SoftmaxProblem) -> list[str]:
        """Every reason why this backend cannot run the problem; empty when it can."""

    def reluctance(self, problem: AttentionProblem | SoftmaxProblem) -> str | Yields | None:
        """Why ``auto`` should pass over this backend although it could run the problem; None when it should not."""

    def attention_fwd(self, call: LoweredAttention) -> Forward: ...

    def attention_aux(self, call: LoweredAttention, forward: Forward, request: AuxRequest) -> AuxTensors: ...

    def attention_bwd(self, call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients: ...

    def stats_shape(self, call: LoweredAttention) -> tuple[int, ...]: ...

    def softmax_fwd(self, call: LoweredSoftmax) -> tuple[Tensor, Tensor | None]:
        """The result, and the probabilities before dropout where there is dropout."""

    def softmax_bwd(self, call: LoweredSoftmax, result: Tensor, dout: Tensor, needs: tuple[bool, ...]) -> Gradients:
        """``result`` holds the probabilities before dropout (their logarithms with ``log``)."""


def sink_gradient(call: LoweredAttention, stats: Tensor, delta: Tensor) -> Tensor:
    """A sink is a key with probability exp(sink - lse) and no value: its gradient is -p * delta, [heads].

    stats [2 or more, batch, heads, q_len] begins with the rows' largest score and their sum of exponentials, sinks included; the sum is
    0 in rows without scores, where the sink has all the weight.
    """
    sinks = call.terms.sinks
    assert sinks is not None
    top, total = stats[:2]
    logits = sinks.float()[:, None]
    alone = torch.exp(logits - logits).masked_fill(logits == -torch.inf, 0.0)  # 1; NaN of a sink that is infinite or NaN
    p = torch.where(total == 0, alone, torch.exp(logits - top) / total)
    return -(p * delta).sum((0, 2)).to(sinks.dtype)


def gradients_without_scores(call: LoweredAttention, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of a call whose score array is empty: zeros, and where only the keys are missing each sink is its rows' lse."""
    inputs = (call.q, call.k, call.v, *call.terms.parameters)
    zeros = [torch.zeros_like(t) if need and t is not None else None for t, need in zip(inputs, needs, strict=True)]
    dsinks = zeros[3]
    if dsinks is not None and call.shape[3] == 0 and incoming.dlse is not None:
        dsinks.copy_(incoming.dlse.sum((0, 2)))
    return tuple(zeros)


def authored_refusals(problem: AttentionProblem | SoftmaxProblem) -> list[str]:
    """The reasons shared by every kernel backend: code of the user's that has no normal form."""
    scoring = problem.modifiers.scoring
    if scoring is None and not problem.modifiers.score_mods:
        return []
    found = [unlowerable(mod, SCORE_MODS) for mod in problem.modifiers.score_mods if not mod.by_parts]
    found += [] if scoring is None or scoring.lowers else [unlowerable(scoring, SCORINGS)]
    return [reason for reason in found if reason]


def composition_refusals(problem: AttentionProblem | SoftmaxProblem) -> list[str]:
    """The reasons shared by every kernel backend: what only the definition computes, or computes together."""
    if isinstance(problem, SoftmaxProblem):
        return []
    modifiers, reasons = problem.modifiers, []
    if modifiers.normalizer is not None and not modifiers.normalizer.name:
        reasons.append(f"{type(modifiers.normalizer).__name__} takes whole rows of scores (the dense path, O(q_len * kv_len) memory)")
    if not is_selective(modifiers.score_mods):
        return reasons
    scoring = modifiers.scoring
    authored = [m for m in modifiers.score_mods if is_authored(m)]
    if authored or (scoring is not None and not scoring.lowers and not scoring.by_parts):
        owner = authored[0] if authored else scoring
        reasons.append(f"Selective runs on blocks of queries and on head 0 alone, for which {type(owner).__name__} cannot be cut")
    if problem.empty_rows == "softmax":
        reasons.append("Selective together with empty_rows='softmax' is computed by eager only")
    if problem.aux is not None and problem.aux.is_picked:
        reasons.append("rows and heads picked out of a Selective call are computed by eager only")
    return reasons


def transform_refusal(problem: AttentionProblem | SoftmaxProblem) -> list[str]:
    """The reason shared by every kernel backend: kernels cannot be traced through by torch's functional transforms."""
    if problem.transform is None:
        return []
    return [f"{problem.transform} is followed through plain torch operations only (eager)"]


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _capability_of(device: torch.device) -> int:
    """Ten times its major part plus the minor one, 0 without: a tuple that it has as a constant, Dynamo compares only from torch 2.13 on."""
    major, minor = _capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


def device_type(problem: AttentionProblem | SoftmaxProblem) -> str:
    """The kind of device that a problem is asked about: its target's, or its tensors'."""
    return problem.device.type if problem.target is None else problem.target.device_type


def capability(problem: AttentionProblem | SoftmaxProblem) -> tuple[int, int] | None:
    """The compute capability of its target, or of its tensors' device; None where there is none."""
    if problem.target is not None:
        return problem.target.capability
    found = _capability_of(problem.device)
    return (found // 10, found % 10) if found else None


def capability_refusal(problem: AttentionProblem | SoftmaxProblem) -> list[str]:
    """The reason shared by the GPU backends: their instructions begin with compute capability 8.0."""
    found = capability(problem)
    if found is None or found >= (8, 0):
        return []
    return [f"kernels need compute capability 8.0; the device has {found[0]}.{found[1]}"]


def has_wgmma(problem: AttentionProblem | SoftmaxProblem) -> bool:
    """Whether there are Hopper's warpgroup products: compute capability 9.0 exactly, for no later chip kept them."""
    return capability(problem) == (9, 0)


def allows_tf32() -> bool:
    """Whether torch's switch for float32 matrix products on GPUs says TF32."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return bool(precision == "tf32" if precision not in (None, "none") else torch.backends.cuda.matmul.allow_tf32)


# torch.compile runs these while tracing instead of tracing through caches and native code (see backends._load).
_capability_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
