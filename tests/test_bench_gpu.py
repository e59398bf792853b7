"""What measuring on a GPU adds: events, CUDA graphs, a flushed cache, and the sensors, which are also tried on a stand-in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import providers
from fused_attn_bench import environment, planted, timers
from fused_attn_bench.history import History
from fused_attn_bench.operation import OPERATIONS, case_of

CPU = torch.device("cpu")


@pytest.mark.cuda("CUDA events and graphs exist on GPUs only")
@pytest.mark.parametrize("name", ["events", "graph"])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_device_and_host_time_are_apart(name: str, cold: bool, device: torch.device) -> None:
    a = torch.randn(4096, 4096, device=device)
    timer = timers.make(name, device, cold)
    timer(lambda: a @ a, 3)
    sample = timer(lambda: a @ a, 5)
    assert sample.host is not None
    assert 0 < sample.host < sample.seconds, "a product of this size takes longer than to ask for it"


@pytest.mark.cuda("NVML reads NVIDIA GPUs")
def test_sensors_of_a_real_chip(device: torch.device) -> None:
    pytest.importorskip("pynvml")
    read = environment.telemetry(device)
    assert read["sm_mhz"] > 0 and read["watts"] > 0 and isinstance(read["throttled"], list)
    described = environment.describe(device)
    assert described["driver"] and described["cuda"] and described["device"] == torch.cuda.get_device_name(device)


@pytest.mark.cuda("the run command on the real thing")
@pytest.mark.parametrize("timer", ["events", "graph"])
def test_run_on_a_gpu(timer: str, tmp_path: Path) -> None:
    case = "attention/causal/fwd/bfloat16/1x2x256x64"
    options = ["--device", "cuda", "--timer", timer, "--seconds", "0.1", "--db", str(tmp_path / "h.sqlite")]
    assert cli.main(["run", "--case", case, "--provider", "fused_attn", "eager", "sdpa", *options]) == 0
    kept = History(tmp_path / "h.sqlite").results()
    assert all(r.status == "ok" and len(r.host) == len(r.samples) for r in kept)


class Sensors:
    """NVML's functions on a chip that is too hot and idle at once."""

    NVMLError = RuntimeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    nvmlClocksThrottleReasonSwPowerCap = 0x4
    nvmlClocksThrottleReasonHwThermalSlowdown = 0x40

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return 0x41

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1980, 2: 3201}[kind]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 650_500

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 84


@pytest.mark.quick
def test_what_is_read_of_the_sensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_nvml", Sensors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2-3"))
    read = environment.telemetry(torch.device("cuda"))
    assert read == {"sm_mhz": 1980, "memory_mhz": 3201, "watts": 650.5, "celsius": 84, "throttled": ["HwThermalSlowdown"]}


@pytest.mark.quick
def test_sensors_that_are_hidden_or_have_their_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(Sensors):
        nvmlDeviceGetCurrentClocksEventReasons = None

        def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
            return 0x4

        def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
            raise self.NVMLError("not supported")

    monkeypatch.setattr(environment, "_nvml", Old)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2-3"))
    assert environment.telemetry(torch.device("cuda")) == {"sm_mhz": 1980, "memory_mhz": 3201, "celsius": 84, "throttled": ["SwPowerCap"]}


@pytest.mark.quick
def test_without_sensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_nvml", lambda: None)
    assert environment.telemetry(torch.device("cuda")) == {}
    assert environment._driver() == ""
    assert set(environment.telemetry(CPU)) == {"load"}


@pytest.mark.quick
def test_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit.__wrapped__(tmp_path) == "unknown"


@pytest.mark.quick
def test_every_provider_is_asked_on_a_gpu() -> None:
    everyone = [name for op in OPERATIONS.values() for name, p in op.providers.items() if p.runs_by_default(torch.device("cuda"))]
    assert "fused_attn:cpu" not in everyone
    assert {
        "fused_attn:cuda",
        "fused_attn:triton",
        "eager",
        "compile",
        "sdpa:flash",
        "sdpa:efficient",
        "sdpa:cudnn",
        "sdpa:math",
        "flex",
    } <= set(everyone)
    assert {"flash-attn", "flash-attn-3", "xformers", "x-transformers", "liger"} <= set(everyone)
    with pytest.raises(providers.Refusal, match="a GPU would not notice"):
        planted.bind("eager+5%", SimpleNamespace(device=torch.device("cuda"), case=case_of("softmax/plain/fwd/float32/1x1x4x8")))
