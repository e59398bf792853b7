"""Masks of x-transformers' layers of our own: arrays, masks of this package, memories in front, rows and keys that nothing is left of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_attn as fa
from fused_attn.lowering import Grid
from fused_attn.nn.x_transformers import Attend, Decoder, Encoder, PrefixDecoder
from fused_attn.nn.x_transformers.pairs import Pairs
from tests.test_x_transformers import CPU, SMALL, decoder, inputs, qkv


@pytest.mark.quick
def test_rows_without_keys() -> None:
    """Zeros where the mask alone leaves none; where causality takes the last one, the mean of all values, or zeros with flash."""
    q, k, v = qkv(4)
    mask = torch.tensor([[False, False, True, True], [False] * 4])
    out, left = Attend(causal=True)(q, k, v, mask=mask)
    torch.testing.assert_close(out[0, :, :2], v[0].mean(1, keepdim=True).expand(-1, 2, -1))
    assert torch.count_nonzero(out[1]) == 0
    torch.testing.assert_close(left.post_softmax_attn[1], torch.full((4, 4, 4), 0.25, dtype=torch.float64))
    assert torch.count_nonzero(Attend(causal=True, flash=True)(q, k, v, mask=mask)[0][0, :, :2]) == 0


@pytest.mark.quick
def test_a_prefix_is_causal_from_there_on() -> None:
    stack = PrefixDecoder(**SMALL, attn_num_mem_kv=2).eval()
    x = inputs()
    moved = x.clone()
    moved[:, 5:] = torch.randn(2, 6, 32)
    changed = (stack(x, prefix_attn_len=4) - stack(moved, prefix_attn_len=4)).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 5 + [True] * 6
    moved = x.clone()
    moved[:, 3] = torch.randn(2, 32)
    assert bool(((stack(x, prefix_attn_len=4) - stack(moved, prefix_attn_len=4)).abs().amax((0, 2)) > 1e-6).all())
    both = stack(x, prefix_attn_len=4, attn_mask=torch.ones(11, 11, dtype=torch.bool))
    torch.testing.assert_close(both, stack(x, prefix_attn_len=torch.tensor([4, 4])))


@pytest.mark.quick
@pytest.mark.parametrize(
    "more",
    [{}, {"attn_num_mem_kv": 2}, {"attn_max_attend_past": 3}, {"attn_post_talking_heads": True}],
    ids=lambda o: next(iter(o), "plain"),
)
@pytest.mark.parametrize("cls", [Encoder, Decoder], ids=lambda cls: cls.__name__)
def test_masks_of_this_package_are_those_of_arrays(cls: Any, more: dict[str, Any]) -> None:
    stack, x = cls(**SMALL, **more).eval(), inputs()
    ids, places = torch.tensor([0] * 4 + [1] * 7), torch.arange(11)
    cases = [(fa.Band(3), (places[:, None] - places).abs() < 3)]
    cases += [] if "attn_num_mem_kv" in more else [(fa.Documents(ids), ids[:, None] == ids)]
    for mask in (None, places < torch.tensor([[11], [6]])):
        for pairs, array in cases:
            torch.testing.assert_close(stack(x, mask=mask, attn_mask=pairs), stack(x, mask=mask, attn_mask=array), rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_memories_are_open_to_masks_and_biases_that_leave_them_out() -> None:
    stack, x = decoder("plain", attn_num_mem_kv=2), inputs()
    torch.testing.assert_close(stack(x, attn_mask=torch.ones(11, 11, dtype=torch.bool)), stack(x))
    torch.testing.assert_close(stack(x, attn_bias=torch.zeros(4, 11, 11)), stack(x))


MASKS: dict[str, Any] = {
    "documents": fa.Documents(torch.tensor([0] * 4 + [1] * 7)),
    "padding": fa.KeyPadding(torch.arange(11) < torch.tensor([[11], [6]])),
    "lengths": fa.ValidLengths(torch.tensor([0, 7])),
    "chunks": fa.Chunked(4),
    "blocks": fa.BlockCausal(4),
    "prefix": fa.PrefixLM(3),
    "not_a_prefix": ~fa.PrefixLM(3),
    "future": ~fa.Causal(),
    "window_of_chunks": fa.Band(3) & fa.Chunked(4),
    "one_or_the_other": fa.Documents(torch.tensor([0] * 4 + [1] * 7)) | fa.Band(2),
    "array": fa.Dense(torch.eye(11, dtype=torch.bool)),
}


@pytest.mark.quick
@pytest.mark.parametrize("more", [{}, {"attn_max_attend_past": 3}, {"attn_pre_talking_heads": True}], ids=lambda o: next(iter(o), "plain"))
@pytest.mark.parametrize("name", MASKS)
def test_masks_do_not_count_memories(name: str, more: dict[str, Any]) -> None:
    mask, array = MASKS[name], MASKS[name].allowed(Grid((2, 4, 11, 11), CPU))
    for memories in (2, 0):
        stack = Encoder(**SMALL, attn_num_mem_kv=memories, **more).eval()
        torch.testing.assert_close(stack(inputs(), attn_mask=mask), stack(inputs(), attn_mask=array), rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_intervals_stay_intervals_behind_memories() -> None:
    grid = Grid((2, 4, 11, 13), CPU, 2)
    for mask in (fa.Causal(), fa.PrefixLM(3), fa.ValidLengths(torch.tensor([0, 7]))):
        form = Pairs(grid, 2, None, mask, None, False).mask().lower(grid)
        assert form.keep is None and not form.rules


@pytest.mark.quick
@pytest.mark.parametrize("option", ["attn_hard", "attn_pre_talking_heads", "attn_cog_signed", "attn_sigmoid"])
def test_rows_that_a_mask_of_this_package_empties_are_zeros(option: str) -> None:
    layer = Encoder(dim=32, depth=1, heads=4, attn_dim_head=8, **{option: True}).layers[0][1]
    assert torch.count_nonzero(layer(inputs(), attn_mask=~fa.Causal())[:, -1]) == 0


@pytest.mark.quick
@pytest.mark.parametrize("option", ["attn_hard", "attn_pre_talking_heads", "attn_softclamp_logits"])
def test_nan_in_hidden_keys_stays_there(option: str) -> None:
    layer, x = Encoder(dim=32, depth=1, heads=4, attn_dim_head=8, **{option: True}).layers[0][1], inputs()
    context, seen = torch.randn(2, 6, 32), torch.arange(6).expand(2, -1) < 4
    right = layer(x, context=context, context_mask=seen)
    context[:, 4:] = torch.nan
    torch.testing.assert_close(layer(x, context=context, context_mask=seen), right)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["mask", "context_mask", "self_attn_kv_mask", "attn_mask"])
def test_masks_of_numbers_are_named(name: str) -> None:
    numbers = torch.ones(11, 11) if name == "attn_mask" else torch.ones(2, 11)
    call = {"context": inputs(), name: numbers} if name == "context_mask" else {name: numbers}
    stack = Encoder(**SMALL, cross_attend=name == "context_mask")
    with pytest.raises(AssertionError, match=rf"{name}.* must be bool"):
        stack(inputs(), **call)


@pytest.mark.quick
def test_rows_that_lost_their_keys_move_no_gate_of_selective_attention() -> None:
    q, k, v = qkv(6)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[0, 0, 4, :5] = False
    out, _ = Attend(causal=True, selective=True)(q, k, v, mask=mask)
    torch.testing.assert_close(out[:, :, 4], v.mean(2))
    assert torch.count_nonzero(torch.autograd.grad(out[:, :, 4].sin().sum(), k)[0]) == 0


@pytest.mark.quick
def test_one_flag_for_all_keys_of_a_sequence() -> None:
    layer, x, context = Encoder(**SMALL, attn_max_attend_past=3).layers[0][1], inputs(), inputs()[:, :6]
    flag = torch.tensor([[True], [False]])
    torch.testing.assert_close(layer(x, context=context, context_mask=flag), layer(x, context=context, context_mask=flag.expand(-1, 6)))
