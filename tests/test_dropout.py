"""Dropout: the generator against published numbers, its statistics, and the same keep mask from every backend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

import fused_attn as fa
from fused_attn import dropout as module
from fused_attn.kernel_dropout import KernelDropout
from fused_attn.lowering import Grid
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


WHOLE = (2, 4, 70, 130)
# Half-open ranges of (batch, head, query, key): single dimensions, keys from inside and from the edge of a group of four, everything at once.
PARTS = {
    "batch": ((1, 2), (0, 4), (0, 70), (0, 130)),
    "heads": ((0, 2), (2, 4), (0, 70), (0, 130)),
    "queries": ((0, 2), (0, 4), (5, 43), (0, 130)),
    "keys of a group": ((0, 2), (0, 4), (0, 70), (8, 130)),
    "keys inside a group": ((0, 2), (0, 4), (0, 70), (7, 129)),
    "few keys": ((0, 1), (3, 4), (69, 70), (129, 130)),
    "everything": ((1, 2), (1, 3), (3, 66), (1, 91)),
}


def start_and_shape(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(low for low, _ in ranges), tuple(high - low for low, high in ranges)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_draws_what_the_whole_draws_there(name: str, backend: str, device: torch.device) -> None:
    dropout, ranges = fa.Dropout(0.4, 9), PARTS[name]
    start, shape = start_and_shape(ranges)
    whole = module.keep_factor(dropout.lower(device), Grid(WHOLE, device), torch.float32)
    want, part = whole[tuple(slice(*r) for r in ranges)], dropout.part(start, WHOLE)
    assert torch.equal(keep_mask(backend, device, shape, part) != 0, want != 0)
    soft = fa.masked_softmax(torch.zeros(shape, device=device), dropout=part, backend=backend)
    assert torch.equal(soft != 0, want != 0)


def test_a_part_of_a_part() -> None:
    one, other = fa.Dropout(0.4, 9).part((1, 1, 3, 1), WHOLE).part((0, 1, 2, 5), (1, 2, 63, 90)), fa.Dropout(0.4, 9, (1, 2, 5, 6), WHOLE)
    assert (one.origin, one.extent) == (other.origin, other.extent)


def cut(q: Tensor, k: Tensor, v: Tensor, along: str, dropout: fa.Dropout, backend: str) -> Tensor:
    """The whole output from calls on two uneven parts; halves of the keys meet by their log-sum-exp."""
    whole, results = (*q.shape[:3], k.shape[2]), []
    dim = ("batch", "heads", "queries", "keys").index(along)
    at = {"batch": 1, "heads": 2, "queries": 13, "keys": 23}[along]
    for low, high in ((0, at), (at, whole[dim])):
        start = tuple(low if d == dim else 0 for d in range(4))
        axis = min(dim, 2)
        queries = q if along == "keys" else q.narrow(axis, low, high - low)
        low, high = (low // 2, high // 2) if along == "heads" else (low, high)
        keys, values = (k, v) if along == "queries" else (t.narrow(axis, low, high - low) for t in (k, v))
        request = fa.AuxRequest(lse=True)
        results.append(fa.attention(queries, keys, values, dropout=dropout.part(start, whole), return_aux=request, backend=backend))
    outs, lses = [out for out, _ in results], [aux.lse for _, aux in results]
    if along != "keys":
        return torch.cat(outs, dim)
    total = torch.logaddexp(*lses)
    return sum(out * (lse - total).exp()[..., None].to(out.dtype) for out, lse in zip(outs, lses, strict=True))


@pytest.mark.parametrize("along", ["batch", "heads", "queries", "keys"])
def test_parts_make_up_the_whole(along: str, backend: str, device: torch.device) -> None:
    """Output and gradients, two key heads for four query heads."""
    dtype = torch.float64 if backend in ("cpu", "eager") else torch.float32
    leaves = [torch.randn(2, heads, n, 16, dtype=dtype, device=device, requires_grad=True) for heads, n in ((4, 37), (2, 45), (2, 45))]
    dropout = fa.Dropout(0.3, torch.tensor(5, device=device))
    out, pieces = fa.attention(*leaves, dropout=dropout, backend=backend), cut(*leaves, along, dropout, backend)
    torch.testing.assert_close(pieces, out)
    incoming = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(o, leaves, incoming) for o in (pieces, out)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.peers
@pytest.mark.parametrize("along", ["heads", "keys"])
def test_parts_under_a_compiler(along: str, kernel_backend: str, device: torch.device) -> None:
    dropout = fa.Dropout(0.3, 5)
    attend = torch.compile(lambda q, k, v: cut(q, k, v, along, dropout, kernel_backend), fullgraph=True, backend="aot_eager")
    for length in (37, 41):  # the second time with symbolic sizes
        leaves = [torch.randn(2, heads, length, 16, device=device, requires_grad=True) for heads in (4, 2, 2)]
        out = fa.attention(*leaves, dropout=dropout, backend="eager")
        compiled = attend(*leaves)
        torch.testing.assert_close(compiled, out)
        incoming = torch.randn_like(out)
        for got, want in zip(*(torch.autograd.grad(o, leaves, incoming) for o in (compiled, out)), strict=True):
            torch.testing.assert_close(got, want)


def test_mapped_gradients_and_double_backward_of_a_part(kernel_backend: str, device: torch.device) -> None:
    part = fa.Dropout(0.4, 3).part((1, 2, 5, 7), (4, 8, 40, 50))
    q, k, v = (torch.randn(2, 2, n, 8, device=device, requires_grad=True) for n in (9, 21, 21))
    out, want = (fa.attention(q, k, v, dropout=part, backend=name) for name in (kernel_backend, "eager"))
    incoming = torch.randn(3, *out.shape, device=device)
    mapped = torch.autograd.grad(out, (q, k, v), incoming, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        one = torch.autograd.grad(want, (q, k, v), incoming[i], retain_graph=True)
        for got, expected in zip(mapped, one, strict=True):
            torch.testing.assert_close(got[i], expected)
    twice = []
    for result in (out, want):
        (dq,) = torch.autograd.grad(result, q, incoming[0], create_graph=True)
        twice.append(torch.autograd.grad(dq.square().sum(), (q, k, v)))
    for got, expected in zip(*twice, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_corner_of_a_huge_problem(backend: str, device: torch.device) -> None:
    """Counters beyond 2^46, strides beyond 2^31."""
    shape, origin, extent = (2, 2, 33, 66), (2, 5, 2**21 - 33, 2**22 - 67), (4, 7, 2**21, 2**22)
    dropout = fa.Dropout(0.5, 21, origin, extent)
    factor = module.keep_factor(dropout.lower(device), Grid(shape, device), torch.float32)
    for b, h, q, k in ((0, 0, 0, 0), (1, 1, 32, 65), (0, 1, 17, 3), (1, 0, 5, 64)):
        counter = (((b + 2) * 7 + h + 5) * 2**21 + q + 2**21 - 33) * 2**20 + (k + 2**22 - 67) // 4
        kept = random123((counter % 2**32, counter >> 32, 0, 0), (21, 0))[(k + 2**22 - 67) % 4] >= 2**31
        assert counter > 2**45 and factor[b, h, q, k].item() == (2.0 if kept else 0.0)
    assert torch.equal(keep_mask(backend, device, shape, dropout) != 0, factor != 0)


def test_a_place_is_structure_to_a_tree_walk() -> None:
    dropout = fa.Dropout(0.5, torch.tensor(3), (0, 1, 0, 0), (1, 2, 3, 4))
    leaves, spec = _pytree.tree_flatten(dropout)
    assert [leaf.item() for leaf in leaves] == [3]
    again = _pytree.tree_unflatten(leaves, _pytree.treespec_loads(_pytree.treespec_dumps(spec)))
    assert (again.p, again.origin, again.extent) == (0.5, (0, 1, 0, 0), (1, 2, 3, 4))
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fa.Dropout(0.5, 1, (0, 1, 0, 0)), ValueError, r"extent must be given with an origin; got origin=\(0, 1, 0, 0\)"),
        (lambda: fa.Dropout(0.5, 1, (0, -1, 0, 0), (1, 1, 1, 1)), ValueError, r"origin must not be negative; got \(0, -1, 0, 0\)"),
        (lambda: fa.Dropout(0.5, 1, (0, 0, 0), (1, 1, 1, 1)), TypeError, "origin must be four ints"),
        (lambda: fa.Dropout(0.5, 1, (0, 0, 0, 0.5), (1, 1, 1, 1)), TypeError, "origin must be an int; got 0.5"),
        (lambda: fa.Dropout(0.5, 1, (0, 0, 0, 2), (1, 1, 1, 1)), ValueError, "must lie within the extent"),
        (lambda: fa.Dropout(0.5, 1, extent=(2**20,) * 4), ValueError, "less than 2\\*\\*62 elements"),
        (lambda: fa.Dropout(0.5, 1).part((0, 0, 4, 0), (1, 1, 3, 3)), ValueError, "must begin within the call's sizes"),
    ],
)
def test_a_place_outside_the_whole_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_call_outside_the_whole_is_refused() -> None:
    q, dropout = torch.randn(1, 2, 5, 8), fa.Dropout(0.5, 1, (0, 1, 0, 0), (1, 2, 5, 5))
    with pytest.raises(ValueError, match=r"the call's sizes \[1, 2, 5, 5\] must lie within the extent; got origin=\(0, 1, 0, 0\)"):
        fa.attention(q, q, q, dropout=dropout)
    with pytest.raises(ValueError, match=r"must lie within the extent"):
        fa.masked_softmax(torch.randn(2, 5, 5), dropout=dropout)
