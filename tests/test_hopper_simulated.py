"""The Hopper kernels, run on the simulator of CUDA: a pairwise cover of what make hopper-product runs in full."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

from tests import native

missing = native.missing_for_simulator()
pytestmark = pytest.mark.skipif(bool(missing), reason=missing or "never")
pytest.importorskip("triton")

from tests import hopper_dense, matrix  # noqa: E402
from tests import hopper_product as product  # noqa: E402

PARTS = 4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_cover_of_all_pairs_holds_the_error_rule(part: int) -> None:
    """In a process without the interpreter; results, races, missing waits, accesses outside tensors."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.hopper_product", "cover", str(part), str(PARTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    expected = [product.name_of(*case) for case in list(product.cover())[part::PARTS]]
    assert [line.partition("\t")[0] for line in done.stdout.splitlines()] == expected


@pytest.mark.slow
def test_dense_masks_alone() -> None:
    """The cover's dense masks are causal too, which cuts a row behind its end whatever the bits say."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "tests.hopper_dense"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 5 * len(hopper_dense.LENGTHS)


@pytest.mark.quick
def test_the_full_product_s_record_is_of_the_present_sources() -> None:
    count = len(list(product.product()))
    assert product.section(count).strip() in matrix.PAGE.read_text(), "the Hopper kernels changed: run make hopper-product"


@pytest.mark.quick
def test_the_cover_meets_every_pair() -> None:
    rows = list(product.factors())
    for a, b in itertools.combinations(range(7), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product({row[a] for row in rows}, {row[b] for row in rows})), (a, b)
    values = (product.LENGTHS, product.MASKS, product.EXTRAS, product.PLACES, product.DIMS, product.MODES, product.REQUESTS)
    assert [{row[i] for row in rows} for i in range(7)] == [set(of) for of in values]


@pytest.mark.quick
def test_combinations_have_names_of_their_own() -> None:
    names = [product.name_of(case, asked) for case, asked in product.product()]
    assert len(set(names)) == len(names)
