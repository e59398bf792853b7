"""Calls whose score array is empty: what their results are, and that gradients and gradients' gradients exist, on every backend."""

from __future__ import annotations

import pytest
import torch

import fused_attn as fa

pytestmark = pytest.mark.quick


def tensors(backend, shape):
    batch, heads, q_len, kv_len = shape
    device = "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    q = torch.randn(batch, heads, q_len, 16, device=device, requires_grad=True)
    k, v = (torch.randn(batch, heads, kv_len, 16, device=device, requires_grad=True) for _ in range(2))
    return q, k, v, torch.randn(heads, device=device, requires_grad=True)


@pytest.mark.parametrize("shape", [(2, 3, 4, 0), (0, 3, 4, 0), (2, 3, 0, 0)], ids=str)
def test_without_keys_lse_is_the_sink(backend, shape):
    q, k, v, sinks = tensors(backend, shape)
    request = fa.AuxRequest(probs=True, scores=True, lse=True, max_scores=True, column_sums=True, entropy=True)
    out, aux = fa.attention(q, k, v, sinks=sinks, return_aux=request, backend=backend)
    rows = (shape[0], shape[1], shape[2])
    assert out.equal(torch.zeros_like(q))
    assert aux.lse.equal(sinks[None, :, None].expand(rows))
    assert aux.max_scores.equal(torch.full(rows, -torch.inf, device=q.device))
    assert aux.entropy.equal(torch.zeros(rows, device=q.device))
    assert [tuple(t.shape) for t in (aux.probs, aux.scores, aux.column_sums)] == [shape, shape, (shape[0], shape[1], 0)]
    arriving = torch.randn_like(aux.lse)
    grads = torch.autograd.grad((aux.lse, out), (q, k, v, sinks), (arriving, torch.randn_like(out)), allow_unused=True)
    assert grads[3].allclose(arriving.sum((0, 2)))
    assert all(g is None or g.equal(torch.zeros_like(g)) for g in grads[:3])


def test_without_keys_gradients_are_differentiable(backend):
    q, k, v, sinks = tensors(backend, (2, 3, 4, 0))
    out, aux = fa.attention(q, k, v, sinks=sinks, return_aux=fa.AuxRequest(lse=True), backend=backend)
    (grad,) = torch.autograd.grad((aux.lse.square().sum() + out.sum()), sinks, create_graph=True)
    assert grad.allclose(2 * 2 * 4 * sinks)
    (second,) = torch.autograd.grad(grad.sum(), sinks)
    assert second.allclose(torch.full_like(sinks, 16.0))


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 4), (2, 0, 4), (0,), (2, 2, 3, 0)], ids=str)
@pytest.mark.parametrize("log", [False, True])
def test_masked_softmax_of_nothing_twice(backend, shape, log):
    device = tensors(backend, (1, 1, 1, 1))[0].device
    scores, bias = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    out = fa.masked_softmax(scores, bias=bias, log=log, backend=backend)
    assert out.shape == shape
    first = torch.autograd.grad(out.sin().sum(), (scores, bias), create_graph=True)
    assert all(g.equal(torch.zeros_like(g)) for g in first)
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), (scores, bias), allow_unused=True)
    assert all(g is None or g.equal(torch.zeros_like(g)) for g in second)
