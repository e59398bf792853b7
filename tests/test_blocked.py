"""Attention in plain torch operations: torch's flash kernel on blocks of rows where it suits, tiles for the rest, on whatever device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fused_attn as fa
from fused_attn.backends.cpu import devices, flash, flash_blocks, tiles
from fused_attn.masks import from_mask_mod
from fused_attn.testing import SOFTMAX_CASES, SOFTMAX_QUICK, check_inputs, check_softmax
from fused_attn.testing.budget import call, evaluate, violations
from fused_attn.testing.cases import inputs_of

pytestmark = pytest.mark.quick
BATCH, HEADS, LENGTH, DIM = 2, 4, 150, 16
POSITIONS = torch.arange(LENGTH)
MASKS: dict[str, Callable[[], fa.masks.Mask | None]] = {
    "none": lambda: None,
    "causal": fa.Causal,
    "window": lambda: fa.SlidingWindow(40, 9),
    "lengths": lambda: fa.ValidLengths(torch.tensor([0, 101])),
    "documents": lambda: fa.Documents((POSITIONS // 47).expand(BATCH, -1)),
    "causal-documents": lambda: fa.Causal() & fa.Documents(POSITIONS // 47),
    "dense": lambda: fa.Dense(torch.rand(LENGTH, LENGTH) > 0.5),
    "dense-of-all": lambda: fa.Dense(torch.rand(BATCH, HEADS, LENGTH, LENGTH) > 0.5) & fa.Causal(),
    "padding": lambda: fa.KeyPadding(torch.rand(BATCH, LENGTH) > 0.4),
    "rule": lambda: from_mask_mod(lambda b, h, i, j: (i + 2 * j + b) % 3 > 0),
}
MODS: dict[str, Callable[[], tuple[fa.score_mods.ScoreMod, ...]]] = {
    "none": lambda: (),
    "bias": lambda: (fa.Bias(torch.randn(1, HEADS, LENGTH, LENGTH)),),
    "bias-of-keys": lambda: (fa.Bias(torch.randn(BATCH, 1, 1, LENGTH).masked_fill(POSITIONS % 7 == 0, -torch.inf)),),
    "bfloat16-bias": lambda: (fa.Bias(torch.randn(HEADS, LENGTH, 1, dtype=torch.bfloat16)),),
    "alibi": lambda: (fa.ALiBi(torch.rand(BATCH, HEADS)),),
    "decay": lambda: (fa.DecayBias(torch.randn(1, HEADS, LENGTH).cumsum(-1) * 0.1),),
    "two": lambda: (fa.Bias(torch.randn(LENGTH, LENGTH)), fa.ALiBi(torch.rand(HEADS))),
}
PAIRS = [
    *itertools.product(MASKS, ["none"]),
    *itertools.product(["none"], [name for name in MODS if name != "none"]),
    ("causal", "bias"), ("causal", "decay"), ("dense-of-all", "two"), ("lengths", "alibi"), ("window", "bias-of-keys"),
]  # fmt: skip


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks of rows and of heads at a length that takes no time."""
    for name, value in {"TILE": 1, "ROOM": 2 * 32 * LENGTH, "MAX_ROWS": 64, "FEW_ROWS": 32, "NARROW_ROWS": 16}.items():
        monkeypatch.setattr(flash_blocks, name, value)


def _watched(seen: list[str], name: str, run: Callable[..., Any], *args: Any) -> Any:
    result = run(*args)
    seen.extend([name] * (result is not None))
    return result


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that torch's kernel computed."""
    seen: list[str] = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(flash, name, partial(_watched, seen, name, getattr(flash, name)))
    return seen


def qkv(kv_heads: int = HEADS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(BATCH, n, LENGTH, DIM) for n in (HEADS, kv_heads, kv_heads))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def held_to_the_error_rule(mask: str, mods: str, kv_heads: int, dtype: torch.dtype) -> None:
    """Gradients of q, k and v alone: with those of a bias the tiles would run."""
    inputs = inputs_of(*qkv(kv_heads, dtype), mask=MASKS[mask](), score_mods=MODS[mods]())
    got = evaluate(lambda p: call(p, "blocked"), inputs, ("out",), ("q", "k", "v"))
    assert violations(inputs, got) == []


@pytest.mark.parametrize(("mask", "mods"), PAIRS)
def test_blocks_hold_the_error_rule(mask: str, mods: str, small_blocks: None, kernels: list[str]) -> None:
    held_to_the_error_rule(mask, mods, 2 if mods == "none" else HEADS, torch.float32)
    assert kernels == ["forward", "backward"]


@pytest.mark.parametrize(("mask", "mods"), [("dense-of-all", "alibi"), ("documents", "none"), ("none", "bias")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_other_dtypes_and_grouped_heads(
    mask: str, mods: str, dtype: torch.dtype, kv_heads: int, small_blocks: None, kernels: list[str]
) -> None:
    held_to_the_error_rule(mask, mods, kv_heads, dtype)
    assert kernels == ["forward", "backward"]


@pytest.mark.parametrize("kv_heads", [2, HEADS])
@pytest.mark.parametrize("kind", ["documents", "padding-alibi", "causal-bias"])
def test_a_batch_is_its_slices(kind: str, kv_heads: int, small_blocks: None, kernels: list[str]) -> None:
    ids, keep = torch.stack((POSITIONS // 47, POSITIONS // 90)), torch.rand(BATCH, LENGTH) > 0.4
    slopes, bias = torch.rand(BATCH, HEADS), torch.randn(BATCH, 1, LENGTH, LENGTH)
    inputs, dout = qkv(kv_heads), torch.randn(BATCH, HEADS, LENGTH, DIM)

    def results(part: slice) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {
            "documents": {"mask": fa.Documents(ids[part])},
            "padding-alibi": {"mask": fa.KeyPadding(keep[part]), "score_mods": (fa.ALiBi(slopes[part]),)},
            "causal-bias": {"mask": fa.Causal(), "score_mods": (fa.Bias(bias[part]), fa.Bias(bias[part, :, :1]))},
        }[kind]
        leaves = tuple(t[part].requires_grad_() for t in inputs)
        out = fa.attention(*leaves, backend="blocked", **options)
        with_probs, _ = fa.attention(*leaves, backend="blocked", **options, return_aux=fa.AuxRequest(probs=True, lse=True))
        assert torch.equal(out, with_probs)
        return out, *torch.autograd.grad(out, leaves, dout[part])

    parts = [results(slice(b, b + 1)) for b in range(BATCH)]
    for whole, *each in zip(results(slice(None)), *parts, strict=True):
        assert torch.equal(whole, torch.cat(each))
    assert kernels.count("backward") == BATCH + 1


@pytest.mark.parametrize("length", [5, LENGTH])
def test_what_a_bias_holds_in_masked_pairs_reaches_nothing(length: int, kernels: list[str]) -> None:
    q, k, v = (torch.randn(1, 2, length, DIM, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 1, length, length)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)

    def results(values: Tensor) -> tuple[Tensor, ...]:
        out = fa.attention(q, k, v, mask=fa.Causal(), score_mods=(fa.Bias(values),), backend="blocked")
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    clean = results(bias)
    assert "forward" in kernels
    for poison in (torch.nan, torch.inf):
        for a, b in zip(results(bias.masked_fill(hidden, poison)), clean, strict=True):
            torch.testing.assert_close(a, b)
        bias_of_row = bias.clone()
        bias_of_row[..., 3, :4] = poison
        out = results(bias_of_row)[0]
        assert bool(out[:, :, 3].isnan().all()) and bool(out[:, :, :3].isfinite().all()) and bool(out[:, :, 4:].isfinite().all())


def test_rows_without_a_finite_score_are_empty(small_blocks: None, kernels: list[str]) -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    bias = torch.zeros(1, 1, LENGTH, LENGTH)
    bias[..., 40:60, :] = -torch.inf
    out, aux = fa.attention(q, k, v, score_mods=(fa.Bias(bias),), backend="blocked", return_aux=fa.AuxRequest(lse=True))
    dq, *others = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for tensor, value in ((out, 0.0), (aux.lse, -torch.inf), (dq, 0.0)):
        assert bool((tensor[:, :, 40:60] == value).all()) and bool(tensor[:, :, :40].isfinite().all())
    assert all(bool(t.isfinite().all()) for t in others) and kernels == ["forward", "backward"]


@pytest.mark.parametrize("mask", ["one key", "few keys", "not the last keys"])
def test_masks_that_leave_little(mask: str, kernels: list[str]) -> None:
    """A row's only key has a score gradient of 0, of which the kernel's backward leaves a rounding."""
    kept = {"one key": fa.SlidingWindow(0, 0), "few keys": fa.Documents(POSITIONS // 3), "not the last keys": fa.Dense(POSITIONS < 140)}
    inputs = inputs_of(*qkv(), mask=kept[mask])
    assert violations(inputs, evaluate(lambda p: call(p, "blocked"), inputs, ("out",), ("q", "k", "v"))) == []
    assert kernels == ["forward", "backward"]


class Strict(TorchFunctionMode):
    """Fails where a tensor is made without being told where, and where an operation writes to what it reads."""

    MAKERS = (torch.arange, torch.empty, torch.full, torch.ones, torch.zeros, torch.tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func not in self.MAKERS or kwargs.get("device") is not None, f"{func.__name__} without a device"
        if func in (torch.softmax, torch.log_softmax):
            assert kwargs.get("out") is None, "a softmax in place"
        assert func is not torch._softmax_backward_data or kwargs.get("grad_input") is None, "its gradient in place"
        return func(*args, **kwargs)


@pytest.fixture
def another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are treated as those of a device that nothing is known of."""
    monkeypatch.setattr(devices, "at_hand", lambda tensor: False)
    monkeypatch.setattr(tiles, "DEVICE_TILE", 1 << 14)


@pytest.mark.parametrize(("mask", "mods"), PAIRS[::2])
def test_tiles_of_another_device_hold_the_error_rule(mask: str, mods: str, another_device: None, kernels: list[str]) -> None:
    inputs = inputs_of(*qkv(), mask=MASKS[mask](), score_mods=MODS[mods]())
    with Strict():
        check_inputs(inputs, "blocked", ("out", "probs", "scores", "lse"), f"{mask}, {mods}")
    assert not kernels


@pytest.mark.parametrize("name", sorted(SOFTMAX_QUICK)[::6])
def test_softmax_of_another_device(name: str, another_device: None) -> None:
    with Strict():
        check_softmax(SOFTMAX_CASES[name], "blocked")


def test_who_takes_what_on_another_device() -> None:
    q = torch.empty(1, 8, 1024, 64, device="meta")
    found = fa.explain(q, q, q, mask=fa.Causal(), score_mods=(fa.SoftCap(3.0),))
    assert found.chosen == "blocked" and found.notes[0] == "plain torch operations, blocked; not tried on this device"
    assert fa.explain(q[:, :, :64], q[:, :, :64], q[:, :, :64], score_mods=(fa.SoftCap(3.0),)).chosen == "eager"
    x = torch.empty(1, 8, 1024, 64)
    on_cpu = fa.explain(x, x, x, score_mods=(fa.SoftCap(3.0),))
    assert on_cpu.chosen == "cpu" and "only when asked for" in {row.backend: row.reason for row in on_cpu.rows}["blocked"]


def test_a_scale_beyond_float32() -> None:
    """torch's products refuse a factor that their dtype cannot hold; scores of infinities are eager's."""
    q = torch.randn(1, 2, 9, 16)
    for mods in ((), (fa.SoftCap(3.0),)):
        outs = [fa.attention(q, q, q, scale=1e39, score_mods=mods, backend=backend) for backend in ("blocked", "cpu", "eager")]
        torch.testing.assert_close(outs[0], outs[2], equal_nan=True)
        torch.testing.assert_close(outs[1], outs[2], equal_nan=True)
