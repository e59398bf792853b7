"""All that differs between Triton 3.6, 3.7, 3.8 and 3.9, so that the kernels and their launch know one dialect."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate
from triton.runtime import driver

__all__ = [
    "TensorDescriptor",
    "aggregate",
    "fence_async_global",
    "takes_tensor_maps",
    "tensor_map",
    "tma_add",
    "tma_load",
    "tma_store",
    "wait_reads",
    "wait_writes",
]

# 3.8 renamed both copies; 3.9 keeps the old names as functions that raise, so the new names are tried first.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

if hasattr(tma, "async_atomic_add"):
    tma_add = tma.async_atomic_add
else:  # 3.6 and 3.7 have the operation in the builder, but no Python name for it

    @builtin
    def tma_add(tensor_desc, coord, src, _semantic=None):
        """Adds a shared tile to global memory, element by element."""
        from triton._C.libtriton import ir

        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@gluon.jit
def wait_reads(PENDING: gl.constexpr):
    """Until at most PENDING bulk stores of this thread still read shared memory: then their tiles may be written again."""
    tma.store_wait(PENDING)


@gluon.jit
def wait_writes(zero):
    """Until all bulk stores of this thread have reached memory. ``tma.store_wait`` says so only from 3.8 on (read_only=False), PTX always did."""
    return gl.inline_asm_elementwise("cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r", [zero], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fence_async_global(token):
    """Orders what this thread has seen in global memory before the TMA operations that follow. No Triton has it; the asm carries a token through."""
    return gl.inline_asm_elementwise("fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [token], dtype=gl.int32, is_pure=False, pack=1)


def tensor_map(descriptor: TensorDescriptor, meta: dict[str, Any]) -> Any:
    """The driver's tensor map of a descriptor, as a compiled kernel wants it (``metadata.tensordesc_meta``)."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    of_driver = driver.active.utils
    fill = getattr(of_driver, "fill_tma_descriptor_tiled", None) or of_driver.fill_tma_descriptor
    kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
    address, sizes, strides = descriptor.base.data_ptr(), list(descriptor.shape), list(descriptor.strides)
    return fill(address, meta["swizzle"], meta["elem_size"], kind, list(meta["block_size"]), sizes, strides, 0)


def takes_tensor_maps(compiled: Any) -> Any:
    """The same kernel, which from here on is given (tensor map, *sizes, *strides) in each descriptor's place.

    Triton makes the maps anew at every call. Its launcher is a closure around one that takes what they expand to; this is that one.
    A kernel without descriptors, and one that was here before (our kinds of arguments are finer than Triton's), has no such closure.
    """
    compiled._init_handles()
    launch = compiled.run.launch
    names = launch.__code__.co_freevars if isinstance(launch, FunctionType) else ()
    if "launcher" in names:
        compiled.run.launch = launch.__closure__[names.index("launcher")].cell_contents
    elif isinstance(launch, FunctionType):
        raise RuntimeError(
            f"Triton's launcher must be one of C or a closure around it named 'launcher'; got {launch.__qualname__} around {names}. "
            "Set FUSED_ATTN_HOPPER=off, or use Triton 3.6 to 3.9."
        )
    return compiled
