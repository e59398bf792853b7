"""Time and memory of functions that do the same work, measured so that they can be compared."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Function = Callable[[], object]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Args:
        seconds: for all functions together; a round that has begun is finished.
        rounds: at least so many rounds, whatever they take.
        sample: seconds that one sample should last; short calls are repeated within it.
        clock: ``time.thread_time`` counts only the calling thread's own work, whatever else the machine does.
    """

    seconds: float = 2.0
    rounds: int = 3
    sample: float = 0.005
    clock: Callable[[], float] = time.perf_counter


def synchronize(device: torch.device) -> None:
    """Waits for the device; the CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample(function: Function, repeats: int, device: torch.device, clock: Callable[[], float]) -> float:
    synchronize(device)
    start = clock()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (clock() - start) / repeats


def interleaved(functions: Mapping[str, Function], device: torch.device, effort: Effort | None = None) -> dict[str, Timing]:
    """Times functions in turns, A B C then C B A, so that a drifting clock or a noisy neighbour hits all of them alike.

    Every function must have run before: the first call, which compiles and allocates, is the caller's.

    Example:
        >>> times = interleaved({"a": lambda: None, "b": lambda: None}, torch.device("cpu"), Effort(0.0, rounds=4))
        >>> len(times["a"].samples), times["b"].median < 1
        (4, True)
    """
    effort = effort or Effort()
    clock = effort.clock
    first = {name: _sample(function, 1, device, clock) for name, function in functions.items()}
    repeats = {name: repeats_for(effort.sample, seconds) for name, seconds in first.items()}
    samplers = {name: functools.partial(_sample, functions[name], repeats[name], device, clock) for name in reversed([*functions])}
    rounds = effort.rounds - (set(repeats.values()) == {1})  # the calibrating call of a long function is a sample already
    taken = turns(samplers, effort.seconds, rounds)
    return {name: Timing((*[first[name]] * (repeats[name] == 1), *taken[name])) for name in functions}


def repeats_for(sample: float, seconds: float) -> int:
    """Calls of so many seconds that fill a sample."""
    return max(1, int(sample / max(seconds, 1e-9)))


def turns(
    samplers: Mapping[str, Callable[[], Result]],
    seconds: float,
    rounds: int,
    enough: Callable[[Mapping[str, list[Result]]], bool] = lambda taken: False,
) -> dict[str, list[Result]]:
    """What each sampler returned, one sample in each round, A B C then C B A, until ``seconds`` are over and ``rounds`` done.

    Args:
        samplers: who takes the samples, by name.
        seconds: for all together; a round that has begun is finished.
        rounds: at least so many.
        enough: whether what has been taken is enough before the seconds are over; asked after every second round.

    Example:
        >>> seen = []
        >>> turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 0.0, rounds=2)
        {'a': [None, None], 'b': [None, None]}
        >>> seen
        ['a', 'b', 'b', 'a']
    """
    taken: dict[str, list[Result]] = {name: [] for name in samplers}
    order, end, done = [*samplers], time.perf_counter() + seconds, 0
    while samplers and (done < rounds or time.perf_counter() < end):
        for name in order:
            taken[name].append(samplers[name]())
        order.reverse()
        done += 1
        if done >= rounds and done % 2 == 0 and enough(taken):
            break
    return taken


def peak_bytes(function: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """The result of a call, and the most bytes of tensors that were alive at once beyond those alive before it.

    Every allocation of torch's allocator counts, inside operators too: on CUDA from its statistics, on the CPU from the
    profiler's record of each allocation and release. Scratch memory that a BLAS library takes for itself is not seen.

    Example:
        >>> result, peak = peak_bytes(lambda: torch.ones(1000).clone(), torch.device("cpu"))
        >>> peak
        8000
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profiler:
        result = function()
    alive = peak = 0
    for event in sorted((e for e in profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return result, peak


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device, for deciding whether an experiment fits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as info:
            return next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
