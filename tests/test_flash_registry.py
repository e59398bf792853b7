"""torch's registry of flash implementations: the operators it calls, registered for the CPU so that they can be called without a GPU.

What torch itself does before it calls them, its choice among kernels on a GPU, is not run here.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.attention as torchs
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from fused_attn import UnsupportedError
from fused_attn.integrations import flash_registry
from tests.torch_reference import ORIGINAL, compare, qkv, randn

if not hasattr(torchs, "register_flash_attention_impl"):
    pytest.skip("this torch has no registry of flash implementations", allow_module_level=True)

ROOT = Path(__file__).parents[1]
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward


@pytest.fixture
def active():
    flash_registry.register(device="cpu")
    torchs.activate_flash_attention_impl("fused_attn")
    yield
    torchs.restore_flash_attention_impl()


def test_importing_registers_nothing():
    torchs._registry._FLASH_ATTENTION_IMPLS.pop("fused_attn", None)
    importlib.reload(flash_registry)
    assert "fused_attn" not in torchs.list_flash_attention_impls()
    flash_registry.register()
    assert "fused_attn" in torchs.list_flash_attention_impls()
    assert torchs.current_flash_attention_impl() is None


def test_round_trip():
    flash_registry.register(device="cpu")
    for _ in range(2):
        with pytest.raises(NotImplementedError):
            FORWARD(*qkv())
        torchs.activate_flash_attention_impl("fused_attn")
        assert torchs.current_flash_attention_impl() == "fused_attn"
        assert FORWARD(*qkv())[0].shape == (2, 4, 7, 8)
        torchs.restore_flash_attention_impl()
        assert torchs.current_flash_attention_impl() is None
    with pytest.raises(NotImplementedError):
        FORWARD(*qkv())


def test_for_cuda_it_takes_the_operators_and_gives_them_back():
    def kernels():
        dumps = (torch._C._dispatch_dump(f"aten::{op.__name__}") for op in (FORWARD, BACKWARD))
        return [[line for line in dump.splitlines() if line.startswith("CUDA")] for dump in dumps]

    before = kernels()
    flash_registry.register()
    torchs.activate_flash_attention_impl("fused_attn")
    try:
        assert all("flash_registry" in "".join(lines) for lines in kernels()), kernels()
    finally:
        torchs.restore_flash_attention_impl()
    assert kernels() == before


def test_a_torch_without_it_is_told_in_a_sentence(monkeypatch):
    monkeypatch.delattr(torchs, "register_flash_attention_impl")
    with pytest.raises(UnsupportedError, match=r"registering needs .*; got torch .* without it\. Install a newer torch"):
        flash_registry.register()


def flash(q, k, v, attn_mask=None, **options):
    return FORWARD(q, k, v, **options)[0]


CASES = {
    "plain": {}, "longer": {"q_len": 7, "kv_len": 11}, "causal": {"is_causal": True}, "scale": {"scale": 0.3},
    "causal-longer": {"q_len": 7, "kv_len": 11, "is_causal": True}, "causal-shorter": {"q_len": 11, "kv_len": 7, "is_causal": True},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name, dtype, active):
    options = dict(CASES[name])
    q_len, kv_len = options.pop("q_len", 9), options.pop("kv_len", 9)
    is_causal, tensors = options.pop("is_causal", False), qkv(q_len, kv_len, dtype=dtype)
    mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len) if is_causal else None  # flash's causal is lower-right
    compare(tensors, mask, call=lambda *t, attn_mask, **o: flash(*t, is_causal=is_causal, **o), **options)


def test_grouped_heads(active):
    q, k, v = qkv(lead=(2, 6), kv_lead=(2, 2))
    torch.testing.assert_close(flash(q, k, v), ORIGINAL(q, k, v, enable_gqa=True))


def test_what_it_returns_is_what_the_operator_promises(active):
    for q, k, v in (qkv(), [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv()]):
        got = FORWARD(q, k, v, 0.5, False)
        with torch._subclasses.FakeTensorMode() as mode:
            promised = FORWARD(*(mode.from_tensor(t) for t in (q, k, v)), 0.5, False)
        for ours, theirs in zip(got, promised, strict=True):
            if isinstance(ours, torch.Tensor):
                assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
            else:
                assert ours == theirs
        torch.testing.assert_close(got[1], torch.logsumexp(q @ k.mT * q.shape[-1] ** -0.5, -1))


def test_dropout_draws_once_and_backward_draws_the_same(active):
    q, k, eye = torch.zeros(1, 2, 64, 32), torch.zeros(1, 2, 32, 32), torch.eye(32).expand(1, 2, -1, -1).clone().requires_grad_()
    torch.manual_seed(0)
    kept = FORWARD(q, k, eye, 0.25)[0]
    assert 0.7 < (kept > 0).double().mean() < 0.8
    assert not kept.equal(FORWARD(q, k, eye, 0.25)[0])
    torch.manual_seed(0)
    assert kept.equal(FORWARD(q, k, eye, 0.25)[0])
    incoming = randn(*kept.shape)
    (got,) = torch.autograd.grad(kept, eye, incoming)
    torch.testing.assert_close(got, kept.detach().mT @ incoming)  # v = I, so the output is the matrix that v is multiplied by


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_a_block_of_keys_with_the_statistics_of_all(is_causal, active):
    """As ring attention calls backward: one block after another, each with the whole output and the whole logsumexp."""
    q, k, v = qkv(8, 8)
    incoming = randn(*q.shape)
    blocks = [(slice(0, 8), slice(0, 8), True)] if is_causal else [(slice(0, 8), s, False) for s in (slice(0, 3), slice(3, 8))]
    if is_causal:  # two blocks of queries and keys: the diagonal ones causal, the lower one full, the upper one skipped
        low, high = slice(0, 4), slice(4, 8)
        blocks = [(low, low, True), (high, high, True), (high, low, False)]
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse, _, _, q_len, kv_len, seed, offset, _ = FORWARD(*leaves, 0.0, is_causal)
    wanted = torch.autograd.grad(out, leaves, incoming)
    got = [torch.zeros_like(t) for t in (q, k, v)]
    for rows, keys, causal in blocks:
        block = [t[:, :, at] for t, at in ((q, rows), (k, keys), (v, keys))]
        whole = (out[:, :, rows].detach(), lse[:, :, rows].contiguous().detach())
        grads = BACKWARD(incoming[:, :, rows], *block, *whole, None, None, q_len, kv_len, 0.0, causal, seed, offset)
        for total, grad, at in zip(got, grads, (rows, keys, keys), strict=True):
            total[:, :, at] += grad
    torch.testing.assert_close(got, list(wanted))


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed")
def test_torchs_ring_attention_over_two_processes(tmp_path):
    command = [sys.executable, "-m", "tests.ring"]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "rendezvous")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors


def test_what_flash_does_not_carry_is_refused_in_a_sentence(active):
    with pytest.raises(UnsupportedError, match=r"return_debug_mask must be False .*; got True"):
        FORWARD(*qkv(), 0.0, False, True)
    with pytest.raises(UnsupportedError, match=r"one head_dim .*; got 8 and 5"):
        FORWARD(*qkv(value_dim=5))


def test_an_explicit_backend_does_not_fall_back():
    flash_registry.register(backend="cuda", device="cpu")
    torchs.activate_flash_attention_impl("fused_attn")
    try:
        with pytest.raises(UnsupportedError, match="cuda"):
            FORWARD(*qkv(dtype=torch.float64))
    finally:
        torchs.restore_flash_attention_impl()


def test_compiled_it_stays_torchs_operator(active):
    torch._dynamo.reset()
    graphs, leaves = [], [t.requires_grad_() for t in qkv(9, 9)]

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    compiled = torch.compile(lambda q, k, v: flash(q, k, v, is_causal=True) * 2, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    out = compiled(*leaves)
    torch.testing.assert_close(out, flash(*leaves, is_causal=True) * 2)
    out.sum().backward()
    assert [any("flash_attention" in str(n.target) for n in g.graph.nodes) for g in graphs] == [True, True]
