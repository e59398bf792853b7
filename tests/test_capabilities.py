"""What runs where: the table of docs/backends.md, and targets that are asked about without their machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_attn as fa
from fused_attn import backends
from fused_attn.__main__ import main
from fused_attn.backends import Target, cuda, triton
from fused_attn.problem import AttentionProblem
from tests import capabilities, simulated_cuda

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def without_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(backends._registered, "cuda", raising=False)


@pytest.fixture
def q() -> torch.Tensor:
    return capabilities.seen(1, 2, 4096, 64, dtype=torch.bfloat16)


def test_the_table_of_the_page_is_what_explain_says() -> None:
    text = capabilities.PAGE.read_text()
    assert capabilities.written(text) == text, "what runs where has changed: run make table"


def test_every_column_is_one_answer() -> None:
    """Chips that stand in one column are told apart nowhere."""
    for feature in capabilities.features():
        assert " or " not in "".join(capabilities.cells(feature)[1:-1]), feature.name


def test_a_target_is_asked_instead_of_the_machine(q: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_INSTALLED", False)
    monkeypatch.setattr(cuda, "_failure", lambda: pytest.fail("there is no library to ask"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: pytest.fail("there is no GPU to ask"))
    assert fa.explain(q, q, q, on="sm_90").chosen == "triton"
    assert fa.explain(q, q, q, on="sm_100").chosen == "cuda"
    assert fa.explain(q, q, q, on=Target("sm_100", library=False)).chosen == "triton"
    assert fa.explain(q, q, q, on="cpu").chosen == "cpu"
    old = fa.explain(q, q, q, on="sm_75")
    assert old.chosen == "blocked" and "plain torch operations, blocked; not tried on this device" in old.notes
    assert [row.reason for row in old.rows[:2]] == ["kernels need compute capability 8.0; the device has 7.5"] * 2
    modified = fa.explain(q, q, q, score_mods=(fa.SoftCap(3.0), fa.ALiBi(capabilities.seen(2))), on="sm_80")
    assert [row.reason for row in modified.rows[:2]] == [f"ALiBi has no gradient for its tensor in {name}" for name in ("CUDA", "Triton")]


def test_a_call_is_never_asked_about_a_target(q: torch.Tensor) -> None:
    options = dict.fromkeys(("mask", "scale", "q_offset", "sinks", "dropout", "return_aux")) | {"score_mods": ()}
    assert AttentionProblem.check(q, q, q, options).target is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "gpu", ValueError, r"on must be 'cpu', 'sm_NN' or a fused_attn.backends.Target; got 'gpu'. Write the chip"),
        (lambda: "sm_9", ValueError, "got 'sm_9'"),
        (lambda: "sm_90a", ValueError, "got 'sm_90a'"),
        (lambda: 90, ValueError, "got 90"),
        (lambda: torch.device("cuda"), ValueError, "got device"),
        (lambda: Target("sm_90", library="yes"), TypeError, "library must be a bool; got 'yes'"),
    ],
)
def test_what_is_no_target(make: Callable[[], Any], error: type[Exception], message: str, q: torch.Tensor) -> None:
    with pytest.raises(error, match=message):
        fa.explain(q, q, q, on=make())


def test_the_command_line_takes_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--q", "1,8,1024,64", "--dtype", "float16", "--on", "sm_120"]) == 0
    assert capsys.readouterr().out.startswith("backend: cuda\n")
    assert main(["explain", "--q", "1,8,1024,64", "--dtype", "float16", "--on", "sm_120", "--no-library"]) == 0
    assert capsys.readouterr().out.startswith("backend: triton\n")
    assert main(["explain", "--on", "tpu"]) == 2
    assert "on must be 'cpu', 'sm_NN'" in capsys.readouterr().err


@pytest.mark.skipif(bool(simulated_cuda.missing()), reason=simulated_cuda.missing() or "never")
def test_the_table_of_modifications_is_the_librarys() -> None:
    assert simulated_cuda.simulator() and cuda._failure() == ""
    assert cuda.MODS == cuda.BUILT_MODS


def test_the_interpreter_says_which_numpy_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy, its_compiler = pytest.importorskip("numpy"), pytest.importorskip("triton")
    found = {}
    for versions in (("3.6.0", "2.5.1"), ("3.6.0", "2.4.6"), ("3.8.0", "2.5.1")):
        monkeypatch.setattr(its_compiler, "__version__", versions[0])
        monkeypatch.setattr(numpy, "__version__", versions[1])
        triton.interpreter_refusal.cache_clear()
        found[versions] = triton.interpreter_refusal()
        if found[versions]:
            q = torch.zeros(1, 1, 4, 16)
            monkeypatch.setenv("TRITON_INTERPRET", "1")
            with pytest.raises(fa.UnsupportedError, match=r"got Triton 3\.6\.0 and NumPy 2\.5\.1 \(pip install 'numpy<2\.5'\)"):
                fa.attention(q, q, q, backend="triton")
    triton.interpreter_refusal.cache_clear()
    assert [bool(text) for text in found.values()] == [True, False, False]


def test_the_table_of_modifications_is_tritons() -> None:
    pytest.importorskip("triton")
    from fused_attn.backends.triton import score_mods

    own = {name for name, (value, _) in score_mods.FUNCTIONS.items() if value.fn.__module__ == score_mods.__name__}
    assert {name: name in score_mods.ADDITIVE for name in own} == triton.BUILT_IN
