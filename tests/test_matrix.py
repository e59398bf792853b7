"""docs/matrix.md says what was seen with these very sources, and all of it is green."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from fused_attn.backends.triton import config
from tests import matrix

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def page() -> str:
    assert matrix.PAGE.is_file(), "docs/matrix.md is missing: run make matrix"
    return matrix.PAGE.read_text()


@pytest.fixture(scope="module")
def rows(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if re.match(r"\| \d", line)]


def test_the_page_was_made_with_the_present_sources(page: str) -> None:
    assert f"Sources: `{matrix.sources()}`" in page, "the Triton sources changed: run make matrix"


def test_every_version_compiles_for_every_chip(rows: list[list[str]]) -> None:
    compiled = {tuple(row[:2]): row[2:] for row in rows if row[1].startswith("sm_")}
    assert set(compiled) == set(itertools.product(matrix.VERSIONS, (f"sm_{chip}" for chip in config.SHARED_MEMORY)))
    for row in compiled.values():
        assert len(row) == len(matrix.COLUMNS)
        for cell in row:
            registers, stack = map(int, cell.split("/"))
            assert registers <= 255 and stack <= matrix.MAX_STACK


def test_every_suite_passed(rows: list[list[str]]) -> None:
    suites = {row[0]: row[-1] for row in rows if not row[1].startswith("sm_")}
    assert set(suites) >= set(matrix.ENDS)
    assert {"2.10", "2.14"} <= {version.rpartition(".")[0] for version in suites}
    for version, counted in suites.items():
        assert re.fullmatch(r"\d+ passed(, \d+ skipped)?", counted), f"{version}: {counted}"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [("x = 1", "x = 2", False), ("why", "because", True), ("f(x)", "f( x )", True)],
    ids=["code", "comment and docstring", "spaces"],
)
def test_the_hash_follows_the_code_alone(old: str, new: str, same: bool) -> None:
    text = '"""why."""\nx = 1  # why\n\n\ndef g(x):\n    """why"""\n    return f(x)\n'
    assert ("".join(matrix._code(text.replace(old, new))) == "".join(matrix._code(text))) == same


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    matrix.Results(tmp_path).add("3.8.0 90:float32:64", [])
    assert matrix.Results(tmp_path).parts == {"3.8.0 90:float32:64": []}


@pytest.mark.parametrize(
    ("kernel", "shown"),
    [
        ({"STACK": 64}, "255/64"),
        ({"STACK": 72}, "FAILS 255/72"),
        ({"LOCAL": 8}, "FAILS 255/0"),
        ({"traps": 1}, "FAILS 255/0"),
        ({"shared": 99 * 1024 + 1}, "FAILS 255/0"),
    ],
    ids=str,
)
def test_a_cell_says_what_breaks_a_bound(kernel: dict[str, int], shown: str) -> None:
    well = {"REG": 255, "STACK": 0, "LOCAL": 0, "shared": 0, "traps": 0}
    assert matrix.cell(120, [well, well | kernel]) == shown
