"""Seeds of a layer's dropout: one for each call."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.checks import described
from fused_attn.dropout import Dropout

# The golden ratio of 64 bits, as an int64: seeds of neighbouring calls share no pattern.
_STRIDE = 0x9E3779B97F4A7C15 - 2**64


def mixed(state: Tensor) -> Tensor:
    """The seed of one call: of a pair (seed, count of calls), as Keras keeps it too."""
    return state[0].to(torch.int64) + state[1].to(torch.int64) * _STRIDE


def _state(seed: int, device: torch.device) -> Tensor:
    """A seed, whose bits an int64 keeps, before the first call."""
    return torch.tensor([(seed + 2**63) % 2**64 - 2**63, 0], dtype=torch.int64, device=device)


class SeedGenerator(nn.Module):
    """A seed and a count of calls, as Keras keeps them (``seed_generator_state``), or torch's generator where there is no seed.

    With a seed, a layer draws the same masks whatever else draws numbers, and another one at each call. Leave the seed out under activation
    checkpointing, which calls a layer twice for one result, and under torch.func's transforms, which let no count change.

    Example:
        >>> first, second = SeedGenerator(7), SeedGenerator(7)
        >>> device = torch.device("cpu")
        >>> [first.next(device).item() == second.next(device).item() for _ in range(2)]
        [True, True]
        >>> first.next(device).item() == first.next(device).item()
        False
    """

    seed_generator_state: Tensor

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ValueError(f"seed must be an int or None; got {described(seed)}. Leave it out to follow torch.manual_seed.")
        self.seed = seed
        if seed is not None:
            self.register_buffer("seed_generator_state", _state(seed, torch.get_default_device()))

    def next(self, device: torch.device) -> Tensor:
        """An int64 number on that device."""
        if self.seed is None:
            return torch.randint(2**63 - 1, (), device=device)
        if self.seed_generator_state.is_meta and device.type != "meta":
            self.seed_generator_state = _state(self.seed, device)
        value = mixed(self.seed_generator_state)
        with torch.no_grad():
            self.seed_generator_state[1:].add_(1)
        return value.to(device)

    def forward(self, rate: float, device: torch.device) -> Dropout:
        """The dropout of one call."""
        return Dropout(rate, seed=self.next(device))


def as_number(dropout: Any) -> int | float:
    """A chance that configs can hold: numpy's numbers become Python's."""
    return dropout if isinstance(dropout, (int, float)) else float(dropout)


def check_rate(dropout: Any) -> None:
    """A ValueError unless it is a chance."""
    if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0 <= float(dropout) <= 1:
        raise ValueError(f"dropout must be a number in [0, 1]; got {described(dropout)}. It is the chance of removal.")
