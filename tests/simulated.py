"""Runs the compiled Triton kernels of a CUDA chip on a PTX simulator: the library's own launch code, CPU tensors, no GPU.

``python -m tests.simulated CHIP DTYPE`` (in a process without TRITON_INTERPRET) holds small problems to the error rule and prints their names; it
ends with an error when one breaks it or when the simulator finds a race, a missing wait or an access outside a tensor.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch

import fused_attn as fa
from fused_attn.testing import DIFFERENTIABLE, check_inputs, inputs_of
from fused_attn.testing.softmax import SoftmaxCase, check_softmax
from tests import aot, native
from tests.problems import problems


def _runtime_arguments(values: Any, signature: Any) -> list[Any]:
    """The kernel's parameters in order: named tuples flattened, compile-time constants left out."""
    if isinstance(signature, (tuple, list)):
        return [flat for value, part in zip(values, signature, strict=True) for flat in _runtime_arguments(value, part)]
    return [] if signature == "constexpr" else [values]


class _Simulated(aot.CompileOnly):
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        super().__call__(*args, **kwargs)
        compiled = aot.compiled[-1][1]
        signature = list(compiled.src.signature.values())
        flat = [v for value, part in zip(args, signature, strict=True) for v in _runtime_arguments(value, part)]
        importlib.import_module("cusim.triton").launch(compiled, self.grid, flat)


def simulate(chip: int, hopper: bool = False) -> None:
    """From here on every Triton launch of this process is compiled for ``chip`` and simulated; ``hopper`` as for ``aot.target``."""
    native.simulator()
    aot.target(chip, _Simulated, hopper)
    # The kernels are compiled functions by now; this only makes the backend accept CPU tensors.
    for module in ("attention_fwd", "attention_aux", "attention_bwd", "softmax"):
        importlib.import_module(f"fused_attn.backends.triton.{module}")
    os.environ["TRITON_INTERPRET"] = "1"


def check_additive(dtype: torch.dtype) -> None:
    """Two heads that share their keys, two tiles of keys, masked and full tiles, and the gradient of a weight per head."""
    q, k, v = (torch.randn(1, h, n, 20).to(dtype) for h, n in ((2, 24), (1, 80), (1, 80)))
    scoring = fa.Additive(torch.randn(2, 20), torch.tensor(0.8))
    options = {"mask": fa.SlidingWindow(60, 5), "q_offset": 50, "score_mods": (fa.SoftCap(2.0), fa.Bias(torch.randn(2, 1, 80)))}
    inputs = inputs_of(q, k, v, scoring=scoring, sinks=torch.randn(2), dropout=fa.Dropout(0.3, seed=5), **options)
    check_inputs(inputs, "triton", DIFFERENTIABLE, title="additive, simulated")


def check_broken(dtype: torch.dtype) -> None:
    """Documents of which the first holds NaN in a key, a value, a query and a gradient: mended to what the others are without them."""
    documents = fa.Documents(torch.arange(70) // 25)
    tensors = [torch.randn(1, 2, 70, 32).to(dtype) for _ in range(4)]

    def run() -> tuple[torch.Tensor, ...]:
        q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
        out = fa.attention(q, k, v, mask=documents, backend="triton")
        return out, *torch.autograd.grad(out, (q, k, v), tensors[3])

    clean = run()
    for row, tensor in zip((3, 7, 11, 16), tensors, strict=True):
        tensor[:, :, row, 5] = torch.nan
    for got, right in zip(run(), clean, strict=True):
        # Mending rounds its own weights to the inputs' dtype: a few roundings of the largest element.
        atol = 8 * torch.finfo(dtype).eps * float(right.detach().abs().max())
        torch.testing.assert_close(got[:, :, 25:], right[:, :, 25:], rtol=0.0, atol=atol)
        assert bool(got[:, :, :25].isnan().any())


def check_sigmoid(dtype: torch.dtype) -> None:
    """Another normaliser, masked and full tiles, and rows without keys as a fill that is added leaves them."""
    q, k, v = (torch.randn(1, h, n, 32).to(dtype) for h, n in ((2, 40), (1, 140), (1, 140)))
    options = {"mask": fa.Causal(), "q_offset": 90, "score_mods": (fa.SoftCap(2.0),), "dropout": fa.Dropout(0.3, seed=5)}
    request = fa.AuxRequest(probs=True, scores=True, max_scores=True, column_sums=True)
    inputs = inputs_of(q, k, v, **options, normalizer=fa.Sigmoid(-1.0), return_aux=request)
    check_inputs(inputs, "triton", ("out", "probs", "scores"), title="sigmoid")
    empty = inputs_of(q, k, v, mask=fa.Causal(), q_offset=-20, empty_rows="softmax")
    check_inputs(empty, "triton", DIFFERENTIABLE, title="empty rows")


def check_one_query(dtype: torch.dtype) -> None:
    """One query, a constant to Triton, that meets one key of its batch or all of them."""
    q, k, v = (torch.randn(2, 1, n, 64).to(dtype) for n in (1, 70, 70))
    check_inputs(inputs_of(q, k, v, mask=fa.Causal(), q_offset=torch.tensor([0, 73])), "triton", ("out",), title="one query")


if __name__ == "__main__":
    torch.manual_seed(0)
    simulate(int(sys.argv[1]))
    for name, inputs in problems(getattr(torch, sys.argv[2])).items():
        check_inputs(inputs, "triton", DIFFERENTIABLE, title=f"{name}, simulated sm_{sys.argv[1]}")
        print(name)
    check_additive(getattr(torch, sys.argv[2]))
    print("additive")
    check_sigmoid(getattr(torch, sys.argv[2]))
    print("sigmoid")
    check_broken(getattr(torch, sys.argv[2]))
    print("broken")
    check_one_query(getattr(torch, sys.argv[2]))
    print("one query")
    for length in (40, 3000):  # a row in one tile, and in several
        check_softmax(SoftmaxCase((3, 5, length), mask="bool", full=(1, 2), bias=True, dropout=0.3), "triton")
        print(f"softmax{length}")
