"""Tiles that one warp loads and others read: shared memory and the ring that hands it over."""

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
    """Shared memory for tiles of a descriptor of four dimensions."""
    box: gl.constexpr = source.block_shape
    return gl.allocate_shared_memory(source.dtype, [COUNT, box[0], box[1], box[2], box[3]], source.layout)


@gluon.jit
def flat(tile):
    """A [1, 1, rows, cols] tile as [rows, cols]."""
    return tile.reshape([tile.shape[2], tile.shape[3]])
