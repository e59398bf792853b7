"""The Hopper kernels' main loops cost what is recorded, the record holds its bounds, and the reader of SASS sees what it is asked about."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest

from tests import hopper_counts, hopper_matrix, hopper_model, matrix, sass
from tests.hopper_counts import CONFIGURATIONS

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
# One of each pass, and the masked loop: a quarter of a minute. make hopper compiles the others.
HERE = ("forward 128 window", "backward 128 plain")
PLAIN = CONFIGURATIONS["forward 128 plain"]


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    assert hopper_counts.RECORD.is_file(), "tests/hopper_counts.json is missing: run make hopper"
    return hopper_counts.recorded()


@pytest.mark.quick
def test_record_and_page_are_of_the_present_sources(record: dict[str, Any]) -> None:
    assert record["sources"] == hopper_matrix.sources(), "the Hopper kernels changed: run make hopper"
    for page, part in ((matrix.PAGE, hopper_matrix.section(record)), (hopper_model.PAGE, hopper_model.section(record))):
        assert part.strip() in page.read_text(), f"{page.name} is not of tests/hopper_counts.json: run make hopper"


@pytest.mark.quick
@pytest.mark.parametrize("version", matrix.VERSIONS)
def test_the_record_holds_every_bound(version: str, record: dict[str, Any]) -> None:
    triton = hopper_matrix.minor(version)
    assert set(record[triton]) == set(CONFIGURATIONS)
    broken = [
        c for n, counts in record[triton].items() for c in hopper_counts.complaints(CONFIGURATIONS[n], triton, counts, record[triton])
    ]
    assert broken == []
    for name, counts in record[triton].items():
        copies = counts["copies"]
        assert copies["UTMALDG"] and copies["UTMASTG"] and (copies["UTMAREDG"] > 0) == name.startswith("backward"), name


@needs_triton
@pytest.mark.slow
def test_loops_cost_what_is_recorded(record: dict[str, Any]) -> None:
    import triton

    version = hopper_matrix.minor(triton.__version__)
    found = dict(hopper_matrix.counted(None, list(HERE)))
    assert set(found) == set(HERE)
    assert [c for name in HERE for c in hopper_counts.complaints(CONFIGURATIONS[name], version, found[name], record[version])] == []


COUNTS = {
    "kernels": ["k"], "per_tile": [900, 930], "loops": [450, 465], "masked": 600, "tiles": 2.0, "products": {"64x128x16 shared": 8}, "mufu": 66,
    "shared_bytes": 0, "waits": 2, "local": 0, "copies": {"UTMALDG": 4, "UTMASTG": 2, "UTMAREDG": 0}, "budgets": [24, 240], "stack": 0, "shared": 9,
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"per_tile": [900, 957]}, "at most 950 are allowed"),
        ({"per_tile": [900, 958]}, r"record \+ 3 %"),
        ({"per_tile": [100, 930]}, ""),
        ({"waits": 3}, "3 waits per trip, 2 are recorded"),
        ({"local": 1}, "1 accesses to local memory"),
        ({"products": {"64x64x16 shared": 16}}, "tensor products"),
        ({"budgets": [24, 232]}, "register budgets"),
        ({"copies": {"UTMALDG": 4, "UTMASTG": 0, "UTMAREDG": 0}}, "no UTMASTG"),
    ],
    ids=str,
)
def test_what_breaks_a_rule_is_said(change: dict[str, Any], said: str) -> None:
    found = hopper_counts.complaints(PLAIN, "3.7", COUNTS | change, {PLAIN.name: COUNTS})
    assert bool(found) == bool(said)
    assert re.search(said, " ".join(found))


@pytest.mark.quick
def test_products_that_run_one_after_the_other_are_said_whatever_is_recorded() -> None:
    serial = COUNTS | {"waits": 16}
    found = hopper_counts.complaints(PLAIN, "3.7", serial, {PLAIN.name: serial})
    assert len(found) == 1 and "16 waits per trip, at most 2 are allowed: ptxas serialised" in found[0]


@pytest.mark.quick
def test_nothing_recorded_is_said() -> None:
    assert "run make hopper" in hopper_counts.complaints(PLAIN, "3.7", COUNTS, {})[0]


@pytest.mark.quick
def test_bounds_of_other_tritons_and_of_modifications() -> None:
    c = CONFIGURATIONS
    assert hopper_counts.bound(c["forward 256 dense"], "3.7", 0) == 1670
    assert hopper_counts.bound(c["backward 64 causal"], "3.9", 0) == 1130 * 1.2
    assert hopper_counts.bound(c["forward 64 bias"], "3.7", 800) == 1200
    assert hopper_counts.bound(c["forward 128 alibi"], "3.8", 900) == 1.5 * 900 * 1.03
    assert hopper_counts.bound(c["backward 64 dropout"], "3.7", 800) is None
    assert hopper_counts.bound(c["forward 128 plain float16"], "3.7", 800) is None


def text_of(*bodies: list[str]) -> str:
    """SASS of a function: loops one after the other, each closed by a branch to its own beginning."""
    lines, address = ["\t\tFunction : kernel"], 0
    for body in bodies:
        start = address
        for line in (*body, f"BRA {start:#x}"):
            lines.append(f"        /*{address:04x}*/                   {line} ;   /* 0x0 */")
            address += 16
    return "\n".join(lines)


PRODUCTS = [
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR36], RZ, !UPT",
    *["HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24"] * 3,
]
EXPONENTIALS = ["MUFU.EX2 R4, R5"] * 32


@pytest.mark.quick
def test_loops_over_tiles_are_found_and_read() -> None:
    masked = [*PRODUCTS, *EXPONENTIALS, "@P0 STL [R1], R4", "FADD R1, R2, R3"]
    full = [*PRODUCTS, *EXPONENTIALS, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "@!P1 STSM.16.M88.4 [R186+0x2c000], R4", "LDS.64 R4, [R5]"]
    found = sass.main_loops(text_of(["FADD R1, R2, R3"] * 9, full[4:], full, masked))
    assert [len(loop.lines) for loop in found] == [len(masked) + 1, len(full) + 1]
    assert [loop.local for loop in found] == [1, 0] and [loop.waits for loop in found] == [0, 1]
    assert found[1].products == [(128, True), (64, False), (64, False), (64, False)]
    assert found[1].mufu == 32 and found[1].shared_bytes == 512 + 128


@pytest.mark.quick
@pytest.mark.parametrize(
    ("sizes", "consumers", "full"),
    [([410, 410, 411], 3, 3), ([410, 410, 555, 557], 3, 2), ([464, 466, 607, 667], 2, 2), ([361, 370, 402, 412], 2, 2), ([596, 726], 3, 1)],
    ids=str,
)
def test_consumers_may_share_a_loop(sizes: list[int], consumers: int, full: int) -> None:
    assert len(hopper_counts.full_tiles([sass.Loop(("NOP",) * n) for n in sizes], consumers)) == full


@pytest.mark.quick
def test_a_branch_back_from_behind_is_no_loop_of_its_own() -> None:
    text = text_of([*PRODUCTS, *EXPONENTIALS])
    behind = f"        /*{16 * 99:04x}*/                   @P0 BRA 0x10 ;   /* 0x0 */"
    assert len(sass.main_loops(f"{text}\n{behind}")) == 1


@pytest.mark.quick
def test_the_model_of_one_trip() -> None:
    """Two consumers, 64 queries each, 128 keys, head size 128: by hand."""
    products = {"64x128x16 shared": 8, "64x128x16 registers": 8}
    model = hopper_model.of(PLAIN, COUNTS | {"products": products, "loops": [464, 466], "shared_bytes": 0})
    assert model.tensor == 2 * 2 * 64 * 128 * 128 / 2048 == 2048
    assert model.issue == 2 * 466
    assert model.mufu == 2 * 4 * 66 * 2
    # Keys and half of a consumer's queries at a time, values; what is copied: both tiles once.
    assert model.products == 2 * (8 * (128 + 64) + 8 * 128) * 16 * 2 / 128 == 1280
    assert model.moved == 2 * 128 * 128 * 2 / 128 == 512
    assert (model.bound, model.fraction) == ("tensor cores", 1.0)
