"""The error rule: what a result may differ from float64 by, derived and never typed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_attn import backends
from fused_attn.auxiliary import AuxOutput, AuxRequest
from fused_attn.backends import eager
from fused_attn.dropout import keep_factor
from fused_attn.functional import attention
from fused_attn.lowering import Grid, stat_dtype
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import SCORE_MODS, ScoreMod
from fused_attn.scoring import Additive
from fused_attn.selective import Selective
from fused_attn.testing.additive import AdditiveTerms
from fused_attn.testing.cases import CPU, Case, Inputs, make_inputs

DIFFERENTIABLE = ("out", "probs", "scores", "lse")
# Differentiable as well, at the cost of recomputing rows by the definition.
STATISTICS = ("max_scores", "column_sums", "entropy")


def input_names(problem: AttentionProblem) -> list[str]:
    """Names for ``problem.inputs``: q, k, v, sinks, "additive[0]" for a scoring's first tensor, "bias[0]" for that of the first modification."""
    modifiers = problem.modifiers
    return [
        "q",
        "k",
        "v",
        *["sinks"] * (modifiers.sinks is not None),
        *([] if modifiers.scoring is None else [f"{modifiers.scoring.name}[{i}]" for i in range(len(modifiers.scoring.tensors))]),
        *(f"{m.name}[{i}]" for i, m in enumerate(modifiers.score_mods) for _ in m.tensors),
        *["normalizer" for _ in (modifiers.normalizer.tensors if modifiers.normalizer else ())],
    ]


def call(problem: AttentionProblem, backend: str) -> tuple[Tensor, AuxOutput]:
    """Runs a problem through the public function."""
    m = problem.modifiers
    return attention(
        problem.q, problem.k, problem.v, mask=m.mask, scale=None if m.scoring else m.scale, scoring=m.scoring, q_offset=m.q_offset, score_mods=m.score_mods, sinks=m.sinks,
        dropout=m.dropout, normalizer=m.normalizer, empty_rows=problem.empty_rows, return_aux=problem.aux or AuxRequest(), backend=backend,
    )  # fmt: skip


Results = dict[str, Tensor]


def evaluate(
    function: Callable[[AttentionProblem], tuple[Tensor, AuxOutput]],
    inputs: Inputs,
    through: Sequence[str] = DIFFERENTIABLE,
    wanted: Collection[str] | None = None,
) -> Results:
    """Every output, and the gradients ("dq", ...) of the wanted inputs (default: all) when the given outputs receive ``inputs.incoming``."""
    names = input_names(inputs.problem)
    leaves = {n: t.detach().requires_grad_(wanted is None or n in wanted) for n, t in zip(names, inputs.problem.inputs, strict=True)}
    out, aux = function(inputs.problem.with_inputs(tuple(leaves.values())))
    outputs = {"out": out} | {name: getattr(aux, name) for name in (inputs.problem.aux or AuxRequest()).names}
    live = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(
        [outputs[n] for n in through], list(live.values()), [inputs.incoming[n] for n in through], allow_unused=True
    )
    filled = {f"d{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(live.items(), grads, strict=True)}
    return {n: t.detach() for n, t in outputs.items()} | filled


def differentiable_inputs(problem: AttentionProblem, backend: str) -> list[str]:
    """The inputs that the backend gives gradients of: q, k, v, sinks, and the modifications' tensors that it does not refuse."""
    names = input_names(problem)
    if backend == backends.EAGER:
        return names

    def refusals(index: int) -> list[str]:
        leaves = (t.detach().requires_grad_(i == index) for i, t in enumerate(problem.inputs))
        return backends.get(backend).refusals(problem.with_inputs(tuple(leaves)))

    return [n for i, n in enumerate(names) if n in ("q", "k", "v", "sinks") or refusals(i) == refusals(-1)]


def in_double(inputs: Inputs) -> Inputs:
    """The same values in float64."""
    problem = inputs.problem.with_inputs(tuple(t.detach().double() for t in inputs.problem.inputs))
    return Inputs(problem, {n: t.double() for n, t in inputs.incoming.items()})


@dataclass(frozen=True)
class Rounding:
    """Rounding errors to first order, for results computed in the inputs' dtype with float32 (or wider) arithmetic.

    Two sources, both properties of the formats alone. Storage: each probability is rounded to the inputs' dtype before it meets the
    values (half an eps), and so is the result (another half): one eps. Arithmetic: a sum of n terms rounds n times by at most half
    an eps of what was summed so far; as independent errors they add up to eps * sqrt(n) / 6 at one standard deviation, so
    eps * sqrt(n) is six of them, which no order of summation exceeds.

    Args:
        probs: float64 probabilities.
        spread: magnitude of the terms that each score is the sum of.
        dtype: of the inputs.
    """

    probs: Tensor
    spread: Tensor
    dtype: torch.dtype

    @property
    def storage(self) -> float:
        return torch.finfo(self.dtype).eps

    @property
    def floor(self) -> float:
        """What is lost below the normal numbers: a subnormal step of the inputs' dtype, everything in arithmetic."""
        return max(torch.finfo(self.dtype).smallest_normal * self.storage, torch.finfo(stat_dtype(self.dtype)).smallest_normal)

    def arithmetic(self, terms: int) -> float:
        return float(torch.finfo(stat_dtype(self.dtype)).eps * math.sqrt(max(terms, 1)))

    def over_row(self, values: Tensor) -> Tensor:
        """Mean over the row with the probabilities as weights."""
        return (self.probs * values).sum(-1, keepdim=True)

    def relative(self, terms: int) -> Tensor:
        """Relative error of each probability: of its own score, of the row's normaliser, and of storage."""
        spread = self.spread.where(self.probs > 0, 0.0)
        return self.storage + self.arithmetic(terms) * (1 + spread + self.over_row(spread))

    def of_gradient(self, magnitude: Tensor, terms: int) -> Tensor:
        """Error of a score's gradient whose terms have this magnitude; the row's other probabilities enter through their mean."""
        relative = self.relative(terms)
        return magnitude * (relative + self.over_row(relative)) + self.floor


def attention_bands(inputs: Inputs, exact: Results, dtype: torch.dtype, through: Sequence[str]) -> Results:
    """How far rounding alone may move each result of a float64 problem that was computed in ``dtype``; see ``Rounding``."""
    problem, modifiers, grid = inputs.problem, inputs.problem.modifiers, inputs.problem.grid
    groups = problem.q.shape[1] // problem.k.shape[1]
    q, k, v = (t.nan_to_num(0.0, 0.0, 0.0) for t in (problem.q, problem.k, problem.v))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    additive = AdditiveTerms(modifiers.scoring, q, k) if isinstance(modifiers.scoring, Additive) else None
    if additive is None:
        scores, spread = q @ k.mT * modifiers.scale, q.abs() @ k.mT.abs() * abs(modifiers.scale)
    else:
        scores, spread = additive.scores()
    for mod in modifiers.score_mods:
        after = (exact["scores"] if isinstance(mod, Selective) else mod.apply(scores, grid)).detach().nan_to_num(0.0, 0.0, 0.0)
        scores, spread = after, spread + (after - scores).abs()
    probs = exact["probs"].nan_to_num(0.0)
    rounding = Rounding(probs, spread, dtype)
    terms = q.shape[-1] + v.shape[-1] + k.shape[2] + groups * q.shape[2]
    step, relative = rounding.arithmetic(terms), rounding.relative(terms)
    keep = keep_factor(modifiers.dropout.lower(grid.device), grid, probs.dtype) if modifiers.dropout else 1.0
    weights = probs * keep * relative + rounding.floor
    row = step * (1 + rounding.over_row(spread.where(probs > 0, 0.0)))[..., 0]
    logs, lse = probs.log().nan_to_num(0.0, 0.0, 0.0).abs(), exact.get("lse", torch.zeros_like(exact["max_scores"]))
    bands = {
        "out": weights @ v.abs(), "probs": probs * relative + rounding.floor, "lse": row + step * lse.abs(),
        "scores": step * spread + rounding.storage * exact["scores"].abs() + rounding.floor,
        "max_scores": step * (spread.amax(-1) + exact["max_scores"].abs()), "column_sums": (probs * relative).sum(-2) + rounding.floor,
        "entropy": (probs * relative * (2 + logs)).sum(-1) + rounding.floor,
    }  # fmt: skip
    arriving = {
        n: inputs.incoming[n].abs() if n in through else torch.zeros_like(inputs.incoming[n]) for n in (*DIFFERENTIABLE, *STATISTICS)
    }
    upstream = arriving["out"] @ v.mT.abs() * keep + arriving["probs"] + arriving["column_sums"][:, :, None]
    upstream = upstream + arriving["entropy"][..., None] * (1 + logs)
    centred = rounding.over_row(upstream) + arriving["lse"][..., None]
    top = (exact["scores"] == exact["max_scores"][..., None]) * arriving["max_scores"][..., None]
    magnitude = probs * (upstream + centred) + (arriving["scores"] + top).where(exact["scores"].isfinite(), 0.0)

    def per_kv_head(values: Tensor) -> Tensor:
        batch, heads, *rest = values.shape
        return values.reshape(batch, heads // groups, groups, *rest).sum(2)

    ds = rounding.of_gradient(magnitude, terms)
    if additive is None:
        bands["dq"], dk = abs(modifiers.scale) * ds @ k.abs(), abs(modifiers.scale) * ds.mT @ q.abs()
    else:
        bands["dq"], dk = additive.of_inputs(ds)
        for i, band in enumerate(additive.of_parameters(rounding.of_gradient(magnitude, terms + probs.numel()))):
            bands[f"dadditive[{i}]"] = band
    bands["dk"] = per_kv_head(dk)
    bands["dv"] = per_kv_head(weights.mT @ arriving["out"])
    if modifiers.sinks is not None:
        # exp(sink - lse) errs as lse does; what arrives at it is the row's mean of products with the other probabilities.
        share = (modifiers.sinks[:, None] - lse).exp()[..., None]
        own = rounding.storage + rounding.arithmetic(terms + probs[:, 0, :, 0].numel()) * (
            1 + rounding.over_row(spread.where(probs > 0, 0.0))
        )
        total = share * (centred * (own + step * modifiers.sinks.abs()[:, None, None]) + rounding.over_row(upstream * relative))
        bands["dsinks"] = total.sum((0, 2, 3)) + rounding.floor
    names = (n for n in input_names(problem)[3:] if n != "sinks" and not n.startswith("additive"))
    for mod in modifiers.score_mods:
        for tensor in mod.tensors:
            ds = rounding.of_gradient(magnitude, terms + probs.numel() // tensor.numel())
            bands[f"d{next(names)}"] = _parameter_band(mod, tensor, grid, ds)
    return bands


def _parameter_band(mod: ScoreMod, tensor: Tensor, grid: Grid, ds: Tensor) -> Tensor:
    """Error of a modification's tensor given that of the scores: summed with the signs taken away, term by term of the normal form."""
    leaf = tensor.detach().requires_grad_()
    total = torch.zeros_like(tensor)
    for term in mod.with_tensors((leaf,)).lower(grid):
        inner = tuple(t.detach().requires_grad_() for t in term.tensors)
        scores = SCORE_MODS[term.name].from_kernel(replace(term, tensors=inner)).apply(torch.zeros_like(ds), grid)
        for outer, grad in zip(term.tensors, torch.autograd.grad(scores, inner, ds), strict=True):
            total += torch.autograd.grad(outer, leaf, grad.abs(), retain_graph=True)[0].abs()
    return total


def excess(name: str, got: Tensor, plain: Tensor, exact: Tensor, band: Tensor) -> str | None:
    """Why a result breaks the error rule, or None: |got - exact| <= 2 * max |plain - exact| + band, and NaN and infinities at the same places."""
    got, plain = got.double(), plain.double()
    if got.shape != exact.shape:
        return f"{name}: shape {list(got.shape)} instead of {list(exact.shape)}"
    finite = exact.isfinite()
    special = (got == exact) | (got.isnan() & exact.isnan())
    wrong = torch.where(finite, ~got.isfinite(), ~special)
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        return f"{name}: {got[index].item()} instead of {exact[index].item()} at {index} ({int(wrong.sum())} of {wrong.numel()} elements)"
    error = (got - exact).abs().where(finite, 0.0)
    plain_error = (plain - exact).abs().where(finite & plain.isfinite(), 0.0)
    allowed = 2 * (plain_error.max() if plain_error.numel() else 0.0) + band.expand(exact.shape)
    over = finite & ~(error <= allowed)
    if not bool(over.any()):
        return None
    worst = (error - allowed).where(over, -torch.inf).argmax()
    place = tuple(int(i) for i in torch.unravel_index(worst, exact.shape))
    return (
        f"{name}: error {error[place]:.3e} > bound {allowed[place]:.3e} (2 x eager's {plain_error.max():.3e} + band {band.expand(exact.shape)[place]:.3e}) "
        f"at {place}: got {got[place]:.6g}, exact {exact[place]:.6g}; {int(over.sum())} of {over.numel()} elements"
    )


def report(title: str, failures: Iterable[str | None]) -> None:
    """Raises an AssertionError that lists the failures, if there are any."""
    lines = [f for f in failures if f]
    if lines:
        raise AssertionError("\n  ".join((f"{title} breaks the error rule:", *lines)))


def check(case: Case, backend: str, device: torch.device = CPU, through: Sequence[str] = ("out",), poison: bool = False) -> Results:
    """Holds every output and gradient of a case to the error rule, and returns them.

    Args:
        case: the problem.
        backend: name of the backend under test.
        device: where to run it.
        through: the outputs that gradients arrive at.
        poison: see ``make_inputs``.
    """
    return check_inputs(make_inputs(case, device, poison=poison), backend, through, case.name)


def check_inputs(inputs: Inputs, backend: str, through: Sequence[str] = ("out",), title: str = "") -> Results:
    """As ``check``, for inputs of your own; all auxiliary outputs must be requested."""
    got = evaluate(lambda p: call(p, backend), inputs, through, differentiable_inputs(inputs.problem, backend))
    report(f"{backend} on {title}", violations(inputs, got, through))
    return got


def violations(inputs: Inputs, got: Results, through: Sequence[str] = ("out",)) -> list[str]:
    """How results (as ``evaluate`` gives them) break the error rule; empty when they hold it."""
    dtype, exactly = inputs.problem.q.dtype, in_double(inputs)
    plain = evaluate(lambda p: eager.attention(p, dtype), inputs, through)
    exact = evaluate(eager.attention, exactly, through)
    bands = attention_bands(exactly, exact, dtype, through)
    return [failure for n in got if (failure := excess(n, got[n], plain[n], exact[n], bands[n]))]
