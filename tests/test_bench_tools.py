"""What looks at kernels: profilers, Proton's times, locked clocks, counts of instructions. Where a GPU is needed stand-ins take its place."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as cli
from fused_attn_bench import clocks, sass, timers
from fused_attn_bench.environment import describe
from fused_attn_bench.results import machine

CASE = "softmax/plain/fwd/float32/1x1x4x8"
CUDA = torch.device("cuda")


@pytest.mark.quick
def test_a_provider_runs_once_for_a_profiler_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", CASE, "--provider", "eager", "--tool", "none", "--device", "cpu", "--calls", "2"]) == 0
    assert capsys.readouterr().out == f"eager ran 2 times on {CASE}\n"
    assert cli.main(["profile", CASE, "--provider", "eager", "--tool", "none", "--device", "cpu", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"code": 0, "case": CASE, "provider": "eager", "tool": "none", "calls": 1}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--provider", "nobody"], "a provider must be one of"),
        (
            ["--provider", "sdpa:cudnn", "--tool", "none"],
            "sdpa:cudnn must be able to compute softmax/plain/fwd/float32/1x1x4x8; it refuses: has no softmax.",
        ),
        (["--provider", "eager", "--calls", "0"], "--calls must be at least 1"),
        (["--provider", "eager", "--tool", "nsys"], "--tool nsys needs nsys on PATH"),
    ],
)
def test_what_a_profiler_cannot_run(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["profile", CASE, "--device", "cpu", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_profiler_gets_its_options_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ncu that writes its own options down and runs what follows them."""
    fake = tmp_path / "ncu"
    fake.write_text(
        f"#!{sys.executable}\nimport os, sys\nat = sys.argv.index({sys.executable!r})\nopen({str(tmp_path / 'said')!r}, 'w').write(' '.join(sys.argv[1:at]))\n"
        "os.execv(sys.argv[at], sys.argv[at:])\n"
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "profile",
        CASE,
        "--provider",
        "fused_attn",
        "--device",
        "cpu",
        "--options",
        "--set full",
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"fused_attn ran 1 time on {CASE}\n"
    assert (tmp_path / "said").read_text() == "--profile-from-start off --set full"


class Nvml:
    """What of NVML locks clocks; it permits 1410 MHz."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.log: list[Any] = []

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceSetGpuLockedClocks(self, handle: str, low: int, high: int) -> None:
        if low != 1410:
            raise self.NVMLError("Insufficient Permissions")
        self.log.append((low, high))

    def nvmlDeviceResetGpuLockedClocks(self, handle: str) -> None:
        self.log.append("free")


@pytest.mark.quick
def test_clocks_are_locked_and_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml()
    monkeypatch.setattr(clocks, "nvml", lambda: library)
    monkeypatch.setattr(clocks, "gpu_handle", lambda found, device: "handle")
    held = clocks.locked(CUDA, 1410)
    held.__enter__()
    assert library.log == [(1410, 1410)]
    assert not held.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None), "Ctrl-C is not swallowed"
    assert library.log == [(1410, 1410), "free"]
    with pytest.raises(ValueError, match=r"the driver must permit clocks of 900 MHz, .*Insufficient Permissions"), clocks.locked(CUDA, 900):
        pass
    with clocks.locked(torch.device("cpu"), 0):
        pass
    with pytest.raises(ValueError, match="Leave --lock-clocks out"), clocks.locked(torch.device("cpu"), 1410):
        pass


@pytest.mark.quick
def test_locked_clocks_are_another_machine(tmp_path: Path) -> None:
    free, held = (describe(torch.device("cpu"), tmp_path, mhz=mhz) for mhz in (0, 1410))
    assert held["clocks"] == "locked at 1410 MHz" and machine(free, "events") != machine(held, "events")


@pytest.mark.quick
def test_proton_counts_the_kernels_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that records what runs, in Proton's format: a flush of 5 ms outside of the scope, two kernels of 1 ms within."""
    tree: list[Any] = []
    scopes: list[list[Any]] = []

    def kernel(name: str, ns: int) -> None:
        (scopes[-1] if scopes else tree).append({"frame": {"name": name}, "metrics": {"time (ns)": ns, "count": 1}, "children": []})

    @contextmanager
    def scope(name: str) -> Any:
        node = {"frame": {"name": name}, "metrics": {}, "children": []}
        tree.append(node)
        scopes.append(node["children"])
        yield
        scopes.pop()

    written: list[str] = []
    proton = SimpleNamespace(
        start=lambda name, data: written.append(name) or 0,
        scope=scope,
        finalize=lambda session: Path(written[-1] + ".hatchet").write_text(
            json.dumps([{"frame": {"name": "ROOT"}, "metrics": {"count": 0}, "children": tree}, {"CUDA": {}}])
        ),
    )
    monkeypatch.setitem(sys.modules, "triton.profiler", proton)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    timer = timers.ProtonTimer.__new__(timers.ProtonTimer)
    timer.device = CUDA
    timer.flush = SimpleNamespace(zero_=lambda: kernel("flush", 5_000_000))  # type: ignore[assignment]

    def call() -> None:
        kernel("a", 1_000_000)
        kernel("b", 1_000_000)

    sample = timer(call, 3)
    assert sample.seconds == pytest.approx(2e-3) and sample.host is not None
    tree.clear()
    with pytest.raises(RuntimeError, match="it saw none"):
        timer(lambda: None, 1)


def _compiled() -> bytes:
    """A cubin for sm_90 of a kernel that adds two vectors."""
    triton = pytest.importorskip("triton")
    source = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def add(x, y, out, n, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out + at, tl.load(x + at, at < n) + tl.load(y + at, at < n), at < n)

made = triton.compile(ASTSource(add, {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}, {"block": 256}), target=GPUTarget("cuda", 90, 32))
import sys
sys.stdout.buffer.write(made.asm["cubin"])
"""
    assert triton
    path = Path(os.environ["PYTEST_TMP"]) / "add.py"
    path.write_text(source)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTEST_TMP", str(tmp_path_factory.mktemp("kernel")))
        return _compiled()


def test_instructions_are_counted(cubin: bytes, tmp_path: Path) -> None:
    names = sass.names(cubin)
    assert names.count("EXIT") >= 1 and any(name.startswith("FADD") for name in names)
    assert sass.instructions(cubin) == len(names) > 20
    assert sass.instructions(cubin, "FADD") == 2, "256 elements on 128 threads"
    assert sass.instructions(cubin, "LDG") >= 2 and sass.instructions(cubin, "HMMA") == 0
    (tmp_path / "k.cubin").write_bytes(cubin)
    assert sass.instructions(tmp_path / "k.cubin") == len(names)
    kernel = SimpleNamespace(device_caches={0: ({"key": SimpleNamespace(asm={"cubin": cubin})}, {}, None)})
    assert sass.instructions(kernel) == len(names)


@pytest.mark.quick
def test_what_has_no_instructions() -> None:
    with pytest.raises(ValueError, match="must have been compiled"):
        sass.instructions(SimpleNamespace(device_caches={}))
    with pytest.raises(ValueError, match="counted in a cubin; nvdisasm says"):
        sass.instructions(b"no cubin")


LOUD = """
import os, torch
from fused_attn_bench import Operation
op = Operation("loud", ("n",), lambda make, sizes: {"x": make.normal(sizes["n"])}, lambda x: 2 * x, cases=("plain/fwd/float32/8",))
@op.provider("raw")
def raw(x):
    os.write(1, b"raw words\\n")
    print("printed words")
    return x + x
"""


@pytest.mark.quick
def test_json_on_standard_output_is_alone_there(tmp_path: Path) -> None:
    """Whatever a provider writes to descriptor 1, past Python's own standard output, is for people."""
    (tmp_path / "loud.py").write_text(LOUD)
    options = ["--load", "loud.py", "--device", "cpu", "--seconds", "0", "--rounds", "2", "--db", "h.sqlite", "--json", "-"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "fused_attn_bench", "run", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["provider"] for line in done.stdout.splitlines()] == ["raw", "eager"]
    assert "raw words" in done.stderr and "printed words" in done.stderr and "vs eager" in done.stderr


TWO = """
import torch
from fused_attn_bench import Operation
make = lambda make, sizes: {"x": make.normal(sizes["n"])}
for name, who in (("floats", "sum"), ("ints", "shift")):
    op = Operation(name, ("n",), make, lambda x: 2 * x, cases=("plain/fwd/float32/8",))
    op.provider(who)(lambda x: x + x)
"""


@pytest.mark.quick
@pytest.mark.parametrize("more", [[], ["--op", "ints"], ["--op", "floats", "--provider", "shift"]])
def test_providers_of_other_operations_are_not_asked(more: list[str], tmp_path: Path) -> None:
    """Unless one is named: its refusal says so."""
    (tmp_path / "two.py").write_text(TWO)
    options = ["--load", "two.py", "--device", "cpu", "--seconds", "0", "--rounds", "2", "--db", "h.sqlite", "--json", "found.json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "fused_attn_bench", "run", *options, *more]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in (tmp_path / "found.json").read_text().splitlines()]
    asked = [(r["case"].partition("/")[0], r["provider"]) for r in found]
    if more[-2:] == ["--provider", "shift"]:
        assert asked == [("floats", "shift")] and "shift refused (floats/plain/fwd/float32/8): has no floats" in done.stdout
        return
    every = [("floats", "sum"), ("floats", "eager"), ("ints", "shift"), ("ints", "eager")]
    assert asked == [(op, who) for op, who in every if op == "ints" or not more]
    assert "refused" not in done.stdout


@pytest.mark.quick
def test_a_baseline_is_of_the_operations_that_have_the_provider(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    options = ["--load", "two.py", "--of", "shift", "--update", "--device", "cpu", "--seconds", "0", "--rounds", "2", "--launches", "3"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "fused_attn_bench", "check", "b.jsonl", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 entries written" in done.stdout, done.stdout + done.stderr
