"""The patch and torch's ``context_parallel``, which replaces the same name and gives each rank its share of the sequence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fused_attn.integrations import sdpa
from tests.processes import together
from tests.torch_reference import ORIGINAL

if not dist.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[object]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_torchs_wrapper_stays(alone):
    from torch.distributed.tensor.experimental import context_parallel

    with context_parallel(alone, buffers=[torch.randn(1, 2, 4, 8)], buffer_seq_dims=[2]):
        wrapper = F.scaled_dot_product_attention
        assert wrapper is not ORIGINAL
        with sdpa.patched():
            assert F.scaled_dot_product_attention is wrapper
        sdpa.install()
        assert F.scaled_dot_product_attention is wrapper
    assert F.scaled_dot_product_attention is ORIGINAL
    sdpa.uninstall()
    assert F.scaled_dot_product_attention is ORIGINAL


@pytest.mark.peers
def test_every_order_of_the_blocks_gives_the_whole_sequences_attention(tmp_path):
    ends = together(2, "tests.patched_ranks", tmp_path)
    assert [end.returncode for end in ends] == [0, 0], "\n".join(end.stdout[-2000:] for end in ends)
