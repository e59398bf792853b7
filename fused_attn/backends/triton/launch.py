"""From a lowered call to a kernel launch: tile configuration, shared arguments, grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fused_attn.backends.triton import arguments, config, masks
from fused_attn.lowering import LoweredAttention

# What a kernel is started through: itself, or what keeps its launches (``hopper.replay``).
Through = Callable[[Any], Any]


def itself(kernel: Any) -> Any:
    """Starts the kernel and keeps nothing."""
    return kernel


# Set by tests that compile for chips this machine does not have; 0 means the device's own.
target_chip = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """How one pass of one call runs."""

    call: LoweredAttention
    config: config.TileConfig
    mask: arguments.MaskArgs
    score: arguments.ScoreArgs

    @classmethod
    def make(cls, call: LoweredAttention, stage: str, more_tiles: bool = False) -> Plan:
        """``more_tiles`` says that the pass reads tiles of the score matrix besides those of the call's own terms."""
        terms, head_size = call.terms, max(call.q.shape[-1], call.v.shape[-1])
        heavy = more_tiles or bool(terms.mods) or terms.dropout is not None or terms.mask.keep is not None
        chip = target_chip or config.chip_of(call.q.device)
        scattered = terms.dropout is not None and terms.dropout.counters(call.shape)[1] != 0
        chosen = config.lookup(chip, config.Pass(stage, heavy, arguments.by_columns(terms), scattered), call.q.dtype, head_size)
        return cls(call, chosen, arguments.mask(call.terms, _summary(call, chosen)), arguments.scores(call.terms, call.grid, call.q.dtype))

    @property
    def q_tiles(self) -> int:
        return -(-self.call.shape[2] // self.config.block_q)

    @property
    def kv_tiles(self) -> int:
        return -(-self.call.shape[3] // self.config.block_kv)

    def launch(self, kernel: Any, programs: int, tensors: tuple[Any, ...]) -> None:
        """Runs ``kernel(*tensors, mask, score, dropout, sizes, tile)`` on a one-dimensional grid, which alone has room for 2^31 programs."""
        if programs == 0:
            return
        call = self.call
        dropout = arguments.dropout(call.terms, call.shape)
        shared = (self.mask, self.score, dropout, arguments.sizes(call), arguments.tile(call, self.config))
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        run(kernel, programs, call.q.device, (*tensors, *shared), options)


def run(kernel: Any, programs: int, device: torch.device, args: tuple[Any, ...], options: dict[str, int]) -> None:
    """Starts a kernel on its tensors' device, which Triton wants to be the current one.

    Every product and sum is rounded where the kernel's text says so. Left to itself Triton contracts a * b + c as
    TRITON_DEFAULT_FP_FUSION says, whose default changes in 3.10: forward and backward would then round the same score
    differently (s * scale - max keeps 2^-24 of the largest logit in one of them). Where one rounding is meant, it is ``tl.fma``.
    """
    with torch.cuda.device(device) if device.type == "cuda" else _NOWHERE:
        kernel[(programs,)](*args, enable_fp_fusion=False, **options)


class _Nowhere:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_NOWHERE = _Nowhere()


def _summary(call: LoweredAttention, chosen: config.TileConfig) -> torch.Tensor | None:
    """Per-tile summary of a dense mask, int8 [batch|1, heads|1, q tiles|1, kv tiles|1]."""
    keep = call.terms.mask.keep
    if keep is None:
        return None
    batch, heads, q_len, kv_len = keep.shape
    q_tiles, kv_tiles = -(-q_len // chosen.block_q), -(-kv_len // chosen.block_kv)
    summary = torch.empty((batch, heads, q_tiles, kv_tiles), dtype=torch.int8, device=keep.device)
    if summary.numel():
        sizes = arguments.Sizes(heads, 1, q_len, kv_len)
        tensors = (arguments.matrix(keep), arguments.matrix(summary))
        run(masks._tile_summary_kernel, summary.numel(), keep.device, (*tensors, sizes, arguments.tile(call, chosen)), {"num_warps": 4})
    return summary
