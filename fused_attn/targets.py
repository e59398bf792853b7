"""Targets: where a problem would run, named instead of found, so that a choice can be asked about without the machine."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fused_attn.checks import described

_ADVICE = "Write the chip of the GPU, as sm_80 (A100), sm_90 (H100), sm_100 (B200) or sm_120 (RTX 50)."


@dataclass(frozen=True)
class Target:
    """A CPU, or an NVIDIA GPU by its compute capability. Triton counts as installed there.

    Args:
        name: "cpu", or "sm_NN".
        library: whether the target's native library is there (``python -m fused_attn build``, with ``--cpu`` on a CPU).

    Example:
        >>> Target("sm_120").capability, Target("cpu").capability
        ((12, 0), None)
    """

    name: str
    library: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"cpu|sm_[1-9]\d{1,2}", self.name):
            raise ValueError(f"on must be 'cpu', 'sm_NN' or a fused_attn.backends.Target; got {described(self.name)}. {_ADVICE}")
        if not isinstance(self.library, bool):
            raise TypeError(f"Target library must be a bool; got {described(self.library)}. Pass True where the native library is built.")

    @property
    def device_type(self) -> str:
        """What ``torch.device.type`` would say of its tensors."""
        return "cpu" if self.name == "cpu" else "cuda"

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability as (major, minor); None of a CPU."""
        return None if self.name == "cpu" else divmod(int(self.name.removeprefix("sm_")), 10)


def as_target(value: object) -> Target | None:
    """What ``explain(on=)`` takes.

    Example:
        >>> as_target("sm_90")
        Target(name='sm_90', library=True)
    """
    return value if value is None or isinstance(value, Target) else Target(value)  # type: ignore[arg-type]
