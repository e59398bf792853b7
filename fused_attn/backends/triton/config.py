"""Tile configurations: one table per (chip, head size, dtype, pass), and what single chips and versions of Triton need differently.

Every entry compiles with at most 64 bytes of stack and within the chip's shared memory: tests/test_triton_compile.py holds it to that with
the installed Triton, `make matrix` with every supported one. Among those that do, entries with counts beside them have the fewest warp
instructions per 64 x 64 scores (SASS of the loop over full tiles, Triton 3.7.1); the others are the largest tiles.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class TileConfig(NamedTuple):
    """Queries and keys per tile, warps per block, pipeline stages; float32 rows of more columns than ``resident`` are read in slices."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    resident: int = 64


class Pass(NamedTuple):
    """A kernel's stage, whether tiles besides q, k and v are live in it (modifications, dense masks, dropout): those need registers.

    ``by_columns`` says that scores are made column by column of q and k; ``scattered`` that dropout draws four words for every element.
    """

    stage: str
    heavy: bool
    by_columns: bool = False
    scattered: bool = False


# The interpreter's cost is per operation, not per element; small tiles only make sure that every loop runs more than once.
_INTERPRETER = TileConfig(64, 64, 4, 1)

# Shared memory per block in bytes, by row of the table.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
STAGES = ("fwd", "aux", "bwd_dq", "bwd_dkdv", "bwd_bias")
# An entry serves padded head sizes up to this.
HEAD_SIZES = (64, 128, 256)

_Row = tuple[TileConfig, TileConfig, TileConfig]


def _row(*entries: tuple[int, ...]) -> _Row:
    small, middle, large = (TileConfig(*entry) for entry in entries)
    return small, middle, large


# (stage, heavy, bits per element): entries for HEAD_SIZES, on chips with mma.sync (sm_80, sm_120). The four that read
# float32 rows of 64 columns in slices spilled on Triton 3.8 otherwise (264 to 648 bytes on sm_80); on 3.7 the dk, dv kernel has no more
# instructions for it. Triton gives every warp whole rows of scores only in tiles with as many queries as the head has columns: else
# sums and maxima cross warps, at 9 barriers a tile instead of 2.
_WARP_MMA: dict[tuple[str, bool, int], _Row] = {
    # 1306, 128 x 64: 1472; 2180, 64 x 64: 4584; 5376 on 233 registers, 64 x 64: 6616, 128 x 32 spills.
    ("fwd", False, 16): _row((128, 128, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    # With a bias alone 9040 at head size 128, 32 x 64: 11536.
    ("fwd", True, 16): _row((64, 32, 4, 2), (128, 16, 8, 2), (32, 32, 8, 1)),
    ("fwd", False, 32): _row((32, 32, 4, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    ("fwd", True, 32): _row((32, 32, 4, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    ("aux", False, 16): _row((64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 8, 1)),
    ("aux", False, 32): _row((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    # 1436; 2376, 64 x 64: 3032 and 3 barriers, 128 x 64: 2244 and 48 bytes of stack.
    ("bwd_dq", False, 16): _row((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
    # With every kind of operand 20632, 64 x 32: 30400; 23376, 32 x 32: 35904.
    ("bwd_dq", True, 16): _row((128, 32, 8, 1), (128, 16, 8, 1), (32, 32, 8, 1)),
    ("bwd_dq", False, 32): _row((32, 32, 4, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    ("bwd_dq", True, 32): _row((32, 32, 8, 1, 32), (32, 32, 8, 1), (16, 32, 8, 1)),
    # 2440, 128 x 64 on 8 warps: 2908; 4480, with one stage, whose loads nothing hides, 4296.
    ("bwd_dkdv", False, 16): _row((64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    ("bwd_dkdv", True, 16): _row((32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
    ("bwd_dkdv", False, 32): _row((32, 32, 8, 1, 32), (32, 32, 8, 1), (16, 32, 8, 1)),
    ("bwd_dkdv", True, 32): _row((32, 32, 8, 1, 32), (16, 32, 8, 1), (16, 32, 8, 1)),
    ("bwd_bias", True, 16): _row((64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 8, 1)),
    ("bwd_bias", True, 32): _row((32, 32, 8, 1, 32), (32, 32, 8, 1), (32, 32, 8, 1)),
}
# What chips with warpgroup products and more shared memory (sm_90, sm_100) do differently.
_WARPGROUP_MMA: dict[tuple[str, bool, int], _Row] = {
    # 1308; 1636; 2332, where 64 x 32 on two warpgroups, each of which makes all scores, has 6496.
    ("fwd", False, 16): _row((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    ("fwd", True, 16): _row((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    ("fwd", False, 32): _row((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    ("fwd", True, 32): _row((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    # 1228; 1736; 4480, where 32 x 32, too few rows for a warpgroup, has 10560.
    ("bwd_dq", False, 16): _row((128, 64, 8, 2), (64, 64, 4, 2), (64, 16, 4, 2)),
    ("bwd_dq", True, 16): _row((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    ("bwd_dq", False, 32): _row((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    ("bwd_dkdv", False, 16): _row((64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 1)),
    ("bwd_dkdv", True, 16): _row((32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
}
# (stage, bits per element): entries for HEAD_SIZES of passes that make scores by columns, on every chip. Sums over a tile's rows want long
# rows (keys for dq and the weight, queries for dk), so that most of a sum stays within a thread.
_BY_COLUMNS: dict[tuple[str, int], _Row] = {
    ("fwd", 16): _row((64, 64, 8, 1), (64, 64, 8, 1), (32, 64, 8, 1)),
    ("fwd", 32): _row((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    ("aux", 16): _row((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
    ("aux", 32): _row((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
    ("bwd_dq", 16): _row((32, 64, 8, 1), (32, 64, 8, 1), (16, 64, 8, 1)),
    ("bwd_dq", 32): _row((32, 32, 8, 1, 32), (16, 32, 8, 1), (16, 32, 8, 1)),
    ("bwd_dkdv", 16): _row((64, 32, 8, 1), (64, 16, 8, 1), (32, 16, 8, 1)),
    ("bwd_dkdv", 32): _row((32, 32, 8, 1, 32), (32, 16, 8, 1), (32, 16, 8, 1)),
    ("bwd_bias", 16): _row((64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 8, 1)),
    ("bwd_bias", 32): _row((32, 32, 8, 1, 32), (32, 32, 8, 1), (32, 32, 8, 1)),
    ("bwd_weight", 16): _row((32, 128, 8, 1), (32, 64, 8, 1), (16, 64, 8, 1)),
    ("bwd_weight", 32): _row((32, 32, 8, 1, 32), (16, 32, 8, 1), (16, 32, 8, 1)),
}
_TABLE = {80: _WARP_MMA, 90: _WARP_MMA | _WARPGROUP_MMA, 100: _WARP_MMA | _WARPGROUP_MMA, 120: _WARP_MMA}
_Place = tuple[int, str, bool, int, int]
# Entries that one chip needs differently: (chip, stage, heavy, bits, head size); a stage that makes scores by columns says so.
_EXCEPTIONS: dict[_Place, TileConfig] = {
    (100, "fwd", True, 16, 64): TileConfig(64, 64, 8, 2),  # 128 x 64: 96 bytes
    (100, "fwd", True, 32, 64): TileConfig(64, 32, 8, 1),  # 32 x 32: above 64 bytes
    (100, "fwd", False, 16, 256): TileConfig(64, 32, 8, 2),  # 128 x 64: 96 bytes on 3.8, 104 on 3.9
    (100, "bwd_dq", False, 16, 256): TileConfig(32, 32, 8, 1),  # 64 x 16 was not counted there: no warp makes these products
    (100, "fwd", False, 32, 128): TileConfig(32, 32, 4, 1),  # 64 rows: tensor memory runs out, and Triton makes the kernel one trap
    (100, "fwd", False, 32, 256): TileConfig(16, 32, 8, 1),  # 32 x 32: 96 bytes; 64 rows: as above
    (100, "fwd", True, 32, 256): TileConfig(32, 16, 8, 1),  # 32 x 32: 96 bytes
    (100, "bwd_dq", True, 32, 64): TileConfig(64, 32, 8, 1),  # more rows than the table's fit
    (100, "bwd_dq", False, 32, 128): TileConfig(32, 32, 8, 1),  # 64 rows: one trap
    (100, "bwd_dq", True, 32, 256): TileConfig(32, 16, 8, 1),  # 16 x 32: 80 bytes
    (120, "fwd", True, 32, 64): TileConfig(32, 32, 8, 1, 32),  # 64 columns at once: 96 bytes
    (120, "fwd", True, 32, 256): TileConfig(32, 16, 8, 1),  # 32 x 32: 104 bytes
    (120, "bwd_dq", False, 32, 256): TileConfig(16, 32, 8, 1),  # 32 x 32: 80 bytes
}
# Entries that one version of Triton needs differently, besides; one newer than all of these takes those of the newest.
_EXCEPTIONS_OF: dict[tuple[int, int], dict[_Place, TileConfig]] = {
    (3, 6): {
        (80, "bwd_dq", True, 16, 64): TileConfig(64, 32, 8, 2),  # 128 x 32: 144 bytes
        (100, "fwd", True, 16, 128): TileConfig(64, 64, 8, 1),  # two stages: 128 bytes
        (90, "fwd", True, 16, 128): TileConfig(128, 32, 8, 2),  # 64 x 64: 136 bytes
        (120, "bwd_bias", True, 16, 128): TileConfig(64, 32, 8, 1),  # 64 x 64: 72 bytes
    },
    (3, 7): {
        (90, "fwd", True, 16, 128): TileConfig(128, 32, 8, 2),  # 64 x 64: 88 bytes
        (120, "bwd_dq by columns", True, 16, 128): TileConfig(16, 64, 8, 1),  # 32 x 64: 72 bytes
    },
    (3, 8): {
        (80, "fwd", True, 32, 64): TileConfig(32, 32, 8, 1, 32),  # 64 columns at once: 72 bytes
        (80, "fwd", True, 32, 128): TileConfig(32, 64, 8, 1),  # 64 x 32: 144 bytes
        (80, "fwd", False, 32, 256): TileConfig(32, 16, 8, 1),  # 32 x 32: 128 bytes
        (80, "fwd", True, 32, 256): TileConfig(32, 16, 8, 1),  # 32 x 32: 200 bytes
        (80, "bwd_dq", True, 32, 128): TileConfig(32, 16, 8, 1),  # 32 x 32: 112 bytes
        (90, "bwd_dq", False, 16, 256): TileConfig(32, 32, 8, 1),  # 64 x 16: 72 bytes
        (90, "fwd", True, 32, 64): TileConfig(32, 32, 8, 1),  # four warps: 248 bytes
        (90, "fwd", False, 32, 256): TileConfig(32, 16, 8, 1),  # 32 x 32: 72 bytes
        (90, "fwd", True, 32, 256): TileConfig(32, 16, 8, 1),  # 32 x 32: 96 bytes
        (100, "fwd", False, 32, 128): TileConfig(32, 32, 8, 1),  # four warps: 168 bytes
        (100, "fwd", True, 32, 128): TileConfig(32, 16, 8, 1),  # 32 x 32: 72 bytes
        (100, "fwd", False, 32, 256): TileConfig(32, 16, 8, 1),  # 16 x 32: 72 bytes
        (100, "fwd", True, 16, 128): TileConfig(64, 64, 8, 1),  # two stages: 128 bytes
        (100, "fwd", True, 16, 256): TileConfig(64, 32, 8, 1),  # two stages: 72 bytes
        (100, "bwd_dq", True, 32, 256): TileConfig(16, 16, 8, 1),  # 32 x 16: 72 bytes
        (120, "fwd", True, 32, 128): TileConfig(32, 32, 8, 1),  # 64 x 32: 168 bytes
        (120, "fwd", False, 32, 256): TileConfig(32, 16, 8, 1),  # 32 x 32: 96 bytes
        (120, "bwd_dq", False, 32, 64): TileConfig(32, 32, 8, 1, 32),  # 64 columns at once: 88 bytes
        (120, "bwd_dq", True, 32, 256): TileConfig(32, 16, 8, 1),  # 16 x 32: 72 bytes
    },
    (3, 9): {
        (90, "fwd", True, 16, 256): TileConfig(32, 64, 8, 2),  # 64 x 32: 88 bytes
        (90, "fwd", False, 32, 256): TileConfig(32, 16, 8, 1),  # 32 x 32: 80 bytes
        (90, "fwd", True, 32, 256): TileConfig(32, 16, 8, 1),  # 32 x 32: 136 bytes
        (100, "fwd", True, 32, 128): TileConfig(32, 16, 8, 1),  # 32 x 32: 80 bytes
        (100, "bwd_dq", True, 32, 256): TileConfig(16, 16, 8, 1),  # 32 x 16: 80 bytes
        (120, "fwd", True, 32, 128): TileConfig(32, 32, 8, 1),  # 64 x 32: 80 bytes
        (120, "bwd_dq", True, 32, 256): TileConfig(32, 16, 8, 1),  # 16 x 32: 72 bytes
    },
}


@functools.cache
def triton_version() -> tuple[int, int]:
    """Major and minor version of the Triton that compiles."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def exceptions(version: tuple[int, int]) -> dict[_Place, TileConfig]:
    """What a version of Triton takes from elsewhere than the table.

    Example:
        >>> exceptions((3, 11)) == exceptions((3, 9))
        True
    """
    return _EXCEPTIONS | _EXCEPTIONS_OF.get(min(version, max(_EXCEPTIONS_OF)), {})


def lookup(chip: int, which: Pass, dtype: torch.dtype, head_size: int) -> TileConfig:
    """The configuration of a pass for the Triton that is installed.

    Args:
        chip: compute capability as major * 10 + minor, or 0 for the interpreter.
        which: the pass.
        dtype: the inputs' dtype.
        head_size: the larger of the two head dimensions, at most 256.

    Example:
        >>> lookup(90, Pass("fwd", heavy=False), torch.bfloat16, 128)
        TileConfig(block_q=128, block_kv=64, num_warps=8, num_stages=2, resident=64)
    """
    if chip == 0:
        return _INTERPRETER
    heavy = (which.heavy and which.stage != "aux") or which.stage == "bwd_bias"
    row, bits = nearest_chip(chip), dtype.itemsize * 8
    # The words need the registers that the widest rows need: 440 bytes of stack otherwise (sm_80, bfloat16, head size 128, Triton 3.6).
    size = HEAD_SIZES[-1] if which.scattered else next(s for s in HEAD_SIZES if head_size <= s)
    entries = _BY_COLUMNS[which.stage, bits] if which.by_columns else _TABLE[row][which.stage, heavy, bits]
    stage = f"{which.stage} by columns" if which.by_columns else which.stage
    return exceptions(triton_version()).get((row, stage, heavy, bits, size)) or entries[HEAD_SIZES.index(size)]


def nearest_chip(chip: int) -> int:
    """The table's row for a chip: 8.6, 8.9 and 12.x have 99 KB of shared memory per block, 8.0 163 KB, 9.0 and 10.x 227 KB.

    Example:
        >>> nearest_chip(86), nearest_chip(103)
        (120, 100)
    """
    if chip in (86, 89) or chip >= 120:
        return 120
    return max(c for c in (80, 90, 100) if c <= chip)


@functools.cache
def chip_of(device: torch.device) -> int:
    """Compute capability of a device as major * 10 + minor; 0 for the interpreter's CPU tensors."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


# Rows longer than this are read twice: 16 warps hold 16384 float32 scores in 32 registers per thread, which leaves room for dropout's counters.
_LONGEST_RESIDENT_ROW = 16384


def softmax(kv_len: int) -> TileConfig:
    """Rows per program and columns per step for rows of ``kv_len``: about 2048 elements per program, whole rows where they fit.

    Example:
        >>> softmax(100)
        TileConfig(block_q=16, block_kv=128, num_warps=8, num_stages=1, resident=64)
    """
    if kv_len > _LONGEST_RESIDENT_ROW:
        return TileConfig(1, 4096, 8, 1)
    columns = max(16, 1 << (kv_len - 1).bit_length())
    rows = max(1, min(128, 2048 // columns))
    return TileConfig(rows, columns, 8 if rows * columns <= 4096 else 16, 1)
