"""Dropout: the generator against published numbers, its statistics, and the same keep mask from every backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn import dropout as module
from fused_attn.lowering import Grid, KernelDropout
from fused_attn.testing import Case, check

pytestmark = pytest.mark.quick
SIGMAS = 6  # two chances in a billion: these draws are fixed by their seeds, so a pass stays a pass


def random123(counter: tuple[int, ...], key: tuple[int, ...], rounds: int = 7) -> tuple[int, ...]:
    """Philox4x32 in Python integers, written from the paper: multiply, swap, xor with the key; the key takes a Weyl step per round."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high % 2**32, (low >> 32) ^ c[3] ^ k[1], low % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def test_published_vectors() -> None:
    """Random123's kat_vectors for philox4x32-7; the package uses the low two counter words."""
    assert random123((0,) * 4, (0,) * 2) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert random123((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2) == (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)
    assert tuple(int(w) for w in module.philox(torch.tensor(0), torch.tensor(0))) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)


@pytest.mark.parametrize("counter", [1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 12345, 2**63 - 1])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_64_bit_counters_and_seeds(counter: int, seed: int) -> None:
    got = tuple(int(w) for w in module.philox(torch.tensor(counter), torch.tensor(seed)))
    key = seed % 2**64
    assert got == random123((counter % 2**32, counter >> 32, 0, 0), (key % 2**32, key >> 32))


def test_index_of_an_element() -> None:
    """Word k % 4 of counter ((b * heads + h) * q_len + q) * ceil(kv_len / 4) + k // 4, kept when at least p * 2^32; any region alike."""
    batch, heads, q_len, kv_len, p = 2, 3, 4, 11, 0.3
    grid, lowered = Grid((batch, heads, q_len, kv_len), torch.device("cpu")), KernelDropout(p, torch.tensor(99))
    factor = module.keep_factor(lowered, grid, torch.float64)
    for b, h, q, k in itertools.product(range(batch), range(heads), range(q_len), range(kv_len)):
        counter = ((b * heads + h) * q_len + q) * 3 + k // 4
        kept = random123((counter, 0, 0, 0), (99, 0))[k % 4] >= round(p * 2**32)
        assert factor[b, h, q, k].item() == (1 / (1 - p) if kept else 0.0)
    part = grid.at((1, 2), (1, 3), (2, 4), (3, 10))
    assert torch.equal(module.keep_factor(lowered, part, torch.float64), factor[1:2, 1:3, 2:4, 3:10])


def keep_mask(
    backend: str, device: torch.device, shape: tuple[int, int, int, int], dropout: fa.Dropout, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What a backend keeps: with equal scores and V = identity, out is the weights themselves."""
    batch, heads, q_len, kv_len = shape
    q, k = (torch.zeros(batch, heads, n, 8, device=device, dtype=dtype) for n in (q_len, kv_len))
    v = torch.eye(kv_len, device=device, dtype=dtype).expand(batch, heads, -1, -1)
    return fa.attention(q, k, v, dropout=dropout, backend=backend)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 3, 5), (1, 2, 70, 130), (2, 1, 129, 66)], ids=str)
@pytest.mark.parametrize("seed", [0, 7, -1, 2**64 - 1, 2**40 + 3])
def test_same_mask_on_every_backend(shape: tuple[int, int, int, int], seed: int, backend: str, device: torch.device) -> None:
    dropout = fa.Dropout(0.3, seed)
    want = module.keep_factor(dropout.lower(device), Grid(shape, device), torch.float32)
    weights = keep_mask(backend, device, shape, dropout)
    torch.testing.assert_close(weights, want / shape[3])
    assert torch.equal(weights != 0, want != 0)
    scores = torch.zeros(shape, device=device)
    soft = fa.masked_softmax(scores, dropout=dropout, backend=backend)
    assert torch.equal(soft != 0, want != 0)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_keep_all_and_remove_all(p: float, backend: str, device: torch.device) -> None:
    q = torch.randn(1, 2, 5, 8, device=device, requires_grad=True)
    out, aux = fa.attention(q, q, q, dropout=fa.Dropout(p, 1), return_aux=fa.AuxRequest(probs=True), backend=backend)
    plain = fa.attention(q, q, q, backend=backend)
    torch.testing.assert_close(aux.probs.sum(-1), torch.ones(1, 2, 5, device=device))
    torch.testing.assert_close(out, plain * (1 - p))
    (grad,) = torch.autograd.grad(out.square().sum(), q)
    assert grad.isfinite().all() and (p == 0 or (grad == 0).all())


def test_probabilities_given_out_are_those_before_dropout(backend: str, device: torch.device) -> None:
    q = torch.randn(1, 2, 33, 8, device=device)
    request = fa.AuxRequest(probs=True, lse=True, entropy=True, column_sums=True)
    _, dropped = fa.attention(q, q, q, dropout=fa.Dropout(0.4, 1), return_aux=request, backend=backend)
    _, plain = fa.attention(q, q, q, return_aux=request, backend=backend)
    for name in ("probs", "entropy", "column_sums"):
        assert torch.equal(getattr(dropped, name), getattr(plain, name)), name
    # The plain call may run on another kernel, which adds the same 33 terms of a row up in another order.
    assert (dropped.lse - plain.lse).abs().max() <= 33 * torch.finfo(torch.float32).eps * plain.lse.abs().max()


def binomial_bound(p: float, n: int) -> float:
    return SIGMAS * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate_and_independence(p: float) -> None:
    """The removal rate of all, of each row, column, head and batch, and of pairs of neighbours in every direction and of seeds."""
    shape = (3, 4, 96, 104)
    grid = Grid(shape, torch.device("cpu"))
    removed, other = ((module.keep_factor(KernelDropout(p, torch.tensor(s)), grid, torch.float64) == 0).double() for s in (5, 6))
    assert abs(removed.mean().item() - p) < binomial_bound(p, removed.numel())
    for dim in range(4):
        rates = removed.mean([d for d in range(4) if d != dim])
        assert (rates - p).abs().max() < binomial_bound(p, removed.numel() // shape[dim])
    pairs = {
        f"neighbours along {d} at {step}": (removed.narrow(d, 0, shape[d] - step), removed.narrow(d, step, shape[d] - step))
        for d in range(4)
        for step in (1, 2)
    }
    pairs |= {f"keys at {step}": (removed[..., :-step], removed[..., step:]) for step in (3, 4, 5, 64)} | {"seeds": (removed, other)}
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean().item() - p * p) < binomial_bound(p * p, a.numel()) * math.sqrt(2), name


def test_gradients_use_the_forward_mask(backend: str, device: torch.device) -> None:
    """Recover the mask with V = identity, build the function from it in plain torch, and compare gradients; causal, more than 64 keys."""
    shape, dropout = (1, 2, 90, 90), fa.Dropout(0.35, 12)
    factor = (keep_mask(backend, device, shape, dropout) != 0) / (1 - 0.35)
    leaves = [torch.randn(1, 2, 90, 16, device=device, requires_grad=True) for _ in range(3)]
    q, k, v = leaves
    out = fa.attention(q, k, v, mask=fa.Causal(), dropout=dropout, backend=backend)
    scores = (q @ k.mT / 4).masked_fill(torch.ones(90, 90, device=device).triu(1).bool(), -torch.inf)
    want = (scores.softmax(-1) * factor) @ v
    torch.testing.assert_close(out, want)
    incoming = torch.randn_like(out)
    for got, expected in zip(torch.autograd.grad(out, leaves, incoming), torch.autograd.grad(want, leaves, incoming), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_seed_tensor_is_the_same_as_its_number(backend: str, device: torch.device) -> None:
    shape = (1, 2, 9, 13)
    number, tensor = (keep_mask(backend, device, shape, fa.Dropout(0.5, s)) for s in (77, torch.tensor(77, device=device)))
    assert torch.equal(number, tensor) and not torch.equal(number, keep_mask(backend, device, shape, fa.Dropout(0.5, 78)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_rule_with_heavy_dropout(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    check(Case((1, 4, 2), (70, 133), (32, 24), dtype, ("Causal0",), ("Bias2",), True, 0.7, "bottom"), backend, device)
