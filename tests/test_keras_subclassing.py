"""Subclasses of Keras' layers get scores by argument, whichever method they override; the guide and the example run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.nn.keras import Attention, GroupQueryAttention, MultiHeadAttention

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[1]
X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Calls(MultiHeadAttention):
    """Overrides ``call`` and knows nothing of scores but the argument."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return super().call(*args, **kwargs)


class Attends(MultiHeadAttention):
    """Overrides ``_compute_attention`` in plain torch."""

    def _compute_attention(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, training: Any = None,
                           return_attention_scores: bool = False) -> Any:  # fmt: skip
        self.seen = (attention_mask, training, return_attention_scores)
        scores = torch.einsum("bqnh,bknh->bnqk", query, key) * self.key_dim**-0.5
        if attention_mask is not None:
            scores = scores.masked_fill(~(attention_mask[:, None] if attention_mask.dim() == 3 else attention_mask), -torch.inf)
        probs = scores.softmax(-1)
        return torch.einsum("bnqk,bknh->bqnh", probs, value), probs if return_attention_scores else None


class Delegates(MultiHeadAttention):
    """Overrides ``_compute_attention`` and calls the layer's own."""

    def _compute_attention(self, *args: Any, **kwargs: Any) -> Any:
        return super()._compute_attention(*args, **kwargs)


@pytest.mark.parametrize("layer_class", [Calls, Attends, Delegates])
@pytest.mark.parametrize(
    "call",
    [{}, {"use_causal_mask": True}, {"attention_mask": torch.rand(2, 2, 5, 5).tril(-1) + torch.eye(5)}],
    ids=["plain", "causal", "heads"],
)
def test_scores_come_whenever_they_are_asked_for(layer_class: type[MultiHeadAttention], call: dict[str, Any]) -> None:
    layer, plain = layer_class(2, 4), MultiHeadAttention(2, 4)
    out = layer(X, X, **call)
    plain.set_weights(layer.get_weights())
    for _ in range(2):
        got, scores = layer(X, X, **call, return_attention_scores=True)
        want, probs = plain(X, X, **call, return_attention_scores=True)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(scores, probs)
        torch.testing.assert_close(layer(X, X, **call), out)


def test_what_an_override_is_given() -> None:
    layer = Attends(2, 4, sliding_window=2)
    layer(X, X, value_mask=torch.arange(5).expand(2, 5) < 4, use_causal_mask=True, training=True)
    mask, training, return_scores = layer.seen
    band = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
    assert torch.equal(mask.expand(2, 5, 5), (band & (torch.arange(5) < 4)).expand(2, 5, 5)) and training is True and return_scores is False
    layer = Attends(2, 4)
    layer(X, X)
    assert layer.seen == (None, None, False)


def test_an_override_gets_keys_for_every_query_head() -> None:
    shapes = []

    class Grouped(GroupQueryAttention):
        def _compute_attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Any:
            shapes.append(key.shape)
            return super()._compute_attention(query, key, value, *args)

    layer, plain = Grouped(4, 6, 2), GroupQueryAttention(4, 6, 2)
    out, scores = layer(X, X, return_attention_scores=True)
    plain.set_weights(layer.get_weights())
    torch.testing.assert_close(out, plain(X, X))
    assert shapes == [(2, 5, 6, 4)] and scores.shape == (2, 6, 5, 5)


def test_a_call_with_other_arguments_builds() -> None:
    class One(MultiHeadAttention):
        def call(self, x: Tensor, return_attention_scores: bool = False) -> Any:  # type: ignore[override]
            return super().call(x, x, return_attention_scores=return_attention_scores)

    assert One(2, 4)(X, return_attention_scores=True)[1].shape == (2, 2, 5, 5)


def test_an_override_of_projections() -> None:
    class Halved(MultiHeadAttention):
        def call(self, query: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert self.query_dense(query).shape == (2, 5, 2, 4)
            return super().call(query / 2, value, *args, **kwargs)

    assert Halved(2, 4)(X, X).shape == X.shape


@pytest.mark.parametrize(
    ("base", "name"),
    [(MultiHeadAttention, "_masked_softmax"), (GroupQueryAttention, "_compute_attention_mask"), (Attention, "_calculate_scores")],
)
def test_overrides_that_nothing_calls_are_refused(base: type, name: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine must override methods that are called; got {name}"):
        type("Mine", (base,), {name: lambda self: None})


def test_an_override_may_call_what_it_defines() -> None:
    class Mine(Attends):
        def _masked_softmax(self) -> None:
            """Its own ``_compute_attention`` may."""

    class Own(Attention):
        def call(self, inputs: Any, **kwargs: Any) -> Any:
            return self._calculate_scores(*inputs)

        def _calculate_scores(self, query: Tensor, value: Tensor) -> Tensor:
            return query @ value.mT

    assert Mine(2, 4)(X, X).shape == X.shape and Own()([X, X]).shape == (2, 5, 5)


@pytest.mark.parametrize("title", ["Keras", "TF-Keras 2.11"])
def test_the_page_of_migrating_runs(title: str) -> None:
    section = (ROOT / "docs" / "migrating.md").read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)), title, "exec"), {})


class Mixed:
    """A class of no layer that has what nothing calls."""

    def _masked_softmax(self) -> None:
        """Of no use."""


def test_a_mixin_is_no_way_around() -> None:
    with pytest.raises(TypeError, match="must override methods that are called; got _masked_softmax"):
        type("Mine", (Mixed, MultiHeadAttention), {})
    assert type("Fine", (Mixed, Attends), {})(2, 4)(X, X).shape == X.shape
