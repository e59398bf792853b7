"""Values that have to be in registers before the compiler would write them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def written(accumulator):
    """The same float32 tile, in registers by now.

    Zeros of an accumulator that is known to take one product only (one key, one query) are otherwise written behind that product's fence.
    """
    return gl.inline_asm_elementwise("", "=f,0", [accumulator], dtype=gl.float32, is_pure=False, pack=1)


@gluon.constexpr_function
def _held_asm(registers: int) -> str:
    """Passes registers on, and stores if a sign bit is set in any of their halves; `registers` are at least 2."""
    inputs = [f"${registers + i}" for i in range(registers)]
    lines = ["{ .reg .pred p; .reg .b32 bits, nowhere; mov.b32 nowhere, 0;", f"or.b32 bits, {inputs[0]}, {inputs[1]};"]
    lines += [f"or.b32 bits, bits, {x};" for x in inputs[2:]]
    lines += ["and.b32 bits, bits, 0x80008000; setp.ne.b32 p, bits, 0; @p st.volatile.shared.b32 [nowhere], bits;"]
    return "\n".join([*lines, *(f"mov.b32 ${i}, {x};" for i, x in enumerate(inputs)), "}"])


@gluon.constexpr_function
def _held_constraints(registers: int) -> str:
    return ",".join(["=r"] * registers + ["r"] * registers)


@gluon.jit
def held(x):
    """The same 16-bit tile of numbers that are not negative, computed before a wait that follows.

    ptxas else hoists the wait for a product above the arithmetic that should run beside it. It moves none over a store, and this one, which
    never happens, wants to know all of the tile.
    """
    REGISTERS: gl.constexpr = 16
    ASM: gl.constexpr = _held_asm(REGISTERS)
    CONSTRAINTS: gl.constexpr = _held_constraints(REGISTERS)
    return gl.inline_asm_elementwise(ASM, CONSTRAINTS, [x], dtype=x.dtype, is_pure=False, pack=2 * REGISTERS)


@gluon.jit
def pinned(x):
    """The same 16-bit tile, computed before whatever follows: LLVM else moves its last instructions behind the fence of the product that reads it."""
    return gl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=2)
