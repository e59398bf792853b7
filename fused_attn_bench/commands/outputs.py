"""Where a command's results go beside the terminal: JSON lines in a file or on standard output."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from fused_attn_bench.files import replacing, unwritten

# As a path: standard output.
STANDARD = Path("-")


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``, alike for every command."""
    text = "write what the table says there as well, as JSON lines; - writes them to standard output and the table to standard error"
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)


@contextlib.contextmanager
def table_of(path: Path | None) -> Iterator[None]:
    """Within it what is printed is for people: it goes to standard error where standard output is for JSON, which ``write`` still reaches."""
    if path != STANDARD:
        yield
        return
    with _set_aside() as kept:
        token = _STANDARD.set(kept)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            _STANDARD.reset(token)


@contextlib.contextmanager
def _set_aside() -> Iterator[TextIO]:
    """Standard output, which within the block nobody else reaches: what libraries and child processes write to descriptor 1 goes to standard error."""
    if _descriptor(sys.stdout) != 1:  # a test's, or a file that somebody put in its place
        yield sys.stdout
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as stream:
            yield stream
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


# Standard output itself, while what is printed goes elsewhere.
_STANDARD: ContextVar[TextIO | None] = ContextVar("standard output", default=None)


def line(values: Mapping[str, Any]) -> str:
    """One JSON object."""
    return json.dumps(values, allow_nan=False)


def write(path: Path | None, lines: Iterable[str]) -> None:
    """Lines of JSON, if a path is given; an old file stays until all of them are written."""
    if path is None:
        return
    with contextlib.nullcontext(_STANDARD.get() or sys.stdout) if path == STANDARD else replacing(path) as file:
        file.writelines(f"{text}\n" for text in lines)
        file.flush()


def flush() -> None:
    """Writes what standard output still holds; what it cannot take is dropped, so that Python does not try again at its end.

    Raises:
        OSError: it could not take all.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):  # not a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def begin(args: argparse.Namespace, *paths: Path | None) -> None:
    """Before anything is measured or read: ``--json`` and other files that will be written are tried.

    Raises:
        ValueError: one cannot be written.
    """
    if args.json not in (None, STANDARD):
        args.json = args.json.absolute()  # what is measured may go to another folder
    for path in (args.json, *paths):
        writable(path)


def writable(path: Path | None) -> None:
    """Nothing, if a file can be written there; tried before anything is measured, and leaving what is there as it is.

    Raises:
        ValueError: it cannot.
        OSError: the disk is full or fails.
    """
    if path is None or path == STANDARD:
        return
    there = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as error:
        if unwritten(error):
            raise
        raise ValueError(f"{path} must be a file that can be written; got: {error.strerror}. Name another, or make its folder.") from None
    if not there:
        os.unlink(path)
