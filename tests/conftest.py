"""Where tests run: ``--device``, one parametrisation over backends, and memory that shows when it is read before it is written."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fused_attn.backends.cuda import library_path
from fused_attn.backends.triton import interpreter_refusal
from tests import interpreter, simulated_cuda
from tests.cpu_builds import cpu_build as cpu_build
from tests.cpu_builds import small_cpu as small_cpu

# The simulator of CUDA has a test-suite of its own, which needs compiled Triton kernels where this one interprets them (make test-peers).
collect_ignore = ["cusim"]
# The blocked backend runs the cpu backend's functions; these files and test_blocked.py hold it to what it answers for itself.
WITH_BLOCKED = ("test_default_device", "test_empty_rows", "test_no_keys")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="also compile the kernel configurations that take many minutes")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the tensors of the tests live")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the selection that ends within two minutes on two cores")
    config.addinivalue_line("markers", "cuda(reason): needs a GPU and says why; runs under --device cuda")
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
        if importlib.util.find_spec("triton") is not None:
            interpreter.quicken()
        if not simulated_cuda.missing():
            simulated_cuda.install()
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Long ones first, so that no worker is left alone with one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not config.getoption("--exhaustive"):
        for item in items:
            if item.get_closest_marker("exhaustive"):
                item.add_marker(
                    pytest.mark.skip(reason="compiling every configuration takes about 20 minutes of CPU time; runs with --exhaustive")
                )
    if config.getoption("--device") == "cuda":
        return
    for item in items:
        marker = item.get_closest_marker("cuda")
        if marker:
            item.add_marker(pytest.mark.skip(reason=f"needs --device cuda: {marker.args[0]}"))


def _backend(name: str, device: str) -> Any:
    marks = []
    if name == "cpu" and device == "cuda":
        marks.append(pytest.mark.skip(reason="the cpu backend runs CPU tensors only"))
    if name == "cuda" and device == "cpu" and simulated_cuda.missing():
        marks.append(pytest.mark.skip(reason=simulated_cuda.missing()))
    if name == "cuda" and device == "cuda" and not library_path().is_file():
        marks.append(pytest.mark.skip(reason="the native library is not built (python -m fused_attn build)"))
    if name == "triton" and importlib.util.find_spec("triton") is None:
        marks.append(pytest.mark.skip(reason="triton is not installed"))
    elif name == "triton" and device == "cpu" and interpreter_refusal():
        marks.append(pytest.mark.skip(reason=interpreter_refusal()))
    return pytest.param(name, marks=marks, id=name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``backend`` runs over every backend there is, ``kernel_backend`` over all but the definition itself."""
    from fused_attn import backends

    device = metafunc.config.getoption("--device")
    is_sampled = metafunc.module.__name__.rpartition(".")[2] in WITH_BLOCKED
    every = [name for name in backends.names() if name != "blocked" or is_sampled]
    for fixture, names in (("backend", every), ("kernel_backend", every[:-1])):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, [_backend(name, device) for name in names])


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or tensor.is_meta or type(tensor) is not torch.Tensor:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(torch.nan)
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 3)

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised tensor is NaN (integers: a third of their largest value), so that reading it before writing shows."""
    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty", "new_empty_strided"))):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


class Counting:
    """A backend that counts its attention calls and passes them on to a built-in one."""

    name = "counting"

    def __init__(self, inner: Any) -> None:
        self.inner, self.calls = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def reluctance(self, problem: Any) -> None:
        return None

    def attention_fwd(self, call: Any) -> Any:
        self.calls += 1
        return self.inner.attention_fwd(call)

    def attention_out(self, call: Any) -> Any:
        return self.attention_fwd(call).out

    def attention_fwd_aux(self, call: Any, request: Any) -> Any:
        forward = self.attention_fwd(call)
        return forward, self.inner.attention_aux(call, forward, request)


@pytest.fixture
def counting() -> Iterator[Counting]:
    from fused_attn import backends

    backend = Counting(backends.get("cpu"))
    backends.register(backend)
    yield backend
    backends.unregister("counting")


@pytest.fixture
def split_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of ``attention`` that Triton's split-key kernels run."""
    from fused_attn.backends.triton.decoding import forward

    calls, original = [], forward.attention_fwd
    monkeypatch.setattr(forward, "attention_fwd", lambda call, shape: calls.append(call) or original(call, shape))
    return calls


@pytest.fixture
def reached(split_calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """``split_calls`` where two keys are many."""
    monkeypatch.setattr("fused_attn.backends.triton.MANY_KEYS", 2)
    return split_calls
