"""What auto takes on which GPU: chips are named by compute capability, and no rule for one of them reaches another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_attn as fa
from fused_attn import backends
from fused_attn.backends import base, cuda, triton
from fused_attn.backends.triton import config
from fused_attn.normalizers import TopK
from fused_attn.problem import AttentionProblem, SoftmaxProblem

pytestmark = pytest.mark.quick

HOPPER = (9, 0)
OTHERS = [(8, 0), (8, 6), (8, 9), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
REASON = "on compute capability 9.0 Triton's wgmma kernels issue 1.7 to 4 times fewer instructions in 16 bits"


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """on(capability): from here on there is a GPU of it, with the native library and Triton; nothing is launched."""
    monkeypatch.setattr(cuda, "_failure", lambda: "")
    monkeypatch.setattr(triton, "_INSTALLED", True)
    for name in ("cuda", "triton"):
        if name in backends._registered:
            monkeypatch.delitem(backends._registered, name)

    def on(capability: tuple[int, int]) -> None:
        base._capability.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    yield on
    base._capability.cache_clear()


def attention(dtype: torch.dtype = torch.bfloat16, **options: Any) -> AttentionProblem:
    defaults = dict.fromkeys(("mask", "scale", "q_offset", "sinks", "dropout", "return_aux")) | {"score_mods": ()}
    with FakeTensorMode():
        q = torch.empty(1, 2, 8, 64, dtype=dtype, device="cuda")
        return AttentionProblem.check(q, q, q, defaults | options)


def test_hopper_takes_tritons_wgmma_kernels_in_16_bits(on: Callable[..., None]) -> None:
    on(HOPPER)
    for dtype in (torch.float16, torch.bfloat16):
        explanation = backends.explain(attention(dtype))
        assert backends.resolve(attention(dtype), "auto") == explanation.chosen == "triton"
        assert explanation.rows[0] == backends.Verdict("cuda", f"can run, but only when asked for: {REASON}")
        assert backends.resolve(attention(dtype), "cuda") == "cuda"


@pytest.mark.parametrize("why", ["triton is not installed", "triton refuses"])
def test_hopper_runs_cuda_where_triton_cannot(why: str, on: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Never eager, which would be the next in line."""
    on(HOPPER)
    if why == "triton is not installed":
        monkeypatch.setattr(triton, "_INSTALLED", False)
    else:
        monkeypatch.setattr(triton.TritonBackend, "refusals", lambda self, problem: ["it is Tuesday"])
    explanation = backends.explain(attention())
    assert backends.resolve(attention(), "auto") == explanation.chosen == "cuda"
    assert explanation.rows[0].reason == ""


def test_hopper_without_the_native_library(on: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    on(HOPPER)
    monkeypatch.setattr(cuda, "_failure", lambda: "the native library is not built")
    assert backends.resolve(attention(), "auto") == backends.explain(attention()).chosen == "triton"
    monkeypatch.setattr(triton, "_INSTALLED", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve(attention(), "auto") == backends.explain(attention()).chosen == "blocked"


def test_what_takes_quadratic_memory_on_a_gpu_says_so(on: Callable[..., None]) -> None:
    on(HOPPER)
    with pytest.warns(UserWarning, match="falls back to eager, which needs O.* TopK takes whole rows of scores"):
        assert backends.resolve(attention(normalizer=TopK(2)), "auto") == "eager"


def test_hopper_takes_cuda_for_float32_and_the_softmax(on: Callable[..., None]) -> None:
    on(HOPPER)
    softmax = {"dim": -1, "mask": None, "q_offset": None, "bias": None, "empty_rows": "zero", "log": False, "scale": 1.0, "dropout": None}
    with FakeTensorMode():
        scores = SoftmaxProblem.check(torch.empty(2, 3, 8, 8, dtype=torch.float16, device="cuda"), softmax)
    for problem in (attention(torch.float32), scores):
        assert backends.resolve(problem, "auto") == backends.explain(problem).chosen == "cuda"


@pytest.mark.parametrize("capability", OTHERS, ids=lambda c: f"{c[0]}.{c[1]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_other_chip_takes_cuda_first(capability: tuple[int, int], dtype: torch.dtype, on: Callable[..., None]) -> None:
    on(capability)
    assert backends.resolve(attention(dtype), "auto") == backends.explain(attention(dtype)).chosen == "cuda"


@pytest.mark.parametrize("capability", [(7, 5), HOPPER, *OTHERS], ids=lambda c: f"{c[0]}.{c[1]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_target_is_the_machine_it_names(capability: tuple[int, int], dtype: torch.dtype, on: Callable[..., None]) -> None:
    on(capability)
    q = torch.zeros(1, 2, 8, 64, dtype=dtype)
    assert fa.explain(q, q, q, on=f"sm_{capability[0]}{capability[1]}").rows == backends.explain(attention(dtype)).rows


def test_on_the_cpu_nothing_asks_for_a_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: pytest.fail("there is no GPU to ask"))
    q = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    assert fa.explain(q, q, q).chosen == "cpu"


@pytest.mark.parametrize("capability", [(7, 5), HOPPER, (12, 1)], ids=lambda c: f"{c[0]}.{c[1]}")
def test_a_compiler_traces_the_rules_of_capabilities(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_capability", lambda device: capability)
    torch._dynamo.reset()
    problem: Any = SimpleNamespace(target=None, device=torch.device("cuda"))

    def asked(x: torch.Tensor) -> torch.Tensor:
        return x + len(base.capability_refusal(problem)) + 2 * base.has_wgmma(problem)

    compiled = torch.compile(asked, fullgraph=True, backend="eager")
    for length in (3, 4):  # the second time with symbolic sizes
        assert compiled(torch.zeros(length)).tolist() == [int(capability < (8, 0)) + 2 * (capability == HOPPER)] * length


@pytest.mark.parametrize(
    ("chip", "row"), {80: 80, 86: 120, 87: 80, 89: 120, 90: 90, 100: 100, 101: 100, 103: 100, 110: 100, 120: 120, 121: 120}.items()
)
def test_a_later_chip_is_not_taken_for_a_larger_one(chip: int, row: int) -> None:
    """sm_120 comes after sm_100 and has 99 KB of shared memory, not 227."""
    assert config.nearest_chip(chip) == row
