"""Residual attention over depth (RealFormer, arXiv 2012.11747): each layer's scores are the next one's bias, -inf included."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.lowering import Grid, stat_dtype

pytestmark = pytest.mark.quick
LAYERS, BATCH, HEADS, KV_HEADS, LENGTH, HEAD_DIM = 3, 2, 4, 2, 37, 16
LENGTHS = torch.tensor([LENGTH - 7, LENGTH])
SPLIT = torch.arange(LENGTH) >= 30  # nobody may attend in the rows of the second layer's mask that are False everywhere
# One mask per layer. Rows that are empty in one layer stay empty in all that follow.
MASKS: dict[str, tuple[Any, Any, Any]] = {
    "causal": (fa.Causal(), fa.Causal(), fa.Causal()),
    "padding": (fa.ValidLengths(LENGTHS),) * 3,
    "each its own": (fa.SlidingWindow(20, 0), None, fa.ValidLengths(LENGTHS)),
    "empty rows": (fa.ValidLengths(torch.tensor([0, 9])), fa.Causal(), None),
    "empty rows later": (fa.Causal(), fa.Dense((SPLIT[:, None] & SPLIT).logical_not() & SPLIT.logical_not()[:, None]), fa.Causal()),
}


@dataclass(frozen=True)
class Chain:
    """Inputs of all layers, and what arrives at every output and at the last scores."""

    layers: list[tuple[Tensor, Tensor, Tensor]]
    masks: tuple[Any, ...]
    incoming: list[Tensor]
    dscores: Tensor
    scores_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, masks: tuple[Any, ...], dtype: torch.dtype, device: torch.device, scores_dtype: torch.dtype | None = None) -> Chain:
        def random(heads: int, size: int = HEAD_DIM) -> Tensor:
            return torch.randn(BATCH, heads, LENGTH, size, device=device).to(dtype)

        layers = [(random(HEADS), random(KV_HEADS), random(KV_HEADS)) for _ in range(LAYERS)]
        dscores = random(HEADS, LENGTH).to(scores_dtype or dtype) / 8
        return cls(layers, masks, [random(HEADS) for _ in range(LAYERS)], dscores, scores_dtype)

    def run(self, backend: str) -> dict[str, Tensor]:
        """Outputs, last scores, and gradients of every layer's q, k, v by the package."""
        request, leaves = fa.AuxRequest(scores=True, scores_dtype=self.scores_dtype), self.leaves()
        outs, scores = [], None
        for (q, k, v), mask in zip(leaves, self.masks, strict=True):
            mods = () if scores is None else (fa.Bias(scores),)
            out, aux = fa.attention(q, k, v, mask=mask, score_mods=mods, return_aux=request, backend=backend)
            scores = aux.scores
            outs.append(out)
        return self.results(outs, scores, leaves)

    def formula(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same in plain torch, nothing infinite on the way: computed in ``dtype``, stored as the package stores unless that is wider."""
        stored = dtype if dtype == torch.float64 else self.layers[0][0].dtype
        kept = dtype if dtype == torch.float64 else self.scores_dtype or stored
        leaves, outs, hidden = self.leaves(stored), [], torch.zeros(1, dtype=torch.bool, device=self.dscores.device)
        scores: Any = 0.0
        for (q, k, v), mask in zip(leaves, self.masks, strict=True):
            allowed = None if mask is None else dense(mask, q)
            hidden = hidden if allowed is None else hidden | ~allowed
            k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1).to(dtype) for t in (k, v))
            raw = q.to(dtype) @ k.mT * HEAD_DIM**-0.5 + (scores if isinstance(scores, float) else scores.to(dtype))
            gone = hidden.expand(raw.shape)
            shifted = raw.masked_fill(gone, 0.0) - raw.detach().masked_fill(gone, -torch.inf).amax(-1, keepdim=True).clamp(min=-1e30)
            weights = shifted.masked_fill(gone, -1e30).exp().masked_fill(gone, 0.0)
            total = weights.sum(-1, keepdim=True)
            outs.append(((weights / total.masked_fill(total == 0, 1.0)).to(stored).to(dtype) @ v).to(stored))
            scores = raw.masked_fill(gone, 0.0).to(kept)
        return self.results(outs, scores.masked_fill(hidden, -torch.inf), leaves)

    def leaves(self, dtype: torch.dtype | None = None) -> list[tuple[Tensor, ...]]:
        return [tuple(t.to(dtype or t.dtype, copy=True).requires_grad_() for t in layer) for layer in self.layers]

    def results(self, outs: list[Tensor], scores: Any, leaves: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        inputs = [t for layer in leaves for t in layer]
        # Nothing arrives at -inf: in exact arithmetic a score that a bias hid still moves with its product.
        dscores = self.dscores.to(scores.dtype).masked_fill(scores.detach() == -torch.inf, 0.0)
        arriving = [*(g.to(o.dtype) for g, o in zip(self.incoming, outs, strict=True)), dscores]
        grads = torch.autograd.grad([*outs, scores], inputs, arriving)
        names = [f"d{name}{i}" for i, name in itertools.product(range(LAYERS), "qkv")]
        return {f"out{i}": o.detach() for i, o in enumerate(outs)} | {"scores": scores.detach()} | dict(zip(names, grads, strict=True))


def dense(mask: Any, q: Tensor) -> Tensor:
    """A mask as bool, [batch|1, heads|1, q_len|1, kv_len|1]."""
    allowed: Tensor = mask.allowed(Grid((BATCH, HEADS, LENGTH, LENGTH), q.device))
    return allowed


def hold(got: dict[str, Tensor], chain: Chain) -> None:
    """The error rule: at most twice the formula's own error against float64 and a rounding band; -inf and nothing else where hidden."""
    want, plain = chain.formula(torch.float64), chain.formula(stat_dtype(chain.layers[0][0].dtype))
    for name, right in want.items():
        there = right.isfinite()
        assert torch.equal(got[name].isfinite(), there), name
        assert torch.equal(got[name] == -torch.inf, ~there), name
        error, of_plain = ((r[name].double() - right)[there].abs().max().item() for r in (got, plain))
        eps = torch.finfo(chain.layers[0][0].dtype).eps
        assert error <= 2 * of_plain + eps * LENGTH**0.5 * right[there].abs().max().item(), (name, error, of_plain)


@pytest.mark.parametrize("masks", MASKS)
def test_three_layers(masks: str, backend: str, device: torch.device) -> None:
    chain = Chain.of(MASKS[masks], torch.float32, device)
    hold(chain.run(backend), chain)


@pytest.mark.parametrize(
    ("dtype", "scores_dtype"),
    [(torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_half_precision(dtype: torch.dtype, scores_dtype: torch.dtype | None, backend: str, device: torch.device) -> None:
    chain = Chain.of(MASKS["each its own"], dtype, device, scores_dtype)
    got = chain.run(backend)
    hold(got, chain)
    assert got["scores"].dtype == (scores_dtype or dtype) and got["out2"].dtype == dtype


@pytest.mark.parametrize("scores_dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_scores_of_another_dtype_than_float32(scores_dtype: torch.dtype, backend: str, device: torch.device) -> None:
    chain = Chain.of(MASKS["causal"], torch.float32, device, scores_dtype)
    if backend == "cuda" and scores_dtype == torch.float64:
        with pytest.raises(fa.UnsupportedError, match="scores in float64 are given out by triton, cpu and eager only"):
            chain.run(backend)
        return
    got = chain.run(backend)
    assert got["scores"].dtype == scores_dtype
    for name, right in chain.formula(torch.float64).items():
        there = right.isfinite()
        step = max(torch.finfo(scores_dtype).eps, torch.finfo(torch.float32).eps)
        assert ((got[name].double() - right)[there].abs() <= LENGTH**0.5 * step * right[there].abs().max()).all(), name


def test_float32_scores_are_exact_where_half_would_round(backend: str, device: torch.device) -> None:
    """What float32 is asked for: the sum over layers is not rounded to 8 bits at each of them."""
    q, k, v = (torch.randn(1, 2, 20, 16, device=device).bfloat16() for _ in range(3))
    wide, narrow = (
        fa.attention(q, k, v, return_aux=fa.AuxRequest(scores=True, scores_dtype=d), backend=backend)[1].scores
        for d in (torch.float32, None)
    )
    assert wide.dtype == torch.float32 and narrow.dtype == torch.bfloat16
    assert ((wide - narrow.float()).abs() <= torch.finfo(torch.bfloat16).eps * wide.abs()).all() and not torch.equal(wide, narrow.float())
    assert wide.is_contiguous()


def test_asking_for_scores_changes_no_output(backend: str, device: torch.device) -> None:
    q, k, v = (torch.randn(1, 2, 20, 16, device=device) for _ in range(3))
    request = fa.AuxRequest(scores=True, scores_dtype=torch.float16)
    with_scores, _ = fa.attention(q, k, v, mask=fa.Causal(), return_aux=request, backend=backend)
    without, _ = fa.attention(q, k, v, mask=fa.Causal(), return_aux=fa.AuxRequest(lse=True), backend=backend)
    assert torch.equal(with_scores, without)


def test_under_a_compiler(kernel_backend: str, device: torch.device) -> None:
    request = fa.AuxRequest(scores=True, scores_dtype=torch.float32)

    def two_layers(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        first, aux = fa.attention(q, k, v, mask=fa.Causal(), return_aux=request, backend=kernel_backend)
        second, aux = fa.attention(first, k, v, score_mods=(fa.Bias(aux.scores),), return_aux=request, backend=kernel_backend)
        return second, aux.scores

    leaves = [torch.randn(2, heads, 24, 16, device=device).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    compiled = torch.compile(two_layers, fullgraph=True, backend="aot_eager", dynamic=True)
    incoming = [torch.randn(2, 4, 24, 16, device=device).bfloat16(), torch.randn(2, 4, 24, 24, device=device)]
    results = []
    for attend in (two_layers, compiled):
        outputs = attend(*leaves)
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, incoming)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_one_score_tensor_per_layer_is_kept(kernel_backend: str, device: torch.device) -> None:
    """What autograd keeps of the scores' size: the bias that each layer got, which is the tensor that the one before gave out."""
    chain, kept = Chain.of(MASKS["causal"], torch.bfloat16, device, torch.float32), {}

    def pack(t: Tensor) -> Tensor:
        if t.numel() >= LENGTH * LENGTH * HEADS * BATCH:
            kept[t.untyped_storage().data_ptr()] = tuple(t.shape)
        return t

    request, scores, given = fa.AuxRequest(scores=True, scores_dtype=torch.float32), None, []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for q, k, v in chain.leaves():
            mods = () if scores is None else (fa.Bias(scores),)
            _, aux = fa.attention(q, k, v, mask=fa.Causal(), score_mods=mods, return_aux=request, backend=kernel_backend)
            scores = aux.scores
            given.append(scores)
    assert set(kept) == {t.untyped_storage().data_ptr() for t in given[:-1]}, kept


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scores_dtype": torch.float32}, ValueError, r"scores must be asked for with a scores_dtype; .* Add scores=True"),
        ({"scores": True, "scores_dtype": torch.int32}, ValueError, "must be float16, bfloat16, float32 or float64; got torch.int32"),
        ({"scores": True, "scores_dtype": "float32"}, TypeError, "must be a torch.dtype; got 'float32'"),
        ({"scores": 1}, TypeError, "scores must be a bool; got 1"),
    ],
)
def test_a_wrong_dtype_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fa.AuxRequest(**options)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_request_survives_an_ops_arguments(dtype: torch.dtype | None) -> None:
    request = fa.AuxRequest(scores=True, entropy=True, scores_dtype=dtype)
    assert fa.AuxRequest.from_numbers(request.numbers) == request
