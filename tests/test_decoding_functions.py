"""Device functions of users, and scorings that are no product, on the split-key kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn import decoding
from fused_attn.decoding import KVCache
from fused_attn.lowering import Grid
from fused_attn.score_mods import ScoreMod
from fused_attn.testing import DIFFERENTIABLE, EVERYTHING, check_inputs, inputs_of, violations

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fused_attn.backends import triton as backend  # noqa: E402
from fused_attn.backends.triton import score_mods  # noqa: E402

pytestmark = [pytest.mark.quick, pytest.mark.skipif(bool(backend.interpreter_refusal()), reason=backend.interpreter_refusal() or "never")]


@triton.jit
def _halved(scores, args, at):
    """A branch on the head, of which there is one."""
    if at[1] == 1:
        scores = scores * 0.5
    return scores + tl.load(args[0].ptr + at[1] * args[0].head).to(tl.float32)


@dataclass(frozen=True, eq=False)
class Halved(ScoreMod):
    """Head 1's scores halved, and a number per head, shift [heads], added."""

    shift: Tensor
    name: ClassVar[str] = "test_halved"

    def view(self, tensor: Tensor, grid: Grid) -> Tensor:
        return tensor[None, :, None, None]

    def apply(self, scores: Tensor, grid: Grid) -> Tensor:
        heads = torch.arange(grid.shape[1]) == 1
        return scores * torch.where(heads, 0.5, 1.0)[:, None, None] + self.shift[:, None, None]


@pytest.fixture
def halved() -> Iterator[None]:
    score_mods.register("test_halved", _halved)
    yield
    del score_mods.FUNCTIONS["test_halved"]


@pytest.mark.parametrize("chosen", ["eager", "cpu", "triton"])
def test_a_users_function_finds_a_single_head(chosen: str, halved: None) -> None:
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 48, 16), torch.randn(2, 2, 48, 16)
    used, mods = torch.tensor([48, 17], dtype=torch.int32), (fa.SoftCap(2.0), Halved(torch.randn(4)))
    inputs = inputs_of(q, k, v, mask=fa.Causal() & decoding.Filled(used), q_offset=used.long() - 3, score_mods=mods)
    out, aux = decoding.attention(q, KVCache(k, v, used), score_mods=mods, return_aux=EVERYTHING, backend=chosen)
    assert violations(inputs, {"out": out} | {n: getattr(aux, n) for n in EVERYTHING.names}) == []


def test_a_users_function_that_triton_does_not_know_is_refused_by_name() -> None:
    cache = KVCache(*torch.randn(2, 1, 2, 8, 4), torch.tensor([4], dtype=torch.int32))
    with pytest.raises(fa.UnsupportedError, match="Halved has no Triton functions"):
        decoding.attention(torch.randn(1, 4, 1, 4), cache, score_mods=(Halved(torch.randn(4)),), backend="triton")


@pytest.mark.parametrize("scoring", ["additive", "distance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scorings(scoring: str, dtype: torch.dtype, reached: list[Any]) -> None:
    q, k, v = torch.randn(1, 4, 3, 20).to(dtype), torch.randn(1, 2, 70, 20).to(dtype), torch.randn(1, 2, 70, 12).to(dtype)
    chosen = fa.Additive(torch.randn(4, 20)) if scoring == "additive" else fa.NegativeL2(0.3)
    check_inputs(inputs_of(q, k, v, mask=fa.Causal(), q_offset=60, scoring=chosen), "triton", DIFFERENTIABLE, scoring)
    assert len(reached) == 1
