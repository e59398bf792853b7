"""One pass over a history: every run's times, and the runs that are shown in full."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fused_attn_bench.changes import Point, Series
from fused_attn_bench.results import Compared, Result, ResultsError


@dataclass(frozen=True)
class Run:
    """A run, without its results.

    Args:
        id: of the run.
        time: of its start.
        commit: what was measured.
        timer: what took the samples.
        environment: all but the commit, as sorted pairs, so that equal ones can be told.
    """

    id: str
    time: str
    commit: str
    timer: str
    environment: tuple[tuple[str, str], ...]


@dataclass(eq=False)
class Device:
    """What is known of one device.

    Args:
        name: of the device.
        runs: all of its runs by id, oldest first.
        points: the median and spread of every timed result, by machine, case and provider, then by run.
        shown: the results of the run that is shown in full.
    """

    name: str
    runs: dict[str, Run] = field(default_factory=dict)
    points: dict[Series, dict[str, tuple[float, float | None]]] = field(default_factory=dict)
    shown: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Takes a result in; all of it while its run is the newest."""
        if result.run not in self.runs:
            environment = tuple(sorted((name, value) for name, value in result.environment.items() if name != "commit"))
            self.runs[result.run] = Run(result.run, result.time, result.environment.get("commit", ""), result.timer, environment)
        if result.median is not None:
            key = (result.machine, result.case, result.provider)
            self.points.setdefault(key, {})[result.run] = (result.median, result.spread)
        newest = self.shown[0] if self.shown else result
        if result.run == newest.run:
            self.shown.append(result)
        elif (result.time, result.run) > (newest.time, newest.run):
            self.shown = [result]

    @property
    def run(self) -> str:
        """Id of the shown run; of a device with comparisons only the newest of those."""
        return self.shown[0].run if self.shown else next(reversed(self.runs))

    def compare(self, compared: Compared) -> None:
        """Takes in the run of a comparison, of which there is no result."""
        environment = tuple(sorted((name, value) for name, value in compared.environment.items() if name != "commit"))
        commit = compared.environment.get("commit", "")
        self.runs.setdefault(compared.run, Run(compared.run, compared.time, commit, compared.timer, environment))

    def history(self, runs: Sequence[str]) -> dict[Series, list[Point]]:
        """The points of these runs, in their order; series without any are left out."""
        kept = [self.runs[name] for name in runs]
        found = {}
        for key, values in self.points.items():
            points = [Point(run.id, run.time, run.commit, values[run.id][0]) for run in kept if run.id in values]
            if points:
                found[key] = points
        return found


def read(
    results: Iterable[Result], run: str | None = None, program: str = "fused-attn-bench", compared: Sequence[Compared] = ()
) -> list[Device]:
    """The devices of a history, first that of the run, by default the newest; those with comparisons only come last.

    Args:
        results: oldest first; only those that are shown in full are kept in memory.
        run: the one to show; of the other devices it is the newest.
        program: how the command line is called, for the message.
        compared: what comparisons found, which may be all that is known of a device.

    Raises:
        ResultsError: there is no such run, or nothing at all.
    """
    devices: dict[str, Device] = {}
    wanted: list[Result] = []
    for result in results:
        name = result.environment.get("device", "")
        devices.setdefault(name, Device(name)).add(result)
        if result.run == run:
            wanted.append(result)
    measured = {*devices}
    for one in compared:
        name = one.environment.get("device", "")
        if name not in measured:
            devices.setdefault(name, Device(name)).compare(one)
    if wanted:
        devices[wanted[0].environment.get("device", "")].shown = wanted
    elif not devices and run is None:
        raise ResultsError(f"the history must hold results or comparisons; what is chosen of it holds none. Measure some: {program} run.")
    elif run is not None:
        known = [name for device in devices.values() for name in device.runs][-5:]
        raise ResultsError(f"the run must be one of the history's; got {run!r}. It has {', '.join(known) or 'none yet'}: {program} run.")
    for device in devices.values():
        device.runs = dict(sorted(device.runs.items(), key=lambda item: (item[1].time, item[0])))
    newest = sorted(devices.values(), key=lambda d: (bool(d.shown), d.runs[d.run].time), reverse=True)
    return sorted(newest, key=lambda d: bool(wanted) and d.shown is not wanted)
