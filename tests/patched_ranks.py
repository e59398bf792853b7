"""One rank of torch's ``context_parallel`` with the patch in every order around it: ``python -m tests.patched_ranks RANK RANKS FOLDER``.

torch's ``context_parallel`` refuses CPU tensors: it has handlers for the operators of its CUDA kernels alone. Here its own ring is given the
operators of torch's CPU kernel, too; the wrapper, the dispatcher, the order of the rows and the transfers are torch's as they are.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

from fused_attn.integrations import sdpa

ORIGINAL = F.scaled_dot_product_attention
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
LENGTH = 16


def ring_of_cpus(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
    """What torch's handlers do for CUDA's operators."""
    mesh = args[0].device_mesh
    given = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    given = {name: value._local_tensor if isinstance(value, DTensor) else value for name, value in given.items()}
    if op is FORWARD:
        results = ring._templated_ring_attention(mesh.get_group(), 2, op, **given)
    else:
        results = ring._templated_ring_attention_backward(mesh.get_group(), 2, op, grad_out_name="grad_out", **given)
    return tuple(DTensor.from_local(t, mesh, [Shard(2)], run_check=False) for t in results)


class Check:
    """A call of F's attribute, whose outputs and gradients must be the whole sequence's, whoever computes them.

    Args:
        is_causal: with it queries and keys are as many; without, the keys are twice as many.
        balanced: whether each rank has an early and a late part.
    """

    def __init__(self, is_causal: bool, balanced: bool) -> None:
        self.is_causal, self.balanced = is_causal, balanced
        lengths = (LENGTH, *2 * [LENGTH if is_causal else 2 * LENGTH])
        self.tensors, self.incoming = [torch.randn(2, 3, n, 8) for n in lengths], torch.randn(2, 3, LENGTH, 8)
        # context_parallel shortens them to this rank's and gives them back their length.
        self.rows = [torch.arange(n) for n in lengths]
        self.wanted = self.results(ORIGINAL)

    def parallel(self, mesh: DeviceMesh) -> AbstractContextManager[None]:
        ring._cp_options.enable_load_balance = self.balanced
        return context_parallel(mesh, buffers=self.rows, buffer_seq_dims=[0] * 3)

    def results(self, attend: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t[:, :, rows].requires_grad_() for t, rows in zip(self.tensors, self.rows, strict=True)]
        out = attend(*leaves, is_causal=self.is_causal)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.incoming[:, :, self.rows[0]])]

    def __call__(self, attend: Callable[..., Tensor] | None = None) -> None:
        wanted = [t[:, :, rows] for t, rows in zip(self.wanted, (self.rows[0], *self.rows), strict=True)]
        torch.testing.assert_close(self.results(attend or F.scaled_dot_product_attention), wanted)


class Installed:
    """``install`` and ``uninstall`` as a block."""

    def __enter__(self) -> None:
        sdpa.install()

    def __exit__(self, *error: object) -> None:
        sdpa.uninstall()


def orders() -> Iterator[tuple[str, ...]]:
    """Every order in which three blocks may begin and end, crossed ones too: a letter's first time is its block's begin."""
    yield from sorted(set(itertools.permutations(("parallel", "installed", "patched") * 2)))


def follow(order: tuple[str, ...], check: Check, mesh: DeviceMesh, ours: Counter[str]) -> None:
    """Begins and ends the blocks, with a call after each step; calls outside context_parallel are ours where a patch began there."""
    blocks = {"parallel": check.parallel(mesh), "installed": Installed(), "patched": sdpa.patched()}
    running: dict[str, bool] = {}  # and whether it began outside context_parallel
    for name in order:
        if running.pop(name, None) is None:
            running[name] = "parallel" not in running
            blocks[name].__enter__()
        else:
            blocks[name].__exit__(None, None, None)
        ours.clear()
        check()
        patches = [began_outside for block, began_outside in running.items() if block != "parallel"]
        if "parallel" in running or not patches:
            assert ours["calls"] == 0, order
        elif any(patches):
            assert ours["calls"] == 1, order
    with sdpa.patched():
        pass  # what outlived a patch below it put the stand-in back, which goes with the next
    assert F.scaled_dot_product_attention is ORIGINAL and not sdpa._displaced and not sdpa._requests, order


class Attention(nn.Module):
    """What torch's other way wraps: a module, whose inputs become DTensors."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def wrapped_module(check: Check, mesh: DeviceMesh, ours: Counter[str]) -> None:
    """The module within a patch that began before, and within one that began after, the dispatcher was told."""
    style = ring._ContextParallel(seq_dim=2, attention_type=ring._ContextParallel.AttentionType.SDPA)
    module = style._apply(Attention(), mesh)
    with check.parallel(mesh):
        parts = [rows.clone() for rows in check.rows]
    check.rows, whole = parts, check.rows
    ring._cp_options.enable_load_balance = check.balanced
    with sdpa.patched():
        ring._enable_context_parallel_dispatcher()
        with sdpa.patched():
            check(module)
    with Installed():
        check(module)
    ring._disable_context_parallel_dispatcher()
    check.rows = whole
    assert ours["calls"] == 0 and F.scaled_dot_product_attention is ORIGINAL


def main(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh, ours, attention = init_device_mesh("cpu", (ranks,)), Counter[str](), sdpa.torch_attention
    ring.custom_ops.update({FORWARD: ring_of_cpus, BACKWARD: ring_of_cpus})
    sdpa.torch_attention = lambda *a: ours.update(["calls"]) or attention(*a)  # type: ignore[func-returns-value]
    checks = itertools.cycle([Check(False, False), Check(True, False), Check(True, True)])
    for order, check, rotate in zip(orders(), checks, itertools.cycle(["allgather", "alltoall"])):
        ring.set_rotate_method(rotate)
        follow(order, check, mesh, ours)
    for check in itertools.islice(checks, 3):
        ours.clear()
        wrapped_module(check, mesh, ours)
    dist.barrier()
    # Past torch's own end of a process, which aborts now and then (2 times of 28) after a ring whose transfers nobody waited for.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
