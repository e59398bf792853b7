"""Which method of context parallelism wins, by ranks and length: ``python -m benchmarks.scaling`` (the table of docs/scaling.md)."""

from __future__ import annotations

from dataclasses import replace

from fused_attn.distributed.cost import Workload, cost
from fused_attn_bench.text import table

# What a rank is taken to reach: bfloat16 attention on an H100 (targets of forward and backward together), and one 400 Gbit/s link per GPU.
FLOPS, BANDWIDTH = 5e14, 5e10
RANKS = (8, 32, 128, 1024)
LENGTHS = {"128 k": 1 << 17, "1 M": 1 << 20, "10 M": 10 << 20}
HEADER = ("length", "ranks", "ring", "gather", "heads", "memory: ring", "gather", "heads")


def rows(work: Workload | None = None) -> list[tuple[str, ...]]:
    """Milliseconds of forward and backward and MiB besides own rows, by method; the least time has a star."""
    found = []
    for name, length in LENGTHS.items():
        for ranks in RANKS:
            costs = {method: cost(replace(work or Workload(), length=length), ranks, method) for method in ("ring", "gather", "heads")}
            times = {m: None if c is None else 1e3 * c.seconds(FLOPS, BANDWIDTH, behind=m == "ring") for m, c in costs.items()}
            best = min(t for t in times.values() if t is not None)
            shown = ["-" if t is None else f"{t:.3g}{'*' * (t == best)}" for t in times.values()]
            memory = ["-" if c is None else f"{c.memory / 2**20:.3g}" for c in costs.values()]
            found.append((name, str(ranks), *shown, *memory))
    return found


if __name__ == "__main__":
    print(table(HEADER, rows(), left=1))
