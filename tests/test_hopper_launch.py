"""The launch of the Hopper kernels without a GPU: what is compiled anew, what descriptors become, what is kept."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import fused_attn as fa  # noqa: E402
from fused_attn.backends.triton import arguments  # noqa: E402
from fused_attn.backends.triton.hopper import compat, descriptors, eligible, launch  # noqa: E402
from fused_attn.backends.triton.hopper.descriptors import Tiles  # noqa: E402

pytestmark = pytest.mark.quick
META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 1, 32, 64], "fp4_padded": False}


class Utils:
    """Stands for the driver: counts the tensor maps it is asked for."""

    def __init__(self) -> None:
        self.filled: list[tuple[Any, ...]] = []

    def fill_tma_descriptor_tiled(self, *args: Any) -> str:
        self.filled.append(args)
        return f"map {len(self.filled)}"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Utils:
    utils = Utils()
    monkeypatch.setattr(compat.driver, "_active", SimpleNamespace(utils=utils), raising=False)
    monkeypatch.setattr(compat, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    for cache in (descriptors._descriptor, descriptors._arguments):
        cache.cache_clear()
    return utils


class Kernel:
    """As much of a jitted function as decides what is compiled."""

    def __init__(self, *constant: bool) -> None:
        self.params = [SimpleNamespace(is_constexpr=is_constant) for is_constant in constant]


class Recorded:
    """A compiled kernel of the signature (tensordesc, i32), behind the wrapper that the installed Triton puts around a launcher."""

    def __init__(self) -> None:
        from triton.backends.nvidia.driver import wrap_handle_tensordesc

        self.calls: list[tuple[Any, ...]] = []
        self.metadata = SimpleNamespace(tensordesc_meta=[META])

        def launcher(*args: Any) -> None:
            self.calls.append(args)

        signature = {"x": "tensordesc<bf16[1, 1, 32, 64],layout>", "n": "i32"}
        self.launcher = launcher
        self.run = SimpleNamespace(launch=wrap_handle_tensordesc(launcher, signature, [META]))

    def _init_handles(self) -> None: ...

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.run.launch


def test_the_launcher_inside_takes_maps() -> None:
    kernel = Recorded()
    assert compat.takes_tensor_maps(kernel).run.launch is kernel.launcher


def test_launches_reach_tritons_own_launcher() -> None:
    """With and without descriptors, and where Triton hands out a kernel that was taken apart before."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "tests.hopper_driver"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["4"]


def test_a_launcher_of_another_form_is_refused() -> None:
    kernel = SimpleNamespace(_init_handles=lambda: None, run=SimpleNamespace(launch=lambda *args: None))
    with pytest.raises(RuntimeError, match=r"a closure around it named 'launcher'; got .*FUSED_ATTN_HOPPER=off"):
        compat.takes_tensor_maps(kernel)


def test_one_compilation_and_one_map_per_kind(driver: Utils, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recorded] = []

    def compile_for(kernel: Any, args: tuple[Any, ...], num_warps: int, num_stages: int | None) -> Recorded:
        made.append(Recorded())
        return made[-1]

    monkeypatch.setattr(launch, "compile_for", compile_for)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    x = torch.zeros(2, 3, 40, 64, dtype=torch.bfloat16)
    kernel = Kernel(False, False)
    for n in (6, 7, 16, 32):  # two kinds of numbers: multiples of 16 and others
        launch.launch(kernel, (5,), (Tiles(x, (1, 1, 32, 64)), n))
    assert len(made) == 2
    assert len(driver.filled) == 1
    assert driver.filled[0][0] == x.data_ptr()
    assert driver.filled[0][4:7] == ([1, 1, 32, 64], [2, 3, 40, 64], [7680, 2560, 64, 1])
    assert made[0].calls == [("map 1", 2, 3, 40, 64, 7680, 2560, 64, 1, n) for n in (6, 7)]
    launch.launch(kernel, (5,), (Tiles(x[:, :, 8:], (1, 1, 32, 64)), 7))
    assert len(driver.filled) == 2
    launch.launch(kernel, (0,), (Tiles(x, (1, 1, 32, 64)), 7))
    assert len(made[0].calls) == 3  # nothing to do is no launch


def test_descriptors_keep_no_tensor(driver: Utils) -> None:
    x = torch.zeros(1, 1, 32, 64, dtype=torch.bfloat16)
    gone = weakref.ref(x)
    Tiles(x, (1, 1, 32, 64)).descriptor()
    del x
    gc.collect()
    assert gone() is None


def test_kinds_are_at_least_as_many_as_tritons() -> None:
    aligned = torch.zeros(64)
    values = [None, 1, 2, 16, 2**35, 2**35 + 1, 1.5, True, False, aligned, aligned[1:], aligned.half(), triton.language.constexpr(3)]
    values += [triton.language.constexpr(4), Tiles(torch.zeros(1, 1, 8, 64), (1, 1, 8, 64)), Tiles(torch.zeros(1, 1, 8, 64), (1, 1, 4, 64))]
    values += [arguments.Sizes(1, 2, 3, 4), arguments.Sizes(2, 2, 3, 4), arguments.Sizes(1, 2, 3, 16), (1, 2, 3, 4)]
    kinds = [launch.kind(value) for value in values]
    assert len(set(kinds)) == len(values)
    assert launch.kind(3) == launch.kind(5)
    assert launch.kind(aligned) == launch.kind(aligned[4:])


def test_every_value_of_a_constant_is_a_kind_of_its_own() -> None:
    kernel = Kernel(True)
    assert len({launch.kinds(kernel, (value,), 4) for value in (2, 3, True, 1, None, torch.float32)}) == 6


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda t: t, ""),
        (lambda t: t.transpose(1, 2), ""),
        (lambda t: t[:, :, 1:], ""),
        (lambda t: t[:, :1].expand(-1, 3, -1, -1), "stride 0 along dimension 1"),
        (lambda t: t[..., 8:40], ""),
        (lambda t: t[..., 4:36], "begin at a multiple of 16 bytes"),
        (lambda t: t[..., ::2], "stride 1 along its last dimension"),
        (lambda t: t.mT, "stride 1 along its last dimension"),
        (lambda t: t.flatten()[4:76].view(1, 1, 2, 36)[..., :32], "strides of multiples of 16 bytes; got 72 along dimension 2"),
    ],
)
def test_which_places_in_memory_tma_takes(make: Any, reason: str) -> None:
    found = eligible.strides_reason(make(torch.zeros(2, 3, 40, 64, dtype=torch.bfloat16)))
    assert reason in found and bool(found) == bool(reason)


def test_strides_of_single_dimensions_do_not_matter() -> None:
    x = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16).as_strided((1, 1, 8, 64), (3, 5, 64, 1))
    assert eligible.strides_reason(x) == ""
    assert Tiles(x, (1, 1, 8, 64)).descriptor().strides[:2] == [8, 8]


def notes(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, **options: Any) -> tuple[str, ...]:
    q = torch.zeros(1, 2, 30, head_dim, dtype=dtype)
    return fa.explain(q, q, q, on="sm_90", **options).notes


def test_explain_says_which_kernels_run_on_hopper() -> None:
    kernels = "kernels for Hopper (TMA, warpgroup products)"
    assert kernels in notes(mask=fa.Causal())
    assert kernels in notes(torch.float16, 256, score_mods=(fa.SoftCap(3.0),))
    assert kernels in notes(scoring=fa.DotProduct(scale=0.3))
    assert kernels not in notes(torch.float32)  # the cuda backend runs it
    q = torch.zeros(1, 2, 30, 64, dtype=torch.bfloat16)
    assert fa.explain(q, q, q, on="sm_100").notes == fa.explain(q, q, q, on="sm_80").notes == ()
    wide = torch.zeros(1, 2, 30, 192, dtype=torch.bfloat16, requires_grad=True)
    plain = "plain Triton kernels for the backward: Hopper's has head sizes up to 128; got 192"
    assert {kernels, plain} <= set(fa.explain(wide, wide, wide, on="sm_90").notes)


@pytest.mark.parametrize(
    ("head_dim", "options", "reason"),
    [
        (36, {}, "head_dim and value_dim must be multiples of 8 up to 256; got 36 and 36"),
        (64, {"normalizer": fa.Sigmoid(-1.0)}, "only the softmax of a dot product has Hopper kernels"),
        (64, {"scoring": fa.Additive(torch.ones(2, 64))}, "only the softmax of a dot product has Hopper kernels"),
    ],
)
def test_explain_says_why_the_plain_kernels_run(head_dim: int, options: dict[str, Any], reason: str) -> None:
    assert f"plain Triton kernels, not those for Hopper: {reason}" in notes(head_dim=head_dim, **options)


def test_explain_sees_strides_and_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 30, 64, dtype=torch.bfloat16)
    k = q[:, :1].expand(-1, 2, -1, -1)
    (note,) = fa.explain(q, k, q, on="sm_90").notes
    assert note == "plain Triton kernels, not those for Hopper: k has stride 0 along dimension 1"
    monkeypatch.setenv("FUSED_ATTN_HOPPER", "off")
    assert notes() == ("plain Triton kernels, not those for Hopper: FUSED_ATTN_HOPPER=off",)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 30), (30, 0)])
def test_explain_says_that_nothing_is_loaded_for_an_empty_call(q_len: int, kv_len: int) -> None:
    q, k = (torch.zeros(1, 2, n, 64, dtype=torch.bfloat16) for n in (q_len, kv_len))
    (note,) = fa.explain(q, k, k, on="sm_90").notes
    assert note == "plain Triton kernels, not those for Hopper: a call without queries, keys or columns leaves them nothing to load"


def test_explain_says_what_is_copied_for_either_kind_of_kernels() -> None:
    """Rows of 24 bytes are no vectors of the plain kernels either; where head_dim is odd, q and k stay as they are."""
    rows = torch.zeros(1, 2, 30, 12, dtype=torch.bfloat16)
    refused, *copies = fa.explain(rows, rows, rows, on="sm_90").notes
    assert "must be multiples of 8" in refused
    assert copies == [f"{name} is copied first: it must have strides of multiples of 32 bytes; got 720 along dimension 1" for name in "qkv"]
    odd = torch.zeros(1, 2, 30, 66, dtype=torch.bfloat16)[..., :65]
    assert len(fa.explain(odd, odd, odd, on="sm_90").notes) == 1


class Told:
    """A compiled kernel that keeps what it is started with."""

    def __init__(self, kernel: Any, args: tuple[Any, ...], calls: list[Any]) -> None:
        self.name, self.calls = kernel.fn.__name__, calls
        self.metadata = SimpleNamespace(tensordesc_meta=[META for a in args if isinstance(a, Tiles)])

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.calls.append((self.name, grid, args))


def placed(value: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    """An argument with the number of the tensor at its address instead of the address; others are named by their elements: views are as good."""
    at = {t.data_ptr(): i for i, t in enumerate(tensors)}
    if isinstance(value, torch.Tensor):
        return at.get(value.data_ptr(), f"{value.numel()} of {value.dtype}")
    if isinstance(value, str) and value.startswith("map of"):
        return "map of", at.get(int(value.split()[2]), "another")
    if isinstance(value, tuple):
        return type(value).__name__, *(placed(v, tensors) for v in value)
    return getattr(value, "value", value)


CALLS = {
    "full": ((2, 4, 2, 300, 300, 64), {}),
    "causal": ((2, 4, 4, 200, 200, 128), {"mask": fa.Causal()}),
    "window": ((1, 2, 2, 130, 400, 256), {"mask": fa.SlidingWindow(64, 8), "q_offset": 270}),
    "packed": ((3, 8, 2, 5, 900, 64), {"mask": fa.Causal(), "q_offset": 895}),
}


BACKWARD = (
    "_attention_bwd_delta_kernel",
    "_backward_rows_kernel",
    "_attention_bwd_hopper_kernel",
    "_backward_dq_kernel",
    "_attention_bwd_dq_kernel",
    "_attention_bwd_dkdv_kernel",
)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_started_again_as_a_first_one_would_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other tensors of the same kind: every argument is that of a call whose launches nobody kept."""
    from fused_attn.backends.base import Forward, Incoming
    from fused_attn.backends.triton import launch as plain_launch
    from fused_attn.backends.triton.hopper import backward, forward, replay
    from fused_attn.problem import AttentionProblem

    calls: list[Any] = []
    monkeypatch.setattr(plain_launch, "target_chip", 90)
    monkeypatch.setattr(launch, "kinds", lambda kernel, *rest: (kernel.fn.__name__,))  # an interpreted kernel has no hash
    monkeypatch.setattr(launch, "compile_for", lambda kernel, args, *rest: Told(kernel, args, calls))
    monkeypatch.setattr(launch, "takes_tensor_maps", lambda compiled: compiled)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(descriptors, "tensor_map", lambda descriptor, meta: f"map of {descriptor.base.data_ptr()}")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(forward, "_kept", {})
    monkeypatch.setattr(backward, "_kept", {})
    descriptors._arguments.cache_clear()
    kind = forward.kind
    for module in (forward, backward):
        monkeypatch.setattr(module, "kind", lambda call: kind(call, "cpu"))

    (batch, heads, kv_heads, q_len, kv_len, dim), given = CALLS[name]
    options = dict.fromkeys(("mask", "scale", "sinks", "dropout", "return_aux", "scoring")) | {"score_mods": (), "q_offset": 0} | given

    def run(saved: Any = lambda out: out) -> list[Any]:
        sizes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
        q, k, v = (torch.zeros(batch, n, h, dim, dtype=torch.bfloat16).transpose(1, 2) for h, n in sizes)
        gone.append(weakref.ref(q))
        call = AttentionProblem.check(q, k, v, options).lower()
        calls.clear()
        results = Forward(*forward.attention_fwd(call, (2, batch, heads, q_len)))
        dout, gradients, results = torch.zeros_like(results.out), (), results._replace(out=saved(results.out))
        if dim <= 128:
            gradients = backward.attention_bwd(call, results, Incoming(dout), (True, True, True, False))[:3]
        tensors = (q, k, v, *results, dout, *gradients)
        return [(kernel, grid, tuple(placed(a, tensors) for a in args)) for kernel, grid, args in calls]

    gone: list[Any] = []
    first, again = run(), run()
    gc.collect()
    assert gone[0]() is None, "what is kept holds no tensor"
    assert [kernel for kernel, _, _ in first[:2]] == ["forward_kernel", "_attention_fwd_kernel"]
    assert [kernel for kernel, _, _ in first[2:]] == (list(BACKWARD) if dim <= 128 else [])
    (recording,) = forward._kept.values()
    assert isinstance(recording, replay.Recording) and len(backward._kept) == int(dim <= 128)
    forward._kept.clear()
    backward._kept.clear()
    assert again == run() == first
    forward._kept.clear()
    backward._kept.clear()
    run(lambda out: out.contiguous().transpose(2, 3).contiguous().transpose(2, 3)), run()
    assert len(backward._kept) == 2 * (dim <= 128), "a compiler may lay out what is kept for the backward as it likes"
    forward._kept.clear()
    q = torch.zeros(1, 2, 200, 64, dtype=torch.bfloat16)
    forward.attention_fwd(AttentionProblem.check(q, q, q, options).lower(), (2, 1, 2, 200))
    assert not forward._kept, "tensors that share an address may have addresses of their own another time"
