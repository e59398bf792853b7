"""x-transformers' layers, our own and the package's fused ones, in one graph, arrays that are read afterwards included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_x_transformers import SMALL, decoder, inputs

pytestmark = [pytest.mark.slow, pytest.mark.peers]
FUSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 3},
    "forgetting": {"attn_data_dependent_alibi": True},
    "real_former_selective": {"residual_attn": True, "attn_selective": True, "attn_kv_heads": 2},
    "talking_heads": {"attn_pre_talking_heads": True},
}
NAMES = ("real_former_selective_grouped", "talking_heads", "forgetting", "window_memories")


def same_when_compiled() -> None:
    for name, stack in {**{n: decoder(n) for n in NAMES}, **fused_models()}.items():
        x = inputs().requires_grad_()
        torch._dynamo.reset()
        compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
        (out, left), (right, wanted) = compiled(x, return_hiddens=True), stack(x, return_hiddens=True)
        torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)
        for got, want in zip(left.attn_intermediates[1].to_tuple(), wanted.attn_intermediates[1].to_tuple(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for got, want in zip(*(torch.autograd.grad(t.sin().sum(), x) for t in (out, right)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        print(name)


def fused_models() -> dict[str, Any]:
    from x_transformers import Decoder

    from fused_attn.integrations.x_transformers import fuse

    torch.manual_seed(0)
    return {f"fused_{name}": fuse(Decoder(**SMALL, verbose=False, **options)) for name, options in FUSED.items()}


def test_one_graph() -> None:
    """In a process of its own: a compiler that has met the tests' stand-ins for torch's allocations does not know torch's own any more."""
    code = "from tests.test_x_transformers_compiled import same_when_compiled as run; run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [*NAMES, *(f"fused_{name}" for name in FUSED)]
