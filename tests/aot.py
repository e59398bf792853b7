"""Compiles the Triton kernels for chips this machine does not have, through the library's own launch code, and reads what ptxas made.

Run as a program (a fresh process without TRITON_INTERPRET), ``python -m tests.aot CHIP:DTYPE:HEAD_DIM ...``, ``CHIP:DTYPE:additive``,
``CHIP:DTYPE:sigmoid`` or ``CHIP:DTYPE:softmax``, it
prints one JSON line per combination as soon as that is compiled: its name, and what ``measured`` says of each kernel.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fused_attn as fa
from fused_attn.auxiliary import AuxRequest
from fused_attn.backends import get
from fused_attn.backends.base import Incoming
from fused_attn.backends.triton import config, launch
from fused_attn.problem import AttentionProblem, SoftmaxProblem

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _Driver:
    """Stands for a GPU of some compute capability; enough for Triton to compile, nothing to run on."""

    def __init__(self, chip: int) -> None:
        self.chip = chip

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels per device: each chip is one of its own."""
        return self.chip

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


compiled: list[tuple[str, Any]] = []


class CompileOnly:
    def __init__(self, kernel: Any, grid: Any) -> None:
        self.kernel, self.grid = kernel, grid

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        compiled.append((self.kernel.fn.__name__, self.kernel.warmup(*args, grid=self.grid, **kwargs)))


def target(chip: int, launcher: type = CompileOnly, hopper: bool = False) -> None:
    """From here on every Triton launch of this process compiles for ``chip`` instead of running; the plain kernels, or Hopper's where they run."""
    os.environ["FUSED_ATTN_HOPPER"] = "on" if hopper else "off"
    driver.set_active(_Driver(chip))
    launch.target_chip = chip
    triton.runtime.jit.JITFunction.__getitem__ = lambda self, grid: launcher(self, grid)


def resources(kernel: Any) -> dict[str, int]:
    """Registers, stack and local memory in bytes, as ``cuobjdump -res-usage`` reports them, shared memory, and traps in the code.

    Triton 3.7.1 and 3.6 compile a kernel whose tensor memory does not fit to a single trap instead of refusing it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {**found, "shared": kernel.metadata.shared, "traps": len(re.findall(r"^\s*trap;", kernel.asm["ptx"], re.M))}


def sass(kernel: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout


# Attention other than the softmax of a dot product, with the head sizes and variants that are compiled of it. The sigmoid's passes are the
# softmax's, tiles included, without the rows' statistics.
_BOTH = ("causal", "everything")
KINDS: dict[str, tuple[tuple[int, str], ...]] = {
    "additive": tuple(itertools.product(config.HEAD_SIZES, _BOTH)),
    "sigmoid": ((64, "causal"), (128, "everything"), (256, "causal")),
}


def problem(dtype: torch.dtype, head_dim: int, variant: str, what: str = "") -> Any:
    """A lowered call: "causal" runs the plain passes, "everything" the heavy ones with every kind of operand; ``what`` as in ``KINDS``."""
    q, k, v = torch.zeros(3, 1, 2, 512, head_dim, dtype=dtype).unbind(0)
    options = dict.fromkeys(("scale", "q_offset", "sinks", "dropout", "return_aux")) | {"mask": fa.Causal(), "score_mods": ()}
    options["scoring"] = fa.Additive(torch.zeros(2, head_dim, requires_grad=True)) if what == "additive" else None
    if variant == "everything":
        bias = torch.zeros(1, 2, 512, 512, dtype=dtype, requires_grad=True)
        options["mask"] = fa.Causal() & fa.Dense(torch.ones(512, 512, dtype=torch.bool))
        options["score_mods"] = (fa.SoftCap(30.0), fa.ALiBi(torch.ones(2)), fa.Bias(bias))
        options["dropout"], options["sinks"] = fa.Dropout(0.1, seed=1), torch.zeros(2)
    if what == "sigmoid":  # and a part of a larger problem, whose keys begin inside a group of four
        options["normalizer"], options["sinks"] = fa.Sigmoid(-6.0), None
        options["dropout"] = options["dropout"] and fa.Dropout(0.1, seed=1, origin=(0, 0, 0, 3), extent=(1, 2, 512, 1024))
    return AttentionProblem.check(q, k, v, options).lower()


def compile_attention(dtype: torch.dtype, head_dim: int, variant: str, what: str = "") -> None:
    call, backend = problem(dtype, head_dim, variant, what), get("triton")
    forward = backend.attention_fwd(call)
    extra = backend.attention_aux(call, forward, AuxRequest.of([True] * 6))
    square = (extra.probs, extra.scores, extra.probs) if variant == "everything" else (None, None, None)
    parameters = call.terms.parameters
    needs = (True, True, True, parameters[0] is not None, *(t.requires_grad for t in parameters[1:]))
    backend.attention_bwd(call, forward, Incoming(forward.out, forward.lse, *square), needs)


def compile_softmax(dtype: torch.dtype, lengths: tuple[int, ...] = (100, 5000, 16384, 100000)) -> None:
    backend = get("triton")
    for kv_len in lengths:
        bias = torch.zeros(1, 1, 1, kv_len, requires_grad=True)
        options = {
            "dim": -1,
            "mask": fa.ValidLengths(torch.tensor([50])),
            "q_offset": None,
            "bias": bias,
            "empty_rows": "zero",
            "log": False,
            "scale": 1.0,
        }
        call = SoftmaxProblem.check(torch.zeros(1, 2, 3, kv_len, dtype=dtype), options | {"dropout": fa.Dropout(0.1, seed=1)}).lower()
        out, probs = backend.softmax_fwd(call)
        backend.softmax_bwd(call, probs, out, (True, True))


def measured(name: str, kernel: Any) -> dict[str, Any]:
    """One kernel's line of the report."""
    return {"kernel": name, "HGMMA": kernel.metadata.target.arch == 90 and "HGMMA" in sass(kernel), **resources(kernel)}


def compile_combination(chip: int, dtype: torch.dtype, what: str) -> list[dict[str, Any]]:
    """Every kernel of the softmax, or of attention at a head size: the plain passes first, then the heavy ones."""
    target(chip)
    compiled.clear()
    if what == "softmax":
        compile_softmax(dtype)
    elif what in KINDS:
        for size, variant in KINDS[what]:
            compile_attention(dtype, size, variant, what)
    else:
        for variant in _BOTH:
            compile_attention(dtype, int(what), variant)
    return [measured(name, kernel) for name, kernel in compiled]


if __name__ == "__main__":
    for combination in sys.argv[1:]:
        chip, dtype, what = combination.split(":")
        kernels = compile_combination(int(chip), getattr(torch, dtype), what)
        print(json.dumps({"combination": combination, "kernels": kernels}), flush=True)
