"""Which backend runs a problem: the order, the choice, and the explanation of it.

``auto`` takes the first of cuda, triton, cpu, blocked, eager whose refusal list is empty and that is not reluctant. An explicit backend runs or raises
``UnsupportedError`` with every reason; it never falls back.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from fused_attn.checks import described
from fused_attn.mask_rules import Pairs, extent
from fused_attn.problem import AttentionProblem, SoftmaxProblem, UnsupportedError
from fused_attn.selective import is_selective
from fused_attn.targets import Target

if TYPE_CHECKING:
    from fused_attn.backends.base import Backend

__all__ = ["EAGER", "Explanation", "Target", "Verdict", "explain", "get", "names", "register", "require_name", "resolve", "unregister"]

EAGER = "eager"
# Module and class of each built-in backend, fastest first; imported when a backend is first considered.
_BUILT_IN = {
    "cuda": "fused_attn.backends.cuda:CudaBackend",
    "triton": "fused_attn.backends.triton:TritonBackend",
    "cpu": "fused_attn.backends.cpu:CpuBackend",
    "blocked": "fused_attn.backends.cpu.blocked:BlockedBackend",
}
_registered: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Adds a backend of your own, tried before the built-in ones (and replaces one of the same name)."""
    _registered.pop(backend.name, None)
    _registered[backend.name] = backend


def unregister(name: str) -> None:
    """Removes a backend added with ``register``."""
    _registered.pop(name, None)


_loaded: dict[str, Backend] = {}


def _load() -> bool:
    if not _loaded:
        _loaded.update(
            {name: getattr(importlib.import_module(path.split(":")[0]), path.split(":")[1])() for name, path in _BUILT_IN.items()}
        )
    return True


# torch.compile runs it while tracing instead of tracing through imports (what torch.compiler.assume_constant_result sets);
# it loads all at once because the dictionary may not change once a trace has seen it.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def get(name: str) -> Backend:
    """The kernel backend of that name."""
    if name in _registered:
        return _registered[name]
    _load()
    return _loaded[name]


def _candidates() -> Collection[Backend]:
    """The kernel backends in the order ``auto`` tries them."""
    _load()
    if not _registered:  # the same without building it anew, a 20th of the host's time on the smallest problems
        return _loaded.values()
    return [*(b for n, b in _registered.items() if n not in _BUILT_IN), *(_registered.get(n, _loaded[n]) for n in _BUILT_IN)]


def _reluctance(backend: Backend, problem: AttentionProblem | SoftmaxProblem) -> str | None:
    """Why ``auto`` passes over a backend that could run the problem, or None."""
    found = backend.reluctance(problem)
    if found is None or isinstance(found, str):
        return found
    other = get(found.to)
    return found.reason if _reluctance(other, problem) is None and not other.refusals(problem) else None


def names() -> tuple[str, ...]:
    """Backend names in the order ``auto`` tries them."""
    return (*(n for n in _registered if n not in _BUILT_IN), *_BUILT_IN, EAGER)


def require_name(backend: object) -> str:
    """A backend's name, or "auto", which says nothing yet about whether it takes a problem.

    Raises:
        ValueError: there is no backend of that name.

    Example:
        >>> require_name("eager")
        'eager'
    """
    if not isinstance(backend, str) or (backend != "auto" and backend not in names()):
        raise ValueError(
            f"backend must be 'auto' or one of {', '.join(names())}; got {described(backend)}. See fused_attn.explain for what can run."
        )
    return backend


def resolve(problem: AttentionProblem | SoftmaxProblem, backend: str) -> str:
    """The name of the backend that runs the problem.

    Raises:
        ValueError: there is no backend of that name.
        UnsupportedError: the backend asked for cannot run the problem.
    """
    if isinstance(backend, str) and backend == EAGER:
        return EAGER
    if require_name(backend) != "auto":
        reasons = get(backend).refusals(problem)
        if reasons:
            raise UnsupportedError(
                f"backend {backend!r} must support the problem; got these refusals: {'; '.join(reasons)}. Use backend='auto' or change the problem."
            )
        return backend
    for candidate in _candidates():
        if _reluctance(candidate, problem) is None and not candidate.refusals(problem):
            return candidate.name
    if problem.device.type == "cuda":
        _warn_quadratic(tuple(f"{row.backend}: {row.reason}" for row in explain(problem).rows if row.reason))
    return EAGER


@functools.cache
def _warn_quadratic(reasons: tuple[str, ...]) -> None:
    warnings.warn(f"fused_attn falls back to eager, which needs O(q_len * kv_len) memory ({'; '.join(reasons)})", stacklevel=4)


@dataclass(frozen=True)
class Verdict:
    """One backend's answer: the reason why it does not run, or an empty string."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Why a backend runs a problem; ``print`` shows a table."""

    chosen: str
    rows: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(len(row.backend) for row in self.rows)
        lines = [f"  {'->' if row.backend == self.chosen else '  '} {row.backend:<{width}}  {row.reason or 'can run'}" for row in self.rows]
        return "\n".join([f"backend: {self.chosen}", *lines, *(f"  note: {note}" for note in self.notes)])


def _mask_notes(problem: AttentionProblem | SoftmaxProblem, chosen: str) -> list[str]:
    """What a mask costs that is no interval per row and no tensor of the caller's."""
    mask, grid = problem.modifiers.mask, problem.grid
    form = None if mask is None else mask.lower(grid)
    if form is None or not form.rules:
        return []
    left = form.settled(grid)
    if left.rules and getattr(get(chosen), "evaluates_rules", False):
        return ["the mask is not one run of keys per query: it is evaluated in blocks, O(block x length) memory"]
    if not left.rules and left.keep is form.keep:
        return []
    rules = form.rules if form.keep is None else (Pairs(form.keep), *form.rules)
    size = prod(extent(rules, grid)) / 2**20
    return [f"the mask is not one run of keys per query: it is stored with one byte per pair, {size:.3g} MiB"]


def _own_notes(problem: AttentionProblem | SoftmaxProblem, chosen: str) -> list[str]:
    """What a backend that has ``notes`` says about how it would run the problem."""
    notes = getattr(get(chosen), "notes", None)
    return [] if notes is None else list(notes(problem))


def _composition_notes(problem: AttentionProblem | SoftmaxProblem) -> list[str]:
    """What is made of several kernel calls, or beside them."""
    if isinstance(problem, SoftmaxProblem):
        return []
    notes, request, mods = [], problem.aux, problem.modifiers.score_mods
    if is_selective(mods):
        notes.append(
            "Selective: blocks of queries one after another, O(q_len * kv_len / block) memory (inside torch.compile one head's scores)"
        )
    if problem.empty_rows != "zero":
        notes.append(f"empty_rows={problem.empty_rows!r}: rows without keys run in a second pass")
    if request is not None and request.is_picked:
        notes.append(
            "rows and heads of probs and scores are computed by the definition (by a kernel on Hopper without gradients), O(rows * kv_len) memory"
        )
    if request is not None and problem.requires_grad and (request.max_scores or request.column_sums or request.entropy):
        notes.append("gradients of max_scores, column_sums and entropy recompute through the definition, O(block * kv_len) memory")
    return notes


def explain(problem: AttentionProblem | SoftmaxProblem) -> Explanation:
    """Asks every backend, in order."""
    rows = []
    for name in names()[:-1]:
        backend = get(name)
        reasons = backend.refusals(problem)
        reluctance = _reluctance(backend, problem) if not reasons else None
        rows.append(Verdict(name, "; ".join(reasons) or (f"can run, but only when asked for: {reluctance}" if reluctance else "")))
    rows.append(Verdict(EAGER, ""))
    chosen = next(row.backend for row in rows if not row.reason)
    notes = ["the definition; needs O(q_len * kv_len) memory"] if chosen == EAGER else []
    normalizer = problem.modifiers.normalizer
    if chosen == EAGER and normalizer is not None and not normalizer.name and problem.transform is None:
        notes.append(f"{type(normalizer).__name__} takes whole rows: what it builds on is the fused masked softmax")
    if chosen != EAGER and problem.requires_grad:
        notes.append("double backward recomputes through eager and needs O(q_len * kv_len) memory")
    notes += [] if chosen == EAGER else [*_own_notes(problem, chosen), *_mask_notes(problem, chosen), *_composition_notes(problem)]
    return Explanation(chosen, tuple(rows), tuple(notes))
