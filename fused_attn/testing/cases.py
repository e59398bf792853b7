"""Named attention problems and their inputs.

``CASES`` is a covering array: every pair of values of any two factors (length, head size, mask, modification, layout, ...) occurs in
some case. Masks and modifications are discovered through ``examples`` of every class of the package, so a new class is covered
without touching a test.
"""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.dropout import Dropout
from fused_attn.lowering import Grid, stat_dtype
from fused_attn.masks import Mask
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import ScoreMod

CPU = torch.device("cpu")
EVERYTHING = AuxRequest(probs=True, scores=True, lse=True, max_scores=True, column_sums=True, entropy=True)


def vocabulary(base: type[Any], grid: Grid) -> dict[str, Any]:
    """Every example of every subclass of ``base`` in the package, as "Class0", "Class1", ...

    Example:
        >>> "Causal0" in vocabulary(Mask, Grid((1, 1, 4, 4), CPU))
        True
    """
    found: dict[str, Any] = {}
    for cls in base.__subclasses__():
        if cls.__module__.startswith("fused_attn."):
            found |= {f"{cls.__name__}{i}": example for i, example in enumerate(cls.examples(grid))} | vocabulary(cls, grid)
    return found


@dataclass(frozen=True)
class Case:
    """One attention problem, described.

    Args:
        sizes: (batch, heads, kv_heads).
        lengths: (q_len, kv_len).
        dims: (head_dim, value_dim).
        dtype: of q, k and v.
        masks: names in ``vocabulary(Mask, ...)``, combined with ``&``.
        mods: names in ``vocabulary(ScoreMod, ...)``, in order.
        sinks: whether there are sinks.
        dropout: chance of removal.
        offset: "top" (0), "bottom" (kv_len - q_len) or "mixed" (an int tensor, different for each sequence).
        layout: how q, k, v and the incoming gradient lie in memory; see ``laid_out``.
        content: "normal", "outliers" (a few channels 20 times larger) or "repeated" (each token four times).
        params: dtype of biases, slopes and sinks: "float32" or "inputs".
    """

    sizes: tuple[int, int, int] = (1, 2, 2)
    lengths: tuple[int, int] = (64, 64)
    dims: tuple[int, int] = (32, 32)
    dtype: torch.dtype = torch.float32
    masks: tuple[str, ...] = ()
    mods: tuple[str, ...] = ()
    sinks: bool = False
    dropout: float = 0.0
    offset: str = "top"
    layout: str = "contiguous"
    content: str = "normal"
    params: str = "float32"

    @property
    def name(self) -> str:
        """A readable test id that says everything.

        Example:
            >>> Case(masks=("Causal0",), dropout=0.2).name
            'q64_k64_d32_v32_b1h2g2-float32-Causal0-drop-top-contiguous-normal-float32'
        """
        (batch, heads, kv_heads), (q_len, kv_len), (dim, value_dim) = self.sizes, self.lengths, self.dims
        size = f"q{q_len}_k{kv_len}_d{dim}_v{value_dim}_b{batch}h{heads}g{kv_heads}"
        extra = (*self.masks, *self.mods, *["sinks"] * self.sinks, *["drop"] * bool(self.dropout))
        return "-".join((size, str(self.dtype).removeprefix("torch."), *extra, self.offset, self.layout, self.content, self.params))

    @property
    def work(self) -> int:
        """Multiply-adds of the forward pass; what a quick selection sorts by."""
        return self.sizes[0] * self.sizes[1] * math.prod(self.lengths) * sum(self.dims)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.sizes[0], self.sizes[1], *self.lengths


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values (for "stride0" their first slice along the first and third dimension, repeated) in another memory layout.

    "contiguous"; "permuted" ([batch, length, heads, dim] in memory); "transposed" (last dimension strided); "sliced" (at an odd
    offset inside a larger tensor full of NaN, so that reading outside shows); "stride0" (expanded).

    Example:
        >>> laid_out(torch.zeros(2, 3, 4, 5), "permuted").stride()
        (60, 5, 15, 1)
    """
    if layout == "permuted" and values.dim() > 2:
        return values.transpose(1, -2).contiguous().transpose(1, -2)
    if layout == "transposed" and values.dim() > 1:
        return values.mT.contiguous().mT
    if layout == "stride0":
        return values[:1, :, :1].expand(values.shape) if values.dim() > 2 else values[:1].expand(values.shape)
    if layout == "sliced":
        room = values.new_full([n + 3 for n in values.shape], torch.nan)
        inner = room[tuple(slice(1, n + 1) for n in values.shape)]
        inner.copy_(values)
        return inner
    return values.contiguous()


def _values(shape: tuple[int, ...], content: str, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    if content == "outliers" and values.dim() > 1:
        values[..., shape[-1] // 3 :: 29] *= 20
    if content == "repeated" and values.dim() > 1:
        values = values[..., torch.arange(shape[-2], device="cpu") // 4, :]
    return values


class Inputs(NamedTuple):
    """A problem and the gradients that arrive at its outputs."""

    problem: AttentionProblem
    incoming: dict[str, Tensor]


def _offset(case: Case, device: torch.device) -> int | Tensor:
    q_len, kv_len = case.lengths
    if case.offset != "mixed":
        return kv_len - q_len if case.offset == "bottom" else 0
    offset = kv_len - q_len - 2 * torch.arange(case.sizes[0], device=device)
    return offset.clamp(min(0, kv_len - q_len)) if any(m.startswith("DecayBias") for m in case.mods) else offset


def make_inputs(case: Case, device: torch.device = CPU, seed: int = 0, poison: bool = False) -> Inputs:
    """Inputs of a case, reproducible from its name and the seed, identical on every device.

    Args:
        case: the description.
        device: where the tensors live.
        seed: for other values of the same case.
        poison: whether keys and values that no query may attend to are NaN.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)
    (batch, heads, kv_heads), (q_len, kv_len), (dim, value_dim) = case.sizes, case.lengths, case.dims

    def make(*shape: int, dtype: torch.dtype = case.dtype, layout: str = "contiguous") -> Tensor:
        return laid_out(_values(shape, case.content, generator).to(device, dtype), layout)

    q = make(batch, heads, q_len, dim, layout=case.layout)
    k = make(batch, kv_heads, kv_len, dim, layout=case.layout)
    v = make(batch, kv_heads, kv_len, value_dim, layout=case.layout)
    grid = Grid(case.shape, device, _offset(case, device))
    known = vocabulary(Mask, grid)
    mask = None
    for name in case.masks:
        mask = known[name] if mask is None else mask & known[name]
    params = torch.float64 if case.dtype == torch.float64 else case.dtype if case.params == "inputs" else torch.float32
    known = vocabulary(ScoreMod, grid)
    mods = tuple(known[name].with_tensors(tuple(t.to(params) for t in known[name].tensors)) for name in case.mods)
    if poison and mask is not None:
        unseen = ~mask.keep(grid).expand(*case.shape[: 2 if mask.keep(grid).dim() == 4 else 0], q_len, kv_len).any(-2)
        unseen = unseen.expand(batch, heads, kv_len).unflatten(1, (kv_heads, -1)).all(2)[..., None]
        k, v = k.masked_fill(unseen, torch.nan), v.masked_fill(unseen, torch.inf)
    options = {
        "mask": mask, "scale": None, "q_offset": grid.q_offset, "score_mods": mods, "return_aux": EVERYTHING,
        "sinks": make(heads, dtype=params) if case.sinks else None, "dropout": Dropout(case.dropout, seed=11 + seed) if case.dropout else None,
    }  # fmt: skip
    rows = stat_dtype(case.dtype)
    incoming = {
        "out": make(batch, heads, q_len, value_dim, layout=case.layout), "probs": make(*case.shape, layout=case.layout),
        "scores": make(*case.shape), "lse": make(batch, heads, q_len, dtype=rows),
        "max_scores": make(batch, heads, q_len, dtype=rows), "column_sums": make(batch, heads, kv_len, dtype=rows),
        "entropy": make(batch, heads, q_len, dtype=rows),
    }  # fmt: skip
    return Inputs(AttentionProblem.check(q, k, v, options), incoming)


def inputs_of(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Inputs:
    """A problem of your own, every auxiliary output asked for, and random gradients that arrive at it.

    Args:
        q: see ``fused_attn.attention``.
        k: see ``fused_attn.attention``.
        v: see ``fused_attn.attention``.
        options: its keyword arguments but for the backend.
    """
    defaults = dict.fromkeys(("mask", "scale", "q_offset", "sinks", "dropout")) | {"score_mods": (), "return_aux": EVERYTHING}
    problem = AttentionProblem.check(q, k, v, defaults | options)
    generator = torch.Generator().manual_seed(problem.shape[3])
    rows = stat_dtype(q.dtype)
    (batch, heads, q_len, kv_len), wide = problem.shape, (q.dtype, rows)
    shapes = {
        "out": (batch, heads, q_len, v.shape[-1]), "probs": problem.shape, "scores": problem.shape, "lse": (batch, heads, q_len),
        "max_scores": (batch, heads, q_len), "column_sums": (batch, heads, kv_len), "entropy": (batch, heads, q_len),
    }  # fmt: skip
    incoming = {
        n: _values(shape, "normal", generator).to(q.device, wide[n not in ("out", "probs", "scores")]) for n, shape in shapes.items()
    }
    return Inputs(problem, incoming)


def covering(factors: Mapping[str, Sequence[Any]], skip: frozenset[tuple[str, str]] = frozenset()) -> list[dict[str, Any]]:
    """Few rows in which every pair of values of any two factors occurs, but for the pairs of factors in ``skip``.

    Example:
        >>> rows = covering({"a": (1, 2), "b": (1, 2), "c": (1, 2)})
        >>> len(rows) < 8 and {(r["a"], r["c"]) for r in rows} == {(1, 1), (1, 2), (2, 1), (2, 2)}
        True
    """
    names, rng = list(factors), random.Random(0)
    pairs = [p for p in itertools.combinations(names, 2) if p not in skip]
    # Insertion-ordered, so that the rows are the same in every process.
    left = dict.fromkeys((a, i, b, j) for a, b in pairs for i in range(len(factors[a])) for j in range(len(factors[b])))
    rows = []
    while left:
        a, i, b, j = next(iter(left))
        row = {a: i, b: j}
        for name in rng.sample([n for n in names if n not in row], len(names) - 2):
            options = rng.sample(range(len(factors[name])), len(factors[name]))
            row[name] = max(options, key=lambda x: sum((c, y, name, x) in left or (name, x, c, y) in left for c, y in row.items()))
        for c, d in pairs:
            left.pop((c, row[c], d, row[d]), None)
        rows.append({n: factors[n][row[n]] for n in names})
    return rows


_GRID = Grid((2, 2, 4, 4), CPU)
_MASKS, _MODS = tuple(vocabulary(Mask, _GRID)), tuple(vocabulary(ScoreMod, _GRID))


def _by_class(names: Sequence[str]) -> dict[str, list[str]]:
    """Examples by the class they belong to."""
    classes: dict[str, list[str]] = {}
    for name in names:
        classes.setdefault(name.rstrip("0123456789"), []).append(name)
    return classes


_LENGTHS = (*((n, n) for n in (1, 2, 3, 7, 63, 64, 65, 127, 128, 129, 257)), (1, 129), (3, 64), (129, 65), (64, 1), (65, 257))
_DIMS = (*((n, n) for n in (16, 32, 40, 64, 80, 96, 128, 160, 192, 256, 1, 3, 33)), (64, 24), (40, 72), (192, 128))
_FACTORS: dict[str, Sequence[Any]] = {
    "lengths": _LENGTHS,
    "dims": _DIMS,
    # Classes, whose examples take turns.
    "masks": ((), *((m,) for m in _by_class(_MASKS))),
    "mods": ((), *((m,) for m in _by_class(_MODS))),
    "layout": ("contiguous", "permuted", "transposed", "sliced", "stride0"),
    "sizes": ((1, 1, 1), (2, 1, 1), (1, 4, 2), (1, 2, 1)),
    "content": ("normal", "outliers", "repeated"),
    "offset": ("top", "bottom", "mixed"),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "params": ("float32", "inputs"),
    "sinks": (False, True),
    "dropout": (0.0, 0.2),
}


def _class_pairs(names: Sequence[str], ordered: bool) -> list[tuple[str, str]]:
    """One pair of examples for every pair of classes, going round the examples of each."""
    chosen = (itertools.permutations if ordered else itertools.combinations)(_by_class(names).values(), 2)
    return [(a[i % len(a)], b[i % len(b)]) for i, (a, b) in enumerate(chosen)]


def _all_cases() -> list[Case]:
    cases = []
    turns = {name: itertools.cycle(examples) for names in (_MASKS, _MODS) for name, examples in _by_class(names).items()}
    for row in covering(_FACTORS, frozenset({("lengths", "dims")})):
        row |= {factor: tuple(next(turns[name]) for name in row[factor]) for factor in ("masks", "mods")}
        if any(m.startswith("DecayBias") for m in row["mods"]):  # it needs every query on a key
            row["lengths"] = tuple(sorted(row["lengths"]))
        cases.append(Case(**row))
    shapes = itertools.cycle([((1, 2, 1), (66, 66), (16, 8)), ((2, 1, 1), (33, 70), (24, 24)), ((1, 1, 1), (130, 130), (16, 16))])
    pairs: list[dict[str, Any]] = [{"masks": p} for p in _class_pairs(_MASKS, False)] + [{"mods": p} for p in _class_pairs(_MODS, True)]
    pairs += [
        {"masks": p, "mods": m, "sinks": True} for p, m in zip(_class_pairs(_MASKS, False), itertools.cycle(_class_pairs(_MODS, True)))
    ]
    for (sizes, lengths, dims), extra in zip(shapes, pairs, strict=False):
        cases.append(Case(sizes, lengths, dims, offset="bottom", **extra))
    layouts = itertools.cycle(_FACTORS["layout"])
    for length, mask in itertools.product((1, 5, 65), ((), *((m,) for m in _MASKS))):
        cases.append(
            Case((2, 2, 1), (length, length), (7, 5), torch.float64, mask, _MODS[:: len(mask) + 1], True, 0.2, "mixed", next(layouts))
        )
    return cases


CASES: dict[str, Case] = {case.name: case for case in _all_cases()}
# Every sixth case among the cheaper three quarters: still all masks, modifications, layouts and dtypes.
QUICK = frozenset(sorted(CASES, key=lambda name: (CASES[name].work, name))[: len(CASES) * 3 // 4 : 6])
