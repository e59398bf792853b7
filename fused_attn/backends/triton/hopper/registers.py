"""Values that have to be in registers before the compiler would write them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def written(accumulator):
    """The same float32 tile, in registers by now.

    Zeros of an accumulator that is known to take one product only (one key, one query) are otherwise written behind that product's fence.
    """
    return gl.inline_asm_elementwise("", "=f,0", [accumulator], dtype=gl.float32, is_pure=False, pack=1)
