"""Every Triton configuration compiles for every chip of the table, spills next to nothing, and fits the chip's shared memory."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from fused_attn.backends.triton import config

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# ptxas counts a stack frame for indexed arrays as well; this much is not a spill in a loop.
MAX_STACK = 64


def compiled(chip: int, dtype: str, what: str) -> list[dict[str, Any]]:
    """What a fresh process, in which Triton does not interpret, compiled for the chip."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.aot", str(chip), dtype, what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def complaints(chip: int, kernels: list[dict[str, Any]]) -> list[str]:
    limit = config.SHARED_MEMORY[chip]
    return [
        str(kernel)
        for kernel in kernels
        if kernel["STACK"] > MAX_STACK or kernel["LOCAL"] > 0 or kernel["shared"] > limit or kernel["traps"]
    ]


def _configurations() -> Iterator[Any]:
    """Every entry of the table; one per chip and dtype, and all of sm_90's 16-bit ones, in every run."""
    for chip, dtype, size in itertools.product(config.SHARED_MEMORY, ("bfloat16", "float32"), config.HEAD_SIZES):
        always = size == {"bfloat16": 128, "float32": 64}[dtype] or (chip, dtype) == (90, "bfloat16")
        yield pytest.param(chip, dtype, size, id=f"sm_{chip}-{dtype}-{size}", marks=() if always else pytest.mark.exhaustive)


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "dtype", "head_size"), _configurations())
def test_attention_compiles_without_spills(chip: int, dtype: str, head_size: int) -> None:
    kernels = compiled(chip, dtype, str(head_size))
    names = {kernel["kernel"] for kernel in kernels}
    stages = ("fwd", "rows", "columns", "bwd_delta", "bwd_dq", "bwd_dkdv", "bwd_bias")
    assert names >= {f"_attention_{stage}_kernel" for stage in stages}
    assert not complaints(chip, kernels)
    if (chip, dtype) == (90, "bfloat16") and head_size < 256:
        plain = {kernel["kernel"]: kernel["HGMMA"] for kernel in kernels[: len(kernels) // 2]}
        assert plain["_attention_fwd_kernel"] and plain["_attention_bwd_dq_kernel"] and plain["_attention_bwd_dkdv_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", config.SHARED_MEMORY)
def test_softmax_compiles_without_spills(chip: int) -> None:
    kernels = compiled(chip, "bfloat16", "softmax")
    assert {kernel["kernel"] for kernel in kernels} == {"_softmax_fwd_kernel", "_softmax_bwd_kernel", "_softmax_bwd_bias_kernel"}
    assert not complaints(chip, kernels)
