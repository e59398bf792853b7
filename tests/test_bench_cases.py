"""Cases and providers: the exact result is the definition's, and every provider computes it or says why not."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import pkgutil

import pytest
import torch

import benchmarks
import fused_attn as fa
import fused_attn_bench
from benchmarks import providers
from benchmarks.cases import AttentionProblem
from benchmarks.variants import ATTENTION, SOFTMAX
from fused_attn_bench import Refusal, planted, timers
from fused_attn_bench.case import Case
from fused_attn_bench.harness import Local, Setup
from fused_attn_bench.operation import OPERATIONS, case_of, problem_of
from fused_attn_bench.problem import MODES

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")
VARIANTS = {"attention": ATTENTION, "softmax": SOFTMAX}
SMALL = {"attention": (2, 2, 9, 8), "softmax": (2, 2, 9, 13)}
EVERY = [Case(op, variant, mode, "float32", SMALL[op]) for op, variants in VARIANTS.items() for variant in variants for mode in MODES]
FAST = ("fused_attn", "eager", "sdpa", "sdpa:flash", "sdpa:math")


@pytest.mark.parametrize(
    "module",
    sorted(
        found.name
        for package in (benchmarks, fused_attn_bench)
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not found.name.endswith("__main__")
    ),
)
def test_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


@pytest.mark.parametrize("case", EVERY, ids=lambda c: c.name)
def test_names_are_read_back(case: Case) -> None:
    assert Case.parse(case.name) == case


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("attention/causal/fwd/float32", "op/variant/mode/dtype/1x2x3"),
        ("attention/causal/fwd/float32/1x2xax4", "op/variant/mode/dtype/1x2x3"),
        ("attention/causal/fwd/float32/1x2x3x0", "with positive sizes"),
        ("attention/causal/fwd/float32/1x2x3x04", "with positive sizes"),
        ("attention/causal/fwd/float32/1x2x3x4,kv_len", "perhaps followed by ,name=4"),
        ("attention/nothing/fwd/float32/1x2x3x4", r"attention/plain\|probs\|causal"),
        ("attention/causal/up/float32/1x2x3x4", r"/fwd\|bwd\|fwd\+bwd/"),
        ("attention/causal/fwd/float33/1x2x3x4", "must be one of torch's"),
        ("attention/causal/fwd/float32/1x2x3", r"batchxheadsxlengthxhead_dim\[,kv_len=\]"),
        ("attention/causal/fwd/float32/1x2x3x4,pages=7", r"\[,kv_len=\]"),
        ("convolution/plain/fwd/float32/1", r"one of those declared \(attention, softmax\)"),
    ],
)
def test_bad_names(name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        case_of(name)


@pytest.mark.parametrize("case", EVERY, ids=lambda c: c.name)
def test_the_reference_is_the_definition(case: Case) -> None:
    """One head at a time in plain torch gives what the eager backend makes of the whole."""
    problem = problem_of(case, CPU)
    exact = problem.reference(torch.float64)
    doubled = [t.detach().double().requires_grad_(case.mode != "fwd") for t in problem.leaves.values()]
    whole = problem_of(dataclasses.replace(case, dtype="float64"), CPU)
    outputs = providers._fused("eager")(whole)(*doubled)
    grads = torch.autograd.grad(outputs, doubled, [t.double() for t in problem.incoming]) if problem.incoming else ()
    want = problem.results(outputs, grads)
    assert exact.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(exact[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("provider", FAST)
@pytest.mark.parametrize("case", EVERY, ids=lambda c: c.name)
def test_every_provider_is_right_or_refuses(case: Case, provider: str) -> None:
    problem = problem_of(case, CPU)
    if provider.startswith("sdpa") and (case.op == "softmax" or problem.variant.beyond_sdpa):
        with pytest.raises(Refusal, match="has no softmax" if case.op == "softmax" else problem.variant.beyond_sdpa):
            planted.bind(provider, problem)
        return
    if provider == "sdpa:flash" and case.variant == "bias" and case.mode != "fwd":
        with pytest.raises(Refusal, match="torch has no such kernel for this case"):
            planted.bind(provider, problem)()
        return
    call = planted.bind(provider, problem)
    results = call()
    assert not problem.judge()(results).broken
    assert not problem.judge()(call()).broken, "the second call differs"


def test_the_same_case_has_the_same_tensors() -> None:
    case = Case.parse("attention/bias/fwd+bwd/float32/1x2x9x8")
    first, second = problem_of(case, CPU), problem_of(case, CPU)
    assert all(first.leaves[name].equal(second.leaves[name]) for name in first.leaves)
    assert all(a.equal(b) for a, b in zip(first.incoming, second.incoming, strict=True))


def test_work_is_counted_from_the_pairs_that_attend() -> None:
    causal = problem_of(Case.parse("attention/causal/fwd/float32/2x3x5x8"), CPU)
    assert causal.flops == 4 * (2 * 3 * 15) * 8
    assert causal.bytes == 4 * 4 * (2 * 3 * 5 * 8)
    both = problem_of(Case.parse("attention/plain/fwd+bwd/float16/2x3x5x8"), CPU)
    assert both.flops == 14 * (2 * 3 * 25) * 8
    assert both.bytes == 2 * (4 + 8) * (2 * 3 * 5 * 8)
    additive = problem_of(Case.parse("attention/additive/fwd+bwd/float32/2x3x5x8"), CPU)
    assert additive.flops == 6 * (2 * 3 * 25) * 8
    assert additive.bytes == 4 * (4 + 8) * (2 * 3 * 5 * 8) + 4 * 3 * (3 * 8), "the weight is read twice and its gradient written"
    layers = problem_of(Case.parse("attention/realformer/fwd/float16/2x3x5x8"), CPU)
    assert layers.flops == 3 * 4 * (2 * 3 * 25) * 8
    assert layers.bytes == 2 * 3 * 4 * (2 * 3 * 5 * 8) + 2 * 2 * 4 * (2 * 3 * 25), "float32 scores are written and read twice"
    softmax = problem_of(Case.parse("softmax/masked/fwd/float32/2x3x5x8"), CPU)
    assert softmax.flops == 0
    assert softmax.bytes == 2 * 4 * (2 * 3 * 5 * 8) + 2 * 8, "the mask has a byte per key and sequence"


def test_no_row_of_a_case_is_empty() -> None:
    """Plain torch would give NaN there, and nothing could be compared."""
    for case in EVERY:
        keep = problem_of(case, CPU).keep
        assert keep is None or bool(keep.any(-1).all())


def test_what_ran_is_recorded() -> None:
    case = Case.parse("attention/causal/fwd+bwd/float32/1x1x16x16")
    problem = problem_of(case, CPU)
    about = Local("fused_attn:triton", problem, problem.judge(), Setup()).prepare()
    assert not about.verdict.broken
    assert about.backend == "triton"
    assert "fwd=64x64x4x1" in about.config and "bwd_dkdv=64x64x4x1" in about.config
    assert Local("fused_attn", problem, problem.judge(), Setup()).prepare().backend == "cpu"


@pytest.mark.parametrize(("variant", "sixteen"), [("additive", "bfloat16"), ("selective", "float16"), ("realformer", "bfloat16")])
def test_16_bit_inputs(variant: str, sixteen: str) -> None:
    problem = problem_of(Case("attention", variant, "fwd+bwd", sixteen, SMALL["attention"]), CPU)
    for provider in ("fused_attn", "eager"):
        assert not problem.judge()(planted.bind(provider, problem)()).broken


@pytest.mark.parametrize("variant", ["additive", "selective", "realformer"])
def test_formulas_that_are_not_the_variant_s_are_wrong(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain attention in the place of each; the first of three layers has the same gradient of v."""
    problem = problem_of(Case("attention", variant, "fwd+bwd", "float32", SMALL["attention"]), CPU)
    judge = problem.judge()
    plain = dataclasses.replace(problem.variant, additive=False, selective=False, layers=1)
    monkeypatch.setattr(AttentionProblem, "variant", plain)
    q, k, v = (problem.leaves[name] for name in "qkv")
    (out,) = problem.plain(q, k, v)
    results = problem.results((out,), torch.autograd.grad(out, (q, k, v), problem.incoming))
    assert set(judge(judge.plain | results).broken) >= {"out", "dq", "dk"}


@pytest.mark.parametrize("name", ["flex", "flash-attn", "flash-attn-3", "xformers", "x-transformers"])
@pytest.mark.parametrize("variant", ["additive", "selective", "realformer"])
def test_what_others_have_no_word_for(variant: str, name: str) -> None:
    with pytest.raises(Refusal, match=r"has no additive|the others'|next layer|takes no dense mask|is measured without"):
        planted.bind(name, problem_of(Case("attention", variant, "fwd", "float32", SMALL["attention"]), CPU))


def test_the_check_s_memory_is_that_of_the_variant() -> None:
    """One head of 9 x 9, head_dim 8, two heads and three layers."""
    held = {v: problem_of(Case("attention", v, "fwd", "float32", SMALL["attention"]), CPU).held for v in ATTENTION}
    assert {v: n for v, n in held.items() if n > 1} == {"additive": 8, "selective": 2, "realformer": 3}


def test_refusals_say_why() -> None:
    problem = problem_of(Case.parse("attention/masked/fwd/float32/1x1x16x16"), CPU)
    for name, reason in {
        "flash-attn": "dense mask",
        "xformers": "without masks",
        "x-transformers": "without masks",
        "liger": "has no attention",
    }.items():
        with pytest.raises(Refusal, match=reason):
            planted.bind(name, problem)
    with pytest.raises(Refusal, match="no backward on the CPU"):
        planted.bind("flex", problem_of(Case.parse("attention/plain/bwd/float32/1x1x16x16"), CPU))
    with pytest.raises(ValueError, match=r"a provider must be one of fused_attn, .*got 'torch'"):
        planted.bind("torch", problem)


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-3", "xformers", "x-transformers", "liger"])
def test_packages_that_are_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = "softmax" if name == "liger" else "attention"
    problem = problem_of(Case(op, "plain", "fwd", "float16", SMALL[op]), CPU)
    problem.device = torch.device("cuda")  # nothing runs there: the package is looked for first
    monkeypatch.setattr(providers.importlib, "import_module", _missing)
    with pytest.raises(Refusal, match=r"is not installed \(No module"):
        planted.bind(name, problem)


def _missing(name: str) -> None:
    raise ImportError(f"No module named {name!r}")


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-3", "xformers", "x-transformers", "liger"])
def test_peers_are_called_as_they_ask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the packages' signatures and layouts: what reaches them is right, and what comes back is turned round again."""
    op = "softmax" if name == "liger" else "attention"
    for variant in ("plain", "causal", "window", "bias")[: 1 if op == "softmax" else 4]:
        problem = problem_of(Case(op, variant, "fwd", "float16", SMALL[op]), CPU)
        judge, _ = problem.judge(), problem.keep
        problem.device = torch.device("cuda")
        monkeypatch.setattr(providers.importlib, "import_module", lambda package: _StandIn(package))
        try:
            results = planted.bind(name, problem)()
        except Refusal:
            continue
        assert not judge(results).broken


class _StandIn:
    """The functions of the other packages that providers call, on torch's SDPA."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.LigerSoftmaxFunction = self

    class LowerTriangularMask:
        pass

    @staticmethod
    def apply(scores: torch.Tensor) -> torch.Tensor:
        return torch.softmax(scores, -1)

    @staticmethod
    def flash_attn_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
    ) -> torch.Tensor:
        grid = fa.lowering.Grid((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), CPU)
        mask = fa.Causal() & fa.SlidingWindow(*(None if side < 0 else side for side in window_size)) if causal else None
        keep = None if mask is None else mask.allowed(grid)
        return torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=keep).transpose(1, 2)

    def memory_efficient_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: object = None) -> torch.Tensor:
        causal = isinstance(attn_bias, self.LowerTriangularMask)
        bias = attn_bias if isinstance(attn_bias, torch.Tensor) else None
        turned = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*turned, attn_mask=bias, is_causal=causal).transpose(1, 2)

    class Attend:
        def __init__(self, *, causal: bool, flash: bool) -> None:
            self.causal = causal

        def __call__(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, None]:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, is_causal=self.causal), None


def test_timers_belong_to_devices() -> None:
    assert timers.make("auto", CPU).name == "wall"
    for name, device in (("events", "cpu"), ("graph", "cpu"), ("wall", "cuda")):
        with pytest.raises(ValueError, match="events, graph or proton on a GPU"):
            timers.make(name, torch.device(device))


def test_default_cases_are_legal_and_named_once() -> None:
    for kind in ("cpu", "cuda"):
        names = [case.name for op in OPERATIONS.values() for case in op.defaults(torch.device(kind))]
        assert len(names) == len(set(names)) > 20
