"""The one-pass backward of Hopper's kernels on the simulator, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import native

pytestmark = pytest.mark.skipif(bool(native.missing_for_simulator()), reason=native.missing_for_simulator() or "never")
pytest.importorskip("triton")

from tests import hopper_backward  # noqa: E402


@pytest.mark.peers  # two minutes of one process; the cover of test_hopper_simulated.py meets every kind of call in each run
@pytest.mark.slow
def test_the_one_pass_backward_is_right_on_the_simulator() -> None:
    """Broken and huge inputs, dq in order, planted faults, unusual calls."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "tests.hopper_backward"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    names = [*(check.__name__ for check in hopper_backward.CHECKS), *(case.name for case in hopper_backward.CASES)]
    assert done.stdout.splitlines() == names
