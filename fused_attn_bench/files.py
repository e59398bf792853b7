"""Files that are written whole or not at all, and what says that a disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def unwritten(error: BaseException) -> bool:
    """Whether it says that a disk, a quota or a file's size is used up, that a disk fails, or that whoever read the output has gone."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A file for text, which takes the place of ``path`` once all of it is on the disk: what cannot be written leaves the old one as it was.

    Devices, pipes and what is open as a process's output are written to as they are; so is a file in a folder that takes no other.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a")
        ...     with replacing(path) as file:
        ...         _ = file.write("all")
        ...     path.read_text()
        'all'
    """
    target = path.resolve()  # a link stays one
    made = _beside(target) if _plain(path) else None
    if made is None:
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    handle, name = made
    try:
        with open(handle, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _plain(path: Path) -> bool:
    """Whether it is, or will be, a file that has its name only: one below /dev or /proc is another name of something open."""
    parts = path.absolute().parts
    if parts[1:2] in (("dev",), ("proc",)) and parts[1:3] != ("dev", "shm"):
        return False
    return path.is_file() or not path.exists()


def _beside(target: Path) -> tuple[int, str] | None:
    """A new file in the same folder, with the old one's permissions; None where the folder takes none."""
    try:
        handle, name = tempfile.mkstemp(prefix=".fused-attn-bench-", dir=target.parent)
    except PermissionError:
        return None
    if target.exists():
        mode = stat.S_IMODE(target.stat().st_mode)
    else:
        os.umask(mask := os.umask(0o077))
        mode = 0o666 & ~mask
    os.chmod(name, mode)
    return handle, name
