"""What compute-sanitizer runs: every kernel of the GPU backends on small problems, held to the error rule.

``compute-sanitizer python -m tests.sanitized [BACKEND ...]`` prints a line per problem; it needs a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from fused_attn import backends
from fused_attn.testing import DIFFERENTIABLE, check_inputs
from fused_attn.testing.softmax import SoftmaxCase, check_softmax
from tests.problems import problems

# One length for each way in which a kernel spreads a row.
LENGTHS = (40, 200, 1000, 3000, 9000, 20_000)
HEAD_DIMS = (64, 128, 256)


def main(names: Sequence[str], device: torch.device) -> None:
    """Raises when a result breaks the error rule; what the sanitizer finds is for it to report."""
    for name in names:
        for dtype in (torch.float16, torch.float32):
            for head_dim in HEAD_DIMS:
                for title, inputs in problems(dtype, head_dim, device).items():
                    check_inputs(inputs, name, DIFFERENTIABLE, title)
                    print(f"{name} {dtype} {head_dim} {title}", flush=True)
        for length in LENGTHS:
            case = SoftmaxCase((3, 5, length), mask="bool", full=(1, 2), bias=True, dropout=0.3)
            check_softmax(case, name, device)
            print(f"{name} softmax {case.name}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1:] or [n for n in backends.names() if n not in ("cpu", "eager")], torch.device("cuda"))
