"""The builds of the CPU library that tests choose from: every instruction set, and "off", which is plain torch operations alone.

A test that takes the fixture ``cpu_build`` runs once per build, with that build in force. ``FUSED_ATTN_CPU=avx2 pytest`` runs on that one
alone, the tests without the fixture included.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from fused_attn import build_cpu
from fused_attn.backends.cpu import library

ALL = (*reversed(build_cpu.ISAS), library.OFF)


def selected() -> tuple[str, ...]:
    """The builds of this run: all, or the one that ``FUSED_ATTN_CPU`` names."""
    named = os.environ.get("FUSED_ATTN_CPU", "")
    if named and named not in ALL:
        raise pytest.UsageError(f"FUSED_ATTN_CPU must be one of {', '.join(ALL)}; got {named!r}. Unset it to run on all of them.")
    return (named,) if named else ALL


def lacking(build: str) -> str:
    """Why a build cannot run here, or an empty string.

    A library that is missing or old although there is a compiler is no reason: then the tests would pass on what is not there.
    """
    if build == library.OFF:
        return ""
    try:
        with library.use(build):
            return ""
    except RuntimeError as error:
        if build not in library.isas() and library.isas():
            return f"the CPU library holds no kernels for {build} that this CPU runs"
        try:
            build_cpu.find_compiler()
        except build_cpu.BuildError as no_compiler:
            return f"{error}; {no_compiler}"
        raise


@pytest.fixture(params=selected())
def cpu_build(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = lacking(request.param)
    if reason:
        pytest.skip(reason)
    with library.use(request.param):
        yield request.param
