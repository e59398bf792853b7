"""The layers give what the real packages gave: outputs, scores, gradients, float32 and float64."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import golden_d2l, golden_keras, golden_x_transformers
from tests.golden_cases import Case, Runner, cases, folders, hold

# The public name that was run -> what runs ours in its place. A target that is missing is an error.
RUNNERS: dict[str, Runner] = {**golden_d2l.RUNNERS, **golden_keras.RUNNERS, **golden_x_transformers.RUNNERS}
MIGRATING = Path(__file__).parents[1] / "docs" / "migrating.md"
CASES = [case for folder in folders() for case in cases(folder)]


def deviations() -> dict[str, str]:
    """Cases that are meant to differ, by id, with the reason: the rows ``| `system/case` | reason |`` of docs/migrating.md."""
    return dict(re.findall(r"^\| `([\w.]+/[\w.\-]+)` \| (.+?) \|$", MIGRATING.read_text(), flags=re.MULTILINE))


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_case(case: Case) -> None:
    run = RUNNERS[case.spec["target"]]
    reason = deviations().get(case.id)
    if reason is None:
        hold(case, run(case))
        return
    with pytest.raises(Exception):  # noqa: B017, PT011 - any difference counts; a deviation that is gone must leave the list
        hold(case, run(case))
