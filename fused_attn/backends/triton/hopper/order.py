"""The order in which persistent CTAs take up query tiles."""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .compat import aggregate

# Simulated and compiled without a device: the processors of a whole chip.
_PROCESSORS = 132


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors, each of which runs one CTA."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else _PROCESSORS


@aggregate
class Order:
    """Tiles of all heads, dealt out to CTAs; no result depends on it.

    ``heads`` counts those of all batches, several packed into one as one, ``together`` how many have their keys and values in the L2 cache at a time.
    """

    heads: gl.tensor
    tiles: gl.tensor
    together: gl.tensor

    @gluon.constexpr_function
    def __init__(self, heads, tiles, together):
        self.heads, self.tiles, self.together = heads, tiles, together

    @gluon.jit
    def total(self):
        return self.heads * self.tiles

    @gluon.jit
    def index(self, turn):
        """The CTA's work of its turn-th round. Every other round runs backwards, so that nobody gets the longest tile each time."""
        grid = gl.num_programs(0)
        here = gl.program_id(0)
        return turn * grid + gl.where(turn % 2 == 0, here, grid - 1 - here)

    @gluon.jit
    def place(self, index):
        """(head of all batches, query tile): last rows (causal: the longest) first."""
        first = index // (self.together * self.tiles) * self.together
        size = gl.minimum(self.together, self.heads - first)
        rest = index % (self.together * self.tiles)
        return first + rest % size, self.tiles - 1 - rest // size
