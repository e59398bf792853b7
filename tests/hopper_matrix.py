"""``make hopper``: the Hopper kernels by every supported Triton, counted, and the record of it: ``hopper_counts.json``, docs/matrix.md and the
model in docs/performance.md.

Results are kept below build/triton, so a run that was cut off goes on; changed sources begin anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests import hopper_model, matrix
from tests.hopper_counts import CONFIGURATIONS, RECORD, complaints
from tests.matrix import BEFORE_HOPPER, HOPPER, KEPT, PAGE, Results, digest, environment, install, table

SIMULATED = "### On the simulator\n"


def sources() -> str:
    """A hash of what decides the Hopper kernels' compiled code, the configurations included."""
    return digest((*HOPPER.rglob("*.py"), HOPPER / "tiles.json", matrix.ROOT / "tests" / "hopper_counts.py"))


def minor(version: str) -> str:
    """3.7 of 3.7.1: what records go by."""
    return version.rpartition(".")[0]


def counted(version: str | None, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Counts of each configuration, by one fresh process of this Triton or the environment's own, as each is ready."""
    command = [sys.executable, "-c", f"from tests import hopper_counts as h\nh.print_counts({names!r})"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=matrix.ROOT, env=environment(version)) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def count_missing(version: str, results: Results) -> None:
    """Every configuration that no earlier run has counted."""
    missing = [name for name in CONFIGURATIONS if f"{version} {name}" not in results.parts]
    for name, counts in counted(version, missing) if missing else ():
        results.add(f"{version} {name}", counts)


def cell(version: str, name: str, record: dict[str, Any]) -> str:
    """Warp instructions per tile of the best and the worst consumer, waits per trip, accesses to local memory if any; what breaks a rule is said."""
    counts = record[minor(version)][name]
    local = f", {counts['local']} local" if counts["local"] else ""
    broken = complaints(CONFIGURATIONS[name], minor(version), counts, record[minor(version)])
    return f"{'FAILS ' if broken else ''}{counts['per_tile'][0]}-{counts['per_tile'][1]}, {counts['waits']} waits{local}"


def section(record: dict[str, Any]) -> str:
    """The part of docs/matrix.md on counts."""
    rows = [[name, *(cell(version, name, record) for version in matrix.VERSIONS)] for name in CONFIGURATIONS]
    return f"""{BEFORE_HOPPER}
Written by `make hopper`; `tests/test_hopper_counts.py` holds it to the present sources. Sources: `{record["sources"]}`.

Warp instructions per 64 x 64 scores (all warps that work on them; best and worst consumer) in the loops over full tiles, read off SASS for
sm_90, and waits for tensor products per trip. bfloat16 unless said otherwise; "in order" is the backward that
`torch.use_deterministic_algorithms(True)` asks for. `tests/hopper_counts.json` holds the rest: shapes of products, copies, registers. A cell
that breaks its bound or touches local memory in a loop (Triton 3.7) says FAILS. Triton 3.9 makes each product's descriptors of sums in 32
bits, whose halves come to uniform registers one by one: at head size 128 a trip of the backward has 64 to 68 UMOV there and 8 to 48 R2UR, where
3.7 has 18 and 2.

{table(["kernel", *matrix.VERSIONS], rows)}

"""


def put(text: str, mark: str) -> None:
    """Replaces the page's section of counts, or that of the simulator, by a text that begins with its mark."""
    page, hopper, rest = PAGE.read_text().partition(BEFORE_HOPPER)
    counts, simulated, runs = (hopper + rest).partition(SIMULATED)
    parts = {BEFORE_HOPPER: counts, SIMULATED: simulated + runs} | {mark: text}
    PAGE.write_text(f"{page.rstrip()}\n\n{parts[BEFORE_HOPPER]}{parts[SIMULATED]}".rstrip() + "\n")


def make() -> None:
    """All configurations by all Tritons, then record and page."""
    results = Results(KEPT / "results", f"hopper-{sources()}")
    for version in matrix.VERSIONS:
        install(version)
    # One process per core: compiling is a single thread's work.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda version: count_missing(version, results), matrix.VERSIONS))
    record: dict[str, Any] = {"sources": sources()}
    for version in matrix.VERSIONS:
        record[minor(version)] = {name: results.parts[f"{version} {name}"] for name in CONFIGURATIONS}
    RECORD.write_text(json.dumps(record, indent=1, separators=(",", ":")) + "\n")
    put(section(record), BEFORE_HOPPER)
    hopper_model.put(hopper_model.section(record))


if __name__ == "__main__":
    make()
