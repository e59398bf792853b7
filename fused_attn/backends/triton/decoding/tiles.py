"""Tiles of the split-key kernel, and into how many parts the keys go."""

from __future__ import annotations

import torch

from fused_attn.backends.triton.config import HEAD_SIZES, TileConfig, nearest_chip

# The interpreter's cost is per operation; few rows and keys, so that there are several blocks and tiles.
_INTERPRETER = TileConfig(32, 32, 4, 1)
# By bits per element, for HEAD_SIZES: packed query rows at most, keys, warps, stages. 32 rows at most, so that products are mma.sync's on every
# chip: warpgroups and tensor memory want 64, which a decoding step rarely has, and their operands through shared memory in whole words,
# which a cache of any strides may not have (see ``_placed`` in the package above). The keys' loads bound the kernel.
# On four warps rows of 256 columns spilled 80 bytes with modifications on sm_120, and 32 of them on eight warps 88; float32 rows of 128
# columns 56 on four (Triton 3.7.1).
_TABLE: dict[int, tuple[TileConfig, TileConfig, TileConfig]] = {
    16: (TileConfig(32, 64, 4, 2), TileConfig(32, 64, 4, 2), TileConfig(16, 32, 8, 2)),
    32: (TileConfig(32, 32, 4, 1), TileConfig(32, 32, 8, 1), TileConfig(16, 32, 8, 1)),
}
# What single chips need differently: (chip, bits, head size).
_EXCEPTIONS: dict[tuple[int, int, int], TileConfig] = {}
# A scoring that reads columns of q and k.
_BY_COLUMNS = TileConfig(16, 32, 4, 1)
# Keys of a part at least: K and V of 256 keys of 128 columns are 128 KB in 16 bits, what a part of 16 rows leaves 8 KB. Estimated.
KEYS = 256
# Parts at most. Eight key heads make 512 programs of 64 parts, some four per multiprocessor of the largest chips.
PARTS = 64


def lookup(chip: int, dtype: torch.dtype, head_size: int, by_columns: bool) -> TileConfig:
    """The configuration for a chip (0: the interpreter), a dtype and the larger of the two head dimensions.

    Example:
        >>> lookup(90, torch.bfloat16, 128, by_columns=False).block_kv
        64
    """
    if chip == 0:
        return _INTERPRETER
    size = next(i for i, s in enumerate(HEAD_SIZES) if head_size <= s)
    if by_columns:
        return _BY_COLUMNS
    return _EXCEPTIONS.get((nearest_chip(chip), dtype.itemsize * 8, HEAD_SIZES[size])) or _TABLE[dtype.itemsize * 8][size]


def parts(kv_len: int) -> int:
    """Into how many parts the keys go, by their number alone, so that a batch's slice is a batch of one.

    Example:
        >>> parts(100), parts(4096), parts(1_000_000)
        (1, 16, 64)
    """
    return max(1, min(PARTS, kv_len // KEYS))


def block_rows(rows: int, most: int) -> int:
    """Query rows of a program: a power of two from 16 on that holds all packed rows, or the most there may be.

    Example:
        >>> block_rows(3, 32), block_rows(17, 32), block_rows(128, 32)
        (16, 32, 32)
    """
    return max(16, min(most, 1 << (rows - 1).bit_length()))
