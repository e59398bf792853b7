"""The Hopper forward on the simulator against float64: cases as data, and a program that runs some of them.

``python -m tests.hopper_forward [part of a name ...]`` in a process without TRITON_INTERPRET; ``product()`` is every case there is.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.backends import get
from fused_attn.problem import AttentionProblem
from tests import hopper

MODES: dict[str, dict[str, Any]] = {
    "late": {"async_mode": "late"},
    "early": {"async_mode": "early"},
    "random": {"async_mode": "random", "sched": "random", "seed": 7},
}
MASKS = ("full", "causal", "window", "documents", "lengths", "dense")
EXTRAS = ("plain", "bias", "softcap", "alibi", "dropout", "sinks")
LENGTHS = (1, 63, 64, 129, 300)


@dataclass(frozen=True)
class Case:
    """One call: sizes, how keys are masked, what is added, and the simulator's mode."""

    dim: int = 64
    value_dim: int = 64
    q_len: int = 300
    kv_len: int = 300
    mask: str = "full"
    extra: str = "plain"
    heads: tuple[int, int] = (2, 2)
    batch: int = 1
    q_offset: Any = None
    dtype: torch.dtype = torch.bfloat16
    mode: str = "late"

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        offset = "" if self.q_offset is None else f" q_offset={self.q_offset}"
        heads = "x".join(map(str, (self.batch, *self.heads)))
        return f"{self.dim}/{self.value_dim} {self.q_len}x{self.kv_len} {self.mask} {self.extra} {heads} {dtype}{offset} {self.mode}"


def _documents(length: int, cuts: tuple[int, ...]) -> Tensor:
    return torch.bucketize(torch.arange(length), torch.tensor(cuts), right=True)


def mask_of(case: Case) -> Any:
    """The case's mask, with rows and tiles that reach nothing where its kind has such."""
    q_len, kv_len = case.q_len, case.kv_len
    if case.mask == "documents":
        return fa.Documents(_documents(kv_len, (40, 90, 220)), _documents(q_len, (37, 100, 101, 230)))
    if case.mask == "lengths":
        return fa.ValidLengths(torch.tensor([kv_len // 2 if b % 2 else kv_len for b in range(case.batch)]))
    if case.mask == "dense":
        keep = torch.rand(case.batch, 1, q_len, kv_len) > 0.4
        keep[:, :, 64:140, :200] = False
        keep[:, :, :64, 128:256] = True
        return fa.Causal() & fa.Dense(keep)
    return {"full": None, "causal": fa.Causal(), "window": fa.SlidingWindow(70, 30)}[case.mask]


def options_of(case: Case) -> dict[str, Any]:
    """What ``attention`` would be given besides q, k and v."""
    heads = case.heads[0]
    options: dict[str, Any] = dict.fromkeys(("scale", "sinks", "dropout", "return_aux", "scoring"))
    mods = {
        "bias": lambda: (fa.Bias(torch.randn(case.batch, heads, case.q_len, case.kv_len).to(case.dtype)),),
        "softcap": lambda: (fa.SoftCap(2.0),),
        "alibi": lambda: (fa.ALiBi(torch.rand(heads)),),
        "both": lambda: (fa.SoftCap(2.0), fa.Bias(torch.randn(1, 1, case.q_len, case.kv_len).to(case.dtype))),
        "everything": lambda: (fa.SoftCap(2.0), fa.ALiBi(torch.rand(heads)), fa.Bias(torch.randn(1, heads, 1, case.kv_len))),
    }
    options |= {"q_offset": case.q_offset, "mask": mask_of(case), "score_mods": mods.get(case.extra, tuple)()}
    if case.extra in ("dropout", "everything"):
        options["dropout"] = fa.Dropout(0.3, seed=5)
    if case.extra in ("sinks", "everything"):
        options["sinks"] = torch.randn(heads)
    return options


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of normal numbers; heads lie behind lengths in memory, so that strides are no sizes."""
    sizes = ((case.q_len, case.heads[0], case.dim), (case.kv_len, case.heads[1], case.dim), (case.kv_len, case.heads[1], case.value_dim))
    q, k, v = (torch.randn(case.batch, *size).to(case.dtype).transpose(1, 2) for size in sizes)
    return q, k, v


def errors(case: Case) -> tuple[float, float, float, int]:
    """Of out, of lse, and of the statistics; infinite where a row is empty on one side only; and how many blocks of rows were done again."""
    from fused_attn.backends.triton import attention_fwd
    from fused_attn.backends.triton.hopper import forward

    torch.manual_seed(0)
    options, inputs = options_of(case), inputs_of(case)
    backend = get("triton")
    call = AttentionProblem.check(*inputs, options).lower()
    given = {name: value for name, value in options.items() if name != "return_aux"}
    exact, aux = fa.attention(*(t.double() for t in inputs), **given, return_aux=fa.AuxRequest(lse=True), backend="eager")
    hopper.simulate(**MODES[case.mode])
    flagged: list[int] = []
    whole_run = attention_fwd.run

    def run(call: Any, into: Any, redo: Tensor) -> None:
        flagged.append(int(redo.sum()))
        whole_run(call, into, redo)

    with mock.patch.object(attention_fwd, "run", run):
        out, lse, stats = forward.attention_fwd(call, backend.stats_shape(call))
    unit = call.terms.scale if not call.terms.mods and call.terms.sinks is None else 1.0
    whole = torch.where(lse == -torch.inf, lse, stats[0] * unit + torch.log(stats[1].clamp(min=1e-30)))
    if call.terms.sinks is not None:
        whole = torch.where(stats[1] == 0, lse, whole)  # the sink alone
    return _difference(out, exact), _difference(lse, aux.lse), _difference(whole, aux.lse), sum(flagged)


def _difference(a: Tensor, b: Tensor) -> float:
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a.double() - b).abs()).nan_to_num(torch.inf).max())


# Half a unit of bfloat16 between 2 and 4 is 0.008; sums of a few such.
OUT, LSE = 0.016, 1e-3


def check(case: Case) -> None:
    """Runs a case.

    Raises:
        AssertionError: something differs from float64 by more than bfloat16 explains.
    """
    found = errors(case)
    limit = OUT if case.extra != "dropout" else OUT / (1 - 0.3)
    assert found[0] < limit and max(found[1:3]) < LSE, (
        f"{case.name}: errors of out, lse, statistics {found}, at most {limit}, {LSE} are due"
    )


def cover() -> Iterator[Case]:
    """A few cases that meet every mask, extra and mode."""
    kinds = itertools.cycle(MODES)
    for case in (
        Case(mask="causal"),
        Case(mask="window", heads=(4, 2), batch=2, q_offset=torch.tensor([30, -20])),
        Case(mask="documents", q_len=301, kv_len=259),
        Case(mask="lengths", batch=2, q_len=129, dtype=torch.float16),
        Case(128, 128, 129, 300, "causal", q_offset=171, heads=(2, 1)),
        Case(128, 64, 200, 130, "window", q_offset=0),
        Case(256, 256, 130, 200, "documents"),
        Case(40, 72, 65, 65, "causal"),
        Case(128, 128, 100, 129, "causal", "softcap", q_offset=29),
        Case(128, 128, 100, 129, "window", "alibi", q_offset=29, batch=2),
        Case(64, 64, 100, 129, "causal", "softcap", q_offset=29, dtype=torch.float16),
        Case(64, 64, 70, 300, "full", "bias"),
        Case(64, 64, 100, 129, "documents", "sinks"),
        Case(64, 64, 1, 63, "full", "sinks"),
        Case(64, 64, 130, 300, "causal", "dropout", q_offset=170),
        Case(128, 128, 70, 129, "full", "everything", q_offset=9),
        Case(64, 64, 9, 300, "causal", heads=(8, 2), batch=2, q_offset=291),
        Case(128, 128, 35, 300, "documents", "alibi", heads=(4, 1), q_offset=0),
        Case(64, 64, 3, 129, "dense", "everything", heads=(8, 4), q_offset=120),
        Case(64, 64, 3, 4500, "causal", "sinks", heads=(4, 2), batch=2, q_offset=4497),
        Case(128, 128, 1, 2100, "window", "alibi", q_offset=2050),
        Case(64, 64, 5, 4200, "dense", q_offset=4000),
        Case(64, 64, 129, 304, "window", "bias", q_offset=100, heads=(4, 2), batch=2),
        Case(128, 128, 200, 304, "documents", "bias", dtype=torch.float16),
        Case(64, 64, 129, 200, "dense", "both", q_offset=71),
        Case(64, 64, 300, 300, "dense", heads=(2, 1), batch=2),
        Case(128, 128, 200, 300, "dense", "alibi", q_offset=90),
        Case(256, 256, 130, 300, "dense", "bias", q_offset=170),
    ):
        yield replace(case, mode=next(kinds))


def product() -> Iterator[Case]:
    """Every case that the project promises."""
    for dim, mask, extra, mode in itertools.product((64, 128, 256), MASKS, EXTRAS, MODES):
        for q_len, kv_len in itertools.product(LENGTHS, LENGTHS):
            for heads, offset in (((2, 2), None), ((4, 2), kv_len - q_len)):
                yield Case(dim, dim, q_len, kv_len, mask, extra, heads, 1, offset, mode=mode)


if __name__ == "__main__":
    for chosen in cover():
        if all(part in chosen.name for part in sys.argv[1:]):
            check(chosen)
            print(chosen.name, flush=True)
