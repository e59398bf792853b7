"""What is measured: an operation, its mask or extra, a mode, a dtype and a shape; and the tensors, the exact result and the work of one."""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Callable
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
        additive: whether scores are sum_d weight_d tanh(q_d + k_d), with a weight [heads, head_dim] with gradient.
        selective: whether head 0's scores are taken off those of later queries in every head.
        layers: so many, each with tensors of its own; each adds the scores of the one before, and the output is the sum of all.
    """

    mask: Callable[[Grid, torch.Generator], Mask | Tensor | None] = lambda grid, generator: None
    probs: bool = False
    bias: bool = False
    additive: bool = False
    selective: bool = False
    layers: int = 1

    @property
    def beyond_sdpa(self) -> str:
        """What no argument of scaled_dot_product_attention says; empty where one does."""
        reasons = {
            "cannot return probabilities": self.probs,
            "has no additive scores": self.additive,
            "cannot take one head's scores off the others'": self.selective,
            "cannot return scores for the next layer": self.layers > 1,
        }
        return ", ".join(reason for reason, holds in reasons.items() if holds)


VARIANTS: dict[str, dict[str, Variant]] = {
    "attention": {
        "plain": Variant(),
        "probs": Variant(probs=True),
        "causal": Variant(lambda grid, _: fa.Causal()),
        "masked": Variant(_dense),
        "bias": Variant(bias=True),
        "window": Variant(lambda grid, _: fa.Causal() & fa.SlidingWindow(255, 0)),
        "documents": Variant(lambda grid, _: fa.Documents(torch.arange(grid.shape[3], device=grid.device) * 4 // grid.shape[3])),
        "additive": Variant(additive=True),
        "selective": Variant(lambda grid, _: fa.Causal(), selective=True),
        "realformer": Variant(layers=3),
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
        layers = ["", *range(2, self.variant.layers + 1)]
        names = [f"{name}{layer}" for layer in layers for name in "qkv"] if self.case.op == "attention" else ["scores"]
        leaves = {name: make(shape) for name in names}
        if self.variant.bias:
            leaves["bias"] = make((1, shape[1], shape[2], shape[2]))
        if self.variant.additive:
            leaves["weight"] = make((shape[1], shape[3]))
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
        """The definition in plain torch, computed in ``dtype`` one head at a time so that float64 fits; all at once where heads look at each other."""
        shapes = dict(zip(self.output_names, self.output_shapes, strict=True))
        if self.incoming:
            shapes |= {f"d{name}": t.shape for name, t in self.leaves.items()}
        sums = {name: torch.zeros(shape, dtype=dtype, device=self.device) for name, shape in shapes.items()}
        heads = self.case.shape[1] if self.variant.selective else 1
        for b, h in itertools.product(range(self.case.shape[0]), range(0, self.case.shape[1], heads)):
            part = functools.partial(_part, batch=b, heads=slice(h, h + heads))
            leaves = [part(t).detach().to(dtype).requires_grad_(bool(self.incoming)) for t in self.leaves.values()]
            outputs = plain(self, None if self.keep is None else part(self.keep.expand(self.grid.shape)), *leaves)
            grads = torch.autograd.grad(outputs, leaves, [part(t).to(dtype) for t in self.incoming]) if self.incoming else ()
            for name, tensor in self.results(outputs, grads).items():
                part(sums[name]).add_(tensor)
        return sums

    @property
    def held(self) -> int:
        """Elements, in tensors of queries x keys, that one part of the reference holds in the place of one head's scores."""
        return (
            (self.case.shape[1] if self.variant.selective else 1)
            * (self.case.shape[3] if self.variant.additive else 1)
            * self.variant.layers
        )

    @cached_property
    def pairs(self) -> int:
        """Queries x keys that may attend to each other."""
        return math.prod(self.grid.shape) if self.keep is None else int(self.keep.expand(self.grid.shape).sum())

    @property
    def flops(self) -> int:
        """Of the matrix products alone: 4 per pair, channel and layer forward, 10 backward, as FlashAttention's authors count; additive scores have none."""
        if self.case.op == "softmax":
            return 0
        forward, backward = (2, 4) if self.variant.additive else (4, 10)
        count = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[self.case.mode]
        return count * self.variant.layers * self.pairs * self.case.shape[3]

    @property
    def bytes(self) -> int:
        """The least that has to be moved: every tensor read or written once per pass and layer, masks as the tensors that the caller holds."""
        size, layers = next(iter(self.leaves.values())).element_size(), self.variant.layers
        # Scores from layer to layer are float32 or wider.
        handed = (layers - 1) * math.prod(self.grid.shape) * max(size, 4) // size
        inputs = sum(t.numel() for t in self.leaves.values()) + handed
        outputs = layers * sum(math.prod(s) for s in self.output_shapes) + handed
        held = sum(t.numel() for t in [self.keep] if t is not None and self.case.variant in ("masked", "dense"))
        forward, backward = inputs + outputs, 2 * inputs + 2 * outputs if self.case.op == "attention" else inputs + 2 * outputs
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[self.case.mode] * size + held


def _part(tensor: Tensor, batch: int, heads: slice) -> Tensor:
    """Some heads of one sequence as a view; what has a batch of 1 or none is every sequence's."""
    if tensor.dim() == 2:
        return tensor[heads]
    start = batch if tensor.shape[0] > 1 else 0
    return tensor[start : start + 1, heads]


def plain(problem: Problem, keep: Tensor | None, *leaves: Tensor) -> tuple[Tensor, ...]:
    """What a user would write: softmax(masked_fill(q k^T / sqrt(d) + bias)) v, its variants, or the softmax alone."""
    if problem.case.op == "softmax":
        return (torch.softmax(leaves[0] if keep is None else leaves[0].masked_fill(~keep, -torch.inf), -1),)
    variant, outputs = problem.variant, []
    layers, more = layers_of(problem, leaves)
    added = more[0] if variant.bias else None
    for q, k, v in layers:
        scores = _additive(q, k, *more) if variant.additive else q @ k.mT * q.shape[-1] ** -0.5
        scores = scores if added is None else scores + added
        scores = scores if keep is None else scores.masked_fill(~keep, -torch.inf)
        scores = _selected(scores) if variant.selective else scores
        probs, added = torch.softmax(scores, -1), scores
        outputs.append(probs @ v)
    return (functools.reduce(torch.add, outputs), probs)[: 1 + variant.probs]


def layers_of(problem: Problem, leaves: tuple[Tensor, ...]) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """q, k and v of each layer, and the other tensors."""
    ends = range(3, 3 * problem.variant.layers + 1, 3)
    return [leaves[end - 3 : end] for end in ends], leaves[ends[-1] :]


def _additive(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """Through [batch, heads, q_len, kv_len, head_dim]."""
    return ((q[..., :, None, :] + k[..., None, :, :]).tanh() * weight[:, None, None, :]).sum(-1)


def _selected(scores: Tensor) -> Tensor:
    """As x-transformers writes it: positive scores of head 0, but for the first key and a query's own, summed over the queries before."""
    gate = torch.relu(scores[:, 0])
    first = torch.arange(gate.shape[-1], device=gate.device) == 0
    gate = gate.masked_fill(first | torch.eye(gate.shape[-1], dtype=torch.bool, device=gate.device), 0.0)
    gate = torch.nn.functional.pad(gate, (0, 0, 1, -1)).cumsum(-2)
    return scores - gate[:, None]


def defaults(device: torch.device) -> list[Case]:
    """The cases of a plain ``run``: real sizes that end within minutes."""
    gpu = device.type == "cuda"
    dtype, attention = ("bfloat16", (2, 16, 4096, 128)) if gpu else ("float32", (1, 4, 1024, 64))
    softmax = [(4, 16, 4096, 4096), (1, 8, 256, 65536)] if gpu else [(2, 4, 512, 1024), (1, 2, 64, 32768)]
    # Additive attention in plain torch holds head_dim values per pair, several times over: 1 GB of float32 each at this shape.
    shapes = {"additive": (2, 4, 512, 64)}
    cases = [
        Case("attention", variant, mode, dtype, shapes.get(variant, attention))
        for variant in VARIANTS["attention"]
        for mode in ("fwd", "fwd+bwd")
    ]
    cases += [
        Case("softmax", variant, mode, dtype, shape) for shape in softmax for variant in ("plain", "masked") for mode in ("fwd", "fwd+bwd")
    ]
    lengths = (1024, 2048, 4096, 8192, 16384) if gpu else (256, 512, 1024, 2048)
    sweep = [Case("attention", "causal", "fwd", dtype, (*attention[:2], length, attention[3])) for length in lengths]
    return list(dict.fromkeys(cases + sweep))
