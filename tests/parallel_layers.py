"""What ranks find with ``nn.MultiheadAttention`` under ``HeadwiseParallel``: results, gradients and transfers, against the plain layer in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing import assert_close

from fused_attn.distributed.tensor_parallel import HeadwiseParallel
from fused_attn.nn import MultiheadAttention, replace_multihead_attention

DIM, HEADS = 32, 8
PADDING = torch.arange(9)[None] > torch.tensor([[2], [8], [4]])


def _tensor(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape).mul(50).sin()


X, Y = _tensor(3, 6, DIM), _tensor(3, 9, DIM)
CASES: dict[str, tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = {
    "self": ({"batch_first": True}, (X, X, X), {}),
    "no biases": ({"batch_first": True, "bias": False}, (X, X, X), {"need_weights": False}),
    "cross": ({"batch_first": True}, (X, Y, Y), {"average_attn_weights": False, "key_padding_mask": PADDING}),
    "causal": ({}, (X, X, X), {"attn_mask": torch.ones(3, 3).triu(1).bool(), "is_causal": True, "need_weights": False}),
    "added": ({"batch_first": True}, (X, X, X), {"attn_mask": _tensor(3 * HEADS, 6, 6)}),
    "more keys": ({"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}, (X, Y, Y), {"key_padding_mask": PADDING}),
    "sizes": ({"batch_first": True, "vdim": 16}, (X, Y, Y[..., :16]), {}),
    "no batch": ({}, (X[0], X[0], X[0]), {}),
}


def _compared(cls: type[nn.MultiheadAttention], name: str, mesh: DeviceMesh) -> None:
    keywords, inputs, call = CASES[name]
    torch.manual_seed(0)
    plain = cls(DIM, HEADS, dtype=torch.float64, **keywords)
    divided = parallelize_module(copy.deepcopy(plain), mesh, HeadwiseParallel())
    replace_multihead_attention(plain)
    results, grads = [], []
    for layer in (plain, divided):
        made = {id(t): t.clone().requires_grad_() for t in inputs}
        out, weights = layer(*(made[id(t)] for t in inputs), **call)
        (out.cos().sum() + (0 if weights is None else weights.sin().sum())).backward()
        results.append((out, weights))
        grads.append([t.grad for t in made.values()])
    assert_close(results[1], results[0])
    assert_close(grads[1], grads[0])
    of: dict[str, Any] = {n: None if p.grad is None else p.grad.full_tensor() for n, p in divided.named_parameters()}  # type: ignore[attr-defined]
    if plain.in_proj_weight is not None:
        of["in_proj_weight"] = torch.cat([of.pop(f"{x}_proj_weight") for x in "qkv"])
    assert_close(of, {n: p.grad for n, p in plain.named_parameters()})


def _sequence_parallel(mesh: DeviceMesh) -> None:
    ranks, rank = mesh.size(), mesh.get_local_rank()
    plain = MultiheadAttention(DIM, HEADS, batch_first=True, dtype=torch.float64)
    replicated(plain)
    whole = _tensor(3, 2 * ranks, DIM).requires_grad_()
    part = whole.detach().chunk(ranks, 1)[rank].clone().requires_grad_()
    divided = parallelize_module(copy.deepcopy(plain), mesh, HeadwiseParallel(input_layouts=Shard(1), output_layouts=Shard(1)))
    expected, got = plain(whole, whole, whole)[0], divided(part, part, part)[0]
    assert_close(got, expected.chunk(ranks, 1)[rank])
    grads = [torch.autograd.grad(out.cos().sum(), t)[0] for out, t in ((expected, whole), (got, part))]
    assert_close(grads[1], grads[0].chunk(ranks, 1)[rank])
    distributed = parallelize_module(copy.deepcopy(plain), mesh, HeadwiseParallel(use_local_output=False))
    assert all(isinstance(t, DTensor) for t in distributed(whole, whole, whole))


def replicated(module: nn.Module) -> None:
    """Rank 0's parameters for all."""
    for parameter in module.parameters():
        dist.broadcast(parameter.data, 0)


def _transfers(mesh: DeviceMesh) -> None:
    layer = parallelize_module(MultiheadAttention(DIM, HEADS, bias=False, batch_first=True), mesh, HeadwiseParallel())
    x = X.float().requires_grad_()
    with CommDebugMode() as forward:
        out = layer(x, x, x, need_weights=False)[0]
    with CommDebugMode() as backward:
        out.sum().backward()
    assert forward.get_total_counts() == backward.get_total_counts() == 1


def _dropout(mesh: DeviceMesh) -> None:
    """What one process with rank 0's generator removes, in the weights that are returned, too."""
    plain = MultiheadAttention(DIM, HEADS, dropout=0.3, batch_first=True, dtype=torch.float64)
    replicated(plain)
    divided = parallelize_module(copy.deepcopy(plain), mesh, HeadwiseParallel())
    for wants in (True, False):
        torch.manual_seed(5 if mesh.get_local_rank() == 0 else 7)
        got = divided(X, X, X, need_weights=wants, average_attn_weights=False)
        torch.manual_seed(5)
        expected = plain(X, X, X, need_weights=wants, average_attn_weights=False)
        assert_close(got, expected)
        assert not wants or bool((got[1] == 0).any())


def _encoder(mesh: DeviceMesh) -> None:
    """A layer of torch's around it: training and evaluation, compiled, a step of an optimiser, its state saved and loaded."""
    plain = nn.TransformerEncoderLayer(DIM, HEADS, 64, batch_first=True, dropout=0.0, dtype=torch.float64)
    replicated(plain)
    plan = {"self_attn": HeadwiseParallel(), "linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    divided = parallelize_module(copy.deepcopy(plain), mesh, plan)
    assert_close(torch.compile(divided, backend="aot_eager")(X), plain(X))
    for layer in (plain, divided):
        optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
        layer(X).square().sum().backward()
        optimizer.step()
        layer.eval()
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    assert_close(divided(X, src_mask=mask, is_causal=True), plain(X, src_mask=mask, is_causal=True))
    divided.load_state_dict(divided.state_dict())


def _nested(mesh: DeviceMesh) -> None:
    """What torch's encoder makes of a padded batch in evaluation."""
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 64, batch_first=True, dtype=torch.float64), 1).eval()
    replicated(plain)
    divided = copy.deepcopy(plain)
    parallelize_module(divided.layers[0], mesh, {"self_attn": HeadwiseParallel()})
    padding = torch.arange(6)[None] >= torch.tensor([[6], [3], [4]])
    with torch.no_grad():
        assert_close(divided(X, src_key_padding_mask=padding), plain(X, src_key_padding_mask=padding))


def _refusals(mesh: DeviceMesh) -> None:
    with pytest.raises(TypeError, match=r"HeadwiseParallel divides a nn\.MultiheadAttention; got Linear"):
        parallelize_module(nn.Linear(3, 3), mesh, HeadwiseParallel())
    with pytest.raises(ValueError, match=f"the ranks must divide num_heads; got 3 heads on {mesh.size()} ranks"):
        parallelize_module(nn.MultiheadAttention(6, 3), mesh, HeadwiseParallel())
    layer = parallelize_module(nn.MultiheadAttention(DIM, HEADS), mesh, HeadwiseParallel())
    with pytest.raises(ValueError, match="must be divided once"):
        parallelize_module(layer, mesh, HeadwiseParallel())
    with pytest.raises(ValueError, match="a mesh must have one dimension here; got 2"):
        parallelize_module(nn.MultiheadAttention(DIM, HEADS), init_device_mesh("cpu", (1, mesh.size())), HeadwiseParallel())


def check(ranks: int) -> None:
    """Asserts all of it."""
    mesh = init_device_mesh("cpu", (ranks,))
    for number, name in enumerate(CASES):
        _compared((nn.MultiheadAttention, MultiheadAttention)[number % 2], name, mesh)
    for part in (_sequence_parallel, _transfers, _dropout, _encoder, _nested, _refusals):
        part(mesh)
