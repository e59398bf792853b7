"""Files that commands write: tried before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def tried(*paths: Path | None) -> None:
    """Opens each file for writing and leaves it as it was, so that nothing is measured in vain.

    Raises:
        ValueError: one cannot be written.
    """
    for path in paths:
        if path is None:
            continue
        there = path.exists()
        try:
            with path.open("a"):
                pass
        except OSError as error:
            raise ValueError(f"{path} must be a file that can be written; got: {error}. Name another.") from None
        if not there:
            path.unlink()


def write(content: Any, path: Path | None) -> None:
    """JSON, where a path is given."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
