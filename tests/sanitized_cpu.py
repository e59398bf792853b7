"""What ``make sanitize`` runs: tests of the CPU library built with the address and undefined-behaviour sanitizers, once per instruction set.

``python -m tests.sanitized_cpu TEST ...``; a report ends the process of the tests, and with it the run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fused_attn import build_cpu

# The run-time libraries have to be there before Python's own memory functions are used.
RUNTIMES = ("libasan.so", "libubsan.so")


def environment(library: Path) -> dict[str, str]:
    """The variables under which a process runs a sanitized library.

    Raises:
        BuildError: the compiler's run-time libraries are not installed.
    """
    compiler = build_cpu.find_compiler()
    found = [compiler.run(f"-print-file-name={name}").stdout.strip() for name in RUNTIMES]
    if not all(Path(path).is_absolute() for path in found):
        raise build_cpu.BuildError(
            f"the sanitizers need g++ and its {' and '.join(RUNTIMES)}; {compiler.command[0]} has none. Install them, or set CXX=g++."
        )
    return {
        "LD_PRELOAD": " ".join(found),
        "FUSED_ATTN_CPU_LIBRARY": str(library),
        # Python frees nothing at its end, and torch asks for more than there is in tests of what it says then.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    }


def python(*arguments: str, output: int | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """This Python in a process of its own."""
    command, names = [sys.executable, *arguments], {**os.environ, **variables}
    return subprocess.run(command, env=names, stdout=output, stderr=output, text=True, check=False, cwd=build_cpu.ROOT)


def main(tests: Sequence[str]) -> int:
    """The exit status: 0 when every run of the tests ended well."""
    try:
        variables = environment(build_cpu.build(sanitize=True, report=print))
    except build_cpu.BuildError as error:
        print(error, file=sys.stderr)
        return 2
    code = "from fused_attn.backends.cpu import library as l; print(l.failure() or ' '.join(l.isas()))"
    asked = python("-c", code, output=subprocess.PIPE, **variables)
    isas = asked.stdout.split()
    if asked.returncode or not isas or not set(isas) <= set(build_cpu.ISAS):
        print(f"the sanitized library must load; it said: {asked.stdout}{asked.stderr}", file=sys.stderr)
        return 2
    status = 0
    for isa in isas:
        print(f"==> {isa}", flush=True)
        done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, FUSED_ATTN_CPU=isa, **variables)
        status = status or done.returncode
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
