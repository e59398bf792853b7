"""What is measured: an operation, its mask or extra, a mode, a dtype and a shape; and the tensors, the exact result and the work of one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.lowering import Grid
from fused_attn.masks import Mask

MODES = ("fwd", "bwd", "fwd+bwd")
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One line of a benchmark.

    Args:
        op: "attention" with shape [batch, heads, length, head_dim], or "softmax" with scores [batch, heads, q_len, kv_len].
        variant: a name in ``VARIANTS[op]``.
        mode: "fwd", "bwd" (the graph of a forward done before) or "fwd+bwd".
        dtype: of the tensors, as torch names it.
        shape: see op.
    """

    op: str
    variant: str
    mode: str
    dtype: str
    shape: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        if self.op not in VARIANTS or self.variant not in VARIANTS[self.op]:
            known = "; ".join(f"{op}: {', '.join(variants)}" for op, variants in VARIANTS.items())
            raise ValueError(f"a case must be one of these operations and variants: {known}; got {self.op}/{self.variant}")
        if (
            self.mode not in MODES
            or len(self.shape) != 4
            or min(self.shape) < 1
            or not isinstance(getattr(torch, self.dtype, 0), torch.dtype)
        ):
            raise ValueError(f"a case must have a mode of {', '.join(MODES)}, a dtype of torch and four sizes; got {self.name}")

    @property
    def name(self) -> str:
        """A readable id, which ``Case.parse`` takes back.

        Example:
            >>> Case("attention", "causal", "fwd", "float32", (1, 4, 2048, 64)).name
            'attention/causal/fwd/float32/1x4x2048x64'
        """
        return "/".join((self.op, self.variant, self.mode, self.dtype, "x".join(map(str, self.shape))))

    @staticmethod
    def parse(name: str) -> Case:
        """A case from its name."""
        parts = name.split("/")
        if len(parts) != 5 or not all(size.isdigit() for size in parts[4].split("x")):
            raise ValueError(f"a case is named op/variant/mode/dtype/1x2x3x4; got {name!r}")
        return Case(*parts[:4], tuple(int(size) for size in parts[4].split("x")))  # type: ignore[arg-type]


def _dense(grid: Grid, generator: torch.Generator) -> Tensor:
    """A third of the pairs at random, whole tiles of 128 x 128 among them; no row is empty."""
    batch, _, q_len, kv_len = grid.shape
    keep = torch.rand(batch, 1, q_len, kv_len, generator=generator) < 2 / 3
    tiles = torch.rand(batch, 1, -(-q_len // 128), -(-kv_len // 128), generator=generator) < 0.5
    keep &= tiles.repeat_interleave(128, 2)[:, :, :q_len].repeat_interleave(128, 3)[..., :kv_len]
    keep[..., 0] = True
    return keep


def _padding(grid: Grid, generator: torch.Generator) -> Tensor:
    """A third of the keys, the same for every query of a sequence."""
    keep = torch.rand(grid.shape[0], 1, 1, grid.shape[3], generator=generator) < 2 / 3
    keep[..., 0] = True
    return keep


@dataclass(frozen=True)
class Variant:
    """What is added to the plain operation.

    Args:
        mask: makes a mask, or a bool tensor, for a grid.
        probs: whether the probabilities are returned too, with a gradient of their own.
        bias: whether a full bias is added, with gradient.
    """

    mask: Callable[[Grid, torch.Generator], Mask | Tensor | None] = lambda grid, generator: None
    probs: bool = False
    bias: bool = False


VARIANTS: dict[str, dict[str, Variant]] = {
    "attention": {
        "plain": Variant(),
        "probs": Variant(probs=True),
        "causal": Variant(lambda grid, _: fa.Causal()),
        "masked": Variant(_dense),
        "bias": Variant(bias=True),
        "window": Variant(lambda grid, _: fa.Causal() & fa.SlidingWindow(255, 0)),
        "documents": Variant(lambda grid, _: fa.Documents(torch.arange(grid.shape[3], device=grid.device) * 4 // grid.shape[3])),
    },
    "softmax": {"plain": Variant(), "masked": Variant(_padding), "dense": Variant(_dense), "causal": Variant(lambda grid, _: fa.Causal())},
}


@dataclass(frozen=True, eq=False)
class Problem:
    """The tensors of a case on a device, from a fixed seed: standard normal values, which is what caches and clocks are sensitive to."""

    case: Case
    device: torch.device
    leaves: Results = field(init=False)
    incoming: tuple[Tensor, ...] = field(init=False)
    mask: Mask | None = field(init=False)
    keep: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.case.op}/{self.case.variant}/{self.case.shape}".encode()))
        dtype = getattr(torch, self.case.dtype)

        def make(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, dtype)

        shape, backward = self.case.shape, self.case.mode != "fwd"
        names = ("q", "k", "v") if self.case.op == "attention" else ("scores",)
        leaves = {name: make(shape) for name in names}
        if self.variant.bias:
            leaves["bias"] = make((1, shape[1], shape[2], shape[2]))
        made = self.variant.mask(self.grid, generator)
        mask = fa.Dense(made.to(self.device)) if isinstance(made, Tensor) else made
        object.__setattr__(self, "leaves", {name: t.requires_grad_(backward) for name, t in leaves.items()})
        object.__setattr__(self, "incoming", tuple(make(s) for s in self.output_shapes) if backward else ())
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "keep", None if mask is None else mask.allowed(self.grid))

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.case.op][self.case.variant]

    @property
    def grid(self) -> Grid:
        batch, heads, q_len, last = self.case.shape
        return Grid((batch, heads, q_len, q_len if self.case.op == "attention" else last), self.device)

    @property
    def output_shapes(self) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = [self.case.shape]
        return [*shapes, self.grid.shape] if self.variant.probs else shapes

    @property
    def output_names(self) -> tuple[str, ...]:
        return ("out", "probs")[: len(self.output_shapes)]

    def results(self, outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...] = ()) -> Results:
        """Outputs and gradients by name."""
        named = dict(zip(self.output_names, (t.detach() for t in outputs), strict=True))
        return named | {f"d{name}": g for name, g in zip(self.leaves, grads, strict=False)}

    def caller(self, forward: Callable[..., tuple[Tensor, ...]]) -> Callable[[], Results]:
        """What is timed: the forward function in the case's mode."""
        leaves = tuple(self.leaves.values())
        if self.case.mode == "fwd":
            return lambda: self.results(forward(*leaves))
        if self.case.mode == "fwd+bwd":

            def both() -> Results:
                outputs = forward(*leaves)
                return self.results(outputs, torch.autograd.grad(outputs, leaves, self.incoming))

            return both
        outputs = forward(*leaves)
        return lambda: self.results(outputs, torch.autograd.grad(outputs, leaves, self.incoming, retain_graph=True))

    def reference(self, dtype: torch.dtype) -> Results:
        """The definition in plain torch, computed in ``dtype`` one head at a time so that float64 fits."""
        parts: dict[str, list[Tensor]] = {}
        for at in self._heads():
            mine = [t.expand(self.case.shape[0], *t.shape[1:])[at].detach().to(dtype) for t in self.leaves.values()]
            leaves = [t.requires_grad_(self.case.mode != "fwd") for t in mine]
            keep = None if self.keep is None else self.keep.expand(self.grid.shape)[at]
            outputs = plain(self, keep, *leaves)
            grads = torch.autograd.grad(outputs, leaves, [t[at].to(dtype) for t in self.incoming]) if self.incoming else ()
            for name, tensor in self.results(outputs, grads).items():
                parts.setdefault(name, []).append(tensor)
        batch, heads = self.case.shape[:2]
        whole = {n: torch.cat(p).unflatten(0, (batch, heads)).squeeze(2) for n, p in parts.items()}
        return {n: t.sum(0, keepdim=True) if n == "dbias" else t for n, t in whole.items()}

    def _heads(self) -> Iterator[tuple[slice, slice]]:
        for b in range(self.case.shape[0]):
            for h in range(self.case.shape[1]):
                yield slice(b, b + 1), slice(h, h + 1)

    @cached_property
    def pairs(self) -> int:
        """Queries x keys that may attend to each other."""
        return math.prod(self.grid.shape) if self.keep is None else int(self.keep.expand(self.grid.shape).sum())

    @property
    def flops(self) -> int:
        """Of the matrix products alone: 4 per pair and channel forward, 10 backward, as FlashAttention's authors count."""
        if self.case.op == "softmax":
            return 0
        return {"fwd": 4, "bwd": 10, "fwd+bwd": 14}[self.case.mode] * self.pairs * self.case.shape[3]

    @property
    def bytes(self) -> int:
        """The least that has to be moved: every tensor read or written once per pass, masks as the tensors that the caller holds."""
        size = next(iter(self.leaves.values())).element_size()
        inputs = sum(t.numel() for t in self.leaves.values())
        outputs = sum(math.prod(s) for s in self.output_shapes)
        held = sum(t.numel() for t in [self.keep] if t is not None and self.case.variant in ("masked", "dense"))
        forward, backward = inputs + outputs, 2 * inputs + 2 * outputs if self.case.op == "attention" else inputs + 2 * outputs
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[self.case.mode] * size + held


def plain(problem: Problem, keep: Tensor | None, *leaves: Tensor) -> tuple[Tensor, ...]:
    """What a user would write: softmax(masked_fill(q k^T / sqrt(d) + bias)) v, or the softmax alone."""
    if problem.case.op == "softmax":
        return (torch.softmax(leaves[0] if keep is None else leaves[0].masked_fill(~keep, -torch.inf), -1),)
    q, k, v, *bias = leaves
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias:
        scores = scores + bias[0]
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    probs = torch.softmax(scores, -1)
    return (probs @ v, probs)[: 1 + problem.variant.probs]


def defaults(device: torch.device) -> list[Case]:
    """The cases of a plain ``run``: real sizes that end within minutes."""
    gpu = device.type == "cuda"
    dtype, attention = ("bfloat16", (2, 16, 4096, 128)) if gpu else ("float32", (1, 4, 1024, 64))
    softmax = [(4, 16, 4096, 4096), (1, 8, 256, 65536)] if gpu else [(2, 4, 512, 1024), (1, 2, 64, 32768)]
    cases = [Case("attention", variant, mode, dtype, attention) for variant in VARIANTS["attention"] for mode in ("fwd", "fwd+bwd")]
    cases += [
        Case("softmax", variant, mode, dtype, shape) for shape in softmax for variant in ("plain", "masked") for mode in ("fwd", "fwd+bwd")
    ]
    lengths = (1024, 2048, 4096, 8192, 16384) if gpu else (256, 512, 1024, 2048)
    sweep = [Case("attention", "causal", "fwd", dtype, (*attention[:2], length, attention[3])) for length in lengths]
    return list(dict.fromkeys(cases + sweep))
