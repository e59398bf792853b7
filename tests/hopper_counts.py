"""Instructions of the Hopper kernels' main loops, counted in SASS: what every configuration costs per 64 x 64 score tile, and the record of it.

``python -m tests.hopper_counts [part of a name ...]`` in a process without TRITON_INTERPRET compiles with the Triton at hand and prints one
JSON line per configuration. ``make hopper`` does so with every supported Triton and writes ``hopper_counts.json``, which
``tests/test_hopper_counts.py`` holds a few configurations to.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fused_attn as fa
from fused_attn.backends import get
from fused_attn.backends.base import Incoming
from fused_attn.problem import AttentionProblem
from tests import aot, sass

RECORD = Path(__file__).with_name("hopper_counts.json")
HEADS, LENGTH = 4, 512
# What a configuration may cost more than its record.
SLACK = 0.03
# Most waits for products in a trip, which are those that are written. Where ptxas runs two products one after the other, which it says nowhere
# else, there is one more.
MOST_WAITS = {"forward": 2, "backward": 4}


@dataclass(frozen=True)
class Counts:
    """What a pass's kernels with loops over score tiles are made of; see ``sass``.

    Args:
        kernels: their names.
        per_tile: warp instructions per 64 x 64 scores of a full tile, all warps that work on it, of the best and the worst consumer.
        loops: instructions of a warp in such a loop, of each consumer.
        masked: the same of the longest loop over masked tiles, 0 without one.
        tiles: 64 x 64 tiles of a warpgroup's loop.
        products: tensor products by shape and where A lies, in one loop.
        mufu: instructions for exponentials in one loop.
        shared_bytes: what a warp's own loads and stores take of shared memory's bandwidth in one loop.
        waits: most waits for products in a full loop.
        local: most accesses to local memory in any loop over tiles.
        copies: bulk loads, stores and sums in the code.
        budgets: registers that USETMAXREG names.
        stack: bytes.
        shared: bytes.
    """

    kernels: list[str]
    per_tile: list[int]
    loops: list[int]
    masked: int
    tiles: float
    products: dict[str, int]
    mufu: int
    shared_bytes: int
    waits: int
    local: int
    copies: dict[str, int]
    budgets: list[int]
    stack: int
    shared: int


@dataclass(frozen=True)
class Configuration:
    """A call whose loops are counted.

    Args:
        direction: "forward" or "backward".
        head_dim: of q, k and, unless ``value_dim`` says otherwise, v.
        what: a name in ``OPTIONS``.
        value_dim: of v.
        dtype: of q, k and v.
    """

    direction: str
    head_dim: int
    what: str = "plain"
    value_dim: int = 0
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        dims = str(self.head_dim) if not self.value_dim else f"{self.head_dim}/{self.value_dim}"
        dtype = "" if self.dtype == torch.bfloat16 else f" {str(self.dtype).removeprefix('torch.')}"
        return f"{self.direction} {dims} {self.what}{dtype}"

    @property
    def consumers(self) -> int:
        """Warpgroups that have a copy of the loop of their own."""
        heavy = self.what in ("bias", "dense", "dropout")
        return 3 if self.direction == "forward" and max(self.head_dim, self.value_dim) <= 64 and not heavy else 2

    @property
    def padded(self) -> tuple[int, int]:
        """Head and value size of the tiles."""
        head, value = (max(64, 1 << (n - 1).bit_length()) for n in (self.head_dim, self.value_dim or self.head_dim))
        return head, value

    @property
    def terms(self) -> int:
        """Multiply-adds per score of the pass's products."""
        d, v = self.padded
        return d + v if self.direction == "forward" else 3 * d + 2 * v


def _dense() -> fa.Dense:
    return fa.Dense(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))


# What a call is given beside q, k and v; made when it is asked for.
OPTIONS: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {
    "plain": lambda dtype: {},
    "causal": lambda dtype: {"mask": fa.Causal()},
    "window": lambda dtype: {"mask": fa.SlidingWindow(100, 30)},
    "documents": lambda dtype: {"mask": fa.Documents(torch.arange(LENGTH) // 100)},
    "dense": lambda dtype: {"mask": _dense()},
    "bias": lambda dtype: {"score_mods": (fa.Bias(torch.zeros(1, HEADS, LENGTH, LENGTH, dtype=dtype, requires_grad=True)),)},
    "softcap": lambda dtype: {"score_mods": (fa.SoftCap(30.0),)},
    "alibi": lambda dtype: {"score_mods": (fa.ALiBi(torch.ones(HEADS)),)},
    "softcap, alibi": lambda dtype: {"score_mods": (fa.SoftCap(30.0), fa.ALiBi(torch.ones(HEADS)))},
    "dropout": lambda dtype: {"dropout": fa.Dropout(0.1, seed=1)},
    "sinks": lambda dtype: {"sinks": torch.zeros(HEADS)},
    "in order": lambda dtype: {},
}
CONFIGURATIONS = {
    c.name: c
    for c in (
        *(
            Configuration("forward", d, what)
            for d in (64, 128, 256)
            for what in ("plain", "causal", "window", "documents", "dense", "softcap")
        ),
        *(Configuration("forward", d, what) for d in (64, 128) for what in ("bias", "alibi", "softcap, alibi", "dropout", "sinks")),
        Configuration("forward", 128, value_dim=64),
        *(Configuration("forward", d, dtype=torch.float16) for d in (64, 128, 256)),
        *(
            Configuration("backward", d, what)
            for d in (64, 128)
            for what in ("plain", "causal", "window", "documents", "dense", "softcap", "alibi", "bias", "dropout", "in order")
        ),
        Configuration("backward", 128, dtype=torch.float16),
    )
}
# Most warp instructions per 64 x 64 tile that the project allows itself, bfloat16, Triton 3.7; FlashAttention 3 takes 840, 887, 1462 and
# 1418, 1632.
BOUNDS = {("forward", 64): 840, ("forward", 128): 950, ("forward", 256): 1670, ("backward", 64): 1130, ("backward", 128): 1530}
MASKS = ("plain", "causal", "window", "documents", "dense")
# Modifications: as a multiple of the plain loop.
TIMES = {("forward", 64, "bias"): 1.5, ("forward", 128, "bias"): 1.7, ("forward", 128, "softcap"): 1.5, ("forward", 128, "alibi"): 1.5}
# Other Tritons, as a multiple of 3.7's bound: 3.9 keeps descriptors differently.
TRITONS = {"3.6": 1.03, "3.7": 1.0, "3.8": 1.03, "3.9": 1.2}


def bound(configuration: Configuration, triton: str, plain: int) -> float | None:
    """Most instructions per tile; None where only the record counts.

    Args:
        configuration: in bfloat16, head and value size the same.
        triton: "3.7".
        plain: what the plain loop of the direction and size takes.
    """
    c = configuration
    if c.dtype != torch.bfloat16 or c.value_dim:
        return None
    most = TIMES[key] * plain if (key := (c.direction, c.head_dim, c.what)) in TIMES else None
    if c.what in MASKS:
        most = BOUNDS[c.direction, c.head_dim]
    return most and most * TRITONS[triton]


def _run(configuration: Configuration) -> None:
    """Launches everything that the pass launches."""
    c = configuration
    sizes = (c.head_dim, c.head_dim, c.value_dim or c.head_dim)
    q, k, v = (torch.zeros(1, HEADS, LENGTH, size, dtype=c.dtype) for size in sizes)
    options = dict.fromkeys(("mask", "scale", "q_offset", "sinks", "dropout", "return_aux")) | {"score_mods": ()}
    call, backend = AttentionProblem.check(q, k, v, options | OPTIONS[c.what](c.dtype)).lower(), get("triton")
    forward = backend.attention_fwd(call)
    if c.direction == "forward":
        return
    aot.compiled.clear()
    torch.use_deterministic_algorithms(c.what == "in order")
    needs = (True, True, True, False, *(t.requires_grad for t in call.terms.parameters[1:]))
    backend.attention_bwd(call, forward, Incoming(forward.out, None, None, None, None), needs)


def of(configuration: Configuration) -> Counts:
    """Compiles a configuration's kernels for Hopper and counts; ``prepare`` comes first."""
    aot.compiled.clear()
    _run(configuration)
    found = [(name, kernel, aot.sass(kernel)) for name, kernel in aot.compiled]
    return counted(configuration, [part for part in found if sass.main_loops(part[2])])


def full_tiles(loops: list[sass.Loop], consumers: int) -> list[sass.Loop]:
    """The loops over full tiles among all, shortest first: those before the largest step in length, at most one per consumer.

    Consumers may share a copy of the code; masked tiles cost 8 % more and beyond, consumers differ by less than that.
    """
    sizes = [len(loop.lines) for loop in loops]
    steps = [longer / shorter for shorter, longer in itertools.pairwise(sizes[: consumers + 1])]
    return loops[: steps.index(max(steps)) + 1] if steps and max(steps) > 1.04 else loops[:consumers]


def counted(configuration: Configuration, kernels: list[tuple[str, Any, str]]) -> Counts:
    """The counts of (name, compiled kernel, SASS); loops of several kernels add up."""
    assert kernels, f"{configuration.name}: no kernel has a loop over score tiles with tensor products"
    full = [full_tiles(sass.main_loops(text), configuration.consumers) for _, _, text in kernels]
    every = [loop for _, _, text in kernels for loop in sass.main_loops(text)]
    worst = [loops[-1] for loops in full]
    work = sum(columns for loop in worst for columns, _ in loop.products) * 16
    tiles = work / (64 * configuration.terms)
    resources = [aot.resources(kernel) for _, kernel, _ in kernels]
    shapes = [f"64x{columns}x16 {'shared' if from_shared else 'registers'}" for loop in worst for columns, from_shared in loop.products]
    masked = max(len(loop.lines) for loop in every)
    return Counts(
        kernels=[name for name, _, _ in kernels],
        per_tile=[round(4 * sum(len(loops[i].lines) for loops in full) / tiles) for i in (0, -1)],
        loops=[len(loop.lines) for loops in full for loop in loops],
        masked=masked if masked > max(len(loop.lines) for loop in worst) else 0,
        tiles=tiles,
        products={shape: shapes.count(shape) for shape in dict.fromkeys(shapes)},
        mufu=sum(loop.mufu for loop in worst),
        shared_bytes=sum(loop.shared_bytes for loop in worst),
        waits=max(loop.waits for loop in worst),
        local=max(loop.local for loop in every),
        copies={name: sum(sass.copies(text)[name] for _, _, text in kernels) for name in ("UTMALDG", "UTMASTG", "UTMAREDG")},
        budgets=sorted({n for _, _, text in kernels for n in sass.register_budgets(text)}),
        stack=max(r["STACK"] for r in resources),
        shared=max(r["shared"] for r in resources),
    )


def prepare() -> None:
    """From here on this process compiles Hopper kernels and starts nothing; the plain kernels beside them are left out."""
    import triton

    from tests import hopper

    hopper.compile_only()
    triton.runtime.jit.JITFunction.__getitem__ = lambda self, grid: lambda *args, **kwargs: None


def complaints(configuration: Configuration, triton: str, counts: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What breaks a rule: the record of this Triton, or the bounds.

    Args:
        configuration: what was counted.
        triton: "3.7".
        counts: ``Counts`` as a dictionary.
        record: {name: counts} of this Triton.
    """
    worst, name = counts["per_tile"][1], f"{configuration.name}, Triton {triton}"
    found, kept = [], record.get(configuration.name)
    if kept is None:
        return [f"{name}: nothing is recorded; run make hopper"]
    most = kept["per_tile"][1] * (1 + SLACK)
    if worst > most:
        found.append(
            f"{name}: {worst} warp instructions per 64 x 64 tile, {most:.0f} are due (record + 3 %); find what grew, or run make hopper"
        )
    for what in ("waits", "local"):
        if counts[what] > kept[what]:
            found.append(f"{name}: {counts[what]} {what} per trip, {kept[what]} are recorded")
    if counts["waits"] > MOST_WAITS[configuration.direction]:
        found.append(
            f"{name}: {counts['waits']} waits per trip, at most {MOST_WAITS[configuration.direction]} are allowed: ptxas serialised"
        )
    if counts["products"] != kept["products"]:
        found.append(f"{name}: tensor products {counts['products']}, recorded {kept['products']}")
    if counts["budgets"] != kept["budgets"]:
        found.append(f"{name}: register budgets {counts['budgets']}, recorded {kept['budgets']}")
    found += [f"{name}: no {copy}" for copy, number in kept["copies"].items() if number and not counts["copies"][copy]]
    plain = record.get(f"{configuration.direction} {configuration.head_dim} plain", counts)["per_tile"][1]
    limit = bound(configuration, triton, plain)
    if limit is not None and worst > limit:
        found.append(f"{name}: {worst} warp instructions per 64 x 64 tile, at most {limit:.0f} are allowed")
    if counts["local"] and triton == "3.7":
        found.append(f"{name}: {counts['local']} accesses to local memory in a loop over tiles")
    return found


def recorded() -> dict[str, Any]:
    """{"sources": digest, "3.7": {name: counts}, ...}."""
    return json.loads(RECORD.read_text())


def print_counts(names: list[str]) -> None:
    """One JSON line, name and counts, per configuration as soon as the Triton at hand has compiled it."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing; unset TRITON_INTERPRET"
    prepare()
    for name in names:
        print(json.dumps([name, asdict(of(CONFIGURATIONS[name]))]), flush=True)


if __name__ == "__main__":
    print_counts([name for name in CONFIGURATIONS if not sys.argv[1:] or any(part in name for part in sys.argv[1:])])
