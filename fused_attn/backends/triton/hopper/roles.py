"""How the warps of a CTA hand shared memory to each other: bells (one barrier) and rings (a full and an empty barrier per stage)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .compat import aggregate


@aggregate
class Ring:
    """Stages that a producer fills and consumers empty, in order; tile i uses stage i % stages.

    A barrier's phase flips each time it completes. Waiting for a phase that lies behind returns at once; hence the empty barriers, which
    nobody has completed yet in the first round, are waited for with the opposite phase.
    """

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    stages: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, full, empty, stages):
        self.full = full
        self.empty = empty
        self.stages = gl.constexpr(stages)

    @gluon.jit
    def stage(self, i):
        # Unsigned: a signed remainder costs three instructions more per use.
        return (gl.to_tensor(i).to(gl.uint32) % self.stages).to(gl.int32)

    @gluon.jit
    def phase(self, i):
        return ((gl.to_tensor(i).to(gl.uint32) // self.stages) & 1).to(gl.int32)

    @gluon.jit
    def full_at(self, i):
        return self.full.index(self.stage(i))

    @gluon.jit
    def wait_full(self, i):
        mbarrier.wait(self.full.index(self.stage(i)), self.phase(i))

    @gluon.jit
    def wait_empty(self, i):
        mbarrier.wait(self.empty.index(self.stage(i)), self.phase(i) ^ 1)

    @gluon.jit
    def release(self, i):
        mbarrier.arrive(self.empty.index(self.stage(i)), count=1)


@gluon.jit
def bell(COUNT: gl.constexpr):
    """One barrier that rings after COUNT arrivals."""
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=COUNT)
    return barrier


@gluon.jit
def ring(STAGES: gl.constexpr, FILLERS: gl.constexpr, EMPTIERS: gl.constexpr):
    """A ring whose stages are filled by FILLERS arrivals and emptied by EMPTIERS."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=FILLERS)
        mbarrier.init(empty.index(i), count=EMPTIERS)
    return Ring(full, empty, STAGES)
