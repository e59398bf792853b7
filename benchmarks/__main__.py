"""The measuring tool on fused_attn's own operations: ``python -m benchmarks COMMAND --help`` says more."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.project import PROJECT
from fused_attn_bench import __main__ as tool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; see ``fused_attn_bench.codes``."""
    return tool.main(argv, PROJECT)


if __name__ == "__main__":
    sys.exit(main())
