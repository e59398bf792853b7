"""The order in which persistent CTAs take up query tiles, and who takes which."""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .compat import aggregate
from .roles import Ring, ring

# Simulated and compiled without a device: the processors of a whole chip.
_PROCESSORS = 132
# What a piece of work is told by: batch, head, query tile (-1: there is no more work), part of the keys.
WORK = gl.constexpr(4)


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
        """The CTA's work of its turn-th round, where all tiles take the same time; else see ``Queue``."""
        return turn * gl.num_programs(0) + gl.program_id(0)

    @gluon.jit
    def place(self, index):
        """(head of all batches, query tile): last rows (causal: the longest) first."""
        first = index // (self.together * self.tiles) * self.together
        size = gl.minimum(self.together, self.heads - first)
        rest = index % (self.together * self.tiles)
        return first + rest % size, self.tiles - 1 - rest // size


@aggregate
class Queue:
    """Hands out work as CTAs become free: the first by their number, the rest by a counter in global memory that starts at zero.

    Dealt out beforehand, every other round backwards, causal tiles took the longest CTA 1.28 and 1.66 times the mean at head sizes 128 and
    256 and 8192 keys: tiles are long again with each group of heads that shares the L2 cache (measured on an H100: 536 and 463 TFLOP/s
    where the same kernel without a mask has 690 and 766).
    """

    counter: gl.tensor
    slots: gl.shared_memory_descriptor
    ring: Ring

    @gluon.constexpr_function
    def __init__(self, counter, slots, ring):
        self.counter, self.slots, self.ring = counter, slots, ring

    @gluon.jit
    def draw(self):
        """The number of the producer's next piece of work."""
        return gl.num_programs(0) + gl.atomic_add(self.counter, 1)

    @gluon.jit
    def tell(self, turn, work):
        """Tells consumers the turn-th work, ``WORK`` numbers: so that its divisions are not theirs."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        self.ring.wait_empty(turn)
        for i in gl.static_range(WORK):
            self.slots.index(self.ring.stage(turn) * WORK + i).store(gl.full((1,), 0, gl.int32, layout) + work[i])
        mbarrier.arrive(self.ring.full_at(turn), count=1)

    @gluon.jit
    def hear(self, turn):
        """A consumer's turn-th work."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        self.ring.wait_full(turn)
        at = self.ring.stage(turn) * WORK
        work = (
            gl.max(self.slots.index(at).load(layout), 0),
            gl.max(self.slots.index(at + 1).load(layout), 0),
            gl.max(self.slots.index(at + 2).load(layout), 0),
            gl.max(self.slots.index(at + 3).load(layout), 0),
        )
        self.ring.release(turn)
        return work


@gluon.jit
def queue(counter, CONSUMERS: gl.constexpr):
    """A queue whose work is told through two slots in shared memory."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return Queue(counter, gl.allocate_shared_memory(gl.int32, [2 * WORK, 1], layout), ring(2, 1, CONSUMERS))
