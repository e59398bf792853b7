"""NaN, infinities, sizes 0: every backend against float64 loops over the allowed pairs, on random compositions and on kinds by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_attn as fa
from fused_attn.lowering import Grid
from fused_attn.score_mods import SCORE_MODS, ScoreMod
from tests import loops

NAN, INF = float("nan"), float("inf")
# 2^-10 of the largest number: float32 on at most 70 keys loses 2^-18, a NaN that became a number is further off.
TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Times(ScoreMod):
    """A modification of the user's own: multiplies by a factor per key."""

    factor: Tensor  # [kv_len]
    name = "test_times"

    def apply(self, scores: Tensor, grid: Grid) -> Tensor:
        return scores * self.factor[grid.kv_idx].to(scores.dtype)


SCORE_MODS.pop("test_times")


@pytest.fixture(scope="module", autouse=True)
def times() -> Any:
    SCORE_MODS["test_times"] = Times
    yield
    SCORE_MODS.pop("test_times")


@dataclass(frozen=True)
class Draw:
    """One composition: tensors are float32, ``mods`` holds (kind, tensor), ``wants`` what requires grad, ``arriving`` gradients by output."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: fa.masks.Mask | None = None
    q_offset: int | Tensor = 0
    mods: tuple[tuple[str, Tensor | None], ...] = ()
    sinks: Tensor | None = None
    arriving: tuple[tuple[str, Tensor], ...] = ()
    wants: tuple[bool, ...] = (True,) * 8

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return *self.q.shape[:3], self.k.shape[2]  # type: ignore[return-value]

    @property
    def keep(self) -> Tensor:
        if self.mask is None:
            return torch.ones(self.shape, dtype=torch.bool)
        return self.mask.allowed(Grid(self.shape, torch.device("cpu"), self.q_offset)).expand(self.shape)

    def leaves(self, dtype: torch.dtype) -> list[Tensor | None]:
        """q, k, v, the sinks and the modifications' tensors as fresh leaves."""
        tensors = (self.q, self.k, self.v, self.sinks, *(t for _, t in self.mods))
        wants = (*self.wants, *[True] * len(tensors))
        return [None if t is None else t.to(dtype).clone().requires_grad_(want) for t, want in zip(tensors, wants, strict=False)]


def position(draw: Draw, b: int, i: int) -> int:
    return i + int(draw.q_offset[b] if isinstance(draw.q_offset, Tensor) else draw.q_offset)


def loop_mod(draw: Draw, kind: str, t: Any) -> Callable[..., Tensor]:
    """A modification as ``loops.Call`` takes it."""

    def bias(s: Tensor, b: int, h: int, i: int, keys: Tensor) -> Tensor:
        full = t.expand(draw.shape)
        return s + full[b, h, i, keys]

    return {
        "softcap": lambda s, b, h, i, keys: 2 * torch.tanh(s / 2),
        "alibi": lambda s, b, h, i, keys: s - t[h] * (position(draw, b, i) - keys).abs(),
        "times": lambda s, b, h, i, keys: s * t[keys],
        "bias": bias,
    }[kind]


MODS: dict[str, Callable[[Any], ScoreMod]] = {"softcap": lambda t: fa.SoftCap(2.0), "alibi": fa.ALiBi, "times": Times, "bias": fa.Bias}


def run(draw: Draw, backend: str | None, request: tuple[str, ...]) -> dict[str, Tensor]:
    """Outputs by name and gradients as d0, d1, ...; ``backend`` None is the loops."""
    leaves = draw.leaves(torch.float64 if backend is None else torch.float32)
    q, k, v, sinks, *tensors = leaves
    if backend is None:
        mods = tuple(loop_mod(draw, kind, t) for (kind, _), t in zip(draw.mods, tensors, strict=True))
        results = loops.attention(loops.Call(q, k, v, draw.keep, q.shape[-1] ** -0.5, mods, sinks))  # type: ignore[arg-type, union-attr]
    else:
        score_mods = tuple(MODS[kind](t) for (kind, _), t in zip(draw.mods, tensors, strict=True))
        out, aux = fa.attention(
            q, k, v, mask=draw.mask, q_offset=draw.q_offset, score_mods=score_mods, sinks=sinks, backend=backend,
            return_aux=fa.AuxRequest(**dict.fromkeys(request, True)),
        )  # type: ignore[arg-type, call-overload]  # fmt: skip
        results = {"out": out, **{name: getattr(aux, name) for name in request}}
    found = {name: results[name].detach() for name in ("out", *request)}
    wanted = [(f"d{i}", t) for i, t in enumerate(leaves) if t is not None and t.requires_grad]
    pairs = [(results[name], g.to(results[name].dtype)) for name, g in draw.arriving if name in results and results[name].requires_grad]
    if not pairs or not wanted:
        return found | {name: torch.zeros_like(t) for name, t in wanted}
    grads = torch.autograd.grad([o for o, _ in pairs], [t for _, t in wanted], [g for _, g in pairs], allow_unused=True)
    return found | {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted, grads, strict=True)}


def check(draw: Draw, backend: str) -> None:
    right, got = run(draw, None, loops.AUX), run(draw, backend, loops.AUX)
    for name, value in got.items():
        problem = loops.differences(value, right[name], TOLERANCE, is_gradient=name.startswith("d"))
        assert not problem, f"{name}: {problem}"


@st.composite
def draws(choose: Any, largest: int, own_code: bool) -> Draw:
    """Compositions of everything; ``own_code`` adds a modification that only backends running the user's code take."""
    generator = torch.Generator().manual_seed(choose(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, kv_heads, group = choose(st.sampled_from((1, 1, 2, 0))), choose(st.sampled_from((1, 2))), choose(st.sampled_from((1, 2)))
    lengths = st.sampled_from([n for n in (5, 1, 2, 3, 8, 12, 0, 17, 33, 70) if n <= largest])
    q_len, kv_len, heads = choose(lengths), choose(lengths), kv_heads * group
    head_dim, value_dim = choose(st.sampled_from((3, 1, 8))), choose(st.sampled_from((2, 8)))
    q, k, v = normal(batch, heads, q_len, head_dim), normal(batch, kv_heads, kv_len, head_dim), normal(batch, kv_heads, kv_len, value_dim)
    shape, grid_offset = (batch, heads, q_len, kv_len), choose(st.sampled_from((0, 1, kv_len - q_len)))
    offset: int | Tensor = torch.full((batch,), grid_offset) if choose(st.booleans()) else grid_offset
    grid = Grid(shape, torch.device("cpu"), offset)
    vocabulary = (
        fa.Causal,
        fa.SlidingWindow,
        fa.ValidLengths,
        fa.KeyPadding,
        fa.Documents,
        fa.PrefixLM,
        fa.Dense,
        fa.Chunked,
        fa.BlockCausal,
    )
    mask: fa.masks.Mask | None = None
    for kind in choose(st.lists(st.sampled_from(vocabulary), max_size=2)):
        found = list(kind.examples(grid))
        one = found[choose(st.integers(0, len(found) - 1))]
        how = choose(st.sampled_from(("and", "and", "or", "not")))
        one = ~one if how == "not" else one
        mask = one if mask is None else mask | one if how == "or" else mask & one
    kinds = {"softcap": [], "alibi": [(heads,)], "bias": [shape, (1, heads, 1, kv_len), (q_len, kv_len), (1, 1, q_len, 1)]}
    kinds |= {"times": [(kv_len,)]} if own_code else {}
    mods: list[tuple[str, Tensor | None]] = []
    for name in choose(st.lists(st.sampled_from(sorted(kinds)), max_size=3)):
        tensor = normal(*choose(st.sampled_from(kinds[name]))) if kinds[name] else None
        # Small slopes: a probability that is 0 in float32 alone makes 0 * inf of what is inf in float64.
        mods.append((name, tensor.abs() * 0.1 if name == "alibi" and tensor is not None else tensor))
    sinks = normal(heads) if choose(st.booleans()) and choose(st.booleans()) else None
    arriving = {"out": normal(batch, heads, q_len, value_dim), "lse": normal(*shape[:3]), "probs": normal(*shape), "scores": normal(*shape)}
    arriving = {name: g for name, g in arriving.items() if name == "out" or choose(st.booleans())}
    biases = [t for name, t in mods if name == "bias" and t is not None]
    for target in choose(st.lists(st.sampled_from((q, k, v, *arriving.values(), *biases)), max_size=3)):
        if target.numel():
            values = (NAN, INF, -INF, -INF, -1e4) if any(target is b for b in biases) else (NAN, INF, -INF)
            target.view(-1)[choose(st.integers(0, target.numel() - 1))] = choose(st.sampled_from(values))
    plain = Draw(q, k, v, mask, offset, tuple(mods), sinks, tuple(arriving.items()))
    if choose(st.booleans()):  # garbage where nobody looks: padding from uninitialised memory
        unseen = ~plain.keep.any(2).view(batch, kv_heads, group, kv_len).any(2)
        k[unseen], v[unseen] = choose(st.sampled_from(((NAN, INF), (INF, NAN), (-INF, 3e38), (1e38, NAN))))
        q[~plain.keep.any(3)] = choose(st.sampled_from((NAN, INF)))
    return replace(plain, wants=tuple(choose(st.booleans()) for _ in range(4)))


FAST = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.mark.parametrize("own_code", ["eager", "cpu"])
@settings(max_examples=250, **FAST)
@given(draw=draws(largest=70, own_code=True))
def test_compositions(own_code: str, draw: Draw) -> None:
    check(draw, own_code)


@settings(max_examples=40, **FAST)
@given(draw=draws(largest=33, own_code=False))
def test_compositions_on_kernels(kernel_backend: str, draw: Draw) -> None:
    if kernel_backend != "cpu":
        # Slopes carry no gradient there.
        check(replace(draw, mods=tuple(m for m in draw.mods if m[0] != "alibi")), kernel_backend)
