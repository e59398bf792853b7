"""Where measurements are kept: one SQLite file outside of the source tree, and JSON lines to carry them elsewhere."""

from __future__ import annotations

import datetime
import json
import mmap
import os
import secrets
import sqlite3
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fused_attn_bench.environment import KEY

STATUSES = ("ok", "wrong", "refused", "failed")
FORMAT = 2
# "FuAt": tells a history from any other SQLite file.
APPLICATION = 0x46754174


@dataclass(frozen=True)
class Result:
    """What one provider did on one case in one run.

    Args:
        case: ``Case.name``.
        provider: a name in ``providers.names()``, perhaps with a planted slowdown or the commit it was built from.
        status: "ok"; "wrong" broke the error rule; "refused" cannot compute the case; "failed" raised.
        reason: why it has no times, or what to know about them.
        backend: which of fused_attn's backends ran.
        config: tile configurations that ran, where they are chosen at run time.
        error: largest absolute distance of any result from float64.
        plain_error: that of plain torch at the same dtype.
        peak: bytes of tensors alive at once beyond the inputs.
        outputs: bytes of the results.
        samples: seconds per call, on the device.
        host: seconds until the call returned; empty where that is the same.
        telemetry: one record of sensors per sample.
        faults: minor page faults per call, the median over the samples; None where they were not counted.
        metrics: figures of the operation's own by name; one whose name ends in "/s" is an amount per call.
        flops: of the case's operations.
        bytes: the least that the case has to move.
        roofs: bytes per second of a copy and operations per second of a matrix product, measured in the same run; empty where they were not.
        run: id of the run.
        time: of its start, ISO 8601 in UTC.
        timer: what took the samples.
        environment: see ``environment.describe``.
    """

    case: str
    provider: str
    status: str = "ok"
    reason: str = ""
    backend: str = ""
    config: str = ""
    error: float | None = None
    plain_error: float | None = None
    peak: int | None = None
    outputs: int = 0
    samples: tuple[float, ...] = ()
    host: tuple[float, ...] = ()
    telemetry: tuple[dict[str, Any], ...] = ()
    faults: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    flops: float = 0
    bytes: float = 0
    roofs: tuple[float, ...] = ()
    run: str = ""
    time: str = ""
    timer: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Seconds; None where nothing was timed."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def spread(self) -> float | None:
        """Half of the interquartile range as a fraction of the median."""
        if len(self.samples) < 4:
            return None
        low, middle, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / 2 / middle

    @property
    def limit(self) -> float | None:
        """The shortest time in seconds that the roofs allow: what the products or what the memory need, whichever is longer."""
        return max(self.bytes / self.roofs[0], self.flops / self.roofs[1]) if self.roofs else None

    @property
    def memory(self) -> str:
        """Of a call: "fresh" where it had pages mapped for at least half of what it gives out, "reused" where it wrote to mapped ones; "" if unknown.

        Outputs and scratch memory look alike here, and a huge page is one fault: the number of faults stands beside the word.
        """
        if self.faults is None or not self.outputs:
            return ""
        return "fresh" if 2 * self.faults * mmap.PAGESIZE >= self.outputs else "reused"

    @property
    def machine(self) -> tuple[str, ...]:
        """What has to agree before two results may be compared."""
        return machine(self.environment, self.timer)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """A result from one line.

        Raises:
            ResultsError: it is none.
        """
        try:
            read = json.loads(text)
            known = {f.name: read[f.name] for f in fields(cls) if f.name in read}
            result = cls(**known | {name: tuple(known.get(name, ())) for name in ("samples", "host", "telemetry", "roofs")})
            if result.status not in STATUSES or not all(isinstance(s, float) and s > 0 for s in result.samples):
                raise ValueError(f"a status of {', '.join(STATUSES)} and positive times are needed")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ResultsError(f"a line must hold one result as JSON; got {text[:60]!r} ({error}).") from None
        return result

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), allow_nan=False)


@dataclass(frozen=True)
class Compared:
    """What a comparison found on one case, as the history keeps it.

    Args:
        case: ``Case.name``.
        a, b: what the sides are called.
        verdict: as ``significance`` names it, or the status of a side that has no time.
        reason: why there is no time, or what to know about it.
        medians: seconds of A and of B; None where there are none.
        effect: log of the ratio of times B / A; None where a side has no time.
        low, high: its 95 % interval; None where it has none.
        p: corrected p-value.
        smallest: the smallest effect that the comparison could have found, a log ratio.
        launches: how many.
        run: id of the comparison.
        time: of its start, ISO 8601 in UTC.
        timer: what took the samples.
        environment: see ``environment.describe``.
    """

    case: str
    a: str
    b: str
    verdict: str
    reason: str = ""
    medians: tuple[float | None, float | None] = (None, None)
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    smallest: float | None = None
    launches: int = 0
    run: str = ""
    time: str = ""
    timer: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def new_run() -> tuple[str, str]:
    """An id for a run that begins now, and the time in UTC."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}", now.isoformat(timespec="seconds")


def machine(environment: Mapping[str, str], timer: str) -> tuple[str, ...]:
    """The part of an environment that times depend on, and what took them, beside which busy processes."""
    busy = environment.get("busy", "")
    return (*(environment.get(name, "") for name in KEY), f"{timer} beside {busy}" if busy else timer)


class ResultsError(ValueError):
    """A file that cannot be read, or must not be written to."""


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


class History:
    """Results in an SQLite file. Several processes may write at once; what was added survives whatever stops the process later.

    Args:
        path: of the file; made where there is none.

    Raises:
        ResultsError: the file is damaged, something else, or of a newer version. It is left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Transactions are begun and ended by hand: Python's own begin too late to keep a second writer out.
            self.connection = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._open()
        except (sqlite3.Error, OSError) as error:
            raise ResultsError(
                f"{path} must be a benchmark history that can be read and written; got: {error}. Move it away or name another with --db."
            ) from None

    def _open(self) -> None:
        version, application = self._number("user_version"), self._number("application_id")
        if version == 0 and application == 0 and self._is_empty():
            with self.writing():
                if self._is_empty():  # another process may have been faster
                    self._execute(SCHEMA, 1)
            version, application = self._number("user_version"), self._number("application_id")
        if application != APPLICATION:
            raise ResultsError(f"{self.path} must be a benchmark history; it is another program's SQLite file. Name another with --db.")
        for added in range(version + 1, FORMAT + 1):
            with self.writing():
                if self._number("user_version") < added:  # another process may have been faster
                    self._execute(ADDED[added], added)
        version = self._number("user_version")
        if version != FORMAT:
            raise ResultsError(
                f"{self.path} must have format {FORMAT} or older; it has {version}, from a newer version. Update, or name another with --db."
            )
        found = self.connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise ResultsError(f"{self.path} must be undamaged; SQLite says: {found}. Move it away or name another with --db.")
        self.connection.execute("PRAGMA journal_mode = WAL")

    def _execute(self, statements: str, version: int) -> None:
        for statement in filter(str.strip, statements.split(";")):
            self.connection.execute(statement)
        self.connection.execute(f"PRAGMA user_version = {version}")

    def _number(self, pragma: str) -> int:
        return int(self.connection.execute(f"PRAGMA {pragma}").fetchone()[0])

    def _is_empty(self) -> bool:
        return int(self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]) == 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction that holds the only write lock from its first statement on."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT")

    def add(self, results: Iterable[Result]) -> int:
        """Keeps results, all or none of them, but for those that are there already; returns how many were new."""
        with self.writing():
            added = 0
            for r in results:
                values = (
                    *(
                        r.run,
                        r.time,
                        r.environment.get("commit", ""),
                        *r.machine,
                        r.case,
                        r.provider,
                        r.backend,
                        r.config,
                        r.status,
                        r.median,
                    ),
                    r.to_json(),
                )
                places = ", ".join("?" * len(values))
                there = 'SELECT 1 FROM results WHERE run = ? AND "case" = ? AND provider = ? AND data = ?'
                if self.connection.execute(there, (r.run, r.case, r.provider, values[-1])).fetchone() is None:
                    columns = f'run, time, "commit", {", ".join(KEY)}, timer, "case", provider, backend, config, status, median, data'
                    self.connection.execute(f"INSERT INTO results ({columns}) VALUES ({places})", values)
                    added += 1
        return added

    def results(self, run: str | None = None) -> list[Result]:
        """Every result, or those of one run, oldest first."""
        where, values = ("WHERE run = ?", (run,)) if run else ("", ())
        rows = self.connection.execute(f"SELECT data FROM results {where} ORDER BY time, id", values)
        return [Result.from_json(row[0]) for row in rows]

    def add_comparisons(self, compared: Iterable[Compared]) -> None:
        """Keeps what comparisons found, all or none."""
        with self.writing():
            for c in compared:
                values = (c.run, c.time, c.case, c.a, c.b, c.verdict, json.dumps(asdict(c), allow_nan=False))
                self.connection.execute(
                    'INSERT INTO comparisons (run, time, "case", a, b, verdict, data) VALUES (?, ?, ?, ?, ?, ?, ?)', values
                )

    def comparisons(self) -> list[Compared]:
        """All that were kept, oldest first."""
        rows = self.connection.execute("SELECT data FROM comparisons ORDER BY time, id")
        read = (json.loads(row[0]) for row in rows)
        return [Compared(**{**values, "medians": tuple(values["medians"])}) for values in read]

    def runs(self) -> list[str]:
        """Ids of all runs, oldest first."""
        return [row[0] for row in self.connection.execute("SELECT run FROM results GROUP BY run ORDER BY min(time), min(id)")]

    def floor(self, machine: tuple[str, ...], case: str, provider: str) -> float | None:
        """The noise floor that ``calibrate`` found on a machine, as a log ratio of times; None where it has not run."""
        query = 'SELECT floor FROM floors WHERE machine = ? AND "case" = ? AND provider = ?'
        found = self.connection.execute(query, (json.dumps(machine), case, provider)).fetchone()
        return None if found is None else float(found[0])

    def set_floor(self, machine: tuple[str, ...], case: str, provider: str, floor: float, comparisons: int) -> None:
        """Keeps a noise floor and the number of comparisons that it rests on."""
        with self.writing():
            values = (json.dumps(machine), case, provider, floor, comparisons)
            self.connection.execute("INSERT OR REPLACE INTO floors VALUES (?, ?, ?, ?, ?)", values)

    def close(self) -> None:
        """Ends the connection; what was added is on disk already."""
        self.connection.close()


def export(results: Iterable[Result], path: Path) -> int:
    """Writes one JSON object per line; returns how many."""
    lines = [r.to_json() for r in results]
    path.write_text("".join(f"{line}\n" for line in lines))
    return len(lines)


def load(path: Path) -> list[Result]:
    """Results from JSON lines.

    Raises:
        ResultsError: a line is none; its number is named.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} must be a text file of JSON lines; got: {error}.") from None
    results = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                results.append(Result.from_json(line))
            except ResultsError as error:
                raise ResultsError(f"{path}, line {number}: {error}") from None
    return results
