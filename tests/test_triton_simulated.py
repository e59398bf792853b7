"""The compiled Triton kernels, run on a PTX simulator: results, races, missing waits, accesses outside tensors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import native

pytestmark = pytest.mark.skipif(bool(native.missing_for_simulator()), reason=native.missing_for_simulator() or "never")


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "dtype"), [pytest.param(80, "float32", marks=pytest.mark.peers), (90, "bfloat16")])
def test_compiled_kernels_hold_the_error_rule(chip: int, dtype: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.simulated", str(chip), dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.split() == ["plain", "window", "dense", "additive", "sigmoid", "broken", "one", "query", "softmax40", "softmax3000"]
