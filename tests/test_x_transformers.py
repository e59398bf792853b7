"""x-transformers' layers of our own: memory, arrays that are computed when read, decoding, dtypes, copies, compiled graphs, refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.nn.x_transformers import Attend, Attention, Decoder, Encoder, Intermediates
from fused_attn_bench.measure import peak_bytes

CPU = torch.device("cpu")
SMALL = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
STACKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "real_former_selective_grouped": {"residual_attn": True, "attn_selective": True, "attn_kv_heads": 2},
    "alibi_sinks": {"alibi_pos_bias": True, "attn_head_learned_sink": True, "attn_kv_heads": 2},
    "real_former_sinks": {"residual_attn": True, "attn_head_learned_sink": True},
    "rotary_clamp": {"rotary_pos_emb": True, "attn_softclamp_logits": True},
    "forgetting": {"attn_data_dependent_alibi": True},
    "window_memories": {"attn_max_attend_past": 3, "attn_num_mem_kv": 2},
    "talking_heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "topk": {"attn_sparse_topk": 2},
}


def decoder(name: str, **more: Any) -> Decoder:
    torch.manual_seed(0)
    stack = Decoder(**{**SMALL, **STACKS[name], **more}).eval()
    for p in stack.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.2)
    return stack


def inputs(length: int = 11, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def qkv(length: int, heads: int = 4, kv_heads: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(2)
    return tuple(torch.randn(2, h, length, 8, dtype=dtype, generator=made).requires_grad_() for h in (heads, kv_heads, kv_heads))  # type: ignore[return-value]


@pytest.mark.quick
def test_two_real_former_layers_by_hand() -> None:
    """softmax(scale q k + what the layer before had after its bias and masks), with gradients through both layers."""
    first, second = qkv(5), qkv(5)
    bias = torch.randn(4, 5, 5, dtype=torch.float64)
    attend = Attend(causal=True)
    out, left = attend(*first, attn_bias=bias)
    after, _ = attend(*second, attn_bias=bias, prev_attn=left.pre_softmax_attn)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    scores = (first[0] @ first[1].mT * 8**-0.5 + bias).masked_fill(hidden, -torch.inf)
    again = second[0] @ second[1].mT * 8**-0.5 + scores + bias
    right, right_after = scores.softmax(-1) @ first[2], again.softmax(-1) @ second[2]
    torch.testing.assert_close(out, right)
    torch.testing.assert_close(after, right_after)
    for got, want in zip(*(torch.autograd.grad(t.sin().sum(), (*first[:2], *second)) for t in (after, right_after)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.quick
def test_grouped_heads_are_tiled() -> None:
    q, k, v = qkv(6, heads=6, kv_heads=2)
    slopes = torch.arange(1.0, 7.0, dtype=torch.float64)
    out, left = Attend(causal=True, head_learned_sink=True, heads=6).double()(q, k, v, attn_bias=(fa.ALiBi(slopes),))
    whole, whole_left = Attend(causal=True, head_learned_sink=True, heads=6).double()(
        q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1), attn_bias=(fa.ALiBi(slopes),)
    )
    torch.testing.assert_close(out, whole)
    for got, want in zip(left.to_tuple(), whole_left.to_tuple(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.quick
def test_arrays_are_made_when_read_and_kept_and_may_be_set() -> None:
    q, k, v = qkv(1024, dtype=torch.float32)
    (_, left), peak = peak_bytes(lambda: Attend(causal=True)(q, k, v), CPU)
    assert peak < q.shape[0] * q.shape[1] * 1024**2 * 4 / 4
    assert left.post_softmax_attn is left.post_softmax_attn
    torch.testing.assert_close(left.post_softmax_attn.sum(-1), torch.ones(2, 4, 1024))
    left.pre_softmax_attn = q
    assert left.to_tuple()[1] is q
    assert Intermediates().to_tuple() == (None, None, None)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["qk_similarities", "pre_softmax_attn", "post_softmax_attn"])
def test_gradients_flow_through_what_is_read(name: str) -> None:
    q, k, v = qkv(5)
    _, left = Attend(causal=True, softclamp_logits=True, logit_softclamp_value=2.0)(q, k, v)
    grads = torch.autograd.grad(getattr(left, name).clamp(min=-10).sin().sum(), (q, k))
    scores = q @ k.mT * 8**-0.5
    clamped = (2 * (scores / 2).tanh()).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), torch.finfo(torch.float64).min)
    right = {"qk_similarities": scores, "pre_softmax_attn": clamped, "post_softmax_attn": clamped.softmax(-1)}[name]
    for got, want in zip(grads, torch.autograd.grad(right.clamp(min=-10).sin().sum(), (q, k)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.quick
def test_arrays_are_those_of_the_call_wherever_they_are_read() -> None:
    """Gradients though they are read without; autocast's dtype; the sinks of the call."""
    q, k, v = qkv(5)
    attend = Attend(head_learned_sink=True, heads=4).double()
    _, left = attend(q, k, v)
    _, right = attend(q, k, v)
    want = right.post_softmax_attn
    with torch.no_grad():
        attend.head_attn_sink.add_(3)
        got = left.post_softmax_attn
    assert got.requires_grad
    torch.testing.assert_close(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, left = Attend()(q.float(), k.bfloat16(), v.float())
    assert left.post_softmax_attn.dtype == torch.bfloat16
    with torch.no_grad():
        _, left = Attend()(q, k, v)
    assert not left.post_softmax_attn.requires_grad


def test_selective_alone_needs_a_tenth_of_the_scores_memory() -> None:
    """Of what plain torch keeps for one layer: seven arrays of the scores' size (the package's peak was measured at that)."""
    q, k, v = (t.detach()[:1, :2].requires_grad_() for t in qkv(2048, dtype=torch.float32))
    attend = Attend(causal=True, selective=True)
    attend(q[:, :, :300], k[:, :, :300], v[:, :, :300])[0].sum().backward()
    _, peak = peak_bytes(lambda: attend(q, k, v)[0].sum().backward(), CPU)
    assert peak <= 0.1 * 7 * q.shape[0] * q.shape[1] * 2048**2 * 4


@pytest.mark.quick
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["all_heads", "grouped"])
def test_real_former_keeps_one_array_of_scores_per_layer_that_gets_one(kv_heads: int) -> None:
    stack, x = decoder("plain", residual_attn=True, depth=4, attn_kv_heads=kv_heads), inputs(512)
    kept = set()

    def pack(t: Tensor) -> Tensor:
        if t.numel() >= 2 * 4 * 512**2:
            kept.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = stack(x)
    assert len(kept) == 3
    out.sum().backward()


@pytest.mark.quick
@pytest.mark.parametrize("name", [n for n in STACKS if "selective" not in n and n != "forgetting"])
def test_decoding_token_by_token(name: str) -> None:
    stack, x = decoder(name).double(), inputs(8, torch.float64)
    out, cache = stack(x[:, :2], return_hiddens=True)
    outs = [out]
    for n in range(2, 8):
        out, cache = stack(x[:, n : n + 1], cache=cache, return_hiddens=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), stack(x))
    assert cache.cache_length == 8


@pytest.mark.quick
@pytest.mark.parametrize("name", ["real_former_selective_grouped", "forgetting"])
def test_a_cache_is_refused_where_scores_need_all_queries(name: str) -> None:
    stack, x = decoder(name), inputs()
    _, cache = stack(x, return_hiddens=True)
    assert not stack.can_cache_kv
    with pytest.raises(AssertionError, match="cache"):
        stack(x, cache=cache)


@pytest.mark.quick
@pytest.mark.parametrize("name", STACKS)
def test_backends_agree(name: str) -> None:
    results = []
    for backend in ("eager", "cpu"):
        stack, x = decoder(name, backend=backend).double(), inputs(dtype=torch.float64).requires_grad_()
        out = stack(x, mask=torch.arange(11) < torch.tensor([[11], [7]]))
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, *stack.parameters()), allow_unused=True)))
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["real_former_selective_grouped", "alibi_sinks", "window_memories"])
def test_one_training_step_on_triton(name: str) -> None:
    results = []
    for backend in ("triton", "eager"):
        stack, x = decoder(name, backend=backend), inputs(9).requires_grad_()
        out = stack(x, mask=torch.arange(9) < torch.tensor([[9], [7]]))
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, *stack.parameters()))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("name", STACKS)
def test_copies_and_dtypes(name: str) -> None:
    stack, x = decoder(name), inputs()
    before, out = x.clone(), stack(x)
    assert torch.equal(x, before)
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        torch.testing.assert_close(other(x), out)
    torch.testing.assert_close(torch.func.functional_call(stack, dict(stack.named_parameters()), (x,)), out)
    fresh = Decoder(**{**SMALL, **STACKS[name]}).eval()
    fresh.load_state_dict(stack.state_dict())
    torch.testing.assert_close(fresh(x), out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (stack(x) - out).abs().max() < 0.2 * out.abs().max()
    assert (stack.bfloat16()(x.bfloat16()) - out).abs().max() < 0.2 * out.abs().max()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["plain", "real_former_sinks", "real_former_selective_grouped", "window_memories"])
def test_transforms_and_recomputation(name: str) -> None:
    stack, x = decoder(name).double(), inputs(5, torch.float64).requires_grad_()
    out = stack(x)
    torch.testing.assert_close(torch.vmap(lambda one: stack(one[None])[0])(x), out)
    torch.testing.assert_close(torch.func.jvp(stack, (x.detach(),), (x.detach(),))[0], out.detach())
    weights = {n: p.detach() for n, p in stack.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(stack, p, (x.detach(),)).sin().sum())(weights)
    for n, grad in zip(weights, torch.autograd.grad(out.sin().sum(), tuple(stack.parameters()), retain_graph=True), strict=True):
        torch.testing.assert_close(grads[n], grad)
    again = torch.utils.checkpoint.checkpoint(stack, x, use_reentrant=False)
    torch.testing.assert_close(*(torch.autograd.grad(t.sin().sum(), x)[0] for t in (again, out)))
    (grad,) = torch.autograd.grad(stack(x).sin().sum(), x, create_graph=True)
    assert bool(torch.autograd.grad(grad.square().sum(), x)[0].isfinite().all())
    assert stack(x[:, :0]).shape == (2, 0, 32)
    assert stack(x[:0]).shape == (0, 5, 32)


@pytest.mark.quick
def test_dropout_is_of_training_alone() -> None:
    q, k, v = qkv(64, dtype=torch.float32)
    attend = Attend(dropout=0.5)
    out, left = attend(q, k, v)
    assert not torch.allclose(out, attend.eval()(q, k, v)[0])
    torch.testing.assert_close(left.post_softmax_attn, attend(q, k, v)[1].post_softmax_attn)
    hard = Attend(dropout=0.5, hard=True)
    assert not torch.allclose(hard(q, k, v)[0], hard.eval()(q, k, v)[0])


@pytest.mark.quick
def test_explain_is_honest() -> None:
    q, k, v = qkv(512, dtype=torch.float32)
    assert Attend(causal=True, selective=True).explain(q, k, v).chosen == "cpu"
    told = Attend(post_talking_heads=True, heads=4).explain(q, k, v)
    assert told.chosen == "eager"
    assert "post_talking_heads works on whole arrays of scores" in str(told)
    assert "attn_delta" in str(Attend().explain(q, k, v, attn_delta=torch.zeros(1)))
    with pytest.raises(fa.UnsupportedError, match="float64"):
        Attend(backend="cuda")(*qkv(4))


@pytest.mark.quick
def test_alibi_needs_no_array() -> None:
    stack, x = decoder("plain", alibi_pos_bias=True, attn_max_attend_past=64), inputs(1024).requires_grad_()
    _, peak = peak_bytes(lambda: stack(x).sum().backward(), CPU)
    assert peak < 2 * 4 * 1024**2 * 4 / 2


@pytest.mark.quick
def test_clipping_bounds_the_scores() -> None:
    layer, x = Attention(32, dim_head=8, heads=4), inputs()
    layer.to_q.weight.data.mul_(30)
    _, left = layer(x, return_intermediates=True)
    layer.qk_clip_(left, tau=2.0)
    _, left = layer(x, return_intermediates=True)
    assert left.pre_softmax_attn.max() < 2.0 + 1e-4
    before = layer.to_q.weight.clone()
    layer.qk_clip_(-left.pre_softmax_attn.abs() - 1.0, tau=2.0)
    assert torch.equal(layer.to_q.weight, before)


@pytest.mark.quick
@pytest.mark.parametrize("positions", ["rotary_pos_emb", "polar_pos_emb"])
def test_positions_on_the_meta_device(positions: str) -> None:
    assert Decoder(**SMALL, **{positions: True}).to("meta")(inputs().to("meta")).shape == (2, 11, 32)


WORKS_HERE: dict[str, dict[str, Any]] = {
    "polar_uniform": {"polar_pos_emb": True, "polar_bias_uniform_init": True},
    "value_rmsnorm_grouped": {"attn_value_rmsnorm": True, "attn_kv_heads": 2},
    "sinks_real_former": {"attn_head_learned_sink": True, "residual_attn": True},
    "recurrence_beside": {"attn_hybrid_module": torch.nn.GRU(32, 32, batch_first=True)},
    "projected_positions_memories": {"attn_use_rel_proj_pos_bias": True, "attn_num_mem_kv": 2},
}


@pytest.mark.quick
@pytest.mark.parametrize("name", WORKS_HERE)
def test_what_fails_in_the_package_works(name: str) -> None:
    """Causal, and with gradients for every parameter that the output depends on."""
    stack, x = Decoder(**SMALL, **WORKS_HERE[name]).eval(), inputs()
    moved = x.clone()
    moved[:, 6:] = torch.randn(2, 5, 32)
    torch.testing.assert_close(stack(moved)[:, :6], stack(x)[:, :6], rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(stack(x).sin().sum(), tuple(stack.parameters()))
    assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.quick
def test_arrays_do_not_follow_what_changes_after_the_call() -> None:
    stack, x, seen = decoder("plain"), inputs(), torch.ones(2, 11, dtype=torch.bool)
    _, left = stack(x, self_attn_kv_mask=seen, return_hiddens=True)
    right = stack(x, self_attn_kv_mask=seen, return_hiddens=True)[1].attn_intermediates[0].post_softmax_attn
    seen[:, 2:] = False
    assert torch.equal(left.attn_intermediates[0].post_softmax_attn, right)
    with torch.no_grad():  # tensors of a graph cannot be copied
        _, left = stack(x, return_hiddens=True)
    for copied in (copy.deepcopy(left.attn_intermediates[0]), pickle.loads(pickle.dumps(left.attn_intermediates[0]))):
        torch.testing.assert_close(copied.post_softmax_attn, left.attn_intermediates[0].post_softmax_attn)
    bias = torch.zeros(11, 11)
    _, left = stack(x, attn_bias=bias, return_hiddens=True)
    bias += 1
    with pytest.raises(RuntimeError, match="modified in place"):
        _ = left.attn_intermediates[0].post_softmax_attn


@pytest.mark.quick
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["all_heads", "grouped"])
def test_real_former_holds_as_many_arrays_at_every_depth_without_gradients(kv_heads: int) -> None:
    peaks = []
    for depth in (3, 6):
        stack, x = decoder("plain", residual_attn=True, depth=depth, attn_kv_heads=kv_heads), inputs(512)
        with torch.no_grad():
            peaks.append(peak_bytes(lambda s=stack, x=x: s(x), CPU)[1])
    assert peaks[1] < peaks[0] + 0.2 * 2 * 4 * 512**2 * 4


@pytest.mark.quick
def test_no_sequences_at_all() -> None:
    assert decoder("forgetting")(inputs()[:0]).shape == (0, 11, 32)


LEFT_OUT: dict[str, dict[str, Any]] = {
    "flash_pack_seq": {"attn_flash_pack_seq": True, "attn_flash": True},
    "cope_soft_onehot_pos": {"attn_use_cope": True, "attn_cope_soft_onehot_pos": True},
}


@pytest.mark.quick
@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_refused_by_name(name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        Decoder(**SMALL, **LEFT_OUT[name])


@pytest.mark.quick
def test_wrong_calls_are_said() -> None:
    stack, x = decoder("plain"), inputs()
    with pytest.raises(TypeError, match="contex"):
        stack(x, contex=x)
    with pytest.raises(AssertionError, match="cross_attend"):
        stack(x, x)
    with pytest.raises(AssertionError, match="selective"):
        Encoder(**SMALL, selective=True)
    with pytest.raises(NotImplementedError, match="flash_pack_seq_kwargs"):
        stack(x, flash_pack_seq_kwargs={})
