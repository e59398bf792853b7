"""A history of two devices with a planted change, statuses and hostile names, for tests of the page."""

from __future__ import annotations

import json
import math
import random
import re
from typing import Any

from fused_attn_bench.results import Compared, Result

EVIL = "<script>document.title='owned'</script>&\"'$x^2$"
ENVIRONMENT = {"device": "a chip", "torch": "2.13", "triton": "3.7", "python": "3.13", "commit": "abcdef0123456789"}
LENGTHS = (256, 512, 1024)


def history(last: float = 1.3) -> list[Result]:
    """Twenty runs of three lengths by three providers; fused_attn becomes slower in the middle, and eager's environment changes at the end."""
    chance, results = random.Random(0), []
    for run in range(20):
        environment = ENVIRONMENT | {"commit": f"{run:040x}"} | ({"python": "3.14"} if run == 19 else {})
        for length in LENGTHS:
            for name, factor in (("fused_attn", 1.0 if run < 10 else last), ("eager", 4.0), ("sdpa", 1.1)):
                times = tuple(factor * length**2 * 1e-8 * math.exp(chance.gauss(0, 0.01)) for _ in range(6))
                results.append(
                    Result(
                        f"attention/causal/fwd/float32/1x4x{length}x64", name, samples=times, error=1e-7 * length, plain_error=2e-7, peak=length * 1000,
                        flops=2 * 4 * length**2 * 64, bytes=16 * length * 256, roofs=(4e10, 2e11), backend="cpu" if name == "fused_attn" else "",
                        run=f"run{run:02}", time=f"2026-01-{run + 1:02}T00:00:00+00:00", timer="wall", environment=environment,
                    )
                )  # fmt: skip
    blank = {"run": "run19", "time": results[-1].time, "environment": results[-1].environment}
    results.append(Result("softmax/masked/fwd/bfloat16/1x1x4x8", "sdpa", "refused", "has no softmax", **blank))
    results.append(Result("softmax/masked/fwd/bfloat16/1x1x4x8", f"mine{EVIL}", "wrong", f"before timing: {EVIL}", error=0.5, **blank))
    gpu = {**ENVIRONMENT, "device": "another", "driver": "570", "busy": "2 busy processes"}
    for run in range(2):
        for name, seconds in (("fused_attn", 1e-4), ("eager", 3e-4)):
            results.append(
                Result(
                    "softmax/masked/fwd/float32/8x8x64x64", name, samples=(seconds,) * 4, metrics={"rows/s": 512.0}, run=f"gpu{run}",
                    time=f"2026-01-1{run}T00:00:00+00:00", timer="events", environment=gpu, telemetry=({"sm_mhz": 1980, "watts": 400.0},) * 4,
                )
            )  # fmt: skip
    return sorted(results, key=lambda r: r.time)


def long_named(letters: str) -> list[Result]:
    """Three runs of three lengths, with these letters in the name of everything that has one."""
    environment = ENVIRONMENT | {"commit": f"v{letters}", "triton": letters}
    return [
        Result(
            f"attention{letters}/causal{letters}/fwd{letters}/float{letters}/1x4x{length}x64", name, samples=(factor * length * 1e-6,) * 4,
            error=1e-7, flops=1e9, bytes=1e7, roofs=(4e12, 2e14), backend=letters, marks=(letters,), metrics={f"{letters}/s": 512.0},
            run=f"{run}{letters}", time=f"2026-01-0{run + 1}T00:00:00+00:00", timer="wall", environment=environment | {"commit": f"{run}{letters}"},
        )
        for run in range(3) for length in LENGTHS for name, factor in (("eager", 2.0), (f"mine{letters}", 1.0), (f"theirs{letters}", 1.5))
    ]  # fmt: skip


def compared() -> list[Compared]:
    """One change that was decided, on the first device."""
    about = {
        "a": "main",
        "b": ".",
        "medians": (1e-3, 1.06e-3),
        "effect": 0.058,
        "low": 0.05,
        "high": 0.07,
        "smallest": 0.013,
        "launches": 8,
    }
    return [
        Compared(f"attention/causal/fwd/float32/1x4x{LENGTHS[0]}x64", verdict="slower", environment=ENVIRONMENT, time="2026-02", **about)
    ]  # type: ignore[arg-type]


def data_of(page: str) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found is not None
    read: dict[str, Any] = json.loads(found[1])
    return read
