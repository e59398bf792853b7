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

from benchmarks.tuning import calls
from benchmarks.tuning.candidates import Entry
from benchmarks.tuning.machine import LAST, Held, Piece
from fused_attn.backends.triton.hopper import tiles

# Seconds that a call may take, all kernels compiled on the way included (a minute in all seven calls of a candidate, on one core): a barrier
# nobody arrives at waits for ever.
LIMIT = 120
# Which of a kernel's parameters are fields of its tiles, in their order.
FIELDS = {
    "forward": ("NC", "BN", "STAGES", "REGISTERS", "AHEAD", "OWN_OUT"),
    "backward": ("STAGES", "CONSUMER", "EARLY", "HELD"),
    "rows": ("NC", "BN", "STAGES", "REGISTERS"),
}
KERNELS = {"forward": "forward_kernel", "backward": "_attention_bwd_hopper_kernel", "rows": "rows_kernel"}


class Watched:
    """What a table's kernel is compiled to and launched with meanwhile."""

    def __init__(self, table: str) -> None:
        from fused_attn.backends.triton.hopper import launch

        self.table, self.kernels, self.launched = table, [], set()
        self.compile, self.start = launch.compile_for, launch.start

    def compile_for(self, kernel: Any, args: tuple[Any, ...], *options: Any) -> Any:
        made = self.compile(kernel, args, *options)
        if kernel.fn.__name__ == KERNELS[self.table]:
            self.kernels.append(made)
        return made

    def started(self, kernel: Any, grid: Any, device: torch.device, args: tuple[Any, ...], *options: Any) -> Any:
        if kernel.fn.__name__ == KERNELS[self.table]:
            self.launched.add(launched(self.table, dict(zip(kernel.arg_names, args, strict=True))))
        return self.start(kernel, grid, device, args, *options)

    def local(self, chosen: Any) -> int:
        """Most accesses to local memory in a trip of the loops compiled since it was asked last.

        Raises:
            RuntimeError: the kernel was not launched with these tiles.
        """
        from tests import aot, sass

        if chosen not in self.launched:
            raise RuntimeError(f"the call does not reach the entry: tiles {self.launched} were launched")
        most = max((loop.local for kernel in self.kernels for loop in sass.main_loops(aot.sass(kernel))), default=0)
        self.kernels.clear()
        self.launched.clear()
        return most


def launched(table: str, args: dict[str, Any]) -> Any:
    """The tiles among a kernel's arguments."""
    values = (args[name] for name in FIELDS[table])
    return tiles.KINDS[table].tiles(*((args["tile"].q.value,) if table == "backward" else ()), *values)


def held(piece: Piece, device: torch.device) -> Held:
    """Compiles, counts and checks: every call has to be right, and the large ones have to run once."""
    from fused_attn.backends.triton.hopper import backward, forward, launch

    entry, chosen, allowed = piece
    watched, most = Watched(entry.table), 0
    with (
        calls.using(entry, chosen),
        mock.patch.object(launch, "compile_for", watched.compile_for),
        mock.patch.object(launch, "start", watched.started),
        mock.patch.object(launch, "_compiled", {}),
        # Nothing that was kept is started again, past what is looked at here.
        mock.patch.object(forward, "_kept", {}),
        mock.patch.object(backward, "_kept", {}),
    ):
        small = calls.checked(entry)
        for call in [*small, *calls.timed(entry)]:
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            why = _computed(entry, call, device, call in small)
            most = max(most, watched.local(chosen))
            if allowed is not None and most > allowed:
                why = f"spills: {most} accesses to local memory in a trip, {allowed} are allowed"
            if why:
                return Held(f"{call.name}: {why}", most)
    return Held("", most)


def _computed(entry: Entry, call: calls.Call, device: torch.device, small: bool) -> str:
    """Runs a call; what is wrong with a small one, empty where there is no GPU and so no results."""
    if not small:
        calls.function(entry, call, device)()
    elif device.type == "cuda":
        return calls.wrong(entry, call, device)
    else:
        calls.results(entry, call, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return ""


def said(error: BaseException) -> str:
    """What an error stems from: first and last line of the innermost one, for compilers put the place before the reason."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}"[:400]


def _compile_only() -> None:
    """Launches of this process compile for a GPU of compute capability 9.0, on tensors of the CPU."""
    from fused_attn.backends import triton
    from tests import hopper

    hopper.compile_only()
    triton._interpreted = lambda: True  # all that keeps the backend from tensors of the CPU


def main() -> None:
    """Answers [table, size, kind, tiles, most] with [why, local], see ``machine``, until the input ends."""
    device = torch.device(sys.argv[1])
    if device.type == "cpu":
        _compile_only()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints
    for line in sys.stdin:
        *where, values, most = json.loads(line)
        entry = Entry(*where)
        try:
            answer = held(Piece(entry, tiles.KINDS[entry.table].tiles(*values), most), device)
        except Exception as error:  # whatever a compiler or a driver raises
            # After an error of the device this process is of no more use.
            answer = Held(LAST * (device.type == "cuda") + said(error), 0)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(answer), file=answers, flush=True)
        if answer.why.startswith(LAST):
            return


if __name__ == "__main__":
    main()
