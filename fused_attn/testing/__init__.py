"""Named problems, their inputs, and the error rule; shared by the tests and the benchmarks."""

from fused_attn.testing.budget import (
    DIFFERENTIABLE,
    STATISTICS,
    call,
    check,
    check_inputs,
    differentiable_inputs,
    evaluate,
    excess,
    in_double,
    input_names,
    violations,
)
from fused_attn.testing.cases import CASES, CPU, EVERYTHING, QUICK, Case, Inputs, inputs_of, laid_out, make_inputs, vocabulary
from fused_attn.testing.softmax import SOFTMAX_CASES, SOFTMAX_QUICK, SoftmaxCase, check_softmax, make_softmax

__all__ = [
    "CASES",
    "CPU",
    "DIFFERENTIABLE",
    "EVERYTHING",
    "QUICK",
    "SOFTMAX_CASES",
    "SOFTMAX_QUICK",
    "STATISTICS",
    "Case",
    "Inputs",
    "SoftmaxCase",
    "call",
    "check",
    "check_inputs",
    "check_softmax",
    "differentiable_inputs",
    "evaluate",
    "excess",
    "in_double",
    "input_names",
    "inputs_of",
    "laid_out",
    "make_inputs",
    "make_softmax",
    "violations",
    "vocabulary",
]
