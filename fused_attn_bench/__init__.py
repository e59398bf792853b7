"""Benchmarks of kernels that can be trusted: every result checked before it is timed, calls taken in turns, changes decided by a test.

An operation is declared once (``Operation``); ``fused-attn-bench run --load FILE.py`` measures it. The package knows no operation of its own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fused_attn_bench.judge import Tolerance
    from fused_attn_bench.operation import Operation
    from fused_attn_bench.problem import DeclarationError, Make, Problem, Refusal

__all__ = ["DeclarationError", "Make", "Operation", "Problem", "Refusal", "Tolerance"]
_MODULES = {"Tolerance": "judge", "Operation": "operation"}


def __getattr__(name: str) -> Any:
    """Names whose modules import torch, which takes seconds: a command line is there before them and answers Ctrl-C."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'problem')}"), name)
