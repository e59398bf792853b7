"""Attention and softmax as the benchmarks' operations: their tensors, exact results, work and cases."""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import fused_attn as fa
from benchmarks.variants import ATTENTION, SOFTMAX, Variant
from fused_attn import backends
from fused_attn.backends.triton import config
from fused_attn.dropout import keep_factor
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn_bench import Make, Operation, Problem, Tolerance
from fused_attn_bench.judge import Results
from fused_attn_bench.problem import BACKWARD, BOTH, FORWARD, dtype_of


class ScoreProblem(Problem):
    """A problem with rows of scores: the mask and what else stands beside the tensors."""

    variants: Mapping[str, Variant]

    @property
    def variant(self) -> Variant:
        return self.variants[self.case.variant]

    @cached_property
    def grid(self) -> Grid:
        """With the last query at the last key."""
        batch, heads, q_len, kv_len = self.score_shape
        return Grid((batch, heads, q_len, kv_len), self.device, self.q_offset)

    @property
    def score_shape(self) -> tuple[int, int, int, int]:
        raise NotImplementedError

    @property
    def q_offset(self) -> int:
        """Key position of query 0."""
        return 0

    @cached_property
    def mask(self) -> Mask | None:
        seed = zlib.crc32(f"mask/{self.case.op}/{self.case.variant}/{self.case.sizes}".encode())
        made = self.variant.mask(self.grid, torch.Generator().manual_seed(seed))
        return fa.Dense(made.to(self.device)) if isinstance(made, Tensor) else made

    @cached_property
    def keep(self) -> Tensor | None:
        """The mask as a bool tensor that broadcasts to [batch, heads, q_len, kv_len]."""
        return None if self.mask is None else self.mask.allowed(self.grid)

    @cached_property
    def pairs(self) -> int:
        """Queries x keys that may attend to each other."""
        return math.prod(self.score_shape) if self.keep is None else int(self.keep.expand(self.score_shape).sum())

    @property
    def output_names(self) -> tuple[str, ...]:
        return ("out", "probs")[: 1 + self.variant.probs]

    @property
    def differentiable(self) -> tuple[bool, ...]:
        return (True,) * len(self.output_names)

    def reference(self, dtype: torch.dtype) -> Results:
        """Computed one head at a time, so that float64 fits; all at once where heads look at each other."""
        shapes = dict(zip(self.output_names, self.output_shapes, strict=True))
        if self.incoming:
            shapes |= {f"d{name}": tuple(t.shape) for name, t in self.tensors.items()}
        sums = {name: torch.zeros(shape, dtype=dtype, device=self.device) for name, shape in shapes.items()}
        batch, heads = self.score_shape[:2]
        step = heads if self.variant.selective else 1
        for b, h in itertools.product(range(batch), range(0, heads, step)):
            part = functools.partial(_part, batch=b, heads=slice(h, h + step), whole=heads)
            leaves = [part(t).detach().to(dtype).requires_grad_(bool(self.incoming)) for t in self.tensors.values()]
            beside = [None if t is None else part(t.expand(self.score_shape)) for t in (self.keep, self.stays)]
            outputs = self.formula(*beside, *leaves)
            grads = torch.autograd.grad(outputs, leaves, [part(t).to(dtype) for t in self.incoming]) if self.incoming else ()
            for name, tensor in self.results(outputs, grads).items():
                part(sums[name]).add_(tensor)
        return sums

    @cached_property
    def stays(self) -> Tensor | None:
        """Whom dropout leaves, bool [batch, heads, q_len, kv_len]."""
        return None if self.dropout is None else keep_factor(self.dropout.lower(self.device), self.grid, torch.float32) > 0

    @property
    def dropout(self) -> fa.Dropout | None:
        return fa.Dropout(self.variant.dropout, seed=0) if self.variant.dropout else None

    def plain(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.formula(self.keep, self.stays, *tensors)

    def formula(self, keep: Tensor | None, stays: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What a user would write, on all heads or on a part of them; mask and dropout are those of the part."""
        raise NotImplementedError

    @property
    def needed(self) -> float:
        """One head's scores in float64, or what a variant holds instead, six at a time."""
        _, _, q_len, kv_len = self.score_shape
        elements = sum(t.numel() for t in self.tensors.values()) + len(self.output_shapes) * q_len * kv_len
        return 8.0 * (6 * self.held * q_len * kv_len + 4 * elements)

    @property
    def held(self) -> int:
        """Elements, in tensors of queries x keys, that one part of the reference holds in the place of one head's scores."""
        return 1


class AttentionProblem(ScoreProblem):
    """softmax(q kᵀ / √d + …) v."""

    variants = ATTENTION

    @property
    def score_shape(self) -> tuple[int, int, int, int]:
        return self.sizes["batch"], self.sizes["heads"], self.sizes["length"], self.sizes["kv_len"]

    @property
    def q_offset(self) -> int:
        return self.sizes["kv_len"] - self.sizes["length"]

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        shapes = ((*self.score_shape[:3], self.sizes["value_dim"]), self.score_shape)
        return shapes[: 1 + self.variant.probs]

    def has(self, *options: str) -> bool:
        """Whether any of these sizes differs from its axis'."""
        return any(self.sizes[name] != self.sizes[self.operation.options[name]] for name in options)

    @property
    def held(self) -> int:
        heads, channels = self.sizes["heads"] if self.variant.selective else 1, self.sizes["head_dim"] if self.variant.additive else 1
        return heads * channels * self.variant.layers

    def formula(self, keep: Tensor | None, stays: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        variant, outputs = self.variant, []
        layers, more = layers_of(self, tensors)
        added = more[0] if variant.bias else None
        for q, k, v in layers:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            scores = _additive(q, k, *more) if variant.additive else q @ k.mT * q.shape[-1] ** -0.5
            scores = variant.cap * torch.tanh(scores / variant.cap) if variant.cap else scores
            scores = scores if added is None else scores + added
            scores = scores if keep is None else scores.masked_fill(~keep, -torch.inf)
            scores = _selected(scores) if variant.selective else scores
            probs, added = _softmax(scores, more[0] if variant.sinks else None), scores
            outputs.append((probs if stays is None else probs * stays / (1 - variant.dropout)) @ v)
        return (functools.reduce(torch.add, outputs), probs)[: 1 + variant.probs]


class SoftmaxProblem(ScoreProblem):
    """softmax(masked scores) over the last dimension."""

    variants = SOFTMAX

    @property
    def score_shape(self) -> tuple[int, int, int, int]:
        batch, heads, q_len, kv_len = self.case.shape
        return batch, heads, q_len, kv_len

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.score_shape,)

    def formula(self, keep: Tensor | None, stays: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        (scores,) = tensors
        return (torch.softmax(scores if keep is None else scores.masked_fill(~keep, -torch.inf), -1),)


def _part(tensor: Tensor, batch: int, heads: slice, whole: int) -> Tensor:
    """Some heads of one sequence as a view; what has a batch of 1 or none is every sequence's, and grouped heads share keys and values."""
    if tensor.dim() < 3:
        return tensor[heads]
    start, group = batch if tensor.shape[0] > 1 else 0, whole // tensor.shape[1]
    return tensor[start : start + 1, heads.start // group : -(-heads.stop // group)]


def layers_of(problem: AttentionProblem, leaves: tuple[Tensor, ...]) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """q, k and v of each layer, and the other tensors."""
    ends = range(3, 3 * problem.variant.layers + 1, 3)
    return [leaves[end - 3 : end] for end in ends], leaves[ends[-1] :]


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The sink is one more key, whose probability is thrown away."""
    if sinks is None:
        return torch.softmax(scores, -1)
    sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((scores, sink), -1), -1)[..., :-1]


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


def _attention_inputs(make: Make, sizes: Mapping[str, int]) -> Results:
    variant = ATTENTION[make.case.variant]
    batch, heads, length, head_dim = (sizes[name] for name in ("batch", "heads", "length", "head_dim"))
    kv_heads, kv_len = sizes["kv_heads"], sizes["kv_len"]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in ("", *map(str, range(2, variant.layers + 1))):
        shapes[f"q{layer}"] = (batch, heads, length, head_dim)
        shapes[f"k{layer}"] = (batch, kv_heads, kv_len, head_dim)
        shapes[f"v{layer}"] = (batch, kv_heads, kv_len, sizes["value_dim"])
    if variant.bias:
        shapes["bias"] = (1, heads, length, kv_len)
    if variant.additive:
        shapes["weight"] = (heads, head_dim)
    if variant.sinks:
        shapes["sinks"] = (heads,)
    return {name: make.normal(*shape) for name, shape in shapes.items()}


def _attention_flops(problem: AttentionProblem) -> float:
    """Of the matrix products alone, as FlashAttention's authors count: per pair 2 · (head_dim + value_dim) forward, 6 · head_dim + 4 · value_dim backward.

    Additive scores are no product.
    """
    head_dim, value_dim = 0 if problem.variant.additive else problem.sizes["head_dim"], problem.sizes["value_dim"]
    forward, backward = 2 * (head_dim + value_dim), 6 * head_dim + 4 * value_dim
    return problem.variant.layers * problem.pairs * {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[problem.case.mode]


def _bytes(problem: ScoreProblem) -> float:
    """The least that has to be moved: every tensor read or written once per pass and layer, masks as the tensors that the caller holds."""
    size, layers = dtype_of(problem.case.dtype).itemsize, problem.variant.layers
    # Scores from layer to layer are float32 or wider.
    handed = (layers - 1) * math.prod(problem.score_shape) * max(size, 4) // size
    inputs = sum(t.numel() for t in problem.tensors.values()) + handed
    outputs = layers * sum(math.prod(shape) for shape in problem.output_shapes) + handed
    held = problem.keep.numel() if problem.keep is not None and problem.case.variant in ("masked", "dense") else 0
    forward, backward = inputs + outputs, 2 * inputs + 2 * outputs if problem.case.op == "attention" else inputs + 2 * outputs
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[problem.case.mode] * size + held


def _tolerance(problem: ScoreProblem) -> Tolerance:
    """Rounding of sums over keys and channels."""
    return Tolerance(terms=sum(problem.case.shape[2:]))


def _defaults(device: torch.device) -> list[str]:
    """Real sizes that end within minutes."""
    gpu = device.type == "cuda"
    dtype, (batch, heads, length, dim) = ("bfloat16", (2, 16, 4096, 128)) if gpu else ("float32", (1, 4, 1024, 64))
    # Additive attention in plain torch holds head_dim values per pair, several times over: 1 GB of float32 each at this shape.
    shapes = {"additive": "2x4x512x64"}
    names = [
        f"{variant}/{mode}/{dtype}/{shapes.get(variant, f'{batch}x{heads}x{length}x{dim}')}"
        for variant in ATTENTION
        for mode in ("fwd", "fwd+bwd")
    ]
    names += [f"causal/fwd/{dtype}/{batch}x{heads}x{n}x{dim}" for n in ((1024, 2048, 4096, 8192, 16384) if gpu else (256, 512, 1024, 2048))]
    # One query per sequence against many keys, as text is generated; heads in groups; values of another size.
    decoding = "8x32x1x128,kv_len=16384,kv_heads=8" if gpu else "2x8x1x64,kv_len=4096,kv_heads=2"
    grouped, narrow = f"{batch}x{heads}x{length}x{dim},kv_heads={heads // 4}", f"{batch}x{heads}x{length}x{dim},value_dim={dim // 2}"
    return [
        *names,
        f"plain/fwd/{dtype}/{decoding}",
        *(f"causal/{mode}/{dtype}/{s}" for mode in ("fwd", "fwd+bwd") for s in (grouped, narrow)),
    ]


def _softmax_defaults(device: torch.device) -> list[str]:
    gpu = device.type == "cuda"
    dtype, shapes = ("bfloat16", ("4x16x4096x4096", "1x8x256x65536")) if gpu else ("float32", ("2x4x512x1024", "1x2x64x32768"))
    return [f"{variant}/{mode}/{dtype}/{shape}" for shape in shapes for variant in ("plain", "masked") for mode in ("fwd", "fwd+bwd")]


@contextmanager
def observed() -> Iterator[list[str]]:
    """What fused_attn runs inside, noted where every call passes: the backend, and each stage's tile configuration in Triton."""
    found: list[str] = []
    resolve, lookup = backends.resolve, config.lookup

    def resolving(problem: Any, backend: str) -> str:
        found.append(resolve(problem, backend))
        return found[-1]

    def looking(chip: int, which: config.Pass, dtype: torch.dtype, head_size: int) -> config.TileConfig:
        tile = lookup(chip, which, dtype, head_size)
        found.append(f"{which.stage}={'x'.join(map(str, tile))}")
        return tile

    backends.resolve, config.lookup = resolving, looking
    try:
        yield found
    finally:
        backends.resolve, config.lookup = resolve, lookup


attention = Operation(
    "attention",
    ("batch", "heads", "length", "head_dim"),
    _attention_inputs,
    cases=_defaults,
    variants=tuple(ATTENTION),
    options={"kv_len": "length", "kv_heads": "heads", "value_dim": "head_dim"},
    gradients=True,
    flops=_attention_flops,
    bytes=_bytes,
    tolerance=_tolerance,
    problem=AttentionProblem,
    refusals=(fa.UnsupportedError,),
    observe=observed,
)
softmax = Operation(
    "softmax",
    ("batch", "heads", "q_len", "kv_len"),
    lambda make, sizes: {"scores": make.normal(*sizes.values())},
    cases=_softmax_defaults,
    variants=tuple(SOFTMAX),
    gradients=True,
    bytes=_bytes,
    tolerance=_tolerance,
    problem=SoftmaxProblem,
    refusals=(fa.UnsupportedError,),
    observe=observed,
)
