"""Hopper's forward on the simulator, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import native

pytestmark = pytest.mark.skipif(bool(native.missing_for_simulator()), reason=native.missing_for_simulator() or "never")
pytest.importorskip("triton")

from tests import hopper_forward  # noqa: E402


@pytest.mark.slow
def test_the_forward_is_right_on_the_simulator() -> None:
    """Broken and huge inputs, slices of a batch, unusual calls."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "tests.hopper_forward"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    names = [*(check.__name__ for check in hopper_forward.CHECKS), *(case.name for case in hopper_forward.CASES)]
    assert done.stdout.splitlines() == names
