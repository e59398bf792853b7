"""The kernel normal form: what every mask and score modification becomes before a kernel sees it.

A mask is one contiguous key interval per query row, optionally thinned out by a dense boolean ``keep``. A score modification is a
name, numbers and tensors. This form is closed under ``&`` and does not change when the vocabulary grows, so op schemas, tile
skipping and the backends' signatures do not change either. A mask that fits neither stays a rule (``mask_rules``) for whoever evaluates
rules, and becomes ``keep`` for everyone else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_attn import mask_rules
from fused_attn.kernel_dropout import KernelDropout, place
from fused_attn.kernel_score import KernelScore, parse
from fused_attn.mask_rules import Pairs, Rule

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Grid:
    """A rectangle of the [batch, heads, q_len, kv_len] score array, with the coordinates of its elements.

    Masks and score modifications receive a grid and answer for exactly its elements, so the same definition serves the whole
    array (eager) and a tile of it (cpu).

    Args:
        shape: full (batch, heads, q_len, kv_len).
        device: where coordinate tensors are made.
        q_offset: key position of query 0, an int or an int tensor [batch].
        region: half-open range per dimension; None means everything.
    """

    shape: tuple[int, int, int, int]
    device: torch.device
    q_offset: int | Tensor = 0
    region: tuple[Range, Range, Range, Range] | None = None

    @property
    def ranges(self) -> tuple[Range, Range, Range, Range]:
        if self.region is not None:
            return self.region
        batch, heads, q_len, kv_len = self.shape
        return (0, batch), (0, heads), (0, q_len), (0, kv_len)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many elements the region has along each dimension."""
        return tuple(end - start for start, end in self.ranges)

    @property
    def q_idx(self) -> Tensor:
        """Query indices, [q, 1]."""
        return torch.arange(*self.ranges[2], device=self.device)[:, None]

    @property
    def q_pos(self) -> Tensor:
        """Query positions on the key axis, [q, 1] or [batch, 1, q, 1]."""
        return self.positions[:, None, :, None] if isinstance(self.q_offset, Tensor) else self.q_idx + self.q_offset

    @property
    def positions(self) -> Tensor:
        """Query positions on the key axis, int64 [batch|1, q], also where a size is 0."""
        index = self.q_idx[:, 0]
        if isinstance(self.q_offset, Tensor):
            return index + self.q_offset[slice(*self.ranges[0]), None].to(torch.int64)
        return (index + self.q_offset)[None]

    @property
    def kv_idx(self) -> Tensor:
        """Key indices, [kv]."""
        return torch.arange(*self.ranges[3], device=self.device)

    def crop(self, tensor: Tensor) -> Tensor:
        """The part of a [batch|1, heads|1, q_len|1, kv_len|1] tensor that belongs to this region, as a view."""
        if self.region is None:
            return tensor
        for dim, (start, end) in enumerate(self.region):
            if tensor.shape[dim] != 1:
                tensor = tensor.narrow(dim, start, end - start)
        return tensor

    def at(self, *region: Range) -> Grid:
        """The same array restricted to four half-open ranges."""
        batch, heads, q_range, kv_range = region
        return replace(self, region=(batch, heads, q_range, kv_range))


def _minimum(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


@dataclass(frozen=True, slots=True)
class KernelMask:
    """Which keys each query row may attend to: one interval per row, thinned by an optional dense ``keep``.

    Args:
        left: keys from ``q_pos - left`` on; None for no limit.
        right: keys up to ``q_pos + right``; None for no limit.
        kv_start: int32 [batch|1, q_len], first key of each row.
        kv_end: int32 [batch|1, q_len], one past the last key of each row.
        keep: bool [batch|1, heads|1, q_len|1, kv_len|1]; True may attend.
        rules: what else must allow a pair, evaluated region by region; kernels that take tensors only see ``as_tensors``.

    Example:
        >>> both = KernelMask(right=0) & KernelMask(left=1)
        >>> both.left, both.right
        (1, 0)
        >>> [t.tolist() for t in both.row_intervals(Grid((1, 1, 3, 3), torch.device("cpu")))]
        [[[0, 0, 1]], [[1, 2, 3]]]
    """

    left: int | None = None
    right: int | None = None
    kv_start: Tensor | None = None
    kv_end: Tensor | None = None
    keep: Tensor | None = None
    rules: tuple[Rule, ...] = ()

    def __and__(self, other: KernelMask) -> KernelMask:
        def both(a: Tensor | None, b: Tensor | None, op: Any) -> Tensor | None:
            return b if a is None else a if b is None else op(a, b)

        rules, keep = (*self.rules, *other.rules), self.keep
        if self.keep is not None and other.keep is not None and mask_rules.multiplies_out(self.keep, other.keep):
            keep, aside = sorted((self.keep, other.keep), key=Tensor.numel, reverse=True)
            rules = (*rules, Pairs(aside))
        else:
            keep = both(self.keep, other.keep, torch.logical_and)
        return KernelMask(
            _minimum(self.left, other.left),
            _minimum(self.right, other.right),
            both(self.kv_start, other.kv_start, torch.maximum),
            both(self.kv_end, other.kv_end, torch.minimum),
            keep,
            rules,
        )

    @property
    def is_trivial(self) -> bool:
        return not self.has_intervals and not self.has_pairs

    @property
    def has_pairs(self) -> bool:
        """Whether anything but intervals decides."""
        return self.keep is not None or bool(self.rules)

    @property
    def has_intervals(self) -> bool:
        return not (self.left is None and self.right is None and self.kv_start is None and self.kv_end is None)

    def row_intervals(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """First and one-past-last key of each row, int64 [batch|1, q_len], clipped to [0, kv_len]; empty rows have start >= end."""
        kv_len, position = grid.shape[3], grid.positions
        start, end = torch.zeros_like(position), torch.full_like(position, kv_len)
        if self.left is not None:
            start = torch.maximum(start, position - self.left)
        if self.right is not None:
            end = torch.minimum(end, position + self.right + 1)
        if self.kv_start is not None:
            start = torch.maximum(start, self.kv_start)
        if self.kv_end is not None:
            end = torch.minimum(end, self.kv_end)
        return start.clamp(0, kv_len), end.clamp(0, kv_len)

    def tile_bounds(self, grid: Grid, block_q: int) -> Tensor:
        """Per tile of ``block_q`` rows the keys any row reaches and the keys every row reaches.

        Returns:
            int64 [4, batch|1, tiles]: first and end of the reach (a tile of empty rows has first >= end), then first and end of the full part.
        """
        start, end = torch.broadcast_tensors(*self.row_intervals(grid))
        empty = start >= end
        tiles = -(-start.shape[1] // block_q)
        pad = (0, tiles * block_q - start.shape[1])

        def reduce(values: Tensor, fill: int, op: str) -> Tensor:
            padded = torch.nn.functional.pad(values, pad, value=fill).unflatten(1, (tiles, block_q))
            result: Tensor = getattr(padded, op)(-1)
            return result

        kv_len = grid.shape[3]
        first = reduce(start.masked_fill(empty, kv_len), kv_len, "amin")
        last = reduce(end.masked_fill(empty, 0), 0, "amax")
        return torch.stack((first, last, reduce(start, 0, "amax"), reduce(end, kv_len, "amin")))

    def tile_summary(self, grid: Grid, block_q: int, block_kv: int) -> Tensor | None:
        """What ``keep`` says of each tile: 0 nothing may attend, 1 mixed, 2 everything may.

        Returns:
            int8 [batch|1, heads|1, q tiles|1, kv tiles|1], or None without ``keep``.

        Example:
            >>> keep = torch.tensor([[True, True, False, False], [True, True, True, False]])[None, None]
            >>> KernelMask(keep=keep).tile_summary(Grid((1, 1, 2, 4), torch.device("cpu")), 2, 2).tolist()
            [[[[2, 1]]]]
        """
        if self.keep is None:
            return None
        some, every = self.keep, self.keep
        for dim, block in ((2, block_q), (3, block_kv)):
            length = self.keep.shape[dim]
            if length > 1:
                groups = [slice(i, min(i + block, length)) for i in range(0, length, block)]
                some = torch.stack([some[(slice(None),) * dim + (g,)].any(dim) for g in groups], dim)
                every = torch.stack([every[(slice(None),) * dim + (g,)].all(dim) for g in groups], dim)
        return some.to(torch.int8) + every.to(torch.int8)

    def dense(self, grid: Grid) -> Tensor | None:
        """The mask of a region as one bool tensor broadcastable to it, or None where everything may attend."""
        allowed = None if self.keep is None else grid.crop(self.keep)
        if self.has_intervals:
            (b0, b1), _, (q0, q1), _ = grid.ranges
            whole = replace(grid, region=None)
            start, end = (t if t.shape[0] == 1 else t[b0:b1] for t in self.row_intervals(whole))
            inside = (grid.kv_idx >= start[:, None, q0:q1, None]) & (grid.kv_idx < end[:, None, q0:q1, None])
            allowed = inside if allowed is None else allowed & inside
        for rule in self.rules:
            allowed = rule.allowed(grid) if allowed is None else allowed & rule.allowed(grid)
        return allowed

    def allowed(self, grid: Grid) -> Tensor:
        """``dense``, also where everything may attend."""
        allowed = self.dense(grid)
        return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=grid.device) if allowed is None else allowed

    def settled(self, grid: Grid) -> KernelMask:
        """The same mask with its rules as intervals, where that is what they are; as ``keep``, where values cannot be looked at."""
        if not self.rules:
            return self
        if mask_rules.are_captured(self.rules, grid):
            return self.as_tensors(grid)
        found = mask_rules.intervals((replace(self, keep=None),), grid)
        return self if found is None else KernelMask(kv_start=found[0], kv_end=found[1], keep=self.keep)

    def as_tensors(self, grid: Grid) -> KernelMask:
        """The same mask without rules: one byte for every pair that they can tell apart."""
        if not self.rules:
            return self
        rules = self.rules if self.keep is None else (Pairs(self.keep), *self.rules)
        write = mask_rules.evaluated if mask_rules.are_captured(rules, grid) else mask_rules.filled
        return replace(self, keep=write(rules, grid), rules=())


@dataclass(frozen=True, slots=True)
class Terms:
    """What is applied to scores between the product and the values, in normal form; shared by attention and softmax."""

    mask: KernelMask
    scale: float
    q_offset: int | Tensor = 0
    mods: tuple[KernelScore, ...] = ()
    sinks: Tensor | None = None
    dropout: KernelDropout | None = None
    scoring: KernelScore | None = None
    normalizer: KernelScore | None = None

    @property
    def entries(self) -> tuple[KernelScore, ...]:
        """Whatever has tensors of its own: the scoring, where it is no dot product, then the modifications in order."""
        return self.mods if self.scoring is None else (self.scoring, *self.mods)

    @property
    def _written(self) -> tuple[tuple[str, KernelScore], ...]:
        """The entries and the normaliser, where it is no softmax, each with what marks it in an op's string."""
        entries = tuple([(_SCORING * (m is self.scoring), m) for m in self.entries])
        return entries if self.normalizer is None else (*entries, (_NORMALIZER, self.normalizer))

    def flatten(self) -> tuple[Any, ...]:
        """Tensors, lists of scalars and one string: exactly the arguments an op schema can carry (see ``SCHEMA``)."""
        mask, offset = self.mask, self.q_offset
        assert not mask.rules, "an op takes tensors"
        is_tensor = isinstance(offset, Tensor)
        numbers = [pair for _, m in self._written for pair in zip(m.scalars, m.kinds, strict=True)]
        ints: list[Any] = [-1 if mask.left is None else mask.left, -1 if mask.right is None else mask.right, 0 if is_tensor else offset]
        if self.dropout is not None:
            ints += place(self.dropout)
        ints += [x for x, kind in numbers if kind == "i"]
        floats = [self.scale, self.dropout.p if self.dropout else 0.0, *(x for x, kind in numbers if kind == "f")]
        return (
            offset if is_tensor else None, mask.kv_start, mask.kv_end, mask.keep, self.dropout.seed if self.dropout else None,
            self.sinks, [t for m in self.entries for t in m.tensors], ints, floats,
            ",".join(mark + m.entry for mark, m in self._written),
        )  # fmt: skip

    # AOTInductor hands an empty list over as None, hence Tensor[]?.
    SCHEMA: ClassVar[str] = (
        "Tensor? q_offset, Tensor? kv_start, Tensor? kv_end, Tensor? keep, Tensor? seed, "
        "Tensor? sinks, Tensor[]? mod_tensors, SymInt[] ints, float[] floats, str mods"
    )

    @classmethod
    def unflatten(cls, flat: tuple[Any, ...]) -> Terms:
        """The inverse of ``flatten``."""
        offset, kv_start, kv_end, keep, seed, sinks, mod_tensors, ints, floats, mods = flat
        scale, p, *more = floats
        dropout = None if seed is None else KernelDropout.at(p, seed, ints[3:11])
        numbers, tensors = {"f": iter(more), "i": iter(ints[3 if seed is None else 11 :])}, iter(mod_tensors or ())
        left, right = (None if x < 0 else x for x in ints[:2])
        entries = list(parse(mods.removeprefix(_SCORING).replace(_NORMALIZER, ""), numbers, tensors))
        scoring = entries.pop(0) if mods.startswith(_SCORING) else None
        normalizer = entries.pop() if _NORMALIZER in mods else None
        return cls(
            KernelMask(left, right, kv_start, kv_end, keep), scale, ints[2] if offset is None else offset,
            tuple(entries), sinks, dropout, scoring, normalizer,
        )  # fmt: skip

    @property
    def holds_tensors(self) -> bool:
        """Whether anything but the inputs is a tensor."""
        if (
            self.entries
            or self.normalizer is not None
            or self.sinks is not None
            or self.dropout is not None
            or isinstance(self.q_offset, Tensor)
        ):
            return True
        mask = self.mask
        return mask.kv_start is not None or mask.kv_end is not None or mask.has_pairs

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The tensors that may want a gradient: the sinks (or None), then those of the scoring and of the modifications in order."""
        return (self.sinks, *(t for m in self.entries for t in m.tensors))


# What marks the scoring and the normaliser among the entries of an op's string.
_SCORING, _NORMALIZER = "@", "!"


@dataclass(frozen=True, slots=True)
class LoweredAttention:
    """An attention call in normal form: q [batch, heads, q_len, head_dim], k and v [batch, kv_heads, kv_len, ...] and its terms."""

    q: Tensor
    k: Tensor
    v: Tensor
    terms: Terms

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, q_len, _ = self.q.shape
        return batch, heads, q_len, self.k.shape[2]

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, self.q.device, self.terms.q_offset)


@dataclass(frozen=True, slots=True)
class LoweredSoftmax:
    """A masked softmax in normal form: scores [batch, middle, q_len, kv_len] (any strides), its terms, and three switches.

    Args:
        scores: the input, viewed as 4-D.
        terms: mask, scale and at most one modification, an additive bias.
        log: logarithms of the probabilities instead.
        uniform_empty: a row without keys gives 1 / kv_len everywhere instead of 0.
    """

    scores: Tensor
    terms: Terms
    log: bool = False
    uniform_empty: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, middle, q_len, kv_len = self.scores.shape
        return batch, middle, q_len, kv_len

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, self.scores.device, self.terms.q_offset)


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of row statistics and of arithmetic: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
