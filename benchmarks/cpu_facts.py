"""What a CPU does to large results and small parallel regions, apart from any kernel: ``python -m benchmarks.cpu_facts pages|regions|threads``.

The figures of docs/performance.md. Environment variables that they speak of are set outside, for they are read when a process starts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch

import fused_attn as fa
from fused_attn_bench.busy import neighbours
from fused_attn_bench.text import ratio, seconds, table
from fused_attn_bench.timers import page_faults

ROUNDS = 15
# Enough for a parallel region in torch, which splits from 32,768 elements on.
REGION = 2**17
Clock = Callable[[], float]


def in_turns(functions: Mapping[str, Callable[[], object]], clock: Clock, rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    """Medians of each function's seconds and page faults, one call of each after the other; the first round is not counted."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            faults, start = page_faults() or 0, clock()
            result = function()
            taken[name].append((clock() - start, (page_faults() or 0) - faults))
            del result
    return {name: (statistics.median(s for s, _ in found[1:]), statistics.median(f for _, f in found[1:])) for name, found in taken.items()}


def pages() -> str:
    """A product with a number into a new tensor and into one that is there, and attention [1, 4, 2048, 64]; one thread, processor time."""
    torch.set_num_threads(1)
    rows = []
    for mib in (16, 64, 256):
        x = torch.randn(mib * 2**18)
        room = torch.empty_like(x)
        functions = {"new": lambda x=x: torch.mul(x, 2.0), "out=": lambda x=x, room=room: torch.mul(x, 2.0, out=room)}
        for name, (taken, faults) in in_turns(functions, time.process_time).items():
            rows.append((f"{mib} MiB, {name}", f"{1e9 * taken / x.numel():.2f} ns an element", f"{faults:.0f}"))
    q, k, v = torch.randn(3, 1, 4, 2048, 64).unbind(0)

    def plain() -> object:
        probs = torch.softmax(q @ k.mT * 0.125, -1)
        return probs @ v, probs

    attention = {
        "eager, probabilities": plain,
        "fused_attn, probabilities": lambda: fa.attention(q, k, v, return_aux=fa.AuxRequest(probs=True)),
        "SDPA, no probabilities": lambda: torch._C._nn.scaled_dot_product_attention(q, k, v),
    }
    rows += [(name, seconds(taken), f"{faults:.0f}") for name, (taken, faults) in in_turns(attention, time.process_time, 7).items()]
    return table(("what", "time", "faults"), rows)


def regions(busy: int) -> str:
    """The same exponentials in a hundred parallel regions and in one, alone and beside busy processes; two threads, wall clock."""
    torch.set_num_threads(2)
    small, large = torch.randn(REGION), torch.randn(100 * REGION)
    into, room = torch.empty_like(small), torch.empty_like(large)

    def many() -> None:
        for _ in range(100):
            torch.exp(small, out=into)

    functions = {"100 regions": many, "one region": lambda: torch.exp(large, out=room)}
    alone = in_turns(functions, time.perf_counter)
    with neighbours(busy):
        beside = in_turns(functions, time.perf_counter)
    rows = [(name, seconds(alone[name][0]), seconds(beside[name][0]), ratio(beside[name][0] / alone[name][0])) for name in functions]
    return table(("what", "alone", f"beside {busy}", "growth"), rows)


def threads() -> str:
    """SDPA [1, 4, 512, 64] and twenty small regions with more and more threads; wall clock. ``taskset -c 0`` makes that one core."""
    q, k, v = torch.randn(3, 1, 4, 512, 64).unbind(0)
    small = torch.randn(REGION)
    into = torch.empty_like(small)

    def many() -> None:
        for _ in range(20):
            torch.exp(small, out=into)

    functions = {"SDPA": lambda: torch._C._nn.scaled_dot_product_attention(q, k, v), "20 regions": many}
    found: dict[int, dict[str, tuple[float, float]]] = {}
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found[count] = in_turns(functions, time.perf_counter)
    rows = [(name, *(seconds(found[n][name][0]) for n in found), ratio(found[4][name][0] / found[1][name][0])) for name in functions]
    return table(("what", "1 thread", "2 threads", "4 threads", "4 over 1"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_facts", description=__doc__)
    parser.add_argument("what", choices=("pages", "regions", "threads"))
    parser.add_argument("--busy", type=int, default=2, help="processes beside the regions (default 2)")
    args = parser.parse_args(argv)
    print(regions(args.busy) if args.what == "regions" else pages() if args.what == "pages" else threads())
    return 0


if __name__ == "__main__":
    sys.exit(main())
