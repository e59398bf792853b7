"""x-transformers' layers of our own in one graph, arrays that are read afterwards included."""

from __future__ import annotations

import pytest
import torch

from tests.test_x_transformers import decoder, inputs


@pytest.mark.parametrize("name", ["real_former_selective_grouped", "talking_heads", "forgetting", "window_memories"])
def test_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a graph cannot hold the tests' stand-ins for torch.empty_like
    stack, x = decoder(name), inputs().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    out, left = compiled(x, return_hiddens=True)
    right, right_left = stack(x, return_hiddens=True)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.attn_intermediates[1].post_softmax_attn, right_left.attn_intermediates[1].post_softmax_attn)
    for got, want in zip(*(torch.autograd.grad(t.sin().sum(), x) for t in (out, right)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
