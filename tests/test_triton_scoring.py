"""A scoring of the user's own on Triton: device functions in the place of the product, forward, auxiliary outputs and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.scoring import SCORINGS, Scoring

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def _score(q_tile, k_tile, args, precision):
    q, k = q_tile.to(tl.float32), k_tile.to(tl.float32)
    return args[0] * (tl.sum(q * q, 1)[:, None] - 2.0 * tl.dot(q, tl.trans(k), input_precision="ieee") + tl.sum(k * k, 1)[None, :])


@triton.jit
def _dq(ds, q_tile, k_tile, args, precision):
    q, k = q_tile.to(tl.float32), k_tile.to(tl.float32)
    return 2.0 * args[0] * (tl.sum(ds, 1)[:, None] * q - tl.dot(ds, k, input_precision="ieee"))


@triton.jit
def _dk(ds, q_tile, k_tile, args, precision):
    q, k = q_tile.to(tl.float32), k_tile.to(tl.float32)
    return 2.0 * args[0] * (tl.sum(ds, 0)[:, None] * k - tl.dot(tl.trans(ds), q, input_precision="ieee"))


@pytest.fixture
def distance() -> Iterator[type[Scoring]]:
    """factor * ||q - k||^2, with device functions and without a form as a dot product."""
    from fused_attn.backends.triton import scorings

    @dataclass(frozen=True, eq=False)
    class Distance(Scoring):
        factor: float | Tensor
        name = "test_distance"

        def score(self, q: Tensor, k: Tensor) -> Tensor:
            return (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1) * self.factor

    scorings.register("test_distance", _score, _dq, _dk)
    yield Distance
    scorings.FUNCTIONS.pop("test_distance")
    SCORINGS.pop("test_distance")


@pytest.mark.parametrize("mask", [None, fa.Causal(), fa.ValidLengths(torch.tensor([20, 33]))], ids=["full", "causal", "lengths"])
def test_device_functions_stand_in_for_the_product(distance, mask, device) -> None:
    q, k, v = (torch.randn(2, h, 33, 12, device=device, requires_grad=True) for h in (4, 2, 2))
    dout = torch.randn(2, 4, 33, 12, device=device)

    def run(backend: str) -> list[Tensor]:
        kept = None if mask is None or device.type == "cpu" else fa.ValidLengths(mask.lens.to(device)) if hasattr(mask, "lens") else mask
        mods = (fa.SoftCap(5.0),) if mask is None else ()
        request = fa.AuxRequest(probs=True, scores=True, lse=True, max_scores=True, column_sums=True)
        out, aux = fa.attention(
            q, k, v, mask=mask if kept is None else kept, scoring=distance(-0.1), score_mods=mods, return_aux=request, backend=backend
        )
        parts = (aux.probs, aux.scores, aux.lse, aux.max_scores, aux.column_sums)
        return [out, *parts, *torch.autograd.grad(out, (q, k, v), dout)]

    for got, right in zip(run("triton"), run("eager"), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_what_triton_refuses(distance) -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(fa.UnsupportedError, match="has no gradient for its tensor in Triton"):
        fa.attention(q, q, q, scoring=distance(torch.tensor(0.1, requires_grad=True)), backend="triton")
