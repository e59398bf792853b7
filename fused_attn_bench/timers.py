"""One sample of a function's time: on the device, and on the host that starts it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

Function = Callable[[], object]
# Of a GPU per second, at least what its fastest clock makes; and seconds that a device waits for the host at most: a first call compiles.
CYCLES = 2e9
MOST_LEAD = 0.01


class Sample(NamedTuple):
    """Seconds per call.

    Args:
        seconds: on the device; on the CPU the wall's.
        host: until the call returned to its caller; None where that is the same.
        telemetry: clocks, power, temperature and reasons for throttling right after; empty where nothing can be read.
        faults: minor page faults of the process per call; None where they are not counted.
    """

    seconds: float
    host: float | None = None
    telemetry: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    faults: float | None = None


class Timer(Protocol):
    """Takes samples."""

    name: str

    def __call__(self, function: Function, repeats: int) -> Sample: ...


def page_faults() -> int | None:
    """Minor page faults of the process so far, all threads together: torch's write most of an output. None where nobody counts them."""
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class WallTimer:
    """The wall clock, for functions that compute on the CPU, and the page faults meanwhile."""

    name = "wall"

    def __call__(self, function: Function, repeats: int) -> Sample:
        before = page_faults()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        seconds = (time.perf_counter() - start) / repeats
        after = page_faults()
        return Sample(seconds, faults=None if before is None or after is None else (after - before) / repeats)


class EventTimer:
    """CUDA events around each call; the cache is flushed before each, outside of what is timed.

    The device then waits for as long as the host took for the call before, and as long again, so that its kernels lie ready one after the other: events around
    a call of 0.5 ms on an H100 else held up to 0.3 ms in which the device had nothing to do.

    Args:
        device: whose stream the calls go to.
        cold: whether the L2 cache is flushed.
    """

    name = "events"

    def __init__(self, device: torch.device, cold: bool = True) -> None:
        self.device = device
        # Twice the cache, so that a partial replacement policy leaves nothing.
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size if cold else 0
        self.flush = torch.empty(size, dtype=torch.int8, device=device) if size else None
        self.lead = 0.0

    def __call__(self, function: Function, repeats: int) -> Sample:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        host = 0.0
        torch.cuda.synchronize(self.device)
        for begin, end in events:
            if self.flush is not None:
                self.flush.zero_()
            torch.cuda._sleep(int(self.lead * CYCLES))
            begin.record()
            start = time.perf_counter()
            function()
            taken = time.perf_counter() - start
            end.record()
            host, self.lead = host + taken, min(2 * taken, MOST_LEAD)
        torch.cuda.synchronize(self.device)
        return Sample(sum(begin.elapsed_time(end) for begin, end in events) / 1e3 / repeats, host / repeats)


class GraphTimer(EventTimer):
    """The same on a captured CUDA graph: no host work between kernels. The host time is that of the call itself."""

    name = "graph"

    def __init__(self, device: torch.device, cold: bool = True) -> None:
        super().__init__(device, cold)
        self.graphs: dict[int, tuple[Function, torch.cuda.CUDAGraph]] = {}

    def __call__(self, function: Function, repeats: int) -> Sample:
        if id(function) not in self.graphs:
            side = torch.cuda.Stream(self.device)
            with torch.cuda.stream(side):  # what allocates or compiles on its first runs must not do so in the capture
                for _ in range(3):
                    function()
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            self.graphs[id(function)] = (function, graph)
        start = time.perf_counter()
        function()
        host = time.perf_counter() - start
        return Sample(super().__call__(self.graphs[id(function)][1].replay, repeats).seconds, host)


class ProtonTimer(EventTimer):
    """Kernel by kernel, as Triton's profiler Proton sees them: the time between kernels does not count, nor does the flush of the cache.

    Tested against Proton's format with stand-ins; no number of it has been measured on a GPU yet.
    """

    name = "proton"

    def __call__(self, function: Function, repeats: int) -> Sample:
        import triton.profiler as proton

        host = 0.0
        with tempfile.TemporaryDirectory() as folder:
            session = proton.start(str(Path(folder) / "sample"), data="tree")
            try:
                for _ in range(repeats):
                    if self.flush is not None:
                        self.flush.zero_()
                    start = time.perf_counter()
                    with proton.scope(PROTON_SCOPE):
                        function()
                    host += time.perf_counter() - start
                torch.cuda.synchronize(self.device)
            finally:
                proton.finalize(session)
            (written,) = Path(folder).iterdir()
            seconds = kernel_seconds(json.loads(written.read_text())[0])
        if not seconds:
            raise RuntimeError("Proton must see the call's kernels; it saw none. Use --timer events.")
        return Sample(seconds / repeats, host / repeats)


# Holds a call's kernels in Proton's tree.
PROTON_SCOPE = "call"


def kernel_seconds(node: Mapping[str, Any], inside: bool = False) -> float:
    """Seconds of all kernels below the scope in a tree of Proton's.

    Example:
        >>> kernel = {"frame": {"name": "k"}, "metrics": {"time (ns)": 2000}, "children": []}
        >>> scope = {"frame": {"name": "call"}, "metrics": {}, "children": [kernel, kernel]}
        >>> kernel_seconds({"frame": {"name": "ROOT"}, "metrics": {}, "children": [kernel, scope]})
        4e-06
    """
    inside = inside or node["frame"]["name"] == PROTON_SCOPE
    below = sum(kernel_seconds(child, inside) for child in node["children"])
    own = node["metrics"].get("time (ns)", 0) / 1e9
    # An inner node's time, where it has one, is that of its children.
    return float(below or own) if inside else float(below)


TIMERS = ("auto", "wall", "events", "graph", "proton")


def make(name: str, device: torch.device, cold: bool = True) -> Timer:
    """The timer of that name; "auto" is "events" on a GPU and "wall" elsewhere.

    Raises:
        ValueError: CUDA's timers on another device, or the wall clock on a GPU, whose calls return before they are done.
    """
    gpu = device.type == "cuda"
    if (name == "wall" and gpu) or (name in ("events", "graph", "proton") and not gpu):
        raise ValueError(
            f"the timer must be wall on the CPU and events, graph or proton on a GPU; got {name} on {device.type}. Leave it at auto."
        )
    if not gpu:
        return WallTimer()
    return {"graph": GraphTimer, "proton": ProtonTimer}.get(name, EventTimer)(device, cold)
