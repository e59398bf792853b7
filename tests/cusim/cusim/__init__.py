"""cusim: run CUDA kernels, given as PTX, on the CPU.

import cusim, torch
m = cusim.Module(ptx_text)
m.launch("kernel", grid=(4,), block=(128,), args=[x, y, n], shared=0)
"""

from .core import (
    CHECKS,
    LaunchResult,
    Module,
    SimError,
    TensorMap,
    compile_cuda,
    defaults,
    environment,
    is_private,
    last_message,
    last_stats,
    library_path,
    register,
    runtime,
    tensor_map,
    unregister,
)
from .roofline import roofline

__all__ = [
    "CHECKS",
    "LaunchResult",
    "Module",
    "SimError",
    "TensorMap",
    "compile_cuda",
    "defaults",
    "environment",
    "is_private",
    "last_message",
    "last_stats",
    "library_path",
    "register",
    "roofline",
    "runtime",
    "tensor_map",
    "unregister",
]
