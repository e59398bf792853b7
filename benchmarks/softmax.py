"""Masked softmax against ``softmax(masked_fill)``, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Report, Row
from benchmarks.providers import SOFTMAX, Softmax
from fused_attn.cli.text import ratio, seconds
from fused_attn.testing.measure import Effort, interleaved
from fused_attn.testing.workload import rounding

SHAPES = ((16, 256, 256), (16, 1024, 1024), (4, 64, 65536))


def run(device: torch.device, budget: float) -> Report:
    """Each shape with a third of the keys masked."""
    plans = [(shape, backward) for shape in SHAPES for backward in (False, True)]
    rows = [_row(shape, backward, device, budget / len(plans)) for shape, backward in plans]
    note = "ratio: eager's median over fused_attn's, calls in turns; holds: errors <= 2 x eager's + rounding."
    return Report(
        f"masked softmax: float32, a third of the keys masked, {device.type}",
        ("case", "fused_attn", "eager", "ratio"),
        rows,
        note,
    )


def _row(shape: tuple[int, int, int], backward: bool, device: torch.device, budget: float) -> Row:
    made = torch.Generator(device).manual_seed(0)
    scores, incoming = (torch.randn(shape, generator=made, device=device) for _ in range(2))
    keep = torch.rand(shape[0], 1, shape[2], generator=made, device=device) > 1 / 3
    calls = {name: _call(function, (scores, keep, incoming), backward) for name, function in SOFTMAX.items()}
    exact = _call(SOFTMAX["eager"], (scores.double(), keep, incoming.double()), backward)()
    errors = {name: [float((got - want).abs().max()) for got, want in zip(call(), exact, strict=True)] for name, call in calls.items()}
    bounds = [2 * plain + rounding(want, torch.float32, shape[2]) for plain, want in zip(errors["eager"], exact, strict=True)]
    title = f"{'fwd+bwd' if backward else 'fwd'} {list(shape)}"
    if not all(e <= b for e, b in zip(errors["fused_attn"], bounds, strict=True)):
        return Row((title, "wrong", "-", "-"), False)
    times = interleaved(calls, device, Effort(budget, rounds=5))
    ours, theirs = times["fused_attn"].median, times["eager"].median
    return Row((title, seconds(ours), seconds(theirs), ratio(theirs / ours)), True)


def _call(function: Softmax, tensors: tuple[Tensor, Tensor, Tensor], backward: bool) -> Callable[[], list[Tensor]]:
    scores, keep, incoming = tensors
    leaf = scores.detach().requires_grad_(backward)

    def call() -> list[Tensor]:
        result = function(leaf, keep)
        return [result.detach(), *(torch.autograd.grad(result, leaf, incoming) if backward else ())]

    return call
