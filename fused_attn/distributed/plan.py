"""One rank's share of an attention over a sharded sequence: its queries' chunks in normal form, and which chunks of keys they meet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fused_attn import backends
from fused_attn.auxiliary import AuxRequest
from fused_attn.distributed.shards import Order, Shards
from fused_attn.distributed.traffic import as_group, told
from fused_attn.kernel_score import KernelScore
from fused_attn.lowering import Grid, LoweredAttention, Range, Terms
from fused_attn.parts import terms_of
from fused_attn.problem import AttentionProblem, UnsupportedError
from fused_attn.score_mods import Bias, ScoreMod, is_authored
from fused_attn.selective import is_selective

# Plain torch on blocks runs on every device: what ``auto`` takes here where it would take the definition, which has no normal form.
_ANYWHERE = "blocked"


@dataclass(frozen=True)
class Plan:
    """What does not change from step to step.

    Args:
        group: the process group.
        shards: who holds what.
        backend: which backend's kernels run.
        terms: of the whole problem; tensors with a dimension of queries are whole, or this rank's rows where ``own_rows`` says so.
        grid: of the whole problem, [batch, heads, length, length].
        own_rows: for each tensor of the modifications whether it has this rank's rows alone.
        request: what is asked for besides.
    """

    group: Any
    shards: Shards
    backend: str
    terms: Terms
    grid: Grid
    own_rows: tuple[bool, ...]
    request: AuxRequest | None

    @classmethod
    def of(cls, tensors: tuple[Tensor, Tensor, Tensor], group: Any, order: Order, options: dict[str, Any], backend: str) -> Plan:
        """Checks a call; ``options`` are those of ``AttentionProblem.check``."""
        group = as_group(group)
        ranks, q = dist.get_world_size(group), tensors[0]
        if any(not isinstance(t, Tensor) or t.dim() != 4 for t in tensors) or len({t.shape[2] for t in tensors}) > 1:
            raise ValueError(
                f"q, k and v must be this rank's rows of one sequence, [batch, heads, length / ranks, dim]; got {[list(getattr(t, 'shape', ())) for t in tensors]}. "
                "Shard all three alike."
            )
        if q.device.type == "cpu":  # a GPU would have to be waited for; gloo ends the process where sizes differ
            _require_same(group, tensors)
        shards, local = Shards(ranks, order, ranks * q.shape[2]), q.shape[2]
        # Views of the whole problem's shape that take no memory: whatever is checked and lowered is that of the whole.
        whole = [t[:, :, :1].expand(-1, -1, shards.length, -1) for t in tensors]
        mods, own = _with_whole_rows(options["score_mods"], local, shards.length)
        problem = AttentionProblem.check(whole[0], whole[1], whole[2], options | {"score_mods": mods})
        _refuse(problem)
        lowered = replace(problem, modifiers=replace(problem.modifiers, score_mods=())).lower()
        parts = [(score, rows) for mod, rows in zip(mods, own, strict=True) for score in mod.lower(lowered.grid)]
        scores = [score if rows is None else KernelScore(score.name, score.scalars, (rows,)) for score, rows in parts]
        terms = replace(lowered.terms, mods=tuple(scores))
        own_rows = tuple([rows is not None for score, rows in parts for _ in score.tensors])
        return cls(group, shards, _kernels(problem, backend), terms, lowered.grid, own_rows, problem.aux)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @cached_property
    def chunk_terms(self) -> tuple[Terms, ...]:
        """The terms of each of this rank's chunks of queries, over all keys; differentiable in the modifications' tensors."""
        return tuple([self._of_rows(place, rows) for place, rows in enumerate(self.shards.chunks(self.rank))])

    def _of_rows(self, place: int, rows: Range) -> Terms:
        batch, heads, _, keys = self.grid.shape
        size = self.shards.size
        kept = iter(self.own_rows)
        masked = [replace(m, tensors=tuple([t[:, :, :1] if next(kept) else t for t in m.tensors])) for m in self.terms.mods]
        cut = terms_of(replace(self.terms, mods=tuple(masked)), self.grid, ((0, batch), (0, heads), rows, (0, keys)))
        kept = iter(self.own_rows)
        own = [
            replace(
                m, tensors=tuple([t.narrow(2, place * size, size) if next(kept) else c for t, c in zip(m.tensors, n.tensors, strict=True)])
            )
            for m, n in zip(self.terms.mods, cut.mods, strict=True)
        ]
        return replace(cut, mods=tuple(own))

    @cached_property
    def meetings(self) -> list[list[bool]]:
        """See ``Shards.meetings``."""
        return self.shards.meetings(self.terms.mask, self.grid)

    def needs(self, rank: int, owner: int) -> bool:
        """Whether a rank's queries may find a key among an owner's."""
        return any(self.meetings[q][k] for q in self.shards.numbers(rank) for k in self.shards.numbers(owner))

    def pairs(self, owner: int) -> list[tuple[int, int, Range]]:
        """(place of a chunk of own queries, place of a chunk of the owner's keys, its range) of those that meet."""
        mine, theirs = self.shards.numbers(self.rank), self.shards.numbers(owner)
        ranges = self.shards.chunks(owner)
        return [(i, j, ranges[j]) for i, q in enumerate(mine) for j, k in enumerate(theirs) if self.meetings[q][k]]

    def part(self, q: Tensor, keys: tuple[Tensor, Tensor], terms: Terms, reach: Range) -> LoweredAttention:
        """A chunk of queries against a chunk of keys."""
        batch, heads, _, length = self.grid.shape
        grid = Grid((batch, heads, self.shards.size, length), q.device, terms.q_offset)
        cut = terms_of(replace(terms, sinks=None), grid, ((0, batch), (0, heads), (0, self.shards.size), reach))
        return LoweredAttention(q, *keys, cut)


def _require_same(group: Any, tensors: tuple[Tensor, ...]) -> None:
    """Raises on every rank where ranks hold other sizes."""
    everyone = told(group, [n for t in tensors for n in (*t.shape, t.element_size())])
    if any(numbers != everyone[0] for numbers in everyone):
        shapes = [[numbers[i : i + 4] for i in (0, 5, 10)] for numbers in everyone]
        raise ValueError(
            f"every rank must hold q, k and v of the same shapes and dtype; got {shapes[:8]} on ranks 0, 1, .... "
            "Pad the sequence to a multiple of the ranks, and mask the padding."
        )


def _with_whole_rows(mods: Any, local: int, length: int) -> tuple[tuple[ScoreMod, ...], tuple[Tensor | None, ...]]:
    """Modifications that fit the whole problem, and the rows of those that came with this rank's rows alone."""
    made: list[Any] = []
    rows: list[Tensor | None] = []
    for mod in mods if isinstance(mods, (tuple, list)) else (mods,):
        if isinstance(mod, Bias) and mod.bias.dim() >= 2 and mod.bias.shape[-2] == local and local not in (1, length):
            rows.append(mod.bias[(None,) * (4 - mod.bias.dim())])
            mod = Bias(mod.bias[..., :1, :].expand(*mod.bias.shape[:-2], length, mod.bias.shape[-1]))
        else:
            rows.append(None)
        made.append(mod)
    return tuple(made), tuple(rows)


def _refuse(problem: AttentionProblem) -> None:
    """Raises for what needs whole rows in one place, or all heads at once."""
    modifiers, reasons = problem.modifiers, []
    if modifiers.scoring is not None:
        reasons.append("a scoring is computed on one device only; fold it into q, k and Bias first")
    if modifiers.normalizer is not None and not modifiers.normalizer.name:
        reasons.append(f"{type(modifiers.normalizer).__name__} takes whole rows of scores")
    if is_selective(modifiers.score_mods):
        reasons.append("Selective needs the scores of all earlier queries")
    reasons += [f"{type(m).__name__} has code of its own, which wants the whole problem" for m in modifiers.score_mods if is_authored(m)]
    if problem.empty_rows != "zero":
        reasons.append("empty_rows must be 'zero'")
    if problem.aux is not None and problem.aux.is_picked:
        reasons.append("rows and heads are picked on one device only; take them out of this rank's probabilities")
    if problem.transform is not None:
        reasons.append(f"{problem.transform} is followed through plain torch operations only")
    if reasons:
        raise UnsupportedError(f"context parallelism cannot run this problem: {'; '.join(reasons)}.")


def _kernels(problem: AttentionProblem, backend: str) -> str:
    name = backends.resolve(problem, backend)
    if name != backends.EAGER:
        return name
    reasons = backends.get(_ANYWHERE).refusals(problem)
    if backend == backends.EAGER or reasons:
        raise UnsupportedError(
            f"context parallelism needs a backend with kernels for parts of a problem; got eager ({'; '.join(reasons) or 'asked for'}). Leave backend='auto'."
        )
    return _ANYWHERE
