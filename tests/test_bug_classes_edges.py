"""Historical bugs of other libraries, parts K and L: sizes 0, infinities as scores, NaN beside a mask, wide offsets, code of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.score_mods import SCORE_MODS, ScoreMod

pytestmark = pytest.mark.quick
INF, NAN = float("inf"), float("nan")


def vectors(q_len: int = 8, kv_len: int = 8, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, heads, q_len, 8), torch.randn(1, heads, kv_len, 8), torch.randn(1, heads, kv_len, 8)


# K. Sizes, infinities, NaN


SIZES = [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (0, 0, 0, 0)]


def masks_of(shape: tuple[int, int, int, int]) -> Iterator[Mask]:
    grid = Grid(shape, torch.device("cpu"))
    for kind in (fa.Causal, fa.SlidingWindow, fa.Band, fa.ValidLengths, fa.KeyPadding, fa.Documents, fa.PrefixLM, fa.Dense):
        yield from kind.examples(grid)
    for kind in (fa.Chunked, fa.BlockCausal, fa.BidirectionalBlocks):
        yield from kind.examples(grid)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_75_sizes_of_zero_with_every_mask_and_modification(shape: tuple[int, int, int, int], backend: str) -> None:
    """A size of 0 stopped in reshapes and divisions that only some masks reach."""
    batch, heads, q_len, kv_len = shape
    q = torch.randn(batch, heads, q_len, 8, requires_grad=True)
    k, v = (torch.randn(batch, heads, kv_len, 8, requires_grad=True) for _ in range(2))
    request = fa.AuxRequest(*[True] * 6)
    for offset in (0, torch.zeros(batch, dtype=torch.long)):
        for mask in (*masks_of(shape), None):
            out, aux = fa.attention(q, k, v, mask=mask, q_offset=offset, return_aux=request, backend=backend)
            assert out.shape == q.shape
            assert bool((out == 0).all())
            assert aux.probs.shape == shape
            for grad in torch.autograd.grad((out.sum() + aux.lse.nan_to_num(0, 0, 0).sum()), (q, k, v), allow_unused=True):
                assert grad is None or bool((grad == 0).all())
    grid = Grid(shape, torch.device("cpu"))
    for mod in (*fa.SoftCap.examples(grid), *fa.ALiBi.examples(grid), *fa.Bias.examples(grid)):
        assert fa.attention(q, k, v, score_mods=(mod,), q_offset=0, backend=backend).shape == q.shape


def test_76_minus_infinity_is_a_score_like_any_other(backend: str) -> None:
    """softmax kernels took it for a masked element in the backward: torch gives log-softmax the gradient g there."""
    values = torch.tensor([[0.0, 1.0, -INF, 0.5]])
    arriving = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for log in (False, True):
        x, y = values.clone().requires_grad_(), values.clone().requires_grad_()
        right = torch.log_softmax(y, -1) if log else torch.softmax(y, -1)
        got = fa.masked_softmax(x, log=log, backend=backend)
        torch.testing.assert_close(got, right)
        torch.testing.assert_close(torch.autograd.grad(got, x, arriving)[0], torch.autograd.grad(right, y, arriving)[0])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
def test_76_a_row_of_minus_infinity_is_empty(log: bool, empty_rows: str, backend: str) -> None:
    x, bias = torch.randn(2, 3, 5), torch.zeros(2, 3, 5)
    x[0, 1], bias[1, 2] = -INF, -INF
    x, bias = x.requires_grad_(), bias.requires_grad_()
    out = fa.masked_softmax(x, bias=bias, log=log, empty_rows=empty_rows, backend=backend)
    level = torch.tensor(0.2 if empty_rows == "uniform" else 0.0)
    for row in (out[0, 1], out[1, 2]):
        torch.testing.assert_close(row, (level.log() if log else level).expand(5))
    arriving = torch.randn_like(out)
    arriving[0, 1, 3] = NAN
    for grad in torch.autograd.grad(out, (x, bias), arriving):
        assert bool((grad[0, 1] == 0).all())
        assert bool((grad[1, 2] == 0).all())
        assert bool(grad.isfinite().all())


def test_76_attention_to_nothing_but_minus_infinity(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in vectors())
    bias = torch.zeros(1, 1, 8, 8)
    bias[..., 3, :], bias[..., 5, 2] = -INF, -INF
    bias = bias.requires_grad_()
    out, aux = fa.attention(q, k, v, score_mods=(fa.Bias(bias),), return_aux=fa.AuxRequest(probs=True, lse=True), backend=backend)
    assert bool((out[:, :, 3] == 0).all())
    assert bool((aux.lse[:, :, 3] == -INF).all())
    assert bool((aux.probs[:, :, 5, 2] == 0).all())
    arriving = torch.randn_like(out)
    arriving[:, :, 3] = NAN
    grads = torch.autograd.grad(out, (q, k, v, bias), arriving)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert bool((grads[0][:, :, 3] == 0).all())
    assert bool((grads[3][..., 3, :] == 0).all())


def test_76_a_key_of_minus_infinity_is_the_same_with_and_without_a_mask(backend: str) -> None:
    q, k, v = vectors()
    q, k = q.abs(), k.clone()
    k[:, :, 2, 4] = -INF
    everything = fa.Dense(torch.ones(8, 8, dtype=torch.bool))
    results = []
    for mask in (None, everything):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, aux = fa.attention(*leaves, mask=mask, return_aux=fa.AuxRequest(probs=True, max_scores=True), backend=backend)
        results.append((out, aux.probs, aux.max_scores, *torch.autograd.grad(out.sin().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert bool((results[0][1][..., 2] == 0).all())


@pytest.mark.parametrize("level", [1e9, -1e9, 1e30])
def test_77_logarithms_of_huge_equal_scores(level: float, backend: str) -> None:
    """x - lse loses log n next to x: 0 instead of -log n."""
    got = fa.masked_softmax(torch.full((2, 4), level), log=True, backend=backend)
    torch.testing.assert_close(got, torch.full((2, 4), 0.25).log())


@pytest.mark.parametrize("offset", [2**31 - 1, 2**31, 2**40, -(2**31), -(2**40)])
def test_78_offsets_beyond_32_bits(offset: int, backend: str) -> None:
    """int64 offsets were narrowed: a query far behind the keys wrapped to one before them."""
    q, k, v = vectors(4, 6)
    offsets = torch.tensor([offset])
    allowed = fa.attention(q, k, v, backend=backend) if offset > 0 else torch.zeros_like(q)
    torch.testing.assert_close(fa.attention(q, k, v, mask=fa.Causal(), q_offset=offsets, backend=backend), allowed)
    for mask in (fa.SlidingWindow(2**30, 2**30), fa.Band(5), fa.Chunked(4)):
        assert bool((fa.attention(q, k, v, mask=mask, q_offset=offsets, backend=backend) == 0).all())
    slopes = torch.tensor([2.0**-41, 2.0**-33])
    out, aux = fa.attention(q, k, v, score_mods=(fa.ALiBi(slopes),), q_offset=offsets, return_aux=fa.AuxRequest(lse=True), backend=backend)
    torch.testing.assert_close(out, fa.attention(q, k, v, backend=backend))
    far = (fa.attention(q, k, v, return_aux=fa.AuxRequest(lse=True), backend=backend)[1].lse - abs(offset) * slopes[None, :, None]).to(
        aux.lse
    )
    torch.testing.assert_close(aux.lse, far, rtol=1e-4, atol=1e-4)


def poisoned(backend: str, mods: tuple[ScoreMod, ...], mask: Mask, hidden: slice, fill: float) -> tuple[Tensor, ...]:
    """out and the gradients of q, k and v, with ``fill`` in hidden keys and values, and what arrives for rows 0 to 2 in order."""
    torch.manual_seed(0)
    q, k, v = vectors()
    if fill:
        k[:, :, hidden], v[:, :, hidden] = fill, fill
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = fa.attention(*leaves, mask=mask, score_mods=mods, backend=backend)
    return out, *torch.autograd.grad(out.sin().sum(), leaves)


@pytest.mark.parametrize("fill", [NAN, INF, -INF, 1e38])
@pytest.mark.parametrize("name", ["softcap", "bias-softcap", "alibi", "bias"])
@pytest.mark.parametrize("mask", [fa.ValidLengths(torch.tensor([5])), fa.Dense(torch.arange(8) < 5)], ids=["lengths", "dense"])
def test_79_what_masked_keys_hold_reaches_nothing(fill: float, name: str, mask: Mask, backend: str) -> None:
    """0 * NaN in the derivative of a soft cap or bias at a masked score; the result must be that of zeros in their place, bit for bit."""
    bias = torch.randn(1, 2, 8, 8)
    bias[..., 5:] = NAN
    mods = {
        "softcap": (fa.SoftCap(1.5),),
        "bias-softcap": (fa.Bias(bias), fa.SoftCap(1.5)),
        "alibi": (fa.ALiBi(torch.tensor([0.3, 0.1])), fa.SoftCap(1.5)),
        "bias": (fa.Bias(bias),),
    }[name]
    got, clean = poisoned(backend, mods, mask, slice(5, 8), fill), poisoned(backend, mods, mask, slice(5, 8), 0.0)
    for a, b in zip(got[:2], clean[:2], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(got[2:], clean[2:], strict=True):
        torch.testing.assert_close(a[:, :, :5], b[:, :, :5])
        assert bool((a[:, :, 5:] == 0).all())


@pytest.mark.parametrize("where", ["key", "value", "query", "arriving"])
def test_79_an_attended_nan_stays_in_its_document(where: str, backend: str) -> None:
    """vLLM, FlashAttention: one broken document of a packed batch made the gradients of the others NaN."""
    q, k, v = vectors()
    arriving = torch.randn(1, 2, 8, 8)
    {"key": k, "value": v, "query": q, "arriving": arriving}[where][:, :, 1, 3] = NAN
    leaves = [t.requires_grad_() for t in (q, k, v)]
    request = fa.AuxRequest(*[True] * 6)
    mask = fa.Documents(torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]))
    out, aux = fa.attention(*leaves, mask=mask, return_aux=request, backend=backend)
    grads = torch.autograd.grad(out, leaves, arriving)
    for name in ("lse", "max_scores", "column_sums", "entropy"):
        assert bool(getattr(aux, name)[:, :, 3:].isfinite().all()), name
    assert bool(aux.probs[:, :, 3:].isfinite().all())
    assert bool((aux.probs[:, :, :3, 3:] == 0).all())
    assert bool((aux.scores[:, :, :3, 3:] == -INF).all())
    for t in (out, *grads):
        assert bool(t[:, :, 3:].isfinite().all())
    broken = {"key": (out, *grads), "query": (out, *grads), "value": (out, grads[0], grads[1]), "arriving": grads}[where]
    assert all(bool(t[:, :, :3].isnan().any()) for t in broken)


@pytest.mark.parametrize("sinks", [False, True])
def test_79_nan_in_a_query_without_keys(sinks: bool, backend: str) -> None:
    q, k, v = vectors()
    q[:, :, 5] = NAN
    keep = torch.ones(8, 8, dtype=torch.bool)
    keep[5] = False
    arriving = torch.randn(1, 2, 8, 8)
    arriving[:, :, 5] = NAN
    leaves = [t.requires_grad_() for t in (q, k, v)] + ([torch.randn(2, requires_grad=True)] if sinks else [])
    out = fa.attention(*leaves[:3], mask=keep, sinks=leaves[3] if sinks else None, backend=backend)
    assert bool(out.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out, leaves, arriving))


def test_79_the_largest_score_may_be_infinite(backend: str) -> None:
    """A row of NaN statistics was told from its sums, so that +inf came out as NaN."""
    q, k, v = vectors()
    bias = torch.zeros(8, 8)
    bias[2, 1], bias[3, 1], bias[4, 0] = INF, NAN, INF
    mask = fa.Causal()
    aux = fa.attention(q, k, v, mask=mask, score_mods=(fa.Bias(bias),), return_aux=fa.AuxRequest(max_scores=True), backend=backend)[1]
    assert bool((aux.max_scores[:, :, 2] == INF).all())
    assert bool(aux.max_scores[:, :, 3].isnan().all())
    assert bool((aux.max_scores[:, :, 4] == INF).all())
    assert bool(aux.max_scores[:, :, :2].isfinite().all())


# L. Extension


@pytest.fixture
def times() -> Iterator[type[ScoreMod]]:
    @dataclass(frozen=True, eq=False)
    class Times(ScoreMod):
        """Multiplies by a factor per key."""

        factor: Tensor  # [kv_len]
        name = "test_times"

        def apply(self, scores: Tensor, grid: Grid) -> Tensor:
            return scores * self.factor[grid.kv_idx].to(scores.dtype)

    yield Times
    SCORE_MODS.pop("test_times")


@pytest.mark.parametrize("own_code", ["eager", "cpu"])
@pytest.mark.parametrize("length", [8, 600])
def test_81_a_users_multiplication_where_nobody_attends(times: type[ScoreMod], length: int, own_code: str) -> None:
    q, k, v = (torch.randn(1, 2, length, 8) for _ in range(3))
    factor = torch.rand(length) + 0.5
    valid = length - 3
    results = []
    for garbage in (NAN, 0.0):
        k[:, :, valid:], v[:, :, valid:], factor[valid:] = garbage, garbage, garbage
        leaves = [t.clone().requires_grad_() for t in (q, k, v, factor)]
        out = fa.attention(*leaves[:3], mask=fa.ValidLengths(torch.tensor([valid])), score_mods=(times(leaves[3]),), backend=own_code)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sink", [NAN, INF, -INF])
def test_79_a_broken_sink_reaches_allowed_pairs_alone(sink: float, backend: str) -> None:
    q, k, v = vectors()
    bias = torch.zeros(1, 2, 8, 8)
    leaves = [t.requires_grad_() for t in (q, k, v, bias)]
    mask = fa.Documents(torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]))
    request = fa.AuxRequest(probs=True, column_sums=True)
    sinks = torch.tensor([sink, 0.0])
    out, aux = fa.attention(*leaves[:3], mask=mask, score_mods=(fa.Bias(leaves[3]),), sinks=sinks, return_aux=request, backend=backend)
    grads = torch.autograd.grad(out.sum(), leaves)
    keep = mask.allowed(Grid((1, 2, 8, 8), torch.device("cpu"))).expand(1, 2, 8, 8)
    assert bool((aux.probs[~keep] == 0).all())
    assert bool((grads[3][~keep] == 0).all())
    assert all(bool(t[:, 1].isfinite().all()) for t in (out, aux.probs, aux.column_sums, *grads))
    assert bool(out[:, 0].isfinite().all()) == (sink == -INF)


def test_79_products_that_overflow_stay_masked(backend: str) -> None:
    """Finite garbage whose products with a query are inf - inf: norms say so in the inputs' own range, not in double precision."""
    results = []
    for fill in (1e30, 0.0):
        torch.manual_seed(0)
        q, k, v = (t * 1e10 for t in vectors())
        k = k * 1e-20
        signs = torch.tensor([1.0, -1.0] * 4)
        k[:, :, 5:] = fill * signs
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = fa.attention(*leaves, mask=fa.ValidLengths(torch.tensor([5])), score_mods=(fa.SoftCap(1.5),), backend=backend)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert bool(a.isfinite().all())
        # 2^-17 of the number: the two sums are made in other blocks.
        torch.testing.assert_close(a, b, rtol=2.0**-17, atol=2.0**-17 * float(b.abs().max()))
