"""The one-pass backward on the simulator: broken and huge inputs, the order of dq, planted faults, a few calls of unusual kinds.

``python -m tests.hopper_backward [part of a name ...]`` in a process without TRITON_INTERPRET; ``hopper_product`` meets all other kinds of calls.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import fused_attn as fa
from fused_attn import testing
from tests import hopper, hopper_product, native
from tests.hopper_forward import MODES, Case, inputs_of, options_of

KERNEL = "_attention_bwd_hopper_kernel"
THROUGH = ("out", "lse")


def _calls(backend: str) -> Callable[[Any], Any]:
    return lambda problem: testing.call(problem, backend)


def _hold(whole: testing.Inputs, title: str) -> None:
    """Holds outputs and gradients to the error rule, and asks that the one-pass backward ran."""
    inputs = whole._replace(problem=replace(whole.problem, aux=fa.AuxRequest(lse=True)))
    hopper.compiled.clear()
    got = testing.evaluate(_calls("triton"), inputs, THROUGH, testing.differentiable_inputs(inputs.problem, "triton"))
    broken = testing.violations(whole, got, THROUGH)
    assert not broken, f"{title} breaks the error rule: {broken}"
    assert KERNEL in {name for name, _ in hopper.compiled}, f"{title}: the one-pass backward did not run"


def check(case: Case) -> None:
    """Holds outputs and gradients of a case to the error rule.

    Raises:
        AssertionError: something breaks it, or the one-pass backward did not run.
    """
    torch.manual_seed(0)
    hopper.simulate(**MODES[case.mode])
    options = {name: value for name, value in options_of(case).items() if name not in ("return_aux", "scoring")}
    _hold(testing.inputs_of(*inputs_of(case), **options), case.name)


# Beside the pairs that ``hopper_product`` meets.
CASES = (
    Case(mask="window", heads=(4, 2), batch=2, q_len=200, q_offset=torch.tensor([30, -20]), mode="random"),
    Case(mask="causal", batch=2, q_len=100, q_offset=torch.tensor([2**33, -(2**33)]), mode="early"),
    Case(mask="lengths", batch=2, q_len=129, dtype=torch.float16, mode="late"),
    Case(128, 128, 100, 129, "dense", "alibi", q_offset=29, mode="random"),
    Case(128, 128, 70, 129, "full", "everything", q_offset=9, mode="late"),
)


def _gradients(tensors: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """out, dq, dk and dv; the last tensor arrives at out."""
    q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
    out = fa.attention(q, k, v, **options, backend="triton")
    return out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])


def check_broken() -> None:
    """Documents in two heads, of which the first holds NaN in a key, a value, a query and a gradient: the other documents and heads are what they are without."""
    hopper.simulate(async_mode="early")
    tensors = [torch.randn(1, 2, 150, 64).bfloat16() for _ in range(4)]
    documents = fa.Documents(torch.arange(150) // 70)
    clean = _gradients(tensors, mask=documents)
    for row, tensor in zip((3, 7, 11, 16), tensors, strict=True):
        tensor[:, 0, row, 5] = torch.nan
    for name, got, right in zip(("out", "dq", "dk", "dv"), _gradients(tensors, mask=documents), clean, strict=True):
        assert torch.equal(got[:, 1], right[:, 1]), f"{name}: another head than the broken one has changed"
        # The plain kernels round elsewhere: a few roundings of the largest element.
        atol = 8 * torch.finfo(torch.bfloat16).eps * float(right.abs().max())
        torch.testing.assert_close(got[:, :, 70:], right[:, :, 70:], rtol=0.0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        assert bool(got[:, 0, :70].isnan().any()), f"{name}: the broken document is whole"


def check_huge() -> None:
    """A head whose exponents are beyond what one rounding allows: the plain kernels do it, by the same rule as all others."""
    hopper.simulate(async_mode="early")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 64).bfloat16() for _ in range(3))
    q[:, 1] *= 3e4
    _hold(testing.inputs_of(q, k, v, mask=fa.Causal()), "huge scores")


def check_order() -> None:
    """dq is the same to the bit however CTAs and copies fall out, where torch wants that; masks by windows, by documents, and by bits."""
    tensors = [torch.randn(1, h, n, 64).bfloat16() for h, n in ((2, 150), (1, 400), (1, 400), (2, 150))]
    keep = torch.rand(1, 1, 150, 400) < 0.5
    keep[..., 128:256] = False
    masks = (fa.SlidingWindow(200, 100), fa.Documents(torch.arange(400) // 300, torch.arange(150) // 80), fa.Dense(keep))
    modes = [dict(MODES["random"], seed=seed, cooperative=True) for seed in (1, 2)] + [{"async_mode": "late"}, {"async_mode": "early"}]
    torch.use_deterministic_algorithms(True)
    for mask in masks:
        found = []
        for mode in modes:
            hopper.simulate(**mode)
            found.append(_gradients(tensors, mask=mask, q_offset=200)[1])
        assert all(torch.equal(found[0], dq) for dq in found), f"{type(mask).__name__}: dq has an order of its own"
    torch.use_deterministic_algorithms(False)


# What is done to the kernel's PTX, and what the simulator calls what comes of it.
FAULTS = {
    "no fence before the asynchronous proxy": (r"fence\.proxy\.async\S*;", "", ("race", "proxy")),
    "no wait for the reducer's reads": (r"cp\.async\.bulk\.wait_group\.read\s+\d+;", "", ("race",)),
    "no wait for products": (r"wgmma\.wait_group\.sync\.aligned\s+0;", "", ("wgmma", "race")),
    "no arrival at a barrier": (r"@%\w+ mbarrier\.arrive\.shared::cta\.b64 _, \[%\w+\];", "", ("deadlock",)),
    "waits for the wrong phase": (
        r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, \[%\w+\]), %\w+;",
        r"\1, 0;",
        ("deadlock", "race"),
    ),
}


def _damaged(kernel: Any, pattern: str, by: str) -> Any:
    """A compiled kernel with other PTX."""
    text, count = re.subn(pattern, by, kernel.asm["ptx"])
    assert count, f"the kernel has no {pattern}"
    return SimpleNamespace(asm={"ptx": text}, metadata=kernel.metadata, src=kernel.src)


def check_faults() -> None:
    """The simulator reports each fault."""
    cusim, compiles = native.simulator(), hopper._compile
    tensors = [torch.randn(1, 1, n, 64).bfloat16() for n in (600, 200, 200, 600)]
    hopper.simulate(async_mode="late")
    for name, (*fault, kinds) in FAULTS.items():

        def damaging(kernel: Any, *rest: Any, fault: list[str] = fault) -> Any:
            compiled = compiles(kernel, *rest)
            return _damaged(compiled, *fault) if kernel.fn.__name__ == KERNEL else compiled

        hopper._compile = damaging
        try:
            _gradients(tensors)
        except cusim.SimError as error:
            found = error.kind
        else:
            found = "nothing"
        finally:
            hopper._compile = compiles
        assert found in kinds, f"{name}: the simulator reports {found}"


CHECKS = (check_broken, check_huge, check_order, check_faults)


def main(parts: list[str]) -> None:
    """The checks and the cases whose names hold all parts."""
    hopper_product.prepare()
    torch.manual_seed(0)
    for chosen in CHECKS:
        if all(part in chosen.__name__ for part in parts):
            chosen()
            print(chosen.__name__, flush=True)
    for case in CASES:
        if all(part in case.name for part in parts):
            check(case)
            print(case.name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
