"""Where measurements are kept: results, comparisons and noise floors in one SQLite file outside of the source tree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fused_attn_bench.changes import Point, Series
from fused_attn_bench.database import Database
from fused_attn_bench.environment import KEY
from fused_attn_bench.results import Compared, Floor, Record, Result, ResultsError, S, kept, machine

# The tables of records, by what their rows hold.
TABLES: dict[type[Record], str] = {Result: "results", Compared: "comparisons"}


@dataclass(frozen=True)
class Filter:
    """Which rows are meant; what is left out keeps all.

    Args:
        runs: ids.
        cases: names or patterns, as ``fnmatch`` takes them.
        since: an ISO date or time in UTC.
        before: the same; rows of that moment are left out.
        last: the newest so many runs of those that the others keep.
    """

    runs: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    since: str = ""
    before: str = ""
    last: int | None = None

    def where(self, table: str) -> tuple[str, list[Any]]:
        """A condition on a table's rows, and its values."""
        parts: list[tuple[str, Sequence[Any]]] = []
        if self.runs:
            parts.append((f"run IN ({', '.join('?' * len(self.runs))})", self.runs))
        if self.cases:
            matches = " OR ".join(['"case" GLOB ?'] * len(self.cases))
            parts.append((f"({matches})", [case.replace("[!", "[^") for case in self.cases]))  # SQLite writes [^a] where fnmatch has [!a]
        if self.since:
            parts.append(("datetime(time) >= datetime(?)", [self.since]))
        if self.before:
            parts.append(("datetime(time) < datetime(?)", [self.before]))
        text, values = " AND ".join(part for part, _ in parts) or "1", [value for _, found in parts for value in found]
        if self.last is not None:
            newest = f"SELECT run FROM {table} WHERE {text} GROUP BY run ORDER BY min(time) DESC, min(id) DESC LIMIT ?"
            text, values = f"{text} AND run IN ({newest})", [*values, *values, self.last]
        return text, values


EVERYTHING = Filter()


@dataclass(frozen=True)
class Run:
    """What a history has of one run.

    Args:
        id: its name.
        time: of its start, ISO 8601 in UTC.
        device: where it ran.
        commit: of what was measured.
        timer: what took the samples, and beside which busy processes.
        results: how many results it has.
        comparisons: how many cases it compared.
    """

    id: str
    time: str
    device: str
    commit: str
    timer: str
    results: int = 0
    comparisons: int = 0


class History(Database):
    """Results in an SQLite file. Several processes may write at once; what was added survives whatever stops the process later.

    Args:
        path: of the file; made where there is none.
        warn: told of rows that cannot be read and are left out.
    """

    def add(self, records: Iterable[Record]) -> int:
        """Keeps records, all or none of them, but for those that are there already; returns how many were new."""
        with self.writing():
            return sum(self._add_floor(r) if isinstance(r, Floor) else self._add_row(r) for r in records)

    def _add_row(self, r: Result | Compared) -> int:
        # What makes two records the same; their text may differ, as 1 does from 1.0.
        if isinstance(r, Result):
            key: dict[str, Any] = {
                "run": r.run,
                "time": r.time,
                "case": r.case,
                "provider": r.provider,
                "status": r.status,
                "median": r.median,
            }
            row = key | {"commit": r.environment.get("commit", "")} | dict(zip((*KEY, "timer"), r.machine, strict=True))
            row |= {"backend": r.backend, "config": r.config, "data": r.to_json()}
        else:
            key = {"run": r.run, "time": r.time, "case": r.case, "a": r.a, "b": r.b, "verdict": r.verdict}
            row = key | {"data": json.dumps(vars(r), allow_nan=False)}
        table = TABLES[type(r)]
        there = " AND ".join(f'"{name}" IS ?' for name in key)
        if self.connection.execute(f"SELECT 1 FROM {table} WHERE {there}", list(key.values())).fetchone() is not None:
            return 0
        columns = ", ".join(f'"{name}"' for name in row)
        self.connection.execute(f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(row))})", list(row.values()))
        return 1

    def _add_floor(self, f: Floor) -> int:
        """Of two floors of one case the one that rests on more comparisons is kept."""
        text = """INSERT INTO floors VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE
            SET floor = excluded.floor, comparisons = excluded.comparisons WHERE excluded.comparisons > comparisons"""
        return self.connection.execute(text, (json.dumps(f.machine), f.case, f.provider, f.floor, f.comparisons)).rowcount

    def results(self, run: str | None = None, only: Filter = EVERYTHING) -> list[Result]:
        """Every result, those of one run, or those that a filter keeps, oldest first; what cannot be read is left out and warned of."""
        return list(self._records(Result, only if run is None else replace(only, runs=(run,))))

    def comparisons(self, only: Filter = EVERYTHING) -> list[Compared]:
        """What comparisons found, oldest first; what cannot be read is left out and warned of."""
        return list(self._records(Compared, only))

    def each(self, only: Filter = EVERYTHING) -> Iterator[Record]:
        """Results, comparisons and the noise floors of their cases, one at a time: all of a large history would not fit."""
        yield from self._records(Result, only)
        yield from self._records(Compared, only)
        yield from self.floors(only)

    def _records(self, kind: type[S], only: Filter) -> Iterator[S]:
        broken = 0
        for _, record in self._read(kind, only):
            if record is None:
                broken += 1
            else:
                yield record
        self._say_left_out(broken)

    def _say_left_out(self, rows: int) -> None:
        if rows:
            self.warn(f"{rows} rows of {self.path} cannot be read and are left out; prune --broken removes them.")

    def _read(self, kind: type[S], only: Filter) -> Iterator[tuple[int, S | None]]:
        """Row by row its id, and its record where it is one."""
        if kind is Compared and self.version < 2:
            return
        table = TABLES[kind]
        where, values = only.where(table)
        for number, data in self.connection.execute(f"SELECT id, data FROM {table} WHERE {where} ORDER BY time, id", values):
            try:
                yield number, kept(kind, data)
            except ResultsError:
                yield number, None

    def points(self, only: Filter = EVERYTHING) -> dict[Series, list[Point]]:
        """Medians in the order of time for each machine, case and provider, read without their samples."""
        where, values = only.where(TABLES[Result])
        sound = "typeof(median) = 'real' AND median BETWEEN 1e-12 AND 1e9 AND time GLOB '????-??-??*'"
        columns = f'{sound}, {", ".join((*KEY, "timer"))}, "case", provider, run, time, "commit", median'
        text = f"SELECT {columns} FROM results WHERE {where} AND median IS NOT NULL ORDER BY time, id"
        found: dict[Series, list[Point]] = {}
        broken = 0
        for is_sound, *row in self.connection.execute(text, values):
            if is_sound:
                found.setdefault((tuple(row[:-6]), row[-6], row[-5]), []).append(Point(*row[-4:]))
            else:
                broken += 1
        self._say_left_out(broken)
        return found

    def runs(self) -> list[str]:
        """Ids of all runs that have results, oldest first."""
        return [row[0] for row in self.connection.execute("SELECT run FROM results GROUP BY run ORDER BY min(time), min(id)")]

    def overview(self, only: Filter = EVERYTHING) -> list[Run]:
        """A line on each run and each comparison, oldest first."""
        where, values = only.where(TABLES[Result])
        text = f'SELECT run, min(time), device, "commit", timer, count(*) FROM results WHERE {where} GROUP BY run'
        found = {row[0]: Run(*row) for row in self.connection.execute(text, values)}
        for c in self.comparisons(only):
            about = c.environment
            blank = Run(c.run, c.time, about.get("device", ""), about.get("commit", ""), machine(about, c.timer)[-1])
            earlier = found.get(c.run, blank)
            found[c.run] = replace(earlier, comparisons=earlier.comparisons + 1)
        return sorted(found.values(), key=lambda r: (r.time, r.id))

    def named(self, run: str, compared: bool = True) -> str:
        """A run's id, which "latest" stands for as well; ``compared`` says whether comparisons are runs here.

        Raises:
            ResultsError: there is no such run.
        """
        known = [r.id for r in self.overview()] if compared else self.runs()
        found = known[-1] if run == "latest" and known else run
        if found not in known:
            raise ResultsError(
                f"the run must be latest or one of the history's; got {run!r}. It has {', '.join(known[-5:]) or 'none yet'}."
            )
        return found

    def delete(self, only: Filter, others: bool = False) -> tuple[int, int]:
        """Removes the results and the comparisons that a filter keeps, or all others; returns how many of each."""
        with self.writing():
            conditions = [(table, *only.where(table)) for table in TABLES.values()]
            results, comparisons = (
                self.connection.execute(f"DELETE FROM {table} WHERE {'NOT' if others else ''} ({where})", values).rowcount
                for table, where, values in conditions
            )
        return results, comparisons

    def delete_broken(self) -> int:
        """Removes the rows that cannot be read; returns how many."""
        with self.writing():
            broken = [(TABLES[Result], n) for n, record in self._read(Result, EVERYTHING) if record is None]
            broken += [(TABLES[Compared], n) for n, record in self._read(Compared, EVERYTHING) if record is None]
            for table, number in broken:
                self.connection.execute(f"DELETE FROM {table} WHERE id = ?", (number,))
        return len(broken)

    def floor(self, machine: tuple[str, ...], case: str, provider: str) -> float | None:
        """The noise floor that ``calibrate`` found on a machine, as a log ratio of times; None where it has not run."""
        query = 'SELECT floor FROM floors WHERE machine = ? AND "case" = ? AND provider = ?'
        found = self.connection.execute(query, (json.dumps(machine), case, provider)).fetchone()
        return None if found is None else float(found[0])

    def floors(self, only: Filter = EVERYTHING) -> list[Floor]:
        """All that were kept, of the cases that a filter keeps."""
        where, values = Filter(cases=only.cases).where("floors")
        rows = self.connection.execute(f'SELECT machine, "case", provider, floor, comparisons FROM floors WHERE {where}', values)
        return [Floor(tuple(json.loads(machine)), *rest) for machine, *rest in rows]

    def set_floor(self, machine: tuple[str, ...], case: str, provider: str, floor: float, comparisons: int) -> None:
        """Keeps a noise floor and the number of comparisons that it rests on."""
        with self.writing():
            values = (json.dumps(machine), case, provider, floor, comparisons)
            self.connection.execute("INSERT OR REPLACE INTO floors VALUES (?, ?, ?, ?, ?)", values)
