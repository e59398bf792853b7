"""x-transformers' layers of our own in one graph, arrays that are read afterwards included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_x_transformers import decoder, inputs

pytestmark = [pytest.mark.slow, pytest.mark.peers]
NAMES = ("real_former_selective_grouped", "talking_heads", "forgetting", "window_memories")


def same_when_compiled() -> None:
    for name in NAMES:
        stack, x = decoder(name), inputs().requires_grad_()
        torch._dynamo.reset()
        compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
        (out, left), (right, wanted) = compiled(x, return_hiddens=True), stack(x, return_hiddens=True)
        torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)
        for got, want in zip(left.attn_intermediates[1].to_tuple(), wanted.attn_intermediates[1].to_tuple(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for got, want in zip(*(torch.autograd.grad(t.sin().sum(), x) for t in (out, right)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        print(name)


def test_one_graph() -> None:
    """In a process of its own: a compiler that has met the tests' stand-ins for torch's allocations does not know torch's own any more."""
    code = "from tests.test_x_transformers_compiled import same_when_compiled as run; run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(NAMES)
