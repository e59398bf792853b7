"""What a measurement belongs to: versions and machine, and what the GPU's own sensors say beside each sample."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fused_attn_bench import busy

# What has to agree before two measurements may be compared. Numbers that change from boot to boot do not belong here.
KEY = ("device", "driver", "cuda", "torch", "triton", "threads")
# Reasons of NVML that say that the clock was held back; idle and settings of the user's are none.
THROTTLE = ("SwPowerCap", "HwSlowdown", "SyncBoost", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")


def describe(device: torch.device, root: Path, beside: int = 0, mhz: int = 0) -> dict[str, str]:
    """Everything that a number depends on, as text; with the busy processes that were started for it, and the GPU's clock if it was locked."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "driver": _driver() if gpu else "",
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "threads": "" if gpu else str(torch.get_num_threads()),
        "busy": busy.described(beside),
        "clocks": f"locked at {mhz} MHz" if mhz else "",
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": commit(root),
        "fused_attn": _installed("fused-attn"),
    }


@functools.cache
def commit(root: Path) -> str:
    """Of the checkout, with a mark when files differ from it; "unknown" outside of one, and without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--match="]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def _cpu_name() -> str:
    names = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@functools.cache
def nvml() -> Any:
    """NVML's module, initialised, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no permission: all of them mean that nothing can be read
        return None
    return pynvml


def _driver() -> str:
    return nvml().nvmlSystemGetDriverVersion() if nvml() else ""


def telemetry(device: torch.device) -> dict[str, Any]:
    """Clocks in MHz, power in watts, degrees Celsius and reasons for throttling; on the CPU how many processes want to run."""
    if device.type != "cuda":
        return {"load": os.getloadavg()[0]}
    library = nvml()
    if library is None:
        return {}
    found: dict[str, Any] = {}
    for name, read in _READINGS.items():
        try:
            found[name] = read(library, gpu_handle(library, device))
        except library.NVMLError:  # a container, a MIG slice or an old driver may hide some of them
            continue
    return found


def gpu_handle(library: Any, device: torch.device) -> Any:
    """NVML's handle of a GPU."""
    return library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def _throttled(nvml: Any, handle: Any) -> list[str]:
    # Named anew in 2024; older packages have the older name.
    reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    bits = reasons(handle)
    return [name for name in THROTTLE if bits & getattr(nvml, f"nvmlClocksThrottleReason{name}", 0)]


_READINGS: dict[str, Callable[[Any, Any], Any]] = {
    "sm_mhz": lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
    "memory_mhz": lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
    "watts": lambda nvml, handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    "celsius": lambda nvml, handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    "throttled": _throttled,
}
