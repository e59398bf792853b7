"""The cuda backend on CPU tensors: the nvcc-built library, unmodified, on a simulator of CUDA that checks every access and barrier.

The library is compiled once (build/native/simulator) when the first test needs it. A race, an access outside a tensor, a missing wait or
a deadlock ends the test with the simulator's report.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch

from fused_attn import build
from fused_attn.backends import cuda, register
from tests import native

# How asynchronous copies take effect and warps are scheduled; tests/test_cuda_simulated.py runs through several. Launches are held to the
# limits of the chip with the least shared memory.
options: dict[str, Any] = {"threads": 1, "chip": "sm_120"}


def missing() -> str:
    """Why the simulator cannot run here, or an empty string."""
    return native.missing_for_simulator() or ("" if build.find_nvcc() else "there is no CUDA compiler (nvcc)")


@functools.cache
def simulator() -> Any:
    """The simulator's module, with the library loaded into it."""
    cusim = native.simulator()
    library = os.environ.get("FUSED_ATTN_LIBRARY") or native.simulated_library()
    importlib.import_module("cusim.torch_ext").load(library)
    os.environ["FUSED_ATTN_LIBRARY"] = str(library)
    cusim.torch_ext._Track.__torch_dispatch__ = _poisoning(cusim.torch_ext._Track.__torch_dispatch__)
    return cusim


def _is_ready() -> bool:
    return simulator() is not None


# torch.compile runs it while tracing instead of tracing through the build.
_is_ready._dynamo_marked_constant = True


def _poisoning(dispatch: Any) -> Any:
    """Every tensor that an operator allocates without filling it is NaN, as everywhere in the tests."""

    def run(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = dispatch(self, func, types, args, kwargs)
        if "empty" in func.name():
            out.fill_(torch.nan if out.is_floating_point() else 111)
        return out

    return run


class SimulatedCuda(cuda.CudaBackend):
    """The backend as it is, but for the device it asks for and the way an operator is called."""

    device_type = "cpu"

    def refusals(self, problem: Any) -> list[str]:
        assert _is_ready()
        return super().refusals(problem)

    def reluctance(self, problem: Any) -> str | None:
        return "the simulator is for tests"

    def call(self, name: str, *args: Any) -> Any:
        return simulator().torch_ext.call(getattr(torch.ops.fused_attn_cuda, name).default, *args, sim=options)


def install() -> None:
    """From here on ``backend="cuda"`` takes CPU tensors."""
    register(SimulatedCuda())
