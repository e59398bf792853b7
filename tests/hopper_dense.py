"""Dense masks alone on the Hopper kernels, on the simulator: bits say themselves where the keys end, unless a column stands for all of them.

``python -m tests.hopper_dense`` in a process without TRITON_INTERPRET prints a line per call that holds the error rule.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.testing import check_inputs, inputs_of
from tests import hopper_product

HEADS, KV_HEADS, DIM = 4, 2, 64
# (q_len, kv_len): one key for one query and for many, and one key behind a tile.
LENGTHS = ((1, 1), (70, 1), (2, 65), (70, 129))


def masks(q_len: int, kv_len: int) -> Iterator[tuple[str, Tensor]]:
    """A mask's layouts in memory: each row keeps all keys or, but for the first, none where it is one column."""
    rows = torch.arange(q_len) % 3 != 1
    pairs = torch.rand(1, 1, q_len, kv_len) < 2 / 3
    pairs[..., 0] = True
    yield "pairs", pairs
    yield "keys", pairs[:, :, :1]
    yield "one column", rows[None, None, :, None]
    yield "expanded column", rows[None, None, :, None].expand(1, 1, q_len, kv_len)
    yield "one for all", torch.ones(1, 1, 1, 1, dtype=torch.bool)


def main() -> None:
    """Outputs, statistics and gradients of every call."""
    hopper_product.prepare()
    for mode, (q_len, kv_len) in zip(("late", "early", "random", "late"), LENGTHS, strict=True):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, heads, n, DIM).bfloat16() for heads, n in ((HEADS, q_len), (KV_HEADS, kv_len), (KV_HEADS, kv_len)))
        for name, mask in masks(q_len, kv_len):
            hopper_product.simulate(mode)
            title = f"{q_len}x{kv_len} {name} {mode}"
            check_inputs(inputs_of(q, k, v, mask=fa.Dense(mask)), "triton", ("out", "lse"), title=title)
            print(title, flush=True)


if __name__ == "__main__":
    main()
