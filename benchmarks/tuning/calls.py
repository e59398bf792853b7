"""Calls that reach an entry of Hopper's tables: small ragged ones to be right on, and large ones to be timed on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fused_attn as fa
from benchmarks.tuning.candidates import Entry
from fused_attn import testing
from fused_attn.backends.triton.hopper import tiles

# What large calls have: 16384 tokens of 2048 columns, as other packages publish them.
TOKENS, COLUMNS = 16384, 2048


@dataclass(frozen=True)
class Call:
    """Sizes, and what is given beside q, k and v: names in ``OPTIONS``, of which the first is shown.

    Args:
        what: "causal", "causal dropout" ...
        batch: sequences.
        heads: of q.
        kv_heads: of k and v.
        lengths: of q and of k.
        dim: of a head.
    """

    what: str
    batch: int
    heads: int
    kv_heads: int
    lengths: tuple[int, int]
    dim: int

    @property
    def name(self) -> str:
        return (
            f"{self.what} {self.lengths[1]}" if self.lengths[0] == self.lengths[1] else f"{self.what} {self.lengths[0]} x {self.lengths[1]}"
        )

    def tensors(self, device: torch.device) -> list[Tensor]:
        """q, k, v and what arrives at the output, bfloat16 and reproducible; zeros, which take no memory until they are used, on the CPU."""
        sizes = [(self.batch, h, n, self.dim) for h, n in zip((self.heads, self.kv_heads), self.lengths, strict=True)]
        return [_normal((sizes[0], sizes[1], sizes[1], sizes[0])[i], device, i) for i in range(4)]

    def options(self, device: torch.device) -> dict[str, Any]:
        """Arguments of ``attention``."""
        made: dict[str, Any] = {"q_offset": self.lengths[1] - self.lengths[0]}
        for name in self.what.split():
            added = OPTIONS[name](self, device)
            if "mask" in made and "mask" in added:
                added["mask"] = made["mask"] & added["mask"]
            if "score_mods" in made and "score_mods" in added:
                added["score_mods"] = (*made["score_mods"], *added["score_mods"])
            made |= added
        return made


def _normal(size: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    if device.type == "cpu":
        return torch.zeros(size, dtype=torch.bfloat16)
    return torch.randn(size, device=device, generator=torch.Generator(device).manual_seed(seed), dtype=torch.bfloat16)


def _dense(call: Call, device: torch.device) -> dict[str, Any]:
    """Half of the tiles of 128 x 128 are empty, the others full or mixed; no row is without a key."""
    made = torch.Generator(device).manual_seed(9)
    sizes = [-(-n // 128) for n in call.lengths]
    state = torch.rand(sizes, device=device, generator=made)
    state = state.repeat_interleave(128, 0)[: call.lengths[0]].repeat_interleave(128, 1)[:, : call.lengths[1]]
    keep = (state > 0.75) | ((state > 0.5) & (torch.rand(call.lengths, device=device, generator=made) > 0.3))
    keep[:, 0] = True
    return {"mask": fa.Dense(keep)}


def _bias(call: Call, device: torch.device) -> dict[str, Any]:
    """A value per pair: of every head up to 2048 keys, of all heads together beyond."""
    heads = call.heads if call.lengths[1] <= 2048 else 1
    return {"score_mods": (fa.Bias(_normal((1, heads, *call.lengths), device, 4).requires_grad_()),)}


OPTIONS: dict[str, Callable[[Call, torch.device], dict[str, Any]]] = {
    "full": lambda call, device: {},
    "causal": lambda call, device: {"mask": fa.Causal()},
    "window": lambda call, device: {"mask": fa.SlidingWindow(100, 30)},
    "documents": lambda call, device: {"mask": fa.Documents(*(torch.arange(n, device=device) // 70 for n in reversed(call.lengths)))},
    "dense": _dense,
    "dropout": lambda call, device: {"dropout": fa.Dropout(0.1, seed=3)},
    "bias": _bias,
    "softcap": lambda call, device: {"score_mods": (fa.SoftCap(30.0),)},
    "alibi": lambda call, device: {"score_mods": (fa.ALiBi(torch.rand(call.heads, device=device)),)},
    "packed": lambda call, device: {},
}
# By table and kind: what is held to float64. The first has more tiles than the chip has multiprocessors, so that CTAs go on to a second one; the
# second has many keys; the third odd lengths and, where that is not another kind, grouped heads.
_CHECKED = {
    ("forward", "plain"): ("full", "causal", "window"),
    ("forward", "heavy"): ("dropout", "dense causal", "packed causal"),
    ("forward", "bias"): ("bias", "bias causal", "bias window"),
    ("backward", "plain"): ("full", "causal", "documents"),
    ("backward", "modified"): ("softcap", "bias causal", "dropout alibi window"),
    ("rows", "plain"): ("full", "causal", "window"),
}
# And what is timed, with the number of keys.
_TIMED = {
    ("forward", "plain"): (("full", 2048), ("causal", 2048), ("full", 8192), ("causal", 8192)),
    ("forward", "heavy"): (("dropout", 2048), ("dropout causal", 8192), ("dense", 2048), ("dense", 8192), ("packed", 8192)),
    ("forward", "bias"): (("bias", 2048), ("bias causal", 2048), ("bias", 8192)),
    ("backward", "plain"): (("full", 2048), ("causal", 2048), ("full", 8192), ("causal", 8192)),
    ("backward", "modified"): (("softcap", 2048), ("bias", 2048), ("dropout", 2048), ("softcap causal", 8192)),
    ("rows", "plain"): (("full", 2048), ("causal", 2048)),
}


def checked(entry: Entry) -> list[Call]:
    """Few seconds of float64 each; lengths of whole 16 compile what the large calls run."""
    whats = _CHECKED[entry.table, entry.kind]
    # 192 tiles of 192 rows, 288 of 128.
    many, long = Call(whats[0], 6, 16, 16, (272, 208), entry.size), Call(whats[1], 2, 8, 8, (464, 976), entry.size)
    # A bias that TMA loads has rows of whole 8.
    odd = (5, 997) if "packed" in whats[2] else (331, 456) if entry.kind == "bias" else (331, 457)
    return [many, long, Call(whats[2], 2, 4, 1 if "packed" in whats[2] else 4 if entry.kind == "bias" else 2, odd, entry.size)]


def timed(entry: Entry) -> list[Call]:
    """16384 tokens of 2048 columns; a few queries of heads in groups of eight."""
    heads = COLUMNS // entry.size
    return [
        Call(what, 64, heads, heads // 8, (8, length), entry.size)
        if what == "packed"
        else Call(what, TOKENS // length, heads, heads, (length, length), entry.size)
        for what, length in _TIMED[entry.table, entry.kind]
    ]


@contextlib.contextmanager
def using(entry: Entry, chosen: Any) -> Iterator[None]:
    """Launches of the whole process take these tiles for the entry meanwhile; autograd's threads included."""
    with mock.patch.dict(tiles.TABLES[entry.table], {entry.key: chosen}):
        yield


def results(entry: Entry, call: Call, device: torch.device) -> tuple[testing.Inputs, dict[str, Tensor], tuple[str, ...]]:
    """A call's problem, its outputs and gradients with the tiles in force, and the outputs that gradients arrive at."""
    q, k, v, _ = call.tensors(device)
    inputs = testing.inputs_of(q, k, v, **call.options(device))
    asked = fa.AuxRequest(probs=True, scores=True) if entry.table == "rows" else fa.AuxRequest(lse=True)
    through = ("out", "probs") if entry.table == "rows" else ("out", "lse")
    problem = replace(inputs.problem, aux=asked)
    wanted = testing.differentiable_inputs(problem, BACKEND)
    return inputs, testing.evaluate(lambda p: testing.call(p, BACKEND), inputs._replace(problem=problem), through, wanted), through


def wrong(entry: Entry, call: Call, device: torch.device) -> str:
    """What of ``results`` breaks the error rule; empty if nothing does."""
    return "; ".join(testing.violations(*results(entry, call, device)))


# Who computes; Hopper's kernels are the triton backend's.
BACKEND = "triton"


def function(entry: Entry, call: Call, device: torch.device) -> Callable[[], object]:
    """What is timed: a forward, a backward whose forward is done, or a forward with rows that it gives out."""
    *leaves, arriving = call.tensors(device)
    options = call.options(device)
    if entry.table == "backward":
        leaves = [t.requires_grad_() for t in leaves]
        out = fa.attention(*leaves, **options, backend=BACKEND)
        wanted = [*leaves, *(t for mod in options.get("score_mods", ()) for t in mod.tensors if t.requires_grad)]
        return lambda: torch.autograd.grad(out, wanted, arriving, retain_graph=True)
    asked = {"return_aux": fa.AuxRequest(probs=True)} if entry.table == "rows" else {}

    def forward() -> object:
        with torch.no_grad():
            return fa.attention(*leaves, **options, **asked, backend=BACKEND)

    return forward
