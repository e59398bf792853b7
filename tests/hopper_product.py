"""The Hopper kernels on the simulator: whole calls, forward, auxiliary outputs and gradients, held to the error rule.

``python -m tests.hopper_product`` (``make hopper-product``, hours) runs the product and writes its record into docs/matrix.md; what is done
is kept below build/triton, so a run that was cut off goes on. ``python -m tests.hopper_product cover`` runs a pairwise cover of it, part of
``make test``: ``cover 0 2`` the first of two halves.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

import fused_attn as fa
from fused_attn.problem import AttentionProblem
from fused_attn.testing import DIFFERENTIABLE, Inputs, call, differentiable_inputs, evaluate
from fused_attn.testing import inputs_of as with_gradients
from fused_attn.testing.budget import violations
from tests import aot, matrix
from tests.hopper_forward import LENGTHS, MODES, Case, inputs_of, options_of
from tests.hopper_matrix import SIMULATED, put
from tests.matrix import HOPPER, KEPT, Results

MASKS = ("full", "causal", "window", "documents", "dense")
EXTRAS = ("plain", "bias", "softcap", "dropout", "sinks")
DIMS = (64, 128, 256)
# As many queries as keys; fewer, behind each other's heads in memory, at an offset, heads in groups; float16, two batches, values of another size.
PLACES = ("square", "grouped", "ragged", "float16", "narrow values")
# Passes whose outputs and gradients arrive everywhere, or at out and lse alone.
REQUESTS = {"all": DIFFERENTIABLE, "out": ("out", "lse")}


def case_of(length: int, mask: str, extra: str, place: str, dim: int, mode: str) -> Case:
    """One combination; the length is that of keys."""
    case = Case(dim, dim, length, length, mask, extra, mode=mode)
    queries = max(1, length - 20)
    if place == "grouped":
        return replace(case, heads=(4, 2), q_len=queries, q_offset=length - queries)
    if place == "ragged":
        return replace(case, heads=(3, 1), q_len=length + 7, q_offset=-5)
    if place == "float16":
        return replace(case, batch=2, dtype=torch.float16, q_offset=torch.tensor([0, 9]))
    if place == "narrow values":
        return replace(case, value_dim=dim // 2 - 8, q_len=queries, q_offset=0)
    return case


def product() -> Iterator[tuple[Case, str]]:
    """Every length, mask, modification, head size and mode with each other; places and what is asked for go round.

    A place's number is the sum of the others': it meets every pair of values of any two of them, and in each of these every other place is met
    as the third changes. What is asked for alternates with length, mask and modification.
    """
    orders = [range(len(values)) for values in (LENGTHS, MASKS, EXTRAS, DIMS, MODES)]
    for length, mask, extra, dim, mode in itertools.product(*orders):
        place, asked = PLACES[(length + mask + extra + dim + mode) % len(PLACES)], list(REQUESTS)[(length + mask + extra) % 2]
        yield case_of(LENGTHS[length], MASKS[mask], EXTRAS[extra], place, DIMS[dim], list(MODES)[mode]), asked


def factors() -> Iterator[tuple[Any, ...]]:
    """25 rows of (length, mask, extra, place, dim, mode, asked) in which every two values of any two factors meet.

    A plane of five by five points: two points lie on one line, of slope 0 to 4 or infinity, and a factor numbers the lines of a slope. Factors
    of fewer values repeat some. What is asked for follows a set of ten points that every line meets and that none lies in.
    """
    dims, modes = (64, 128, 256, 128, 64), ("late", "early", "random", "late", "random")
    for i, j in itertools.product(range(5), range(5)):
        line = [(j + k * i) % 5 for k in range(5)]
        asked = "all" if (j * j + i) % 5 in (0, 2) else "out"
        yield LENGTHS[line[1]], MASKS[i], EXTRAS[line[0]], PLACES[line[2]], dims[line[3]], modes[line[4]], asked


def cover() -> Iterator[tuple[Case, str]]:
    """The combinations of ``factors``."""
    for *values, asked in factors():
        yield case_of(*values), asked


def name_of(case: Case, asked: str) -> str:
    return f"{case.name} {asked}"


def prepare() -> None:
    """Compiles to PTX, which is all that the simulator reads, into a cache of its own; leaves out launches that have nothing to do again."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    # Before the simulator's backend says that it interprets: functions are compiled or interpreted as they are made.
    for path in HOPPER.glob("*.py"):
        importlib.import_module(f"fused_attn.backends.triton.hopper.{path.stem}")
    triton.knobs.cache.dir = str(KEPT / "simulated")
    CUDABackend.make_cubin = lambda self, src, metadata, *rest: b""


def simulate(mode: str) -> None:
    """From here on every launch is simulated in this mode."""
    import triton

    from tests import hopper, simulated

    hopper.simulate(**MODES[mode])

    class Redo(simulated._Simulated):
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            given = dict(zip(self.kernel.arg_names, args, strict=False))
            redo = given.get("redo")
            if redo is None or bool(redo.any()):
                super().__call__(*args, **kwargs)

    triton.runtime.jit.JITFunction.__getitem__ = lambda self, grid: Redo(self, grid)


def check(case: Case, asked: str) -> None:
    """Runs a combination.

    Raises:
        AssertionError: a result breaks the error rule, or no Hopper kernel ran.
    """
    torch.manual_seed(0)
    options = {name: value for name, value in options_of(case).items() if name not in ("return_aux", "scoring")}
    inputs, through = with_gradients(*inputs_of(case), **options), REQUESTS[asked]
    simulate(case.mode)
    aot.compiled.clear()
    problem = inputs.problem
    if asked == "out":
        problem = AttentionProblem(problem.q, problem.k, problem.v, problem.modifiers, fa.AuxRequest(lse=True))
    wanted = differentiable_inputs(inputs.problem, "triton")
    got = evaluate(lambda p: call(p, "triton"), Inputs(problem, inputs.incoming), through, wanted)
    broken = violations(inputs, got, through)
    assert not broken, f"{name_of(case, asked)} breaks the error rule:\n  " + "\n  ".join(broken)
    ran = {name for name, _ in aot.compiled}
    assert any("hopper" in name or name == "forward_kernel" for name in ran), (
        f"{name_of(case, asked)}: only plain kernels ran: {sorted(ran)}"
    )


def run(cases: list[tuple[Case, str]], part: int = 0, parts: int = 1) -> None:
    """Every parts-th case from ``part`` on, one line each as it is done."""
    prepare()
    for case, asked in cases[part::parts]:
        before = time.process_time()
        check(case, asked)
        print(f"{name_of(case, asked)}\t{time.process_time() - before:.1f} s", flush=True)


def sources() -> str:
    """A hash of what decides the results: Hopper's kernels, and the plain device functions that they call."""
    return matrix.digest(
        (*HOPPER.rglob("*.py"), HOPPER / "tiles.json", *matrix.KERNELS.glob("*.py"), *(matrix.ROOT / "tests" / f for f in FILES))
    )


FILES = ("hopper.py", "hopper_forward.py", "hopper_product.py")


def section(count: int) -> str:
    """The part of docs/matrix.md on the product."""
    return f"""{SIMULATED}
Written by `make hopper-product`. Sources: `{sources()}`.

{count} calls on the simulator of CUDA, every combination of {len(LENGTHS)} lengths of keys ({", ".join(map(str, LENGTHS))}), masks
({", ".join(MASKS)}), modifications ({", ".join(EXTRAS)}), head sizes ({", ".join(map(str, DIMS))}) and orders of asynchronous copies
({", ".join(MODES)}), with places ({", ".join(PLACES)}) and what is asked for (everything; out and lse) going round, so that each meets every pair
of the others: all hold the error rule, without a race, a missing wait, an access outside a tensor or a deadlock. A cover of all pairs is part of
`make test`.
"""


def make() -> None:
    """What no earlier run of the present sources has done, one process per core, then the record."""
    results = Results(KEPT / "results", f"hopper-product-{sources()}")
    names = [name_of(case, asked) for case, asked in product()]
    missing = [i for i, name in enumerate(names) if name not in results.parts]
    workers = os.cpu_count() or 1

    def work(worker: int) -> int:
        code = f"from tests import hopper_product as p\ncases = list(p.product())\np.run([cases[i] for i in {missing[worker::workers]}])"
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=matrix.ROOT, env=matrix.environment(None)) as process:
            assert process.stdout is not None
            for line in process.stdout:
                results.add(line.partition("\t")[0], "right")
        return process.returncode

    with ThreadPoolExecutor(workers) as pool:
        codes = list(pool.map(work, range(workers)))
    assert not any(codes), "a combination failed; its report is above"
    put(section(len(names)), SIMULATED)


if __name__ == "__main__":
    if sys.argv[1:2] == ["cover"]:
        run(list(cover()), *map(int, sys.argv[2:4]))
    else:
        make()
