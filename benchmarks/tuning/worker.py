"""A process that holds candidates to float64, one JSON line in and one out: what crashes or hangs there ends nothing else.

``python -m benchmarks.tuning.worker cuda`` runs on the GPU; ``cpu`` compiles for a GPU of compute capability 9.0 alone, which fills Triton's cache.
Importing it needs no Triton.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from typing import Any
from unittest import mock

import torch

from benchmarks.tuning import calls, machine
from benchmarks.tuning.candidates import Entry
from fused_attn.backends.triton.hopper import tiles

# Seconds that a call may take, all kernels compiled on the way included (a minute in all seven calls of a candidate, on one core): a barrier
# nobody arrives at waits for ever.
LIMIT = 120
KERNELS = {"forward": "forward_kernel", "backward": "_attention_bwd_hopper_kernel", "rows": "rows_kernel"}


class Watched:
    """What a table's kernel is compiled to and launched with meanwhile."""

    def __init__(self, table: str) -> None:
        from fused_attn.backends.triton.hopper import launch

        self.table, self.kernels, self.launched = table, [], set()
        self.compile, self.start = launch.compile_for, launch.start

    def compile_for(self, kernel: Any, args: tuple[Any, ...], num_warps: int) -> Any:
        made = self.compile(kernel, args, num_warps)
        if kernel.fn.__name__ == KERNELS[self.table]:
            self.kernels.append(made)
        return made

    def started(self, kernel: Any, grid: Any, device: torch.device, args: tuple[Any, ...], num_warps: int) -> None:
        if kernel.fn.__name__ == KERNELS[self.table]:
            self.launched.add(launched(self.table, args))
        self.start(kernel, grid, device, args, num_warps)

    def complaint(self, chosen: Any) -> str:
        """Why what was compiled since it was asked last may not be chosen.

        Raises:
            RuntimeError: the kernel was not launched with these tiles.
        """
        from tests import aot, sass

        if chosen not in self.launched:
            raise RuntimeError(f"the call does not reach the entry: tiles {self.launched} were launched")
        local = max((loop.local for kernel in self.kernels for loop in sass.main_loops(aot.sass(kernel))), default=0)
        self.kernels.clear()
        self.launched.clear()
        return f"spills: {local} accesses to local memory in a trip" if local else ""


def launched(table: str, args: tuple[Any, ...]) -> Any:
    """The tiles among a kernel's arguments."""
    if table == "forward":
        return tiles.ForwardTiles(*args[-8:-4], args[-2])
    return tiles.BackwardConfig(args[-3].q.value, *args[-2:]) if table == "backward" else tiles.RowTiles(*args[-4:])


def held(entry: Entry, chosen: Any, device: torch.device) -> str:
    """Why the tiles may not be chosen; empty where they compile, do not spill and are right in every call, large ones run once included."""
    from fused_attn.backends.triton.hopper import launch

    watched = Watched(entry.table)
    with (
        calls.using(entry, chosen),
        mock.patch.object(launch, "compile_for", watched.compile_for),
        mock.patch.object(launch, "start", watched.started),
        mock.patch.object(launch, "_compiled", {}),
    ):
        for call in calls.checked(entry):
            _watch()
            # Without a GPU there are no results, only compiled kernels.
            why = calls.wrong(entry, call, device) if device.type == "cuda" else calls.results(entry, call, device) and ""
            if why := why or watched.complaint(chosen):
                return f"{call.name}: {why}"
        for call in calls.timed(entry):
            _watch()
            calls.function(entry, call, device)()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if why := watched.complaint(chosen):
                return f"{call.name}: {why}"
    return ""


def said(error: BaseException) -> str:
    """What an error stems from: first and last line of the innermost one, for compilers put the place before the reason."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}"[:400]


def _watch() -> None:
    """Ends this process if the next call takes too long."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)


def _compile_only() -> None:
    """Launches of this process compile for a GPU of compute capability 9.0, on tensors of the CPU."""
    from fused_attn.backends import triton
    from tests import hopper

    hopper.compile_only()
    triton._interpreted = lambda: True  # all that keeps the backend from tensors of the CPU


def main() -> None:
    """Answers [table, size, kind, values] with a reason, until the input ends."""
    device = torch.device(sys.argv[1])
    if device.type == "cpu":
        _compile_only()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints
    for line in sys.stdin:
        *where, values = json.loads(line)
        entry = Entry(*where)
        try:
            why = held(entry, tiles.KINDS[entry.table].tiles(*values), device)
        except Exception as error:  # whatever a compiler or a driver raises
            why = said(error)
            if device.type == "cuda":
                # After an error of the device this process is of no more use.
                print(json.dumps(machine.LAST + why), file=answers, flush=True)
                return
        finally:
            faulthandler.cancel_dump_traceback_later()
        print(json.dumps(why), file=answers, flush=True)


if __name__ == "__main__":
    main()
