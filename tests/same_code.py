"""``python -m tests.same_code REVISION``: whether the plain Triton kernels' code is what it was, so that the record of docs/matrix.md still holds.

Every kernel of every chip and column goes through the front end of every supported Triton, here and in a checkout of the revision whose hash the
page names. All that comes later, optimisation and ptxas, sees nothing else: where this code and the options are the same, so is what is compiled.
Then the page and the kept results are given the hash of the present sources. Half an hour, where the record takes hours.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fused_attn.backends.triton import config
from tests import matrix

# Runs in either checkout with the tests' own launch code of that checkout: a line [combination, hash, kernels] each.
FRONT_END = """
import hashlib, json, re, sys
import torch
from triton.backends.nvidia.compiler import CUDABackend
from tests import aot

seen = []
make_ttir = CUDABackend.make_ttir

def front_end(module, metadata, options, capability, *rest):
    made = make_ttir(module, metadata, options, capability, *rest)
    text = re.sub(r"^#loc.*$|\\\\s*loc\\\\(.*\\\\)$", "", str(made), flags=re.M)
    seen.append((re.findall(r"tt.func public @(\\\\w+)", text), text, str(sorted(vars(options).items(), key=str))))
    return made

def ptx(source, metadata, *rest):
    metadata["name"] = "kernel"
    metadata["shared"] = 0
    return ""

CUDABackend.make_ttir = staticmethod(front_end)
CUDABackend.make_ttgir = staticmethod(lambda module, metadata, *rest: module)
CUDABackend.make_llir = lambda self, module, metadata, *rest: ""
CUDABackend.make_ptx = lambda self, source, metadata, *rest: ptx(source, metadata)
CUDABackend.make_cubin = lambda self, source, metadata, *rest: b""
for combination in sys.argv[1:]:
    chip, dtype, what = combination.split(":")
    seen.clear()
    aot.target(int(chip))
    if what == "softmax":
        aot.compile_softmax(getattr(torch, dtype))
    elif what in aot.KINDS:
        for size, variant in aot.KINDS[what]:
            aot.compile_attention(getattr(torch, dtype), size, variant, what)
    else:
        for variant in aot._BOTH:
            aot.compile_attention(getattr(torch, dtype), int(what), variant)
    print(json.dumps([combination, hashlib.sha256(repr(seen).encode()).hexdigest(), len(seen)]), flush=True)
""".replace("\\\\", "\\")


def front_end(root: Path, version: str | None, combinations: list[str]) -> Iterator[tuple[str, str, int]]:
    """(combination, hash of its kernels' code and options, how many) by one fresh process of a checkout and a Triton, or the environment's."""
    with tempfile.TemporaryDirectory() as cache:
        variables = matrix.environment(version) | {"TRITON_CACHE_DIR": cache}
        # The checkout comes before the Triton, and before an installed package.
        variables["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [variables.get("PYTHONPATH")])])
        command = [sys.executable, "-c", FRONT_END, *combinations]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=variables) as process:
            assert process.stdout is not None
            yield from map(json.loads, process.stdout)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)


def differences(revision: Path, version: str | None, combinations: list[str]) -> list[str]:
    """Combinations whose code is not the revision's."""
    now, then = ({c: (h, n) for c, h, n in front_end(root, version, combinations)} for root in (matrix.ROOT, revision))
    assert set(now) == set(then) == set(combinations)
    assert all(number for _, number in now.values()), "a combination has no kernels"
    print(f"{version}: {sum(n for _, n in now.values())} kernels", flush=True)
    return [f"{version} {c}" for c in combinations if now[c] != then[c]]


def recorded() -> str:
    """The hash that docs/matrix.md names."""
    found = re.search(r"Sources: `(\w+)`", matrix.PAGE.read_text())
    assert found is not None
    return found[1]


def main(revision: str) -> None:
    """Compares, and renames the record where all is the same."""
    combinations = [f"{chip}:{column}" for chip, column in itertools.product(config.SHARED_MEMORY, matrix.COLUMNS)]
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "then"
        subprocess.run(["git", "worktree", "add", "--detach", checkout, revision], cwd=matrix.ROOT, check=True)
        try:
            code = "from tests import matrix; print(matrix.sources())"
            variables = matrix.environment(None) | {"PYTHONPATH": str(checkout)}
            then = subprocess.run(
                [sys.executable, "-c", code], cwd=checkout, env=variables, capture_output=True, text=True, check=True
            ).stdout
            assert then.strip() == recorded(), (
                f"{revision} has the hash {then.strip()}, docs/matrix.md that of {recorded()}; name the revision it is of"
            )
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = [d for part in pool.map(lambda v: differences(checkout, v, combinations), matrix.VERSIONS) for d in part]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", checkout], cwd=matrix.ROOT, check=True)
    assert not found, f"other code than in {revision}, run make matrix: {', '.join(found)}"
    old, new = recorded(), matrix.sources()
    kept = matrix.KEPT / "results"
    if (kept / f"{old}.jsonl").is_file() and old != new:
        shutil.copy(kept / f"{old}.jsonl", kept / f"{new}.jsonl")
    matrix.PAGE.write_text(matrix.PAGE.read_text().replace(f"Sources: `{old}`", f"Sources: `{new}`", 1))
    print(f"the same code: docs/matrix.md is of {new} now")


if __name__ == "__main__":
    main(sys.argv[1])
