"""How long the first call of each kind takes, compilation included, and the first call of a process that finds its kernels compiled.

``python -m benchmarks.first_call [--device cuda]``: a process each, with a compile cache of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

import torch

from fused_attn_bench.text import seconds, table

# head_dim, whether there is a gradient.
KINDS = tuple((head_dim, backward) for head_dim in (64, 128, 256) for backward in (False, True))
_TIMED = """
import sys, time, torch, fused_attn as fa
device, head_dim, backward = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
q = torch.randn(1, 4, 512, head_dim, device=device, dtype=dtype, requires_grad=backward)
(q * 2).sum().item()
start = time.perf_counter()
out = fa.attention(q, q, q, mask=fa.Causal())
(out.float().sum().backward() if backward else None)
torch.cuda.synchronize() if device == "cuda" else None
print(time.perf_counter() - start)
"""


def first_call(device: str, head_dim: int, backward: bool, cache: str) -> float:
    """Seconds of a fresh process's first call; what it compiles is kept in ``cache``."""
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    command = [sys.executable, "-c", _TIMED, device, str(head_dim), str(backward)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main(argv: list[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_call", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    device, rows = parser.parse_args(argv).device, []
    for head_dim, backward in KINDS:
        with tempfile.TemporaryDirectory() as cache:
            compiling, cached = (first_call(device, head_dim, backward, cache) for _ in range(2))
        rows.append((str(head_dim), "forward + backward" if backward else "forward", seconds(compiling), seconds(cached)))
    print(table(("head_dim", "call", "nothing compiled", "compiled before"), rows, left=2))


if __name__ == "__main__":
    main()
