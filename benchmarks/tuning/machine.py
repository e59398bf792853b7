"""What a tuning needs of a machine: candidates held to float64 in processes of their own, and times taken in turns in this one."""

from __future__ import annotations

import functools
import json
import queue
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks.project import ROOT
from benchmarks.tuning import calls
from benchmarks.tuning.candidates import Entry
from fused_attn_bench import timers
from fused_attn_bench.measure import repeats_for, turns

# What a worker runs.
PROGRAM = ("-m", "benchmarks.tuning.worker")
# Seconds per call, one value per round, of each of the tiles in their order.
Times = list[list[float]]
# Before the reason of a worker that ends with its answer.
LAST = "\0"
# Seconds that a sample lasts: a round of a dozen candidates ends in a tenth of a second.
SAMPLE = 0.003
ROUNDS = 6


class Piece(NamedTuple):
    """Tiles to be held: accesses to local memory that a trip of their loops may have, None for any number."""

    entry: Entry
    tiles: Any
    most: int | None


class Held(NamedTuple):
    """Why tiles may not be chosen, empty if they may, and the most accesses to local memory in a trip of their loops."""

    why: str
    local: int


class Machine(Protocol):
    """What a test puts another in the place of."""

    def hold(self, pieces: Sequence[Piece], tell: Callable[[Piece, Held], None]) -> None:
        """Tells of each piece as soon as it is known."""

    def time(self, entry: Entry, chosen: Sequence[Any], seconds: float) -> dict[str, Times]:
        """Of each call that stands for the entry; the tiles may be given twice."""


class Local:
    """This machine.

    Args:
        device: where; "cpu" compiles alone.
        jobs: processes that compile and check at once.
    """

    def __init__(self, device: torch.device, jobs: int) -> None:
        self.device, self.jobs = device, jobs

    def hold(self, pieces: Sequence[Piece], tell: Callable[[Piece, Held], None]) -> None:
        waiting: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        for piece in pieces:
            waiting.put(piece)
        workers = min(self.jobs, len(pieces))
        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(lambda _: self._work(waiting, tell), range(workers)))

    def _work(self, waiting: queue.SimpleQueue[Piece], tell: Callable[[Piece, Held], None]) -> None:
        """Hands pieces to one process after the other: whoever ends is replaced."""
        worker = None
        try:
            while True:
                piece = waiting.get_nowait()
                if worker is None or worker.ended:
                    worker = _Worker(self.device)
                tell(piece, worker.ask(piece))
        except queue.Empty:
            if worker is not None:
                worker.close()

    def time(self, entry: Entry, chosen: Sequence[Any], seconds: float) -> dict[str, Times]:
        timer, of_calls = timers.make("auto", self.device), calls.timed(entry)
        return {call.name: self._time(entry, call, chosen, timer, seconds / len(of_calls)) for call in of_calls}

    def _time(self, entry: Entry, call: calls.Call, chosen: Sequence[Any], timer: timers.Timer, seconds: float) -> Times:
        function = calls.function(entry, call, self.device)

        def sample(tiles: Any, repeats: int) -> float:
            with calls.using(entry, tiles):
                return timer(function, repeats).seconds

        for tiles in chosen:  # loads what the workers have compiled
            sample(tiles, 1)
        repeats = [repeats_for(SAMPLE, min(sample(tiles, 1) for _ in range(2))) for tiles in chosen]
        samplers = {str(i): functools.partial(sample, tiles, repeats[i]) for i, tiles in enumerate(chosen)}
        taken = turns(samplers, seconds, ROUNDS)
        return [taken[str(i)] for i in range(len(chosen))]


class _Worker:
    """A process of ``worker``."""

    def __init__(self, device: torch.device) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the worker)
        command = [sys.executable, *PROGRAM, device.type]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def ask(self, piece: Piece) -> Held:
        """Its answer, or how it ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([*piece.entry, list(piece.tiles), piece.most]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer.endswith("\n"):
            why, local = json.loads(answer)
            if why.startswith(LAST):
                self.process.wait()
            return Held(why.removeprefix(LAST), local)
        code = self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()] or ["it said nothing"]
        hung = next((line for line in lines if line.startswith("Timeout")), None)
        return Held(f"its process ended with {code}: {hung or lines[-1]}", 0)

    def close(self) -> None:
        """Lets it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()
