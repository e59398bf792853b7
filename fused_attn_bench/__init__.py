"""Benchmarks of kernels that can be trusted: every result checked before it is timed, calls taken in turns, changes decided by a test.

An operation is declared once (``Operation``); ``fused-attn-bench run --load FILE.py`` measures it. The package knows no operation of its own.
"""

from fused_attn_bench.judge import Tolerance
from fused_attn_bench.operation import Operation
from fused_attn_bench.problem import DeclarationError, Make, Problem, Refusal

__all__ = ["DeclarationError", "Make", "Operation", "Problem", "Refusal", "Tolerance"]
