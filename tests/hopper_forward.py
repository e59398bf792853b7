"""The Hopper forward on the simulator against float64: broken and huge inputs, slices of a batch, a few calls of unusual kinds.

``python -m tests.hopper_forward [part of a name ...]`` in a process without TRITON_INTERPRET; ``hopper_product`` meets all other kinds of calls.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.backends import get
from fused_attn.problem import AttentionProblem
from fused_attn.testing import call as testing_call
from tests import hopper, native

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
        # Alone, its bits say where keys end as well.
        return fa.Dense(keep) if case.q_offset is None else fa.Causal() & fa.Dense(keep)
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
        "bias first": lambda: (
            fa.Bias(torch.randn(1, heads, case.q_len, case.kv_len).to(case.dtype)),
            fa.ALiBi(torch.rand(heads)),
            fa.SoftCap(2.0),
        ),
        "two biases": lambda: tuple(fa.Bias(torch.randn(b, heads, case.q_len, case.kv_len).to(case.dtype)) for b in (case.batch, 1)),
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


class Found(NamedTuple):
    """Largest errors of out, of lse, and of lse made of the statistics (infinite where a row is empty on one side only); blocks done again."""

    out: float
    lse: float
    statistics: float
    redone: int


def _forward(inputs: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> tuple[Any, int]:
    """(out, lse, statistics), and how many blocks of 64 rows the plain kernel did again."""
    from fused_attn.backends.triton import attention_fwd
    from fused_attn.backends.triton.hopper import forward

    call, flagged, whole = AttentionProblem.check(*inputs, options).lower(), [], attention_fwd.run

    def run(call: Any, into: Any, redo: Tensor) -> None:
        flagged.append(int(redo.sum()))
        if flagged[-1]:  # a launch that has nothing to do
            whole(call, into, redo)

    with mock.patch.object(attention_fwd, "run", run):
        return forward.attention_fwd(call, get("triton").stats_shape(call)), sum(flagged)


def compared(inputs: tuple[Tensor, Tensor, Tensor], options: dict[str, Any], mode: str) -> Found:
    """One call on the simulator against float64."""
    given = {name: value for name, value in options.items() if name != "return_aux"}
    exact, aux = fa.attention(*(t.double() for t in inputs), **given, return_aux=fa.AuxRequest(lse=True), backend="eager")
    hopper.simulate(**MODES[mode])
    (out, lse, stats), redone = _forward(inputs, options)
    raw = not options["score_mods"] and options["sinks"] is None
    unit = inputs[0].shape[-1] ** -0.5 if raw else 1.0
    whole = torch.where(lse == -torch.inf, lse, stats[0] * unit + torch.log(stats[1].clamp(min=1e-30)))
    if options["sinks"] is not None:
        whole = torch.where(stats[1] == 0, lse, whole)  # the sink alone
    return Found(_difference(out, exact), _difference(lse, aux.lse), _difference(whole, aux.lse), redone)


def _difference(a: Tensor, b: Tensor) -> float:
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a.double() - b).abs()).nan_to_num(torch.inf).max())


# Half a unit of bfloat16 between 2 and 4 is 0.008; sums of a few such.
OUT, LSE = 0.016, 1e-3


def hold(found: Found, title: str, limit: float = OUT) -> None:
    """Asks for errors that bfloat16 explains.

    Raises:
        AssertionError: an error is larger.
    """
    assert found.out < limit and max(found.lse, found.statistics) < LSE, f"{title}: {found}; errors up to {limit} and {LSE} are due"


def check(case: Case) -> None:
    """Holds a case to float64, and asks that nothing was done again unless a row's scores say so."""
    torch.manual_seed(0)
    options, inputs = options_of(case), inputs_of(case)
    found = compared(inputs, options, case.mode)
    hold(found, case.name, OUT / (1 - 0.3) if options["dropout"] is not None else OUT)
    # A row that a dense mask leaves empty looks like one whose bias is -inf.
    may_redo = case.mask == "dense" and bool(options["score_mods"])
    assert may_redo or found.redone == 0, f"{case.name}: {found.redone} blocks were done again; none has a reason"


def huge_scores() -> None:
    """Rows whose base one rounding cannot hold are done again; smaller ones are not. With the window's masked and full tiles."""
    case = Case(mask="window")
    for size, redone in ((1e4, 0), (3e7, 1), (1e12, 1), (1e30, 1)):
        torch.manual_seed(0)
        options, (q, k, v) = options_of(case), inputs_of(case)
        q[0, 1, 20:40] *= size
        found = compared((q, k, v), options, "early")
        hold(found._replace(lse=0.0, statistics=0.0), f"scores of {size}")  # lse of 1e12 has no small error
        assert found.redone == redone, f"scores of {size}: {found.redone} blocks done again; {redone} are due"


def broken_values() -> None:
    """NaN and infinities of one document reach none of the others, with keys in one part and in several; what is attended shows."""
    for case in (Case(mask="documents", q_offset=0), Case(64, 64, 2, 4500, "causal", heads=(4, 2), q_offset=4481)):
        torch.manual_seed(0)
        options, (q, k, v) = options_of(case), inputs_of(case)
        v[0, 0, -20], v[0, 1, -3], k[0, 1, -7] = torch.nan, torch.inf, torch.nan
        if case.q_len > 150:
            q[0, 0, 150], k[0, 0, 50] = torch.nan, torch.inf
        found = compared((q, k, v), options, "early")
        hold(found, f"broken values, {case.name}")
        assert found.redone > 0


def capped_scores() -> None:
    """Rows at either end of a soft cap, whose exponentials are 2^72 and 2^-72, with a column of values of another size; padding is none. Sinks beside."""
    whole, parts = Case(64, 40, 70, 200, extra="softcap"), Case(64, 40, 3, 4500, extra="softcap", heads=(4, 2))
    sizes = ((9, 1.0, False), (-9, 1.0, False), (9, 1e18, True), (-9, 1e18, False), (9, 1e-20, False), (-9, 1e-20, True))
    rows = [(*size, None) for size in sizes] + [(9, 1.0, sink > 66, sink) for sink in (-200.0, 0.0, 60.0, 88.0, 105.0)]
    for case, (end, size, redone, sink) in itertools.product((whole, parts), rows):
        torch.manual_seed(0)
        (q, k, v), options = inputs_of(case), options_of(case) | {"score_mods": (fa.SoftCap(50.0),)}
        q[:], k[:], v[..., 3] = end, 9, v[..., 3] * size
        columns = torch.where(torch.arange(case.value_dim) == 3, size, 1.0).double()
        if sink is not None:
            options["sinks"] = torch.full((case.heads[0],), sink)
            columns *= min(1.0, case.kv_len * math.exp(50 - sink))
        given = {name: value for name, value in options.items() if name != "return_aux"}
        exact = fa.attention(q.double(), k.double(), v.double(), **given, backend="eager")
        hopper.simulate(**MODES["early"])
        (out, *_), blocks = _forward((q, k, v), options)
        title = f"{case.name}, scores of {end * 9 * 8}, values of {size}, sink {sink}"
        assert _difference(out / columns, exact / columns) < OUT, f"{title}: {_difference(out / columns, exact / columns)}"
        assert (blocks > 0) == redone, f"{title}: {blocks} blocks done again"


def bias_that_masks() -> None:
    """Rows and keys at -inf, and at the least finite number, which times log2(e) is no number any more."""
    for least in (-torch.inf, float(torch.finfo(torch.float32).min)):
        torch.manual_seed(0)
        case = Case(q_len=70, kv_len=140)
        options, bias = options_of(case), torch.randn(1, 1, 70, 140)
        bias[..., 20:30, :], bias[..., 100:], bias[..., 40:50, :130] = least, least, least
        options["score_mods"] = (fa.Bias(bias),)
        hold(compared(inputs_of(case), options, "early")._replace(lse=0.0, statistics=0.0), f"bias of {least}")


def slices() -> None:
    """A batch's slice is a batch of one, to the bit: packed heads, keys in parts, and a plain call."""
    for case in (Case(64, 64, 3, 4500, "causal", heads=(4, 2), batch=2, q_offset=4490), Case(mask="window", batch=2)):
        torch.manual_seed(0)
        options, inputs = options_of(case), inputs_of(case)
        hopper.simulate(**MODES["random"])
        both, _ = _forward(inputs, options)
        one, _ = _forward(tuple(t[1:] for t in inputs), options)
        for a, b, dim in zip(both, one, (0, 0, 1), strict=True):
            assert torch.equal(a.narrow(dim, 1, 1), b), f"{case.name}: the slice of a batch differs from a batch of one"


def queues() -> None:
    """More work than processors: whoever takes a tile, whatever a tile costs, the bits are those of a processor per tile."""
    from fused_attn.backends.triton.hopper import forward

    for case in (
        Case(q_len=500, kv_len=500, mask="causal", heads=(4, 2), q_offset=0),
        Case(128, 128, 3, 4500, "causal", q_offset=4497, batch=3),
    ):
        torch.manual_seed(0)
        options, inputs, found = options_of(case), inputs_of(case), []
        for processors, mode in ((132, "early"), (2, "late"), (1, "random")):
            hopper.simulate(**MODES[mode])
            with mock.patch.object(forward, "processors", lambda device, count=processors: count):
                found.append(_forward(inputs, options)[0])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), f"{case.name}: the number of processors shows"


def rows_in_pieces() -> None:
    """Odd head sizes, whose rows no copy makes whole words, and rows that copies make whole: values, layouts, no race between the ways of loading."""
    from tests import hopper_product

    def sliced(*sizes: int) -> Tensor:
        return torch.randn(*sizes[:-1], sizes[-1] + 3).half()[..., : sizes[-1]]

    for dim, value_dim, make in ((67, 64, torch.randn), (64, 24, sliced)):
        torch.manual_seed(0)
        hopper_product.simulate("late")
        q, k, v = (make(1, h, n, d).half() for h, n, d in ((2, 40, dim), (1, 66, dim), (1, 66, value_dim)))
        wide = [t.double().requires_grad_() for t in (q, k, v)]
        exact = fa.attention(*wide, mask=fa.Causal(), q_offset=26, backend="eager")
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        call = AttentionProblem.check(
            *leaves,
            dict.fromkeys(("scale", "sinks", "dropout", "return_aux", "scoring")) | {"mask": fa.Causal(), "score_mods": (), "q_offset": 26},
        )
        out = testing_call(call, "triton")[0]
        arriving = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, arriving)
        for got, want in zip((out, *grads), (exact, *torch.autograd.grad(exact, wide, arriving.double())), strict=True):
            assert _difference(got.detach(), want.detach()) < OUT, (
                f"head sizes {dim} and {value_dim}: {_difference(got.detach(), want.detach())}"
            )
        assert out.is_contiguous() and all(g.stride() == torch.empty_like(t).stride() for g, t in zip(grads, leaves, strict=True))


def planted_faults() -> None:
    """The simulator reports each fault of the forward kernel's PTX."""
    from tests.hopper_backward import FAULTS, _damaged

    cusim, compiles, case = native.simulator(), hopper._compile, Case(q_len=130, kv_len=600)
    hopper.simulate(**MODES["late"])
    for name in ("no fence before the asynchronous proxy", "no wait for products", "no arrival at a barrier", "waits for the wrong phase"):
        *fault, kinds = FAULTS[name]

        def damaging(kernel: Any, *rest: Any, fault: list[str] = fault) -> Any:
            compiled = compiles(kernel, *rest)
            return _damaged(compiled, *fault) if kernel.fn.__name__ == "forward_kernel" else compiled

        with mock.patch.object(hopper, "_compile", damaging):
            try:
                _forward(inputs_of(case), options_of(case))
                found = "nothing"
            except cusim.SimError as error:
                found = error.kind
        assert found in kinds, f"{name}: the simulator reports {found}"


CHECKS = (huge_scores, broken_values, capped_scores, bias_that_masks, slices, queues, rows_in_pieces, planted_faults)


# Beside the pairs that ``hopper_product`` meets: heads packed into rows, keys in parts, a bias that TMA loads, odd head sizes.
CASES = (
    Case(40, 72, 65, 65, "lengths", batch=2, mode="random"),
    Case(256, 8, 65, 129, "causal", q_offset=60, mode="early"),
    Case(256, 256, 130, 400, "window", q_offset=200, mode="random"),
    Case(128, 128, 35, 300, "documents", "alibi", heads=(4, 1), q_offset=0, mode="random"),
    Case(64, 64, 3, 4500, "causal", "sinks", heads=(4, 2), batch=2, q_offset=4497, mode="early"),
    Case(64, 64, 5, 4200, "dense", q_offset=4000),
    Case(64, 64, 129, 200, "dense", "both", q_offset=71, mode="early"),
    Case(64, 64, 70, 136, "full", "bias first", q_offset=66, mode="late"),
    Case(64, 64, 70, 136, "full", "two biases", batch=2, q_offset=66, mode="random"),
)


if __name__ == "__main__":
    from tests import hopper_product

    hopper_product.prepare()
    for one_check in CHECKS:
        if all(part in one_check.__name__ for part in sys.argv[1:]):
            one_check()
            print(one_check.__name__, flush=True)
    for chosen in CASES:
        if all(part in chosen.name for part in sys.argv[1:]):
            check(chosen)
            print(chosen.name, flush=True)
