"""What a measurement belongs to: versions and machine, and what the GPU's own sensors say beside each sample."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# What has to agree before two measurements may be compared. Numbers that change from boot to boot do not belong here.
KEY = ("device", "driver", "cuda", "torch", "triton", "threads")
# Reasons of NVML that say that the clock was held back; idle and settings of the user's are none.
THROTTLE = ("SwPowerCap", "HwSlowdown", "SyncBoost", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")


def describe(device: torch.device, root: Path = ROOT) -> dict[str, str]:
    """Everything that a number depends on, as text."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "driver": _driver() if gpu else "",
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "threads": "" if gpu else str(torch.get_num_threads()),
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": commit(root),
        "fused_attn": _installed("fused-attn"),
    }


@functools.cache
def commit(root: Path = ROOT) -> str:
    """Of the checkout, with a mark when files differ from it; "unknown" outside of one."""
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--match="], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


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
def _nvml() -> Any:
    """The module, initialised, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no permission: all of them mean that nothing can be read
        return None
    return pynvml


def _driver() -> str:
    return _nvml().nvmlSystemGetDriverVersion() if _nvml() else ""


def telemetry(device: torch.device) -> dict[str, Any]:
    """Clocks in MHz, power in watts, degrees Celsius and reasons for throttling; on the CPU how many processes want to run."""
    if device.type != "cuda":
        return {"load": os.getloadavg()[0]}
    nvml = _nvml()
    if nvml is None:
        return {}
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return {
        "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "celsius": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "throttled": [name for name in THROTTLE if reasons & getattr(nvml, f"nvmlClocksThrottleReason{name}", 0)],
    }
