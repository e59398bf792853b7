"""One SQLite file: made, migrated, opened for reading where it cannot be written to, and never left half written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fused_attn_bench.environment import KEY
from fused_attn_bench.files import unwritten
from fused_attn_bench.results import ResultsError

FORMAT = 2
# "FuAt": tells a history from any other SQLite file.
APPLICATION = 0x46754174


def default_path() -> Path:
    """The user's data folder, or FUSED_ATTN_BENCHMARKS."""
    named = os.environ.get("FUSED_ATTN_BENCHMARKS")
    if named:
        return Path(named)
    import platformdirs

    return Path(platformdirs.user_data_dir("fused_attn", appauthor=False)) / "benchmarks.sqlite"


SCHEMA = f"""
CREATE TABLE results (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, time TEXT NOT NULL, "commit" TEXT NOT NULL, {", ".join(f"{name} TEXT NOT NULL" for name in KEY)},
    timer TEXT NOT NULL, "case" TEXT NOT NULL, provider TEXT NOT NULL, backend TEXT NOT NULL, config TEXT NOT NULL, status TEXT NOT NULL,
    median REAL, data TEXT NOT NULL
);
CREATE INDEX by_case ON results ("case", provider, time);
CREATE INDEX by_run ON results (run);
CREATE TABLE floors (
    machine TEXT NOT NULL, "case" TEXT NOT NULL, provider TEXT NOT NULL, floor REAL NOT NULL, comparisons INTEGER NOT NULL,
    PRIMARY KEY (machine, "case", provider)
);
PRAGMA application_id = {APPLICATION};
"""
# Seconds that a process waits for another one that writes.
PATIENCE = 60
# What each format added to the one before; a new history takes all of them.
ADDED = {
    2: """
CREATE TABLE comparisons (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, time TEXT NOT NULL, "case" TEXT NOT NULL, a TEXT NOT NULL, b TEXT NOT NULL, verdict TEXT NOT NULL,
    data TEXT NOT NULL
);
CREATE INDEX comparisons_by_case ON comparisons ("case", time);
"""
}
# What SQLite says when it cannot write; the second also of a quota that is used up.
UNWRITTEN = {"database or disk is full": errno.ENOSPC, "disk I/O error": errno.EIO}


class Database:
    """The file of a history. A file that may only be read is opened for reading, also from a folder or a disk that may only be read.

    Args:
        path: of the file; made where there is none.
        warn: told of rows that cannot be read and are left out.

    Raises:
        ResultsError: the file is damaged, something else, or of a newer version. It is left as it is.
        OSError: the disk is full or fails.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = lambda text: None) -> None:
        self.path, self.warn, self.cleanup = path, warn, contextlib.ExitStack()
        self.read_only = path.is_file() and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))
        try:
            if self.read_only:
                self.connection = self._reading()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                # Transactions are begun and ended by hand: Python's own begin too late to keep a second writer out.
                self.connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
            self._open()
        except (sqlite3.Error, OSError) as error:
            full = _full(error, path)
            if full is not None:
                raise full from None
            raise ResultsError(
                f"{path} must be a benchmark history that can be read{'' if self.read_only else ' and written'}; got: {error}. "
                "Move it away or name another with --db."
            ) from None

    def _reading(self) -> sqlite3.Connection:
        """A connection that needs to write nothing, neither the file nor the two beside it that SQLite keeps while one is open."""

        def connected(path: Path, mode: str) -> sqlite3.Connection:
            return sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, timeout=PATIENCE, isolation_level=None)

        connection = connected(self.path, "mode=ro")
        try:
            connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.OperationalError:
            connection.close()
        else:
            return connection
        left = Path(f"{self.path}-wal")
        if not left.is_file() or left.stat().st_size == 0:
            return connected(self.path, "immutable=1")
        # A process that was killed left rows there, which an immutable file would not show.
        folder = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory(prefix="fused-attn-bench-")))
        for file in (self.path, left):
            shutil.copyfile(file, folder / file.name)
        return connected(folder / self.path.name, "mode=rw")

    def _open(self) -> None:
        version, application = self._number("user_version"), self._number("application_id")
        if version == 0 and application == 0 and self._is_empty() and not self.read_only:
            with self.writing():
                if self._is_empty():  # another process may have been faster
                    self._execute(SCHEMA, 1)
            version, application = self._number("user_version"), self._number("application_id")
        if application != APPLICATION:
            raise ResultsError(f"{self.path} must be a benchmark history; it is another program's SQLite file. Name another with --db.")
        for added in () if self.read_only else range(version + 1, FORMAT + 1):
            with self.writing():
                if self._number("user_version") < added:  # another process may have been faster
                    self._execute(ADDED[added], added)
        self.version = self._number("user_version")
        if self.version > FORMAT:
            raise ResultsError(
                f"{self.path} must have format {FORMAT} or older; it has {self.version}, from a newer version. Update, or name another with --db."
            )
        found = self.connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise ResultsError(f"{self.path} must be undamaged; SQLite says: {found}. Move it away or name another with --db.")
        if not self.read_only:
            self.connection.execute("PRAGMA journal_mode = WAL")

    def _execute(self, statements: str, version: int) -> None:
        for statement in filter(str.strip, statements.split(";")):
            self.connection.execute(statement)
        self.connection.execute(f"PRAGMA user_version = {version}")

    def _number(self, pragma: str) -> int:
        return int(self.connection.execute(f"PRAGMA {pragma}").fetchone()[0])

    def _is_empty(self) -> bool:
        return int(self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]) == 0

    def must_be_writable(self) -> None:
        """Nothing, if it can be written to.

        Raises:
            ResultsError: it can only be read.
        """
        if self.read_only:
            raise ResultsError(
                f"{self.path} and its folder must be writable for this; they can only be read. Allow writing, or name another with --db."
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction that holds the only write lock from its first statement on.

        Raises:
            ResultsError: the file can only be read, or another process does not end writing.
            OSError: the disk is full or fails; nothing of the transaction is kept.
        """
        self.must_be_writable()
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            yield
            self.connection.execute("COMMIT")
        except BaseException as error:
            if self.connection.in_transaction:  # a full disk may have ended it already
                self.connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) and str(error) == "database is locked":
                raise ResultsError(
                    f"{self.path} must be free within {PATIENCE} s; another process is writing to it. Repeat the command when that has ended."
                ) from None
            full = _full(error, self.path)
            if full is not None:
                raise full from None
            raise

    def shrink(self) -> None:
        """Gives the room of what was removed back to the disk, where that has the room to do it."""
        with contextlib.suppress(sqlite3.OperationalError):
            self.connection.execute("VACUUM")
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Ends the connection; what was added is on disk already."""
        self.connection.close()
        self.cleanup.close()


def _full(error: BaseException, path: Path) -> OSError | None:
    """What the system says where a disk is full or fails; None for anything else."""
    if isinstance(error, OSError):
        return error if unwritten(error) else None
    code = UNWRITTEN.get(str(error)) if isinstance(error, sqlite3.OperationalError) else None
    return None if code is None else OSError(code, os.strerror(code), str(path))
