"""Named masked softmaxes, their inputs, and their error rule."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fused_attn.dropout import Dropout
from fused_attn.functional import masked_softmax
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.problem import as_rows
from fused_attn.testing.budget import Results, Rounding, excess, report
from fused_attn.testing.cases import CPU, covering, laid_out, vocabulary


@dataclass(frozen=True)
class SoftmaxCase:
    """One masked softmax, described.

    Args:
        shape: of the scores.
        dim: the dimension that sums to 1.
        dtype: of the scores.
        mask: a name in ``vocabulary(Mask, ...)``, "float_lengths", "" for none, or "bool" for a bool tensor.
        full: which dimensions a bool mask and a bias do not broadcast along, by position in ``shape``.
        bias: whether there is a bias.
        scale: factor of the scores.
        log: logarithms instead.
        dropout: chance of removal (not with ``log``).
        empty_rows: what rows without keys give.
        layout: see ``laid_out``; "stride0" expands mask and bias as well.
    """

    shape: tuple[int, ...]
    dim: int = -1
    dtype: torch.dtype = torch.float32
    mask: str = ""
    full: tuple[int, ...] = ()
    bias: bool = False
    scale: float = 1.0
    log: bool = False
    dropout: float = 0.0
    empty_rows: Literal["zero", "uniform"] = "zero"
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        """A readable test id.

        Example:
            >>> SoftmaxCase((3, 5), mask="Causal0").name
            '3x5_dim-1-float32-Causal0-scale1.0-zero-contiguous'
        """
        extra = (
            self.mask,
            "bias" * self.bias,
            "full" + "".join(map(str, self.full)) if self.full else "",
            "log" * self.log,
            "drop" * bool(self.dropout),
        )
        head = f"{'x'.join(map(str, self.shape))}_dim{self.dim}-{str(self.dtype).removeprefix('torch.')}"
        return "-".join((head, *filter(None, extra), f"scale{self.scale}", self.empty_rows, self.layout))


class SoftmaxInputs(NamedTuple):
    """Scores, bias or None, the other arguments of ``masked_softmax``, and the gradient that arrives."""

    scores: Tensor
    bias: Tensor | None
    options: dict[str, Any]
    incoming: Tensor


def make_softmax(case: SoftmaxCase, device: torch.device = CPU, seed: int = 0) -> SoftmaxInputs:
    """Inputs of a case, reproducible from its name and the seed, identical on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)
    part = [n if i in case.full else 1 for i, n in enumerate(case.shape)]

    def make(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")

    def widened(tensor: Tensor) -> Tensor:
        return tensor.expand(case.shape) if case.layout == "stride0" else tensor

    scores = laid_out(make(case.shape).to(device, case.dtype), case.layout)
    bias = widened(make(part).to(device, case.dtype)) if case.bias else None
    rows = as_rows(torch.empty(case.shape, device="meta").movedim(case.dim, -1)).shape
    grid = Grid((rows[0], rows[1], rows[2], rows[3]), device)
    mask: Any = None
    if case.mask == "bool":
        mask = widened((make(part) > -0.4).to(device))
    elif case.mask == "float_lengths":
        mask = vocabulary(Mask, grid)["ValidLengths1"].__class__(torch.arange(rows[0], device=device) * 1.5)
    elif case.mask:
        mask = vocabulary(Mask, grid)[case.mask]
    options = {
        "mask": mask, "scale": case.scale, "dim": case.dim, "log": case.log, "empty_rows": case.empty_rows, "q_offset": rows[3] - rows[2],
        "dropout": Dropout(case.dropout, seed=5 + seed) if case.dropout else None,
    }  # fmt: skip
    return SoftmaxInputs(scores, bias, options, laid_out(make(case.shape).to(device, case.dtype), case.layout))


def evaluate_softmax(inputs: SoftmaxInputs, backend: str) -> Results:
    """The result and the gradients of scores and bias."""
    leaves = [t.detach().requires_grad_() for t in (inputs.scores, inputs.bias) if t is not None]
    out = masked_softmax(leaves[0], bias=leaves[1] if inputs.bias is not None else None, backend=backend, **inputs.options)
    grads = torch.autograd.grad(out, leaves, inputs.incoming)
    return {"out": out.detach()} | dict(zip(("dscores", "dbias"), grads, strict=False))


def softmax_bands(case: SoftmaxCase, inputs: SoftmaxInputs, dtype: torch.dtype) -> Results:
    """How far rounding alone may move each result of a float64 problem that was computed in ``dtype``; see ``Rounding``."""
    scores, bias, options, incoming = inputs

    def moved(tensor: Tensor) -> Tensor:
        return tensor.expand(case.shape).movedim(case.dim, -1)

    spread = moved((scores * case.scale).abs() + (0.0 if bias is None else bias.abs()))
    probs = masked_softmax(scores, bias=bias, backend="eager", **options | {"log": False, "dropout": None})
    rounding, terms = Rounding(moved(probs), spread, dtype), scores.shape[case.dim]
    probs, dout, step = rounding.probs, moved(incoming).abs() / (1 - case.dropout), rounding.arithmetic(scores.shape[case.dim])
    centred = dout.sum(-1, keepdim=True) if case.log else rounding.over_row(dout)
    magnitude = dout + probs * centred if case.log else probs * (dout + centred)
    relative = rounding.relative(terms)
    out = probs * relative / (1 - case.dropout) + rounding.floor
    if case.log:
        lse = 1 + rounding.over_row(spread.where(probs > 0, 0.0))
        out = step * (spread + lse) + rounding.storage * (spread + probs.log().nan_to_num(0.0, 0.0, 0.0).abs())
    bands = {"out": out, "dscores": abs(case.scale) * rounding.of_gradient(magnitude, terms)}
    if bias is not None:
        whole = rounding.of_gradient(magnitude, terms + scores.numel() // bias.numel())
        bands["dbias"] = whole.movedim(-1, case.dim).sum_to_size(bias.shape)
    return {n: b if n == "dbias" else b.movedim(-1, case.dim) for n, b in bands.items()}


def check_softmax(case: SoftmaxCase, backend: str, device: torch.device = CPU) -> Results:
    """Holds the result and the gradients of a case to the error rule, and returns them."""
    inputs = make_softmax(case, device)
    wide = inputs._replace(
        scores=inputs.scores.double(), bias=None if inputs.bias is None else inputs.bias.double(), incoming=inputs.incoming.double()
    )
    got, plain, exact = evaluate_softmax(inputs, backend), evaluate_softmax(inputs, "eager"), evaluate_softmax(wide, "eager")
    bands = softmax_bands(case, wide, case.dtype)
    report(f"{backend} on {case.name}", (excess(n, got[n], plain[n], exact[n], bands[n]) for n in exact))
    return got


_FACTORS: dict[str, Sequence[Any]] = {
    "layout": ("contiguous", "permuted", "transposed", "sliced", "stride0"),
    "mask": (
        "",
        "bool",
        "float_lengths",
        "Causal0",
        "ValidLengths0",
        "ValidLengths1",
        "KeyPadding0",
        "SlidingWindow0",
        "Dense1",
        "Documents1",
    ),
    "full": ((), (0,), (1, -1), (-1,), (-2, -1), (0, -2)),
    "dtype": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "kind": ({}, {"log": True}, {"dropout": 0.3}),
    "bias": (False, True),
    "scale": (1.0, 0.3, -2.0),
    "empty_rows": ("zero", "uniform"),
    "shape": ((7,), (5, 9), (2, 3, 33), (2, 2, 5, 65), (2, 1, 3, 2, 130), (3, 2, 4, 1), (1, 1, 1, 1), (2, 3, 17, 17)),
    "dim": (-1, 0, 1, -2),
}


def _all_cases() -> list[SoftmaxCase]:
    cases = []
    for row in covering(_FACTORS):
        rank = len(row["shape"])
        row |= {"full": tuple(sorted({i % rank for i in row["full"]})), "dim": row["dim"] if -rank <= row["dim"] < rank else -1}
        cases.append(SoftmaxCase(**row.pop("kind"), **row))
    masks = itertools.cycle(("", "ValidLengths1", "bool"))
    for length in sorted({max(1, 2**k + d) for k in range(13) for d in (-1, 0, 1)}):
        cases.append(SoftmaxCase((2, 3, length), mask=next(masks), full=(0, 2), bias=length % 2 == 1, scale=0.7))
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"mask": "ValidLengths0"},
        {"bias": True, "full": (1,)},
        {"log": True},
        {"dropout": 0.3, "mask": "bool", "full": (0, 1)},
    )
    for length, kind in itertools.product((65537, 131072, 1_000_003), kinds):
        # A second row proves its offset; at a million, which take seconds under an interpreter, only where the rows' lengths differ.
        rows = 1 if length > 1_000_000 and "ValidLengths" not in kind.get("mask", "") else 2
        cases.append(SoftmaxCase((rows, length), **kind, dtype=torch.float16 if kind.get("log") else torch.float32))
    return cases


SOFTMAX_CASES: dict[str, SoftmaxCase] = {case.name: case for case in _all_cases()}
SOFTMAX_QUICK = frozenset(
    sorted(SOFTMAX_CASES, key=lambda name: (math.prod(SOFTMAX_CASES[name].shape), name))[: len(SOFTMAX_CASES) * 4 // 5 : 3]
)
