"""How a call is cut for torch's flash kernel: few blocks of query rows, each with its mask and biases added up in one tensor.

A block holds every head and batch that it can, so that it is one parallel region, and the keys that any of its rows reaches. Its cut never
depends on the number of batches or on what the other batches hold, so neither do the results' bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fused_attn.backends.cpu.mask_tiles import MaskTiles, Region
from fused_attn.backends.cpu.tiles import MIN_ROWS, TILE
from fused_attn.lowering import LoweredAttention, Range
from fused_attn.score_mods import Bias

# Elements of what is added, 16 MB of float32. Milliseconds forward/with backward of float32 B1 H4 D64 with a dense mask, 2 threads beside some
# fifteen busy processes: L2048 2^20 895/2541, 2^21 752/2170, 2^22 448/1497; L4096 5168/15444, 3412/11303, 2209/6582.
ROOM = 1 << 22
# Query rows of a block of a mask of intervals. Causal and lengths, same case, L2048: one thread, 256 rows 48/159, 512 55/176, 1024 54/174; busy,
# 256 rows 2412/6352, 512 972/3265, 1024 1446/3384. Other blocks have as many as fit, and heads are parted before there are fewer than 256.
MAX_ROWS, FEW_ROWS = 512, 256
# The same where rows reach few keys; windows of 16 and 64 keys each side, L2048, one thread: 64 rows 10.3/26.6 and 13.7/37.3, 128 rows 10.3/29.0
# and 12.7/37.6, 256 rows 13.2/40.3 and 15.7/46.4.
NARROW_ROWS = 128


def is_causal(call: LoweredAttention) -> bool:
    """Whether the kernel's own switch says the mask: key j is open to query i where j <= i."""
    mask, offset = call.terms.mask, call.terms.q_offset
    others = (mask.left, mask.kv_start, mask.kv_end, mask.keep)
    aligned = isinstance(offset, int) and offset == 0 and call.q.shape[2] == call.k.shape[2]
    return aligned and mask.right == 0 and not mask.rules and all(t is None for t in others)


@dataclass(frozen=True, slots=True)
class Block:
    """Some query rows against the keys that they reach.

    Args:
        region: half-open ranges of batches, query heads, queries and keys.
        additive: what is added to the scores, broadcastable to the region, or None. It lies in memory that the next block writes to.
        is_causal: whether key j is open to query i where j <= i alone.
    """

    region: Region
    additive: Tensor | None
    is_causal: bool


class Blocks:
    """The blocks of a call in the order they are computed.

    Args:
        call: a call whose modifications are all among ``score_mods.ADDED``.
        dtype: of the arithmetic.
    """

    def __init__(self, call: LoweredAttention, dtype: torch.dtype) -> None:
        self.call, self.dtype, mask = call, dtype, call.terms.mask
        mods = call.terms.mods
        # A tensor that the kernel reads as it lies, or none, is added without memory.
        self.is_ready = not mods or (len(mods) == 1 and self._lies_well(mods[0].name, mods[0].tensors))
        self.is_causal = self.is_ready and is_causal(call)
        self.masks = None if mask.is_trivial or self.is_causal else MaskTiles(mask, call.grid, dtype)
        tensors = [t for m in mods for t in m.tensors]
        self.heads = call.q.shape[1] if self._differs(1, tensors) else 1
        # Grouped heads are folded into the batch, which a tensor that differs along either does not broadcast over.
        is_grouped = call.q.shape[1] != call.k.shape[1]
        self.is_single = self._differs(0, tensors) or (is_grouped and self.heads > 1)
        self.rooms: dict[str, Tensor] = {}

    def _differs(self, dim: int, tensors: list[Tensor]) -> bool:
        """Whether what is added differs along the batches (0) or the heads (1)."""
        of_mask = self.masks is not None and (self.masks.per_batch, self.masks.per_head)[dim]
        of_positions = dim == 0 and isinstance(self.call.terms.q_offset, Tensor)
        return of_mask or of_positions or any(t.shape[dim] != 1 for t in tensors)

    @property
    def is_whole(self) -> bool:
        """Whether all rows are one block: what is added is a view or small."""
        _, heads, q_len, kv_len = self.call.shape
        return self.is_ready if self.masks is None else not self.call.terms.mods and heads * q_len * kv_len <= TILE

    def _lies_well(self, name: str, tensors: tuple[Tensor, ...]) -> bool:
        return name == Bias.name and tensors[0].dtype == self.dtype and (tensors[0].shape[3] == 1 or tensors[0].stride(3) == 1)

    def __iter__(self) -> Iterator[Block]:
        _, heads, q_len, kv_len = self.call.shape
        if self.is_whole:
            for batches in self._batches(self.is_single and heads != self.call.k.shape[1]):
                region = (batches, (0, heads), (0, q_len), (0, kv_len))
                yield Block(region, self._added(region, (kv_len, 0)), self.is_causal)
            return
        for batches in self._batches(self.is_single):
            yield from self._of_batches(batches)

    def _batches(self, one_by_one: bool) -> list[Range]:
        batch = self.call.shape[0]
        return [(b, b + 1) for b in range(batch)] if one_by_one else [(0, batch)]

    def _of_batches(self, batches: Range) -> Iterator[Block]:
        _, heads, q_len, kv_len = self.call.shape
        widths = [kv_len] if self.masks is None else self.masks.widths
        rows, step = self._steps(widths[batches[0] if len(widths) > 1 else 0])
        bounds = [[[0, kv_len, 0, kv_len]] * -(-q_len // rows)] if self.masks is None else self.masks.bounds(rows)
        for block, h0 in product(range(-(-q_len // rows)), range(0, heads, step)):
            first, last, *full = bounds[batches[0] if len(bounds) > 1 else 0][block]
            keys, open_to_all = ((first, last) if first < last else (0, 1)), (full[0], full[1])
            region = (batches, (h0, min(h0 + step, heads)), (block * rows, min((block + 1) * rows, q_len)), keys)
            if self.masks is not None:
                keys, open_to_all = self.masks.trimmed(region, open_to_all)
                region = (*region[:3], keys)
            # The kernel's own switch counts from the first query of all.
            yield Block(region, self._added(region, open_to_all), False)

    def _steps(self, widest: int) -> tuple[int, int]:
        """Query rows and query heads of a block."""
        (_, heads, q_len, kv_len), mask = self.call.shape, self.call.terms.mask
        groups, rows = heads // self.call.k.shape[1], MAX_ROWS if mask.has_intervals else ROOM
        while rows > FEW_ROWS and rows * min(kv_len, widest + rows) * self.heads > ROOM:
            rows //= 2
        while rows > NARROW_ROWS and mask.has_intervals and rows > widest // 2:
            rows //= 2
        while rows > MIN_ROWS and rows * min(kv_len, widest + rows) > ROOM:
            rows //= 2
        fits = max(1, ROOM // (rows * min(kv_len, widest + rows))) // groups * groups
        return min(rows, q_len), heads if self.heads == 1 else max(groups, min(heads, fits))

    def _added(self, region: Region, full: Range) -> Tensor | None:
        """The mask and the modifications of a region in one tensor, [batch|1, heads|1, rows|1, keys|1]; None where there is nothing to add."""
        total = None if self.masks is None else self.masks.additive(region, full, lambda shape: self._room("mask", shape))
        mods = self.call.terms.mods
        if total is None and mods and self.is_ready:
            return self.call.grid.at(*region).crop(mods[0].tensors[0])
        for score in mods:
            total = self._with(total, score.name, score.tensors[0], region)
        return total

    def _with(self, total: Tensor | None, name: str, tensor: Tensor, region: Region) -> Tensor:
        """The sum and one modification, [batch|1, heads|1, rows, keys]."""
        grid = self.call.grid.at(*region)
        part, (_, heads, rows, keys) = grid.crop(tensor).to(self.dtype), grid.sizes
        shape = (1, heads if self.heads > 1 else 1, rows, keys)
        room = self._room("sum", shape)
        if name != Bias.name:
            first = region[3][0]  # subtracted as an integer, because positions may be too large for float32
            distance = ((grid.q_pos - first).to(self.dtype) - (grid.kv_idx - first).to(self.dtype)).abs_()
            if total is None:
                return torch.mul(distance, -part.expand(*shape[:2], 1, 1), out=room)
            return torch.addcmul(total.expand(shape), distance, part, value=-1, out=room)
        return room.copy_(part) if total is None else torch.add(total.expand(shape), part, out=room)

    def _room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Reused memory."""
        size = torch.Size(shape).numel()
        if name not in self.rooms or self.rooms[name].shape[0] < size:
            self.rooms[name] = self.call.q.new_empty(size, dtype=self.dtype)
        return self.rooms[name][:size].view(shape)
