"""Tiles that one warp loads and others read: shared memory and the ring that hands it over."""

from collections.abc import Sequence

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .compat import aggregate, tma_load
from .roles import Ring, ring


@aggregate
class Stream:
    """Stages of [1, 1, rows, cols] tiles; the n-th tile of a CTA lies in stage n % stages."""

    tiles: gl.shared_memory_descriptor
    ring: Ring

    @gluon.constexpr_function
    def __init__(self, tiles, ring):
        self.tiles, self.ring = tiles, ring

    @gluon.jit
    def load(self, source, coordinates, n):
        """Loads the n-th tile once its stage is empty."""
        full = self.ring.full_at(n)
        self.ring.wait_empty(n)
        mbarrier.expect(full, source.block_type.nbytes)
        tma_load(source, coordinates, full, self.tiles.index(self.ring.stage(n)))

    @gluon.jit
    def tile(self, n):
        """The n-th tile, [rows, cols]."""
        return flat(self.tiles.index(self.ring.stage(n)))

    @gluon.jit
    def pass_over(self, n):
        """Gives back the n-th tile unread."""
        self.ring.wait_full(n)
        self.ring.release(n)


@gluon.jit
def stream(source, STAGES: gl.constexpr, EMPTIERS: gl.constexpr):
    """Stages for the tiles of a descriptor."""
    return Stream(room(source, STAGES), ring(STAGES, 1, EMPTIERS))


@gluon.jit
def room(source, COUNT: gl.constexpr):
    """Shared memory for tiles of a descriptor."""
    return gl.allocate_shared_memory(source.dtype, staged(COUNT, source.block_shape), source.layout)


@gluon.constexpr_function
def staged(count: int, box: Sequence[int]) -> list[int]:
    """The shape of ``count`` boxes."""
    return [count, *box]


@gluon.jit
def flat(tile):
    """A [1, 1, rows, cols] or packed [1, 1, rows / group, group, cols] tile as [rows, cols]."""
    shape: gl.constexpr = matrix_shape(tile.shape)
    return tile.reshape(shape)


@gluon.constexpr_function
def matrix_shape(box: Sequence[int]) -> list[int]:
    """Rows and columns of a tile."""
    rows = 1
    for size in box[:-1]:
        rows *= int(size)
    return [rows, int(box[-1])]


@gluon.constexpr_function
def packed_heads(tiles: Sequence[int]) -> int:
    """How many heads the rows of query tiles hold, from the shape of all: 6-D where there are several."""
    return int(tiles[4]) if len(tiles) == 6 else 1
