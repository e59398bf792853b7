"""What this machine can do at most, measured in the same run: a data sheet's figure is never reached, and a laptop's changes by the hour."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fused_attn_bench.timers import Function, Timer


class Roofs(NamedTuple):
    """Bytes per second of a copy (read and written), and floating-point operations per second of a matrix product."""

    copy: float
    matmul: float

    def raised(self, other: Roofs) -> Roofs:
        """The higher one of each.

        Example:
            >>> Roofs(1.0, 5.0).raised(Roofs(2.0, 4.0))
            Roofs(copy=2.0, matmul=5.0)
        """
        return Roofs(*map(max, self, other))


def measure(device: torch.device, dtype: torch.dtype, timer: Timer, seconds: float = 0.5) -> Roofs:
    """The best of several samples of each."""
    gpu = device.type == "cuda"
    size, side = (2**30, 8192) if gpu else (2**26, 1024)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    copy = _best(lambda: target.copy_(source), timer, seconds / 2)
    return Roofs(2 * size / copy, 2 * side**3 / _best(lambda: a @ b, timer, seconds / 2))


def _best(function: Function, timer: Timer, seconds: float) -> float:
    best = spent = timer(function, 3).seconds  # the first calls touch the memory and wake the clocks
    spent *= 3
    while spent < seconds:
        sample = timer(function, 1).seconds
        best, spent = min(best, sample), spent + sample
    return best
