"""Choose the tiles of Hopper's kernels by measuring: candidates are compiled and held to float64 in processes of their own, then timed in turns."""

from __future__ import annotations

import argparse
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.project import ROOT
from benchmarks.tuning import record, verdict
from benchmarks.tuning.candidates import Entry, candidates, entries, shown
from benchmarks.tuning.machine import Held, Local, Machine, Piece
from benchmarks.tuning.verdict import Verdict
from benchmarks.tuning.worker import said
from fused_attn.backends.triton.hopper import tiles
from fused_attn_bench.commands import selection
from fused_attn_bench.environment import describe
from fused_attn_bench.text import table

WRONG = 1
# Each checks on the GPU as well, with up to 4 GB of its memory: an estimate, from the float64 tensors of the largest problem.
MOST_JOBS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which entries, and how long."""
    parser.add_argument("--table", choices=tiles.TABLES, help="one of them (default: all)")
    parser.add_argument("--entry", nargs="+", metavar='"64 plain"', help="head size and kind of call (default: all)")
    selection.add_device(parser)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per entry (default 3)")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, MOST_JOBS), help="processes that compile and check at once")
    parser.add_argument("--write", action="store_true", help=f"write what is fastest into {tiles.PATH.name}, entry by entry")
    parser.add_argument(
        "--compile", action="store_true", help="only compile, for capability 9.0 and without a GPU: says what spills, fills Triton's cache"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there as well")


def run(args: argparse.Namespace, machine: Machine | None = None) -> int:
    """0; 1 where tiles of today are wrong or do not compile."""
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, a process that compiles; got {args.jobs}")
    device = torch.device("cpu") if args.compile else selection.device(args)
    if machine is None and not args.compile and (device.type == "cpu" or torch.cuda.get_device_capability(device) != (9, 0)):
        raise ValueError("Hopper's kernels are timed on a GPU of compute capability 9.0; there is none. --compile needs no GPU.")
    chosen = entries(args.table, args.entry)
    machine = machine or Local(device, args.jobs)
    found = hold(machine, chosen, "compiles" if args.compile else "right")
    verdicts = []
    for entry in [] if args.compile else chosen:
        try:
            verdicts.append(judged(machine, entry, found[entry], args.seconds))
        except RuntimeError as error:  # of the device: its memory, or a candidate that fails only now
            found[entry][entry.present] = f"stopped while candidates were timed: {said(error)}"
            print(f"{entry.table} {entry.name}: {found[entry][entry.present]}\n", flush=True)
            continue
        print(f"{report(verdicts[-1])}\n", flush=True)
        # After every entry: what has been measured survives whatever comes next.
        if args.write and verdicts[-1].best is not None:
            tiles.PATH.write_text(record.revised(tiles.PATH.read_text(), verdicts[-1], describe(device, ROOT)))
        if args.json is not None:
            args.json.write_text(json.dumps({"environment": describe(device, ROOT), "entries": [listed(v) for v in verdicts]}, indent=1))
    bad = [f"{entry.table} {entry.name}: {why}" for entry in chosen if (why := found[entry][entry.present])]
    print("\n".join(f"tiles of {line}" for line in bad) or f"{len(chosen)} entries, whose present tiles hold", flush=True)
    return WRONG if bad else 0


def hold(machine: Machine, chosen: Sequence[Entry], good: str) -> dict[Entry, dict[Any, str]]:
    """Why each candidate of each entry may not be chosen, or an empty string; printed as it is known.

    The present tiles come first, for they leave compiled what all candidates of an entry share.
    """
    found: dict[Entry, dict[Any, str]] = {entry: dict.fromkeys(candidates(entry), "was not tried") for entry in chosen}
    lock, allowed = threading.Lock(), dict.fromkeys(chosen, 0)

    def tell(piece: Piece, held: Held) -> None:
        with lock:
            found[piece.entry][piece.tiles] = held.why
            said = held.why or (f"{good}, {held.local} accesses to local memory in a trip" if held.local else good)
            print(f"{piece.entry.table} {piece.entry.name}: {shown(piece.tiles)}: {said}", flush=True)
            if piece.tiles == piece.entry.present:
                allowed[piece.entry] = held.local

    machine.hold([Piece(entry, entry.present, None) for entry in chosen], tell)
    # What spills no more than the present tiles may be chosen: by Triton 3.9 most of them do.
    machine.hold([Piece(entry, other, allowed[entry]) for entry in chosen for other in [*found[entry]][1:]], tell)
    return found


def judged(machine: Machine, entry: Entry, found: dict[Any, str], seconds: float) -> Verdict:
    """Times of those that are right, the present tiles first and last. Nothing is timed against tiles that are wrong."""
    right = [candidate for candidate, why in found.items() if not why]
    refused = {candidate: why for candidate, why in found.items() if why}
    if entry.present in refused:
        return Verdict(entry, (), 0.0, refused)
    chosen = [*right, entry.present]
    return verdict.verdict(entry, chosen, machine.time(entry, chosen, seconds), refused)


def report(found: Verdict) -> str:
    """A table, the fastest first, and whom nobody timed."""
    best = found.best
    shapes = list(found.timed[0].ratios) if found.timed else []
    rows = []
    for timed in sorted(found.timed, key=lambda t: t.effect):
        said = [word for word, holds in (("present", timed is found.timed[0]), ("chosen", timed is best)) if holds]
        times = [f"{timed.milliseconds[shape]:.3f} ms {timed.ratios[shape]:.3f}" for shape in shapes]
        rows.append((shown(timed.tiles), ", ".join(said), f"{timed.ratio:.3f}", f"{100 * timed.error:.2f}%", *times))
    title = f"{found.entry.table} {found.entry.name}: ratios to the present tiles, which differ from themselves by {100 * abs(found.noise):.2f}%"
    refused = [f"refused: {shown(candidate)}: {why}" for candidate, why in found.refused.items()]
    return "\n".join([title, table(("tiles", "", "ratio", "error", *shapes), rows, left=2), *refused])


def listed(found: Verdict) -> dict[str, Any]:
    """For a file."""
    best = found.best
    return {
        "entry": found.entry._asdict(),
        "chosen": best and best.tiles._asdict(),
        "noise": found.noise,
        "timed": [{"tiles": t.tiles._asdict(), "ratio": t.ratio, "error": t.error, "milliseconds": t.milliseconds} for t in found.timed],
        "refused": [{"tiles": candidate._asdict(), "why": why} for candidate, why in found.refused.items()],
    }
