"""Masks for models of the transformers package, without a model: against its own mask tensors."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.integrations.transformers.attention import Attend
from fused_attn.integrations.transformers.mask_tensor import KeyRuns, RowMask
from fused_attn.integrations.transformers.masks import row_mask
from fused_attn.integrations.transformers.patterns import Window, window_of

pytestmark = pytest.mark.quick
LAYER = SimpleNamespace(is_causal=True)


def library() -> Any:
    return pytest.importorskip("transformers.masking_utils", reason="transformers is not installed (make demo installs it)")


def patterns(hf: Any) -> dict[str, Any]:
    """Mask functions as models make them, for positions below 16."""
    images = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 1] + [-1] * 8, [0, 0, -1, -1, 2, 2, 2, 2] + [-1] * 8])
    packed = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2] + [2] * 8, [0] * 16])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2] + [3] * 8, list(range(16))])
    return {
        "causal": hf.causal_mask_function,
        "bidirectional": hf.bidirectional_mask_function,
        "sliding": hf.sliding_window_causal_mask_function(3),
        "sliding both ways": hf.sliding_window_bidirectional_mask_function(2),
        "chunked": hf.chunked_causal_mask_function(3, torch.tensor([0, 1])),
        "packed": hf.packed_sequence_compatibility_function(hf.causal_mask_function, positions, packed),
        "images": hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(images)),
        "gaps": hf.or_masks(hf.sliding_window_overlay(2), lambda b, h, q, kv: kv % 3 == 0),
    }


NAMES = ("causal", "bidirectional", "sliding", "sliding both ways", "chunked", "packed", "images", "gaps")
PADDINGS = {
    "none": None,
    "left": [[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8],
    "right": [[1] * 8, [1, 1, 1, 1, 1, 0, 0, 0]],
    "holes": [[1, 0, 1, 1, 0, 1, 1, 1], [1] * 8],
    "short": [[0, 1, 1, 1, 1, 1], [1] * 6],
    "nothing": [[0] * 8, [1] * 8],
}


@pytest.mark.parametrize("place", [(8, 8, 0, 0), (5, 8, 3, 0), (1, 8, 7, 0), (4, 6, 4, 2), (3, 8, 0, 0)], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_pairs_as_the_package(name: str, padding: str, place: tuple[int, int, int, int]) -> None:
    hf, (q_len, kv_len, q_offset, kv_offset) = library(), place
    keep = None if PADDINGS[padding] is None else torch.tensor(PADDINGS[padding]).bool()
    arguments: dict[str, Any] = {"batch_size": 2, "q_length": q_len, "kv_length": kv_len, "q_offset": q_offset, "kv_offset": kv_offset}
    arguments |= {"mask_function": patterns(hf)[name], "attention_mask": keep, "allow_is_causal_skip": False}
    want = hf.sdpa_mask(**arguments)
    for more in ({}, {"use_vmap": True}, {"q_offset": torch.tensor(q_offset)}):
        got = row_mask(**arguments | more)
        assert isinstance(got, RowMask) and got.shape == want.shape and got.dtype == torch.bool
        assert torch.equal(got.dense(), want)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "gaps"])
def test_two_integers_per_query(name: str, padding: str) -> None:
    keep = None if PADDINGS[padding] is None else torch.tensor(PADDINGS[padding])
    mask = row_mask(2, 8, 8, mask_function=patterns(library())[name], attention_mask=keep, allow_is_causal_skip=False)
    parts = getattr(mask.mask, "masks", (mask.mask,))
    assert all(isinstance(part, KeyRuns) for part in parts)
    assert mask.untyped_storage().nbytes() == 1


def test_gaps_cost_a_byte_per_pair_and_holes_one_per_key() -> None:
    mask = row_mask(2, 8, 8, mask_function=patterns(library())["gaps"], attention_mask=torch.tensor(PADDINGS["holes"]))
    assert [type(part) for part in mask.mask.masks] == [fa.Dense, fa.KeyPadding]


@pytest.mark.parametrize("kind", ["causal", "sliding", "bidirectional"])
@pytest.mark.parametrize("place", [(8, 8, 0), (1, 8, 7), (5, 8, 3), (1, 8, 3), (2, 2, 0), (8, 8, 2)], ids=str)
@pytest.mark.parametrize("padding", ["none", "left", "whole"])
def test_none_where_attention_knows_by_itself(kind: str, place: tuple[int, int, int], padding: str) -> None:
    """Never None where the package builds a mask, but for what its attention does the same without one."""
    hf, (q_len, kv_len, q_offset) = library(), place
    keep = {"none": None, "left": torch.arange(kv_len) > 0, "whole": torch.arange(kv_len) >= 0}[padding]
    arguments: dict[str, Any] = {"q_length": q_len, "kv_length": kv_len, "q_offset": q_offset, "mask_function": patterns(hf)[kind]}
    arguments |= {"batch_size": 1, "attention_mask": None if keep is None else keep[None]}
    got = row_mask(**arguments, allow_is_causal_skip=kind != "bidirectional", allow_is_bidirectional_skip=kind == "bidirectional")
    dense = hf.sdpa_mask(**arguments, allow_is_causal_skip=False)[0, 0]
    implied = torch.ones_like(dense) if kind == "bidirectional" or q_len == 1 else torch.ones_like(dense).tril()
    assert got is not None or torch.equal(dense, implied)
    if padding != "left" and place == (8, 8, 0) and kind != "sliding":
        assert got is None


@pytest.mark.parametrize(
    ("function", "window"),
    [
        (lambda b, h, q, kv: kv <= q, Window(None, 0)),
        (lambda b, h, q, kv: (q + 2 > kv) & (q - 3 <= kv), Window(3, 1)),
        (lambda b, h, q, kv: torch.logical_and(3 - kv >= 0 - q, kv >= 0), Window(None, 3)),
        (lambda b, h, q, kv: torch.abs(kv - q) < 3, Window(2, 2)),
        (lambda b, h, q, kv: q >= 0, Window()),
        (lambda b, h, q, kv: kv > 1, None),
        (lambda b, h, q, kv: kv < q, None),
        (lambda b, h, q, kv: abs(kv - q) > 2, None),
        (lambda b, h, q, kv: q == kv, None),
        (lambda b, h, q, kv: (kv <= q) | (kv < 3), None),
        (lambda b, h, q, kv: (kv <= q) & (b == 0), None),
        (lambda b, h, q, kv: kv <= q if q > 2 else kv < 9, None),
        (lambda b, h, q, kv: kv + q <= 9, None),
        (lambda b, h, q, kv: kv <= 2.5, None),
        (lambda b, h, q, kv: torch.sub(kv, q, alpha=2) <= 0, None),
        (lambda b, h, q, kv: True, None),
        (lambda b, h, q, kv: q, None),
    ],
)
def test_windows_are_found_and_nothing_else_is_taken_for_one(function: Any, window: Window | None) -> None:
    assert window_of(function) == window


def test_a_mask_is_a_tensor_to_everyone_else(tmp_path: Any) -> None:
    mask = row_mask(2, 5, 8, q_offset=3, attention_mask=torch.tensor(PADDINGS["left"]))
    dense = mask.dense()
    assert mask.dim() == 4 and mask.size(-1) == 8 and mask.device == dense.device and len(mask) == 2 and not mask.is_floating_point()
    for got, want in (
        (mask[:, :, 1:, :4], dense[:, :, 1:, :4]),
        (torch.cat([mask, mask], -1), torch.cat([dense, dense], -1)),
        (torch.where(mask, 1.0, -1.0), torch.where(dense, 1.0, -1.0)),
        (~mask, ~dense),
        (mask.to(torch.float32), dense.to(torch.float32)),
        (mask.mT, dense.mT),
        (mask.data, dense),
        (mask & dense, dense),
        (torch.zeros(2, 1, 5, 8).masked_fill(mask, 2.0), torch.zeros(2, 1, 5, 8).masked_fill(dense, 2.0)),
        (copy.deepcopy(mask), dense),
        (pickle.loads(pickle.dumps(mask)), dense),
    ):
        assert torch.equal(got, want)
    assert mask.tolist() == dense.tolist() and bool(mask.any())
    with pytest.raises(TypeError, match=r"must not be written to; got __setitem__\. Write to mask\.dense\(\)"):
        mask[0] = True
    with pytest.raises(TypeError, match="must not be written to; got fill_"):
        mask.fill_(True)


def test_a_mask_that_is_moved_stays_one() -> None:
    mask = row_mask(2, 8, 8, attention_mask=torch.tensor(PADDINGS["left"]))
    for same in (mask.to("cpu"), mask.detach(), mask.clone(), mask.contiguous(), mask.to(torch.bool), mask.cpu()):
        assert isinstance(same, RowMask) and torch.equal(same.dense(), mask.dense())
    there = mask.to("meta")
    assert isinstance(there, RowMask) and there.device.type == "meta" and there.mask.masks[0].start.device.type == "meta"
    assert type(mask.to(torch.float32)) is Tensor


def test_a_mask_may_be_written_into_others() -> None:
    mask = row_mask(1, 8, 8, attention_mask=torch.tensor(PADDINGS["left"])[:1])
    into = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    into.copy_(mask)
    assert torch.equal(into, mask.dense())
    into[:] = False
    into |= mask
    assert torch.equal(into, mask.dense())
    assert torch.equal(torch.zeros(1, 1, 8, 8).masked_fill_(mask, 1.0), mask.dense().float())


def test_padding_must_be_of_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[batch, tokens\].*\[8\]"):
        row_mask(1, 8, 8, attention_mask=torch.ones(8))


def test_a_mask_may_enter_and_leave_a_graph() -> None:
    def attend(x: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        out, _ = Attend()(LAYER, x, x, x, mask)
        again = row_mask(2, 8, 8, attention_mask=padding)
        return out + Attend()(LAYER, x, x, x, again)[0] + mask[:, :, :1, :1].float().mean()

    x, padding = torch.randn(2, 2, 8, 16), torch.tensor(PADDINGS["left"])
    mask = row_mask(2, 8, 8, attention_mask=padding)
    torch._dynamo.reset()
    got = torch.compile(attend, backend="aot_eager", fullgraph=True)(x, mask, padding)
    torch.testing.assert_close(got, attend(x, mask, padding))


def test_registering_and_taking_it_back() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (make demo installs it)")
    from fused_attn.integrations.transformers import NAME, register, unregister

    register(backend="cpu")
    try:
        assert transformers.AttentionInterface()[NAME].backend == "cpu"
        assert transformers.AttentionMaskInterface()[NAME].func is row_mask
        register()
        assert transformers.AttentionInterface()[NAME].backend == "auto"
    finally:
        unregister()
    assert NAME not in transformers.AttentionInterface() and NAME not in transformers.AttentionMaskInterface()
    unregister()
