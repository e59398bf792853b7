"""Historical bugs of other libraries, part A: masks and NaN. Each test names the thread and the symptom it would have shown."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.testing import DIFFERENTIABLE, EVERYTHING, check_inputs, evaluate, inputs_of
from fused_attn.testing import call as call_problem

pytestmark = pytest.mark.quick


def qkv(
    device: torch.device, batch: int = 2, heads: int = 2, q_len: int = 33, kv_len: int | None = None, dim: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (q_len, kv_len or q_len, kv_len or q_len)
    q, k, v = (torch.randn(batch, heads, n, dim, device=device) for n in lengths)
    return q, k, v


def test_01_bool_row_all_false(backend: str, device: torch.device) -> None:
    """pytorch#103963, #103749: a bool mask row without True gave NaN. Here: zeros out and in, for every input."""
    q, k, v = qkv(device)
    keep = torch.rand(33, 33, device=device) > 0.3
    keep[[0, 5, 32]] = False
    bias = torch.randn(2, 2, 33, 33, device=device)
    results = check_inputs(inputs_of(q, k, v, mask=keep, score_mods=(fa.Bias(bias),)), backend, DIFFERENTIABLE)
    for name in ("out", "probs", "dq", "dbias[0]", "entropy"):
        assert (results[name][:, :, [0, 5, 32]] == 0).all(), name
    assert (results["lse"][:, :, [0, 5, 32]] == -torch.inf).all()
    assert all(results[n].isfinite().all() for n in ("dq", "dk", "dv", "dbias[0]"))


def test_02_nan_gradients_of_sliced_away_rows(backend: str, device: torch.device) -> None:
    """pytorch#41508, PR#42323: NaN gradients (0 * NaN) even when the NaN rows were sliced away."""
    leaves = [t.requires_grad_() for t in qkv(device)]
    mask = fa.ValidLengths(torch.tensor([0, 20], device=device))
    fa.attention(*leaves, mask=mask, backend=backend)[1].square().sum().backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all() and (leaf.grad[0] == 0).all() and (leaf.grad[1] != 0).any()


@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min, -1e4, None], ids=str)
def test_03_rows_filled_with_any_floor(fill: float | None, backend: str, device: torch.device) -> None:
    """pytorch#109517, #110213: -inf, finfo.min and -1e4 disagreed between devices. -inf and bool: no keys, zeros; finite: the mean."""
    q, k, v = qkv(device, q_len=70)
    options: dict[str, Any]
    if fill is None:
        options = {"mask": fa.Dense(torch.zeros(1, 70, dtype=torch.bool, device=device))}
    else:
        options = {"score_mods": (fa.Bias(torch.full((70,), fill, device=device)),)}
    out, aux = fa.attention(q * 1e-9, k, v, return_aux=EVERYTHING, backend=backend, **options)
    finite = fill is not None and fill != -torch.inf
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out) if finite else torch.zeros_like(out))
    torch.testing.assert_close(aux.probs, torch.full_like(aux.probs, 1 / 70 if finite else 0.0))


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e9])
def test_03_gradients_of_rows_with_a_huge_finite_floor(fill: float, backend: str, device: torch.device) -> None:
    """torch's CPU flash backward is S times too large on such rows: one float32 lse loses log S beside 1e9. The rows are uniform."""
    q, k, v = (t.requires_grad_() for t in qkv(device, q_len=70))
    bias = torch.zeros(70, 70, device=device)
    bias[:9] = fill
    out = fa.attention(q * 1e-9, k, v, score_mods=(fa.Bias(bias),), backend=backend)
    incoming = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, incoming)
    torch.testing.assert_close(dv, incoming.mean(2, keepdim=True).expand_as(dv))


@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
def test_04_fused_softmax_row_without_keys(empty_rows: Any, backend: str, device: torch.device) -> None:
    """apex#1390, d2l-en#2423, keras#21149: uniform instead of zero, and a backward that guessed the mask from zeros in the output."""
    scores = torch.randn(2, 3, 40, device=device)
    scores[0, 0, 1] = -200.0  # its probability underflows to 0 without being masked
    scores.requires_grad_()
    out = fa.masked_softmax(scores, fa.ValidLengths(torch.tensor([40, 0], device=device)), empty_rows=empty_rows, backend=backend)
    torch.testing.assert_close(out[1], torch.full_like(out[1], 1 / 40 if empty_rows == "uniform" else 0.0))
    torch.testing.assert_close(out[0], scores[0].softmax(-1))
    incoming = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, scores, incoming)
    assert (grad[1] == 0).all()
    torch.testing.assert_close(grad[0], torch.autograd.grad(scores[0].softmax(-1), scores, incoming[0])[0][0])


def test_05_weights_path_and_plain_path_agree(backend: str, device: torch.device) -> None:
    """pytorch#160064, #152028: NaN when weights were returned, 0 when not. Here bit for bit, gradients included."""
    q, k, v = qkv(device)
    mask = fa.ValidLengths(torch.tensor([0, 17], device=device))
    plain, asked = [], []
    for results, request in ((plain, None), (asked, EVERYTHING)):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        result = fa.attention(*leaves, mask=mask, return_aux=request, backend=backend)
        out = result if isinstance(result, Tensor) else result[0]
        results += [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
    for a, b in zip(plain, asked, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("mask", [fa.Band(5), fa.SlidingWindow(4, 0), fa.SlidingWindow(0, 3)], ids=repr)
def test_06_leading_tiles_empty(mask: fa.Band, backend: str, device: torch.device) -> None:
    """pytorch#127055, PR#130014: with a band mask and n = 600 the first tiles are empty: exp(-inf - -inf)."""
    check_inputs(inputs_of(*qkv(device, 1, 1, 600, dim=8), mask=mask), backend)


def test_07_masked_keys_are_not_attended(backend: str, device: torch.device) -> None:
    """TensorRT-LLM#17477: a running maximum still at its floor turned masked keys into weight 1; no NaN to be seen."""
    q, k, v = qkv(device, 1, 1, 20, 300)
    keep = torch.zeros(20, 300, dtype=torch.bool, device=device)
    keep[:, 290:] = True
    v[:, :, :290] += 1e3
    results = check_inputs(inputs_of(q, k, v, mask=keep), backend)
    assert (results["out"].abs() < 20).all() and (results["probs"][..., :290] == 0).all()


@pytest.mark.parametrize("level", [-2.5e5, -6e4, 2.5e5])
def test_08_logits_below_a_finite_sentinel(level: float, backend: str, device: torch.device) -> None:
    """flashinfer#4267 (fix #4401): a sentinel of -5e4 zeroed rows whose logits lie below it."""
    q, k, v = qkv(device, 1, 2, 20, 90, dim=16)
    q[..., 0], k[..., 0] = 100.0, level / 25
    results = check_inputs(inputs_of(q, k, v, mask=fa.SlidingWindow(50, 50), q_offset=0), backend)
    torch.testing.assert_close(results["probs"].sum(-1), torch.ones(1, 2, 20, device=device))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_09_poisoned_padding(bad: float, backend: str, device: torch.device) -> None:
    """pytorch#101967, FlashAttention#1745: NaN or infinity in masked-out keys and values reached the output."""
    q, k, v = qkv(device, q_len=20, kv_len=70)
    lens = torch.tensor([70, 33], device=device)
    keep = torch.arange(70, device=device) < lens[:, None]
    for mask in (fa.ValidLengths(lens), fa.KeyPadding(keep), fa.Dense(keep[:, None, None])):
        clean = inputs_of(q, k, v, mask=mask)
        poisoned = inputs_of(q, *(t.masked_fill(~keep[:, None, :, None], bad) for t in (k, v)), mask=mask)
        want, got = (evaluate(lambda p: call_problem(p, backend), i, ("out", "probs", "lse")) for i in (clean, poisoned))
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("masked", [False, True])
def test_10_genuine_nan_is_not_hidden(masked: bool, backend: str, device: torch.device) -> None:
    """torch-xpu-ops#5022: a safe softmax turned a NaN query into zeros."""
    q, k, v = qkv(device)
    q[0, 1, 4] = torch.nan
    out = fa.attention(q, k, v, mask=fa.Causal() if masked else None, backend=backend)
    assert out[0, 1, 4].isnan().all() and int(out.isnan().any(-1).sum()) == 1


def test_11_masks_do_not_overflow_together(backend: str, device: torch.device) -> None:
    """transformers PR#27114: two masks of finfo.min added up to -inf and NaN. Causal, padding and a bias of finfo.min together."""
    q, k, v = (t.half() for t in qkv(device))
    bias = torch.zeros(33, 33, device=device).masked_fill(torch.ones(33, 33, device=device).triu(1).bool(), torch.finfo(torch.float16).min)
    mask = fa.Causal() & fa.ValidLengths(torch.tensor([33, 9], device=device))
    out = fa.attention(q, k, v, mask=mask, score_mods=(fa.Bias(bias.half()), fa.Bias(bias.half())), backend=backend)
    torch.testing.assert_close(out, fa.attention(q, k, v, mask=mask, backend=backend))


@pytest.mark.parametrize(
    "options", list(itertools.product((False, True), repeat=4)), ids=lambda o: "".join("dasb"[i] for i in range(4) if o[i]) or "plain"
)
def test_12_causality_survives_every_option(options: tuple[bool, ...], backend: str, device: torch.device) -> None:
    """keras#23038: the causal mask was dropped with dropout, with returned scores, and for other ranks."""
    dropout, aux, sinks, bias = options
    extra = {
        "dropout": fa.Dropout(0.2, 1) if dropout else None, "return_aux": EVERYTHING if aux else None,
        "sinks": torch.zeros(2, device=device) if sinks else None, "score_mods": (fa.Bias(torch.ones(33, device=device)),) if bias else (),
    }  # fmt: skip
    q, k, v = qkv(device, 1)
    future = torch.arange(33, device=device)[:, None] > 16
    outs = []
    for shift in (0.0, 50.0):
        result = fa.attention(q, k + shift * future, v + shift * future, mask=fa.Causal(), backend=backend, **extra)
        outs.append(result[0] if aux else result)
    assert torch.equal(outs[0][:, :, :17], outs[1][:, :, :17]) and not torch.equal(outs[0][:, :, 17:], outs[1][:, :, 17:])


def test_13_causal_and_any_other_mask(backend: str, device: torch.device) -> None:
    """ColossalAI#208: the triangular kernel ignored the additional mask."""
    keep = torch.rand(2, 2, 33, 33, device=device) > 0.4
    results = check_inputs(inputs_of(*qkv(device), mask=fa.Causal() & keep), backend)
    assert (results["probs"][~(keep & torch.ones(33, 33, dtype=torch.bool, device=device).tril())] == 0).all()


def test_14_no_state_left_by_a_masked_call(backend: str, device: torch.device) -> None:
    """flashinfer PR#1028: the custom mask stayed in force in the next call."""
    q, k, v = qkv(device)
    before = fa.attention(q, k, v, backend=backend)
    keep = torch.rand(33, 33, device=device) > 0.5
    masked = fa.attention(q, k, v, mask=keep, backend=backend)
    assert torch.equal(fa.attention(q, k, v, backend=backend), before) and not torch.equal(masked, before)
    keep.logical_not_()
    assert not torch.equal(fa.attention(q, k, v, mask=keep, backend=backend), masked)


def test_15_dtype_decides_what_a_mask_means(backend: str, device: torch.device) -> None:
    """pytorch#107084: a float mask was read as bool on the fast path. bool keeps, float adds, ints are refused."""
    q, k, v = qkv(device)
    numbers = (torch.rand(33, 33, device=device) > 0.5).float()
    added = fa.attention(q, k, v, score_mods=(fa.Bias(numbers),), backend=backend)
    kept = fa.attention(q, k, v, mask=numbers.bool(), backend=backend)
    torch.testing.assert_close(added, ((q @ k.mT / 4 + numbers).softmax(-1)) @ v)
    torch.testing.assert_close(kept, ((q @ k.mT / 4).masked_fill(numbers == 0, -torch.inf).softmax(-1).nan_to_num(0.0)) @ v)
    for wrong in (numbers, numbers.int(), numbers.to(torch.uint8)):
        with pytest.raises(TypeError, match="bool"):
            fa.attention(q, k, v, mask=wrong, backend=backend)
    with pytest.raises(TypeError, match="float"):
        fa.Bias(numbers.bool())


@pytest.mark.parametrize(
    "full", list(itertools.product((False, True), repeat=4)), ids=lambda f: "".join("bhqk"[i] if f[i] else "1" for i in range(4))
)
def test_16_every_broadcast_shape_of_a_mask(full: tuple[bool, ...], backend: str, device: torch.device) -> None:
    """hyunwoongko/transformer#40: (B, 1, L, 1) was passed for (B, 1, 1, L). Every shape equals its explicit expansion."""
    q, k, v = qkv(device, q_len=18, kv_len=21)
    shape = [n if f else 1 for n, f in zip((2, 2, 18, 21), full, strict=True)]
    keep = torch.rand(shape, device=device) > 0.4
    got, want = (fa.attention(q, k, v, mask=m, backend=backend) for m in (keep, keep.expand(2, 2, 18, 21).contiguous()))
    torch.testing.assert_close(got, want)
    reference = (q @ k.mT / 4).masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0) @ v
    torch.testing.assert_close(got, reference)
