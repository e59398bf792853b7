"""Processes that keep cores busy while something is measured beside them, and end with whoever started them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# A loop, and a thread that waits for the end of standard input: the system closes the pipe however its other side ends, killed or crashed.
_LOOP = """
import os, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
os.write(1, b"!")
while True:
    pass
"""


def described(count: int) -> str:
    """What an environment says of so many; empty for none.

    Example:
        >>> described(2), described(1), described(0)
        ('2 busy processes', '1 busy process', '')
    """
    return f"{count} busy process{'es' * (count > 1)}" if count else ""


def most() -> int:
    """How many may be asked for: beyond a few per core nothing is left to measure."""
    return 8 * (os.cpu_count() or 1)


@contextmanager
def neighbours(count: int) -> Iterator[list[int]]:
    """The ids of so many busy processes, running when the block begins and gone when it ends.

    Raises:
        ValueError: the count is negative or far beyond the cores.
    """
    if not 0 <= count <= most():
        raise ValueError(f"the number of busy processes must be in [0, {most()}], at most 8 per core; got {count}.")
    with ExitStack() as stack:
        processes = [stack.enter_context(_running()) for _ in range(count)]
        for process in processes:
            assert process.stdout is not None
            if not process.stdout.read(1):
                raise RuntimeError(f"a busy process must begin before anything is measured; one ended with {process.wait()}. Start fewer.")
        yield [process.pid for process in processes]


@contextmanager
def _running() -> Iterator[subprocess.Popen[bytes]]:
    # In a session of its own, or Ctrl-C would end it before the results of the case in progress are kept.
    command = [sys.executable, "-S", "-c", _LOOP]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()
