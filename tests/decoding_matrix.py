"""``make decoding``: the split-key kernels by every supported Triton for every chip, and the record of it in docs/decoding.md (four minutes)."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.matrix import KERNELS, ROOT, VERSIONS, cell, digest, environment, install, table

PAGE = ROOT / "docs" / "decoding.md"
HEADING = "## Compiled\n"
CHIPS = (80, 90, 100, 120)
Reports = dict[str, list[dict[str, Any]]]


def sources() -> str:
    """A hash of what decides the kernels' compiled code, the calls included."""
    shared = [p for p in KERNELS.glob("*.py") if p.name != "__init__.py"]
    return digest((*shared, *(KERNELS / "decoding").glob("*.py"), ROOT / "tests" / "decoding_aot.py"))


def compiled(version: str, chip: int) -> Reports:
    """Each call's kernels, by a fresh process of this Triton."""
    command = [sys.executable, "-m", "tests.decoding_aot", str(chip)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(version), cwd=ROOT, check=True)
    return {report["call"]: report["kernels"] for report in map(json.loads, done.stdout.splitlines())}


def section(reports: dict[tuple[str, int], Reports]) -> str:
    """The last part of the page."""
    calls = next(iter(reports.values()))
    rows = [[f"{call}, sm_{chip}", *(cell(chip, reports[version, chip][call]) for version in VERSIONS)] for call in calls for chip in CHIPS]
    return f"""{HEADING}
Written by `make decoding`; `tests/test_decoding.py` holds it to the present sources. Sources: `{sources()}`. Most registers / most bytes of stack of a
call's kernels by Triton version; a cell that spills, does not fit shared memory or was compiled to a trap says FAILS. "everything" is four modifications and masks at once.

{table(["call", *VERSIONS], rows)}
"""


def make() -> None:
    """Every version and chip, then the page."""
    for version in VERSIONS:
        install(version)
    pairs = list(itertools.product(VERSIONS, CHIPS))
    # One process per core: compiling is a single thread's work.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = dict(zip(pairs, pool.map(lambda pair: compiled(*pair), pairs), strict=True))
    PAGE.write_text(PAGE.read_text().partition(HEADING)[0].rstrip() + f"\n\n{section(reports)}")


if __name__ == "__main__":
    make()
