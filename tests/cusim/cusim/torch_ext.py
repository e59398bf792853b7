"""Call the CUDA implementation of a PyTorch operator (an extension built by nvcc with -cudart shared) on CPU tensors."""

import ctypes
import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from . import core


def load(path):
    """torch.ops.load_library with the run-time replacement in place."""
    core.runtime()
    if core.is_private():
        ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_DEEPBIND)
    else:
        torch.ops.load_library(str(path))


class _Track(TorchDispatchMode):
    """Registers every tensor created inside the operator with the bounds check."""

    def __init__(self):
        super().__init__()
        self.bases = []

    def add(self, values):
        for t in tree_flatten(values)[0]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes():
                s = t.untyped_storage()
                core.register(s.data_ptr(), s.nbytes(), f"tensor {tuple(t.shape)} {str(t.dtype)[6:]}")
                self.bases.append(s.data_ptr())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.add(out)
        return out


def call(op, *args, sim=None, **kwargs):
    """op: torch.ops.ns.name.overload.  sim: options of cusim.environment (strict bounds by default)."""
    core.runtime()
    track = _Track()
    track.add((args, kwargs))
    before = core.lib().cusim_rt_errors()
    try:
        with core.environment(**{"strict": True, **(sim or {})}), track:
            out = op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
    except RuntimeError as e:
        if core.lib().cusim_rt_errors() != before:
            raise core.SimError(core.last_kind(), core.last_message()) from e
        raise
    finally:
        for b in track.bases:
            core.unregister(b)
    if core.lib().cusim_rt_errors() != before:
        raise core.SimError(core.last_kind(), core.last_message())
    return out
