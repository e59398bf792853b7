"""A GPU's clock held still while something is measured, where the driver permits it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fused_attn_bench.environment import gpu_handle, nvml


@contextmanager
def locked(device: torch.device, mhz: int) -> Iterator[None]:
    """The multiprocessors' clock at so many MHz within the block, and free again after it; nothing for 0.

    Tested with a stand-in for NVML; no GPU has been locked by it yet.

    Raises:
        ValueError: the device has no such clock, or the driver does not permit it.
    """
    if not mhz:
        yield
        return
    found = nvml()
    if device.type != "cuda" or found is None:
        raise ValueError(f"clocks are locked on NVIDIA GPUs, through NVML; {device.type} has none here. Leave --lock-clocks out.")
    handle = gpu_handle(found, device)
    try:
        found.nvmlDeviceSetGpuLockedClocks(handle, mhz, mhz)
    except found.NVMLError as error:
        raise ValueError(
            f"the driver must permit clocks of {mhz} MHz, which takes an administrator; it says: {error}. Without --lock-clocks results say how they moved."
        ) from None
    try:
        yield
    finally:
        found.nvmlDeviceResetGpuLockedClocks(handle)
