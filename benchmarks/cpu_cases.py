"""What the CPU kernels are held to: each case in our words, in SDPA's where it has them, and in plain torch; with the speed to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fused_attn as fa
from fused_attn import backends
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn_bench.judge import Judge, Tolerance

LENGTHS = (256, 1024, 2048, 4096)
HEADS = 4
# Where eager's whole score arrays leave the caches, and the targets rise.
LONG = 2048
OURS = ("cpu", "blocked")
CPU = torch.device("cpu")
# Tiles that a mask's kept share is counted in, [rows, keys]: what the kernels skip.
TILE = (48, 128)

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Target:
    """Least speed: time of ``rival`` over ours, forward and forward with backward, below and from ``LONG`` on; None where none is set."""

    rival: str
    fwd: tuple[float, float] | None
    both: tuple[float, float] | None

    def of(self, mode: str, length: int) -> float | None:
        found = self.fwd if mode == "fwd" else self.both
        return None if found is None else found[length >= LONG]


SDPA = Target("sdpa", (1.1, 1.1), (1.2, 1.2))
PROBS = Target("eager", (1.4, 1.4), (1.5, 1.8))
BIAS_GRADIENT = Target("eager", None, (1.2, 1.7))
ROWS = Target("eager", (1.8, 2.8), (1.8, 2.8))


@dataclass(frozen=True)
class Kind:
    """Attention with something added.

    Args:
        name: as shown.
        target: what it is held to.
        mask: makes a mask, or a bool tensor that keeps, for a length.
        bias: "" for none, "fixed" for one without a gradient, "learned" for one with.
        probs: whether the probabilities are returned, with a gradient of their own.
        cap: of the scores; 0 for none.
        dropout: chance of removal.
        is_tiled: whether the target grows as the mask leaves tiles out.
    """

    name: str
    target: Target
    mask: Callable[[int, torch.Generator], Mask | Tensor | None] = lambda length, generator: None
    bias: str = ""
    probs: bool = False
    cap: float = 0.0
    dropout: float = 0.0
    is_tiled: bool = False


def _half(length: int, generator: torch.Generator) -> Tensor:
    """Half of the pairs at random; no row is empty."""
    keep = torch.rand(1, 1, length, length, generator=generator) < 0.5
    keep[..., 0] = True
    return keep


def _lengths(length: int, generator: torch.Generator) -> Mask:
    return fa.ValidLengths(torch.randint(length // 2, length + 1, (1,), generator=generator))


KINDS = (
    Kind("plain", SDPA),
    Kind("dense mask", SDPA, _half),
    Kind("causal", SDPA, lambda length, _: fa.Causal()),
    Kind("window", SDPA, lambda length, _: fa.SlidingWindow(length // 8, length // 8), is_tiled=True),
    Kind("documents", SDPA, lambda length, _: fa.Documents(torch.arange(length) * 8 // length), is_tiled=True),
    Kind("lengths", SDPA, _lengths),
    Kind("bias", SDPA, bias="fixed"),
    Kind("probabilities", PROBS, probs=True),
    Kind("bias gradient", BIAS_GRADIENT, bias="learned"),
    Kind("dropout", ROWS, dropout=0.1),
    Kind("soft cap", ROWS, cap=30.0),
)
# On the second head size: what reads or writes differently. The others do the same to scores of any head size.
KINDS_AGAIN = ("plain", "dense mask", "causal", "window", "bias", "probabilities")


@dataclass(frozen=True)
class Job:
    """One line of the table: who computes it, who is right, and the target in the time of ``rival``.

    Args:
        kind: name of the case.
        mode: "fwd" or "fwd+bwd".
        length: of queries and keys; of a row for the softmax.
        size: head size, or a softmax's shape.
        calls: provider -> what is timed.
        judge: whether what a provider returned is right; None for one that draws its own random numbers.
        target: time of the rival over ours; None where none is set.
        rival: provider that the target speaks of.
    """

    kind: str
    mode: str
    length: int
    size: str
    calls: Mapping[str, Call]
    judge: Callable[[str, tuple[Tensor, ...]], str]
    target: float | None
    rival: str

    @property
    def work(self) -> float:
        """What it takes, roughly, in forward passes over one score."""
        return self.length**2 * (1 if self.mode == "fwd" else 3)


def known(name: str) -> bool:
    """Whether there is a backend of that name."""
    return name in backends.names()


class Attention:
    """The tensors of a kind at a length and a head size, and its two modes."""

    def __init__(self, kind: Kind, length: int, head_dim: int) -> None:
        self.kind, self.length, self.head_dim = kind, length, head_dim
        generator = torch.Generator().manual_seed(length + head_dim)
        shape, scores = (1, HEADS, length, head_dim), (1, HEADS, length, length)
        made = kind.mask(length, generator)
        self.mask = made
        mask = fa.Dense(made) if isinstance(made, Tensor) else made
        self.keep = None if mask is None else mask.allowed(Grid(scores, CPU))
        self.qkv = torch.randn(3, *shape, generator=generator).unbind(0)
        self.bias = torch.randn(scores, generator=generator) if kind.bias else None
        self.incoming = [torch.randn(shape, generator=generator)]
        self.incoming += [torch.randn(scores, generator=generator)] * kind.probs

    def jobs(self) -> list[Job]:
        """Forward, and forward with backward, where there is a target or a mask to compare."""
        exact, plain = (self._definition(dtype) for dtype in (torch.float64, torch.float32))
        names = ["out", "probs"][: len(self.incoming)]
        grads = ["dq", "dk", "dv", *["dbias"] * (self.kind.bias == "learned")]

        def judging(wanted: Sequence[str]) -> Callable[[str, tuple[Tensor, ...]], str]:
            judge = Judge({n: exact[n] for n in wanted}, {n: plain[n] for n in wanted}, Tolerance(terms=self.length))

            def judged(provider: str, results: tuple[Tensor, ...]) -> str:
                if provider == "eager" and self.kind.dropout:  # draws other numbers
                    return ""
                parts = {n: t[:, 1:2].detach() for n, t in zip(wanted, results, strict=True)}
                return ", ".join(judge(parts).broken)

            return judged

        modes = {"fwd": names, "fwd+bwd": [*names, *grads]}
        wanted = {m: n for m, n in modes.items() if self.kind.target.of(m, self.length) is not None}
        return [
            Job(
                self.kind.name, mode, self.length, str(self.head_dim), self._calls(mode), judging(results), self._target(mode),
                self.kind.target.rival,
            )
            for mode, results in wanted.items()
        ]  # fmt: skip

    def _target(self, mode: str) -> float | None:
        target = self.kind.target.of(mode, self.length)
        return target if target is None or not self.kind.is_tiled else target / self.kept_share

    @property
    def kept_share(self) -> float:
        """Of the tiles of ``TILE``, those in which any pair is kept."""
        assert self.keep is not None
        rows, keys = TILE
        whole = self.keep.expand(1, 1, self.length, self.length)[0, 0]
        padded = torch.nn.functional.pad(whole, (0, -self.length % keys, 0, -self.length % rows))
        keep = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, keys))
        return float(keep.any(3).any(1).float().mean())

    def _calls(self, mode: str) -> dict[str, Call]:
        forwards = {name: self._ours(name, heads=None) for name in OURS if known(name)} | {"eager": self._eager}
        if self.kind.target.rival == "sdpa":
            forwards["sdpa"] = self._sdpa
        if mode == "fwd":
            leaves = self._leaves(False)
            return {name: lambda f=forward: f(*leaves) for name, forward in forwards.items()}
        leaves = self._leaves(True)
        wanted = [t for t in leaves if t.requires_grad]

        def both(forward: Callable[..., tuple[Tensor, ...]]) -> Call:
            def call() -> tuple[Tensor, ...]:
                outputs = forward(*leaves)
                return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, wanted, self.incoming)

            return call

        return {name: both(forward) for name, forward in forwards.items()}

    def _leaves(self, backward: bool) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(backward) for t in self.qkv]
        return leaves if self.bias is None else [*leaves, self.bias.detach().requires_grad_(backward and self.kind.bias == "learned")]

    def _ours(self, backend: str, heads: int | None) -> Callable[..., tuple[Tensor, ...]]:
        """On all heads, or on one of them with the tensors of that head."""
        kind = self.kind
        mods = (fa.SoftCap(kind.cap),) if kind.cap else ()
        dropout = fa.Dropout(kind.dropout, seed=7) if kind.dropout else None
        if dropout is not None and heads is not None:
            dropout = dropout.part((0, heads, 0, 0), (1, HEADS, self.length, self.length))
        request = fa.AuxRequest(probs=True) if kind.probs else None

        def forward(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
            added = (*mods, *map(fa.Bias, bias))
            found = fa.attention(q, k, v, mask=self.mask, score_mods=added, dropout=dropout, return_aux=request, backend=backend)
            return (found,) if isinstance(found, Tensor) else (found[0], found[1].probs)

        return forward

    def _eager(self, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        scores = q @ k.mT * self.head_dim**-0.5
        scores = self.kind.cap * torch.tanh(scores / self.kind.cap) if self.kind.cap else scores
        scores = scores + bias[0] if bias else scores
        probs = torch.softmax(scores if self.keep is None else scores.masked_fill(~self.keep, -torch.inf), -1)
        weights = torch.nn.functional.dropout(probs, self.kind.dropout) if self.kind.dropout else probs
        return (weights @ v, probs)[: len(self.incoming)]

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        causal = isinstance(self.mask, fa.Causal)
        mask = bias[0] if bias else None if causal else self.keep
        # torch's own function, also while fused_attn.integrations.sdpa is installed.
        return (torch._C._nn.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal),)

    def _definition(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Outputs and gradients of head 1 by the definition in ``dtype``: all heads of 4096 keys in float64 would not fit everywhere."""
        parts = [t[:, 1:2].to(dtype).requires_grad_(t.requires_grad) for t in self._leaves(True)]
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in parts]
        outputs = self._ours("eager", heads=1)(*leaves)
        wanted = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(outputs, wanted, [t[:, 1:2].to(dtype) for t in self.incoming])
        named = zip(("out", "probs"), (t.detach() for t in outputs), strict=False)
        return dict(named) | dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=False))


@dataclass(frozen=True)
class Rows:
    """A softmax of scores, masked or not."""

    name: str
    shape: tuple[int, ...]
    masked: bool
    target: float

    def job(self) -> Job:
        """Forward alone, what the targets speak of."""
        generator = torch.Generator().manual_seed(len(self.shape))
        scores = torch.randn(self.shape, generator=generator)
        keep = torch.rand(self.shape, generator=generator) < 0.5 if self.masked else None
        if keep is not None:
            keep[..., 0] = True
        calls: dict[str, Call] = {
            name: lambda name=name: (fa.masked_softmax(scores, keep, backend=name),) for name in OURS if known(name)
        } | {"eager": lambda: (_softmax(scores, keep),)}
        rows = slice(None, 4 if len(self.shape) == 3 else None)
        part = None if keep is None else keep[rows]
        exact, plain = ({"probs": _softmax(scores[rows].to(dtype), part)} for dtype in (torch.float64, torch.float32))
        judge = Judge(exact, plain, Tolerance(terms=self.shape[-1]))

        def judged(provider: str, results: tuple[Tensor, ...]) -> str:
            return ", ".join(judge({"probs": results[0][rows]}).broken)

        size = "x".join(map(str, self.shape))
        return Job(self.name, "fwd", self.shape[-1], size, calls, judged, self.target, "eager")


def _softmax(scores: Tensor, keep: Tensor | None) -> Tensor:
    return torch.softmax(scores if keep is None else scores.masked_fill(~keep, -torch.inf), -1)


SOFTMAX = (
    Rows("masked softmax", (64, 1024, 1024), True, 3.0),
    Rows("plain softmax", (64, 1024, 1024), False, 1.0),
    Rows("thin rows, masked", (300000, 4), True, 10.0),
    Rows("thin rows, masked", (20000, 8), True, 10.0),
)
