"""Compiles the split-key decoding kernels for a chip this machine does not have: ``python -m tests.decoding_aot CHIP``, a JSON line per call.

Every entry of the table of tiles, plain and with every kind of operand, keys in pages and in one piece; and a scoring by columns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

import fused_attn as fa
from fused_attn.backends.triton import config
from fused_attn.backends.triton.decoding import forward
from fused_attn.lowering import KernelMask
from fused_attn.paged_call import LoweredPaged
from fused_attn.problem import AttentionProblem
from tests import aot, matrix

CAPACITY, PAGE = 2048, 16


def steps(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, LoweredPaged]]:
    """A step of one query from pages, and one of four with everything from pages; the first one fills a block of 16 rows, the second one of 32."""
    used = torch.tensor([100, 2000], dtype=torch.int32)
    for name, q_len in (("plain", 1), ("everything", 8)):
        q, k = torch.zeros(2, 8, q_len, dim, dtype=dtype), torch.zeros(2, 2, CAPACITY, dim, dtype=dtype)
        options = dict.fromkeys(("scale", "sinks", "dropout", "return_aux")) | {
            "mask": fa.Causal(),
            "score_mods": (),
            "q_offset": used - q_len,
        }
        if name == "everything":
            mods = (fa.SoftCap(30.0), fa.ALiBi(torch.ones(8)), fa.Bias(torch.zeros(1, 8, 1, CAPACITY, dtype=dtype)))
            mask = fa.Causal() & fa.Dense(torch.ones(q_len, CAPACITY, dtype=torch.bool))
            options |= {"mask": mask, "score_mods": mods, "sinks": torch.zeros(8)}
        terms = AttentionProblem.check(q, k, k, options).lower().terms
        terms = replace(terms, mask=terms.mask & KernelMask(kv_end=used[:, None]))
        pages = torch.zeros(300, 2, PAGE, dim, dtype=dtype)
        yield name, LoweredPaged(q, pages, pages, torch.zeros(2, CAPACITY // PAGE, dtype=torch.int32), terms)


def compiled(title: str, call: LoweredPaged, chip: int) -> str:
    """One call's line of the report."""
    aot.compiled.clear()
    forward.attention_paged(call)
    kernels = [aot.measured(name, kernel) for name, kernel in aot.compiled]
    return json.dumps({"call": title, "kernels": kernels, "complaints": matrix.complaints(chip, kernels)})


def calls() -> Iterator[tuple[str, LoweredPaged]]:
    """Every call, with its title."""
    for dtype in (torch.bfloat16, torch.float32):
        for dim in config.HEAD_SIZES:
            for name, call in steps(dtype, dim):
                yield f"{dtype} {dim} {name}", call
    q, k = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16), torch.zeros(1, 2, CAPACITY, 64, dtype=torch.bfloat16)
    additive = dict.fromkeys(("mask", "scale", "q_offset", "sinks", "dropout", "return_aux")) | {"score_mods": ()}
    lowered = AttentionProblem.check(q, k, k, additive | {"scoring": fa.Additive(torch.zeros(4, 64))}).lower()
    yield "additive", LoweredPaged(lowered.q, lowered.k, lowered.v, None, lowered.terms)


if __name__ == "__main__":
    # A second argument takes those with everything and leaves the plain ones, which have fewer registers to spill.
    chip, heavy = int(sys.argv[1]), len(sys.argv) > 2
    aot.target(chip)
    for title, call in calls():
        if not heavy or not title.endswith("plain"):
            print(compiled(title, call, chip), flush=True)
