"""Providers made worse by a known amount, to see what is noticed: "eager+5%" is slower, "eager+32MiB" holds more memory, "eager+20us" starts later."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import torch

from fused_attn_bench.judge import Results
from fused_attn_bench.operation import provider_names
from fused_attn_bench.problem import Problem, Refusal

_PLANTED = re.compile(r"(.+)\+(\d+(?:\.\d+)?)(%|MiB|us)")
Call = Callable[[], Results]


def split(name: str) -> tuple[str, float, str]:
    """A provider's name, the planted amount and its unit.

    Example:
        >>> split("eager+5%"), split("eager+32MiB"), split("sdpa:flash")
        (('eager', 5.0, '%'), ('eager', 32.0, 'MiB'), ('sdpa:flash', 0.0, ''))
    """
    found = _PLANTED.fullmatch(name)
    return (found[1], float(found[2]), found[3]) if found else (name, 0.0, "")


def known(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: there is no such provider.
    """
    if split(name)[0] not in provider_names():
        raise ValueError(
            f"a provider must be one of {', '.join(provider_names()) or 'none yet'}, or one of them made worse like eager+5%; got {name!r}"
        )
    return name


def bind(name: str, problem: Problem) -> Call:
    """What is timed, with what is planted.

    Raises:
        Refusal: it cannot compute the case, and why.
    """
    base, amount, unit = split(known(name))
    if amount and unit != "MiB" and problem.device.type == "cuda":
        raise Refusal("a planted slowdown waits on the host, which a GPU would not notice")
    call = problem.operation.bind(base, problem)
    if not amount:
        return call
    if unit == "MiB":
        return _heavier(call, int(amount * 2**20), problem.device)
    return _slower(call, lambda seconds: amount / 100 * seconds if unit == "%" else amount * 1e-6)


def _slower(call: Call, extra: Callable[[float], float]) -> Call:
    def slow() -> Results:
        start = time.perf_counter()
        result = call()
        end = time.perf_counter()
        until = end + extra(end - start)
        while time.perf_counter() < until:
            pass
        return result

    return slow


def _heavier(call: Call, size: int, device: torch.device) -> Call:
    def heavy() -> Results:
        held = torch.empty(size, dtype=torch.uint8, device=device)
        result = call()
        del held
        return result

    return heavy
