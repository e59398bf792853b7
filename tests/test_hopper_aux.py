"""Modifications, dropout and bits of the Hopper kernels, and their pass over whole rows, on the simulator in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import native

pytestmark = pytest.mark.skipif(bool(native.missing_for_simulator()), reason=native.missing_for_simulator() or "never")


@pytest.mark.slow
def test_pieces_and_rows_are_right_on_the_simulator() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "tests.hopper_aux"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.split() == ["modifications", "functions", "dropout", "bits", "rows", "picked"]
