"""A mask, a score modification and a backend from user code work end to end without an edit of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import fused_attn as fa
from fused_attn import backends
from fused_attn.backends import eager
from fused_attn.backends.base import AuxTensors, Forward
from fused_attn.lowering import KernelMask
from fused_attn.masks import Mask
from fused_attn.score_mods import SCORE_MODS, ScoreMod
from fused_attn.testing import EVERYTHING, Case, Inputs, check_inputs, make_inputs

pytestmark = pytest.mark.quick
TITLE = "user code"
CPU = torch.device("cpu")


class Checkers(Mask):
    """Keys an even distance away; the default ``lower`` makes it dense."""

    positional: ClassVar[bool] = True

    def keep(self, grid):
        return (grid.q_pos - grid.kv_idx) % 2 == 0


@dataclass(frozen=True, eq=False)
class Recent(Mask):
    """The last ``count`` keys up to the query, per sequence; lowered to intervals, so that kernels skip tiles."""

    counts: torch.Tensor
    positional: ClassVar[bool] = True

    def keep(self, grid):
        first = grid.q_pos - self.counts[slice(*grid.ranges[0]), None, None, None] + 1
        return (grid.kv_idx >= first) & (grid.kv_idx <= grid.q_pos)

    def lower(self, grid):
        start = (grid.positions - self.counts[:, None] + 1).clamp(0, grid.shape[3]).to(torch.int32)
        return KernelMask(right=0, kv_start=start)


@pytest.fixture
def mod():
    """A score modification with a scalar and a learned tensor: s * factor + gain_h."""

    @dataclass(frozen=True, eq=False)
    class Gain(ScoreMod):
        factor: float
        gain: torch.Tensor
        name: ClassVar[str] = "test_gain"

        def view(self, tensor, grid):
            return tensor.reshape(1, -1, 1, 1)

        def apply(self, scores, grid):
            return scores * self.factor + grid.crop(self.view(self.gain, grid)).to(scores.dtype)

    yield Gain(0.25, torch.tensor([0.5, -0.25, 0.0, 1.0]))
    SCORE_MODS.pop("test_gain")


class PlainBackend:
    """The normal form in plain torch: no kernel, but everything a backend must answer."""

    name = "plain"

    def __init__(self):
        self.calls = []

    def refusals(self, problem):
        return ["it has no dropout"] if problem.modifiers.dropout else []

    def reluctance(self, problem):
        return None

    def stats_shape(self, call):
        return (1,)

    def _rows(self, call, q, k, v, parameters):
        """Scores after all modifications, probabilities, lse and output."""
        sinks, *rest = parameters
        left, scores = list(rest), q @ k.mT * call.terms.scale
        for score in call.terms.mods:
            tensors = tuple(left.pop(0) for _ in score.tensors)
            scores = SCORE_MODS[score.name].from_kernel(type(score)(score.name, score.scalars, tensors)).apply(scores, call.grid)
        allowed = call.terms.mask.dense(call.grid)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        probs, lse = eager._softmax(scores, sinks)
        if allowed is not None:
            probs = probs.masked_fill(~allowed, 0.0)
        return probs @ v, lse, probs, scores

    def _inputs(self, call):
        groups = call.q.shape[1] // call.k.shape[1]
        return call.q, call.k.repeat_interleave(groups, 1), call.v.repeat_interleave(groups, 1), call.terms.parameters

    def attention_fwd(self, call):
        self.calls.append("fwd")
        out, lse, _, _ = self._rows(call, *self._inputs(call))
        return Forward(out.transpose(1, 2).contiguous().transpose(1, 2), lse, lse.new_zeros(1))

    def attention_aux(self, call, forward, request):
        self.calls.append("aux")
        _, _, probs, scores = self._rows(call, *self._inputs(call))
        wanted = zip(
            request.flags[:2] + request.flags[3:],
            (probs, scores, scores.amax(-1), probs.sum(-2), torch.special.entr(probs).sum(-1)),
            strict=True,
        )
        return AuxTensors(*(t if want else None for want, t in wanted))

    def attention_bwd(self, call, forward, incoming, needs):
        self.calls.append("bwd")
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().requires_grad_() for t in (call.q, call.k, call.v, *call.terms.parameters)]
            groups = call.q.shape[1] // call.k.shape[1]
            k, v = (t.repeat_interleave(groups, 1) for t in leaves[1:3])
            outputs = self._rows(call, leaves[0], k, v, leaves[3:])
            arriving = (incoming.dout, incoming.dlse, incoming.dprobs, incoming.dscores)
            pairs = [(o, g) for o, g in zip(outputs, arriving, strict=True) if g is not None]
            wanted = [t for t, need in zip(leaves, needs, strict=True) if need]
            grads = iter(
                torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, materialize_grads=True)
            )
        return tuple(next(grads) if need else None for need in needs)


@pytest.fixture
def plain():
    backend = PlainBackend()
    backends.register(backend)
    yield backend
    backends.unregister("plain")


def problem_with(mask=None, mods=(), lengths=(9, 13), device=CPU):
    """A problem with grouped heads and unequal lengths, with everything asked for, and the gradients that arrive."""
    inputs = make_inputs(Case((2, 4, 2), lengths, (16, 16), offset="bottom"), device)
    options = {
        "mask": mask,
        "scale": None,
        "q_offset": lengths[1] - lengths[0],
        "score_mods": mods,
        "sinks": None,
        "dropout": None,
        "return_aux": EVERYTHING,
    }
    problem = inputs.problem
    return Inputs(type(problem).check(problem.q, problem.k, problem.v, options), inputs.incoming)


def padding(device=CPU):
    return fa.KeyPadding(torch.arange(26, device=device).view(2, 13) % 5 > 0)


def recent(device=CPU):
    return Recent(torch.tensor([3, 5], device=device))


MASKS = {
    "dense": lambda device: Checkers(),
    "lowered": recent,
    "combined": lambda device: Checkers() & recent(device) & padding(device),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_mask(mask, backend, device):
    check_inputs(problem_with(mask(device), device=device), backend, ("out", "probs"), TITLE)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_mask_lowers_to_its_meaning(mask, device):
    mask = mask(device)
    grid = problem_with(mask, device=device).problem.grid
    assert mask.lower(grid).dense(grid).expand(grid.shape).equal(mask.keep(grid).expand(grid.shape))


def test_mask_compiles_and_is_explained(kernel_backend, device):
    problem = problem_with(MASKS["combined"](device), device=device).problem
    q, k, v = problem.q, problem.k, problem.v
    counts = recent(device).counts

    def run(q, k, v):
        return fa.attention(q, k, v, mask=Checkers() & Recent(counts), q_offset=4, backend=kernel_backend)

    assert torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v).equal(run(q, k, v))
    assert fa.explain(q, k, v, mask=recent(device), q_offset=4).chosen in backends.names()


def test_mask_in_masked_softmax(backend, device):
    scores = torch.randn(2, 3, 9, 9, device=device)
    probs = fa.masked_softmax(scores, Checkers() & fa.Causal(), backend=backend)
    expected = (
        scores.double()
        .masked_fill(~torch.tensor([[(q - k) % 2 == 0 and k <= q for k in range(9)] for q in range(9)], device=device), -torch.inf)
        .softmax(-1)
    )
    assert (probs - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_score_mod(mod, backend, device):
    mod = mod.with_tensors(tuple(t.to(device) for t in mod.tensors))
    inputs = problem_with(fa.Causal(), (fa.SoftCap(3.0), mod), device=device)
    if backend in ("triton", "cuda"):
        with pytest.raises(fa.UnsupportedError, match="Gain"):
            fa.attention(inputs.problem.q, inputs.problem.k, inputs.problem.v, score_mods=(mod,), backend=backend)
    else:
        check_inputs(inputs, backend, ("out", "scores"), TITLE)


def test_score_mod_is_explained_and_compiles(mod):
    problem = problem_with().problem
    q, k, v = problem.q, problem.k, problem.v
    assert "eager is faster" in str(fa.explain(q, k, v, score_mods=(mod,)))
    text = str(fa.explain(*(t.repeat(1, 1, 60, 1) for t in (q, k, v)), score_mods=(mod,)))
    assert "-> cpu" in text
    assert "Gain" in text

    def run(q, k, v, gain):
        return fa.attention(q, k, v, score_mods=(type(mod)(0.25, gain),), backend="cpu")

    gain = mod.gain.clone().requires_grad_()
    expected, out = run(q, k, v, gain), torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v, gain)
    assert out.equal(expected)
    assert torch.autograd.grad(out.sum(), gain)[0].equal(torch.autograd.grad(expected.sum(), gain)[0])


def test_backend_holds_to_the_error_rule(plain):
    mods = (fa.SoftCap(3.0), fa.ALiBi(torch.tensor([0.5, 0.25, 0.125, 1.0])), fa.Bias(torch.randn(4, 9, 1)))
    check_inputs(
        problem_with(fa.Causal() & padding(), mods),
        "plain",
        ("out", "probs", "scores", "lse"),
        TITLE,
    )
    assert plain.calls == ["fwd", "aux", "bwd"]


def test_backend_is_preferred_refuses_and_is_explained(plain):
    problem = problem_with().problem
    q, k, v = problem.q, problem.k, problem.v
    assert fa.explain(q, k, v).chosen == "plain"
    fa.attention(q, k, v)
    assert plain.calls == ["fwd"]
    dropped = fa.explain(q, k, v, dropout=fa.Dropout(0.1))
    assert dropped.chosen != "plain"
    assert "it has no dropout" in str(dropped)
    with pytest.raises(fa.UnsupportedError, match="it has no dropout"):
        fa.attention(q, k, v, dropout=fa.Dropout(0.1), backend="plain")


def test_backend_compiles(plain):
    problem = problem_with().problem
    q, k, v = (t.clone().requires_grad_() for t in (problem.q, problem.k, problem.v))

    def run(q, k, v):
        return fa.attention(q, k, v, mask=fa.Causal(), q_offset=4, backend="plain")

    out, expected = torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v), run(q, k, v)
    assert out.equal(expected)
    for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        assert a.equal(b)


def test_backend_double_backward_goes_through_eager(plain):
    inputs = make_inputs(Case((1, 2, 1), (4, 4), (4, 4), torch.float64)).problem
    leaves = [t.clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    assert torch.autograd.gradgradcheck(lambda q, k, v: fa.attention(q, k, v, mask=fa.Causal(), backend="plain"), leaves)
