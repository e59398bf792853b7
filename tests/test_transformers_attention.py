"""What attention does with each argument that models of the transformers package hand over, against the formula in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.integrations.transformers import attention as module
from fused_attn.integrations.transformers.attention import Attend
from fused_attn.integrations.transformers.masks import row_mask

pytestmark = pytest.mark.quick
BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, HEAD_DIM = 2, 4, 2, 5, 8, 6
LAYER = SimpleNamespace(is_causal=True)


def tensors(q_len: int = Q_LEN, kv_len: int = KV_LEN, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, HEADS, q_len, HEAD_DIM), (BATCH, KV_HEADS, kv_len, HEAD_DIM), (BATCH, KV_HEADS, kv_len, HEAD_DIM + 1))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


def formula(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | bool = True, **terms: Any) -> tuple[Tensor, Tensor]:
    """Output [batch, q_len, heads, value_dim] and weights in plain torch."""
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    scores = q @ k.mT * terms.get("scale", HEAD_DIM**-0.5)
    cap = terms.get("cap")
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = (scores + terms.get("bias", 0.0)).masked_fill(~torch.as_tensor(allowed), -torch.inf)
    sinks = terms.get("sinks")
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], -1)
    probs = scores.softmax(-1)[..., : k.shape[2]]
    return (probs @ v).transpose(1, 2), probs


def hold(got: tuple[Tensor, Tensor | None], want: tuple[Tensor, Tensor], *leaves: Tensor) -> None:
    """Outputs, weights and the gradients of both are the formula's, but for float64's rounding."""
    assert got[1] is not None
    dout, dprobs = torch.randn_like(want[0]), torch.randn_like(want[1])
    grads = [torch.autograd.grad(results, leaves, (dout, dprobs)) for results in (got, want)]
    for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert got[0].is_contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, layer: Any = LAYER, **options: Any) -> Any:
    return Attend()(layer, q, k, v, mask, output_attentions=True, **options)


KEEP = torch.rand(BATCH, 1, Q_LEN, KV_LEN, generator=torch.Generator().manual_seed(1)) > 0.3
KEEP[..., 0] = True


def test_a_bool_mask_and_the_default_scale() -> None:
    q, k, v = tensors()
    hold(attend(q, k, v, KEEP), formula(q, k, v, KEEP), q, k, v)


def test_a_float_mask_is_added_with_its_gradient() -> None:
    (q, k, v), mask = tensors(), torch.randn(BATCH, 1, Q_LEN, KV_LEN, dtype=torch.float64, requires_grad=True)
    hold(attend(q, k, v, mask, scaling=1.0), formula(q, k, v, bias=mask, scale=1.0), q, k, v, mask)


def test_a_scale_that_learns() -> None:
    (q, k, v), scale = tensors(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    hold(attend(q, k, v, KEEP, scaling=scale), formula(q, k, v, KEEP, scale=scale), q, k, v, scale)


def test_the_cap_comes_before_bias_and_mask() -> None:
    (q, k, v), bias = tensors(), torch.randn(1, HEADS, Q_LEN, KV_LEN, dtype=torch.float64, requires_grad=True)
    got = attend(q, k, v, KEEP, softcap=1.5, position_bias=bias, scaling=2.0)
    hold(got, formula(q, k, v, KEEP, cap=1.5, bias=bias, scale=2.0), q, k, v, bias)


@pytest.mark.parametrize("name", ["s_aux", "sinks"])
@pytest.mark.parametrize("shape", [(HEADS,), (1, HEADS, 1, 1), (BATCH, HEADS, Q_LEN, 1)], ids=str)
def test_sinks_per_head_and_per_query(name: str, shape: tuple[int, ...]) -> None:
    (q, k, v), sinks = tensors(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    want = formula(q, k, v, KEEP, sinks=sinks if len(shape) == 4 else sinks[:, None, None])
    hold(attend(q, k, v, KEEP, **{name: sinks}), want, q, k, v, sinks)


def test_chosen_keys() -> None:
    q, k, v = tensors()
    indices = torch.tensor([0, 3, -1, KV_LEN]).expand(BATCH, Q_LEN, 4)
    allowed = torch.zeros(KV_LEN, dtype=torch.bool)
    allowed[[0, 3]] = True
    hold(attend(q, k, v, KEEP, indices=indices), formula(q, k, v, KEEP & allowed), q, k, v)


CAUSAL = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool).tril()
ALL = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool)
DISTANCE = torch.arange(Q_LEN)[:, None] + KV_LEN - Q_LEN - torch.arange(KV_LEN)


@pytest.mark.parametrize(
    ("layer", "options", "allowed"),
    [
        (SimpleNamespace(), {}, CAUSAL),
        (SimpleNamespace(is_causal=False), {}, ALL),
        (SimpleNamespace(is_causal=False), {"is_causal": True}, CAUSAL),
        (LAYER, {"is_causal": False}, ALL),
        (LAYER, {"is_causal": False, "sliding_window": 3}, DISTANCE.abs() < 3),
        (LAYER, {"sliding_window": 2}, CAUSAL & ~CAUSAL.tril(-2)),
        (LAYER, {"sliding_window": KV_LEN}, CAUSAL),
        (LAYER, {"sliding_window": None}, CAUSAL),
    ],
    ids=["default", "module", "keyword", "keyword says no", "window", "causal window", "wide window", "no window"],
)
def test_without_a_mask(layer: Any, options: dict[str, Any], allowed: Tensor) -> None:
    q, k, v = tensors()
    got, want = attend(q, k, v, None, layer, **options), formula(q, k, v, allowed)
    if torch.equal(allowed, allowed & CAUSAL):  # the keys beyond the queries are those of an empty static cache
        assert got[1].shape[-1] == Q_LEN
        got = got[0], torch.nn.functional.pad(got[1], (0, KV_LEN - Q_LEN))
    hold(got, want, q, k, v)


def test_one_query_attends_to_all_keys_or_to_the_last_of_a_window() -> None:
    q, k, v = tensors(1)
    hold(attend(q, k, v), formula(q, k, v), q, k, v)
    hold(attend(q, k, v, sliding_window=3), formula(q, k, v, torch.arange(KV_LEN) > KV_LEN - 4), q, k, v)


def test_more_queries_than_keys_are_aligned_at_the_first() -> None:
    q, k, v = tensors(8, 5)
    hold(attend(q, k, v), formula(q, k, v, torch.ones(8, 5, dtype=torch.bool).tril()), q, k, v)


def test_a_bias_is_cropped_with_the_keys() -> None:
    (q, k, v), bias = tensors(), torch.randn(1, HEADS, Q_LEN, KV_LEN, dtype=torch.float64)
    got, _ = attend(q, k, v, position_bias=bias)
    torch.testing.assert_close(got, formula(q, k, v, CAUSAL, bias=bias)[0])


def test_packed_sequences() -> None:
    q, k, v = (torch.randn(1, HEADS, 6, HEAD_DIM, dtype=torch.float64) for _ in range(3))
    ends, documents = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 0, 1, 1, 1, 1])
    got = attend(q, k, v, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=4, max_length_k=4)[0]
    want = fa.attention(q, k, v, mask=fa.Causal() & fa.Documents(documents)).transpose(1, 2)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k must be given together"):
        attend(q, k, v, cu_seq_lens_q=ends)


def test_queries_of_one_batch_for_all_keys() -> None:
    q, k, v = tensors(batch=1)
    hold(attend(q, k, v, KEEP), formula(q, k, v, KEEP), q, k, v)


def test_dropout_follows_torchs_generator_and_leaves_the_weights() -> None:
    q, k, v = tensors()
    torch.manual_seed(3)
    first, probs = attend(q, k, v, KEEP, dropout=0.5)
    torch.manual_seed(3)
    again, _ = attend(q, k, v, KEEP, dropout=0.5)
    assert torch.equal(first, again) and not torch.equal(first, attend(q, k, v, KEEP)[0])
    torch.testing.assert_close(probs, formula(q, k, v, KEEP)[1])


def test_weights_are_computed_for_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[fa.AuxRequest] = []
    real = module.attention
    monkeypatch.setattr(module, "attention", lambda *args, **kwargs: requests.append(kwargs["return_aux"]) or real(*args, **kwargs))
    collected: list[Any] = [None, {"hidden_states": []}, {"hidden_states": [], "attentions": []}, {"cross_attentions": []}]
    for found in collected:
        Attend("auto", SimpleNamespace(get=lambda found=found: found))(LAYER, *tensors(), KEEP)
    Attend()(LAYER, *tensors(), KEEP, output_attentions=True)
    assert [r.probs for r in requests] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_indices": torch.zeros(1)}, "block_indices must be None for fused_attn; got torch.float32 .* blocks of keys"),
        ({"cache": SimpleNamespace()}, "cache must be None for fused_attn; got SimpleNamespace.* pages"),
        ({"head_mask": torch.ones(4)}, "head_mask must be None"),
        ({"use_top_left_mask": True}, "use_top_left_mask must be None"),
        ({"temperature": 2.0}, "must be known to fused_attn.*got temperature=2.0. Leave it out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_change_the_meaning_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fa.UnsupportedError, match=message):
        attend(*tensors(), KEEP, **options)


@pytest.mark.parametrize("options", [{"softcap": 0.0}, {"s_aux": torch.zeros(HEADS), "sinks": torch.zeros(HEADS)}], ids=["cap", "sinks"])
def test_mistakes_name_the_keyword(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        attend(*tensors(), KEEP, **options)


def test_what_changes_nothing_passes() -> None:
    q, k, v = tensors()
    options = {"position_ids": torch.arange(Q_LEN), "use_cache": True, "cache_position": torch.arange(Q_LEN), "output_router_logits": True}
    more = {"encoder_hidden_states": torch.zeros(1), "temperature": None, "head_mask": None, "deterministic": True}
    assert torch.equal(attend(q, k, v, KEEP, **options, **more)[0], attend(q, k, v, KEEP)[0])


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            row_mask(BATCH, 4, KV_LEN, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1] * 8])),
            ValueError,
            "attention_mask must have shape .* 5 queries",
        ),
        (KEEP.long(), TypeError, "attention_mask must be bool or floating point"),
    ],
    ids=["of other lengths", "of integers"],
)
def test_a_wrong_mask_is_refused(mask: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attend(*tensors(), mask)


def test_the_backend_is_the_one_asked_for(counting: Any) -> None:
    Attend("counting")(LAYER, *tensors(), None)
    assert counting.calls == 1
