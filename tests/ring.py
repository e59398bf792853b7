"""One rank of torch's own ring attention over this package's flash operators: ``python -m tests.ring RANK RANKS RENDEZVOUS``."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.attention as torchs
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

from fused_attn.integrations import flash_registry

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward


def check(rank: int, ranks: int, is_causal: bool, balanced: bool) -> None:
    """Output and gradients of this rank's part against the whole computed here; ``balanced`` gives each rank an early and a late part."""
    ring._cp_options.enable_load_balance = balanced
    q, k, v, dout = (torch.randn(2, 3, 16, 8) for _ in range(4))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    whole = FORWARD(*leaves, 0.0, is_causal)[0]
    wanted = [whole.detach(), *torch.autograd.grad(whole, leaves, dout)]
    parts = torch.arange(16).chunk(2 * ranks if balanced else ranks)
    mine = torch.cat([parts[rank], parts[-1 - rank]]) if balanced else parts[rank]
    q, k, v, dout = (t[:, :, mine].contiguous() for t in (q, k, v, dout))
    with torch.no_grad():
        group = dist.group.WORLD
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = ring._templated_ring_attention(
            group, 2, FORWARD, q, k, v, is_causal=is_causal, dropout_p=0.0
        )
        state = {"cum_seq_q": cum_q, "cum_seq_k": cum_k, "max_q": max_q, "max_k": max_k, "philox_seed": seed, "philox_offset": offset}
        grads = ring._templated_ring_attention_backward(
            group, 2, BACKWARD.default, dout, "grad_out", q, k, v, out, lse, is_causal=is_causal, dropout_p=0.0, **state
        )
    torch.testing.assert_close([out, *grads], [t[:, :, mine] for t in wanted])


if __name__ == "__main__":
    rank, ranks = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=ranks)
    flash_registry.register(device="cpu")
    torchs.activate_flash_attention_impl("fused_attn")
    for is_causal, balanced in ((False, False), (True, False), (True, True)):
        check(rank, ranks, is_causal, balanced)
    dist.destroy_process_group()
