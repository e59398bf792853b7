"""Attention on every backend: the error rule over all cases, and the contract that holds whatever the flags."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_attn as fa
from fused_attn import backends
from fused_attn.auxiliary import AuxRequest
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.problem import AttentionProblem
from fused_attn.testing import (
    CASES,
    DIFFERENTIABLE,
    EVERYTHING,
    QUICK,
    Case,
    Inputs,
    call,
    check,
    differentiable_inputs,
    evaluate,
    input_names,
    laid_out,
    make_inputs,
    vocabulary,
)  # fmt: skip

CHEAP = [name for name in CASES if name in QUICK]
MASKS = list(vocabulary(Mask, Grid((2, 2, 4, 4), torch.device("cpu"))))
WITH_EVERYTHING = Case(
    (1, 2, 1),
    (19, 37),
    (24, 20),
    masks=("Causal0", "KeyPadding0"),
    mods=("SoftCap0", "ALiBi0", "Bias1", "DecayBias0"),
    sinks=True,
    dropout=0.2,
    offset="bottom",
)


def params(names: Any) -> list[Any]:
    return [pytest.param(CASES[n], id=n, marks=[pytest.mark.quick] if n in QUICK else []) for n in names]


def narrow(case: Case, backend: str, device: torch.device) -> bool:
    """Whether the backend must refuse the case's dtype; then it is checked that it does."""
    if backend not in ("triton", "cuda") or case.dtype != torch.float64:
        return False
    with pytest.raises(fa.UnsupportedError, match="float64"):
        call(make_inputs(case, device).problem, backend)
    return True


def run(inputs: Inputs, backend: str, through: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor]:
    """Outputs and gradients of all inputs that the backend differentiates."""
    return evaluate(lambda p: call(p, backend), inputs, through, differentiable_inputs(inputs.problem, backend))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every element, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("case", params(CASES))
def test_error_rule(case: Case, backend: str, device: torch.device) -> None:
    if not narrow(case, backend, device):
        check(case, backend, device)


@pytest.mark.parametrize("case", params(dict.fromkeys((*CHEAP[::2], *list(CASES)[::9]))))
def test_error_rule_through_every_output(case: Case, backend: str, device: torch.device) -> None:
    if not narrow(case, backend, device):
        check(case, backend, device, through=DIFFERENTIABLE)


@pytest.mark.quick
@pytest.mark.parametrize(
    "through",
    [("out",), ("probs",), ("scores",), ("lse",), ("out", "lse"), ("probs", "scores"), ("out", "probs", "scores", "lse")],
    ids="+".join,
)
def test_gradients_through_chosen_outputs(through: tuple[str, ...], backend: str, device: torch.device) -> None:
    check(WITH_EVERYTHING, backend, device, through=through)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_asking_for_more_never_changes_out(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(**{**vars(WITH_EVERYTHING), "dtype": dtype}), device)
    problem = AttentionProblem(inputs.problem.q, inputs.problem.k, inputs.problem.v, inputs.problem.modifiers)
    alone, _ = call(problem, backend)
    grads = run(Inputs(problem, inputs.incoming), backend, ("out",))
    names = list(EVERYTHING.names)
    for chosen in ((), *((n,) for n in names), *zip(names, names[1:] + names[:1], strict=True), tuple(names)):
        request = AuxRequest(**dict.fromkeys(chosen, True))
        more = AttentionProblem(problem.q, problem.k, problem.v, problem.modifiers, request)
        out, aux = call(more, backend)
        assert same(out, alone), f"out changed with {request.names}"
        assert {n for n in vars(aux) if getattr(aux, n) is not None} == set(request.names)
    results = run(inputs, backend, ("out",))
    for name in grads:
        assert same(results[name], grads[name]), f"{name} changed with every auxiliary output"


@pytest.mark.quick
def test_tuple_exactly_when_aux_is_asked_for(backend: str, device: torch.device) -> None:
    q = torch.randn(1, 1, 4, 8, device=device)
    assert isinstance(fa.attention(q, q, q, backend=backend), Tensor)
    out, aux = fa.attention(q, q, q, return_aux=AuxRequest(), backend=backend)
    assert isinstance(out, Tensor) and all(x is None for x in vars(aux).values())


SMALL = Case((1, 2, 1), (5, 6), (8, 4), masks=("Causal0",), mods=("Bias1", "DecayBias0"), sinks=True, offset="bottom")


@functools.cache
def all_gradients(backend: str, device: torch.device) -> dict[str, Tensor]:
    return run(make_inputs(SMALL, device), backend)


@pytest.mark.parametrize(
    "wanted", [w for n in range(1, 7) for w in itertools.combinations(range(6), n)], ids=lambda w: "".join("qkvsbc"[i] for i in w)
)
def test_every_requires_grad_subset(wanted: tuple[int, ...], backend: str, device: torch.device) -> None:
    """q, k, v, sinks, bias, decay: each subset gives the same gradients as all together, and None elsewhere."""
    inputs = make_inputs(SMALL, device)
    everything = all_gradients(backend, device)
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs.problem.inputs)]
    out, aux = call(inputs.problem.with_inputs(tuple(leaves)), backend)
    outputs = {"out": out, "probs": aux.probs, "scores": aux.scores, "lse": aux.lse}
    live = [n for n, t in outputs.items() if t.requires_grad]
    assert "out" in live
    torch.autograd.backward([outputs[n] for n in DIFFERENTIABLE if n in live], [inputs.incoming[n] for n in DIFFERENTIABLE if n in live])
    for i, (name, leaf) in enumerate(zip(input_names(inputs.problem), leaves, strict=True)):
        if i not in wanted:
            assert leaf.grad is None, name
        else:
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(grad, everything[f"d{name}"], msg=lambda m, n=name: f"d{n}: {m}")


def tiny(case: Case, device: torch.device) -> tuple[Any, tuple[Tensor, ...]]:
    """A function of the case's differentiable inputs that returns its differentiable outputs, and the inputs."""
    problem = make_inputs(case, device).problem
    leaves = tuple(t.detach().requires_grad_() for t in problem.inputs)

    def function(backend: str) -> Any:
        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            out, aux = call(problem.with_inputs(tensors), backend)
            return out, aux.probs, aux.lse

        return run

    return function, leaves


GRADCHECK = [
    Case((1, 2, 1), (2, 3), (2, 1), torch.float64, ("Causal0",), ("SoftCap0", "Bias1"), True, 0.2, "bottom"),
    Case((2, 1, 1), (2, 2), (1, 2), torch.float64, ("ValidLengths0",), ("DecayBias0", "ALiBi0")),
    Case((1, 1, 1), (3, 4), (2, 2), torch.float64),
]


@pytest.mark.quick
@pytest.mark.parametrize("case", GRADCHECK, ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_gradcheck_and_gradgradcheck(case: Case, name: str) -> None:
    function, leaves = tiny(case, torch.device("cpu"))

    def finite(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, probs, lse = function(name)(*tensors)
        return out, probs, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(finite, leaves)
    assert torch.autograd.gradgradcheck(finite, leaves)


@pytest.mark.quick
def test_double_backward(backend: str, device: torch.device) -> None:
    """Gradients of a gradient's norm agree with eager's: recomputed, never silently wrong."""
    case = Case(**{**vars(GRADCHECK[0]), "dtype": torch.float32})

    def second(name: str) -> list[Tensor]:
        function, leaves = tiny(case, device)
        outputs = function(name)(*leaves)
        first = torch.autograd.grad(sum((o.sin() * 1.3).sum() for o in outputs), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    for got, want in zip(second(backend), second("eager"), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "stride0"])
def test_inputs_and_incoming_gradients_are_never_written(layout: str, backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case(**{**vars(WITH_EVERYTHING), "layout": layout}), device)
    tensors = [*inputs.problem.inputs, *inputs.incoming.values(), inputs.problem.modifiers.mask.masks[1].keep_keys]
    before = [(t.clone(), t._version) for t in tensors]
    run(inputs, backend)
    for tensor, (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy) and tensor._version == version


@pytest.mark.quick
def test_repeating_gives_the_same_bits(backend: str, device: torch.device) -> None:
    """Forward, dk and dv always; dq (and everything else) when torch asks for deterministic algorithms."""
    inputs = make_inputs(Case((1, 2, 1), (130, 150), (16, 16), masks=("Causal0",), mods=("Bias1",), sinks=True, offset="bottom"), device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(inputs, backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    third = run(inputs, backend)
    for name in first:
        assert same(first[name], second[name]), name
    for name in (*DIFFERENTIABLE, "dk", "dv"):
        assert same(first[name], third[name]), f"{name} without the deterministic switch"


@pytest.mark.quick
@pytest.mark.parametrize("content", ["normal", "outliers", "repeated"])
def test_batch_slices_equal_batches_of_one(content: str, kernel_backend: str, device: torch.device) -> None:
    inputs = make_inputs(Case((3, 1, 1), (65, 65), (16, 16), masks=("Causal0",), content=content), device)
    whole = run(inputs, kernel_backend)
    for b in range(3):
        problem = inputs.problem.with_inputs(tuple(t[b : b + 1] for t in inputs.problem.inputs))
        one = run(Inputs(problem, {n: t[b : b + 1] for n, t in inputs.incoming.items()}), kernel_backend)
        for name in one:
            assert same(one[name], whole[name][b : b + 1]), name


@pytest.mark.parametrize("mask", MASKS)
def test_poison_in_unseen_keys_never_leaks(mask: str, backend: str, device: torch.device) -> None:
    """NaN keys and infinite values that no query may attend to change no output and no gradient."""
    lengths = (20, 70) if mask != "Documents0" else (40, 90)
    case = Case((2, 1, 1), lengths, (16, 16), masks=(mask,), offset="top")
    clean, poisoned = make_inputs(case, device), make_inputs(case, device, poison=True)
    unseen = poisoned.problem.k.isnan().any()
    assert unseen or not mask.startswith(("Causal", "Band", "KeyPadding", "ValidLengths0")), "this mask leaves no key unseen here"
    want, got = (run(i, backend, ("out", "probs", "lse")) for i in (clean, poisoned))
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.quick
def test_poison_per_row_never_leaks(backend: str, device: torch.device) -> None:
    """A NaN key at position p under a causal mask reaches the rows from p on, and only those; the same for an infinite value."""
    q, k, v = (torch.randn(1, 2, 70, 16, device=device) for _ in range(3))
    clean = fa.attention(q, k, v, mask=fa.Causal(), backend=backend)
    for name, tensors in (("k", (q, k.clone(), v)), ("v", (q, k, v.clone()))):
        tensors["kv".index(name) + 1][:, :, 40, 3] = torch.nan
        out = fa.attention(*tensors, mask=fa.Causal(), backend=backend)
        torch.testing.assert_close(out[:, :, :40], clean[:, :, :40], msg=lambda m, n=name: f"{n}: {m}")
        column = out[:, :, 40:, 3] if name == "v" else out[:, :, 40:]
        assert column.isnan().all(), f"a NaN in {name} that is attended must come out"


@pytest.mark.quick
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_genuine_nan_comes_out(place: str, backend: str, device: torch.device) -> None:
    tensors = {n: torch.randn(1, 1, 5, 8, device=device) for n in "qkv"}
    tensors[place][0, 0, 2, 1] = torch.nan
    out, aux = fa.attention(**tensors, return_aux=EVERYTHING, backend=backend)
    rows = torch.arange(5, device=device) == 2 if place == "q" else torch.ones(5, dtype=torch.bool, device=device)
    assert torch.equal(out.isnan().any(-1)[0, 0], rows)
    if place != "v":
        assert torch.equal(aux.lse.isnan()[0, 0], rows) and torch.equal(aux.probs.isnan().any(-1)[0, 0], rows)


FLAGS = {
    "plain": {}, "softcap": {"score_mods": (fa.SoftCap(2.0),)}, "dropout": {"dropout": fa.Dropout(0.3, seed=3)}, "aux": {"return_aux": EVERYTHING},
    "sinks": {"sinks": torch.tensor([0.3, -0.2])}, "scale": {"scale": 0.7}, "bias": {"score_mods": (fa.Bias(torch.linspace(-1, 1, 50)),)},
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("flags", [c for n in (1, 2) for c in itertools.combinations(FLAGS, n)], ids="+".join)
def test_future_keys_change_nothing(flags: tuple[str, ...], backend: str, device: torch.device) -> None:
    """A causal output never depends on later keys, whatever else is asked for."""
    options: dict[str, Any] = {}
    for flag in flags:
        for name, value in FLAGS[flag].items():
            if isinstance(value, Tensor):
                value = value.to(device)
            if name == "score_mods":
                value = tuple(m.with_tensors(tuple(t.to(device) for t in m.tensors)) for m in value)
            options[name] = options[name] + value if name in options else value
    q, k, v = (torch.randn(1, 2, 50, 8, device=device) for _ in range(3))
    later = torch.arange(50, device=device)[:, None] >= 30
    results = []
    for shift in (0.0, 9.0):
        result = fa.attention(q, k + shift * later, v - shift * later, mask=fa.Causal(), backend=backend, **options)
        results.append(result[0] if "return_aux" in options else result)
    assert same(results[0][:, :, :30], results[1][:, :, :30])
    assert not torch.equal(results[0][:, :, 30:], results[1][:, :, 30:])


@pytest.mark.quick
@pytest.mark.parametrize("zero", ["batch", "heads", "q_len", "kv_len", "head_dim", "value_dim"])
def test_sizes_of_zero(zero: str, backend: str, device: torch.device) -> None:
    size = {"batch": 2, "heads": 2, "q_len": 3, "kv_len": 5, "head_dim": 8, "value_dim": 4} | {zero: 0}
    q = torch.randn(size["batch"], size["heads"], size["q_len"], size["head_dim"], device=device, requires_grad=True)
    k = torch.randn(size["batch"], size["heads"], size["kv_len"], size["head_dim"], device=device, requires_grad=True)
    v = torch.randn(size["batch"], size["heads"], size["kv_len"], size["value_dim"], device=device, requires_grad=True)
    sinks = torch.zeros(size["heads"], device=device, requires_grad=True)
    if zero.endswith("_dim") and backend != "auto":
        name = "head_dim and value_dim must be"  # a kernel backend may refuse, saying so; then auto must run it
        problem = AttentionProblem.check(
            q, k, v, dict.fromkeys(("mask", "scale", "q_offset", "sinks", "dropout", "return_aux")) | {"score_mods": ()}
        )
        reasons = [] if backend == "eager" else backends.get(backend).refusals(problem)
        assert all(name in r for r in reasons)
        backend = "auto" if reasons else backend
    for options in ({}, {"sinks": sinks}, {"mask": fa.Causal(), "q_offset": 0}):
        out, aux = fa.attention(q, k, v, return_aux=EVERYTHING, backend=backend, **options)
        shape = (size["batch"], size["heads"], size["q_len"])
        assert out.shape == (*shape, size["value_dim"]) and aux.probs.shape == (*shape, size["kv_len"]) and aux.lse.shape == shape
        assert aux.column_sums.shape == (*shape[:2], size["kv_len"]) and aux.entropy.shape == aux.max_scores.shape == shape
        grads = torch.autograd.grad(
            out.sum() + aux.lse.masked_fill(aux.lse == -torch.inf, 0.0).sum() + aux.probs.sum(), (q, k, v), allow_unused=True
        )
        for tensor, grad in zip((q, k, v), grads, strict=True):
            assert grad is None or (grad.shape == tensor.shape and grad.isfinite().all())
        if zero == "kv_len":
            assert (
                (out == 0).all()
                and ((aux.lse == 0).all() if "sinks" in options else (aux.lse == -torch.inf).all())
                and (aux.entropy == 0).all()
            )
        if zero == "head_dim" and not options:
            torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))


@pytest.mark.quick
def test_explicit_backend_never_falls_back(kernel_backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 1, 4, 8, device=device)
    monkeypatch.setattr(type(backends.get(kernel_backend)), "refusals", lambda self, problem: ["first reason", "second reason"])
    with pytest.raises(fa.UnsupportedError, match=r"first reason; second reason"):
        fa.attention(q, q, q, backend=kernel_backend)
    with pytest.raises(fa.UnsupportedError, match=r"first reason"):
        fa.masked_softmax(q, backend=kernel_backend)
    assert fa.explain(q, q, q).chosen != kernel_backend


@pytest.mark.quick
def test_the_chosen_backend_really_runs(kernel_backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    cls = type(backends.get(kernel_backend))
    together = hasattr(cls, "attention_fwd_aux")
    forwards = ("attention_fwd_aux",) if together else ("attention_fwd", "attention_aux")
    for name in (*forwards, "attention_bwd", "softmax_fwd", "softmax_bwd"):
        original = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda *a, _name=name, _original=original: (ran.append(_name), _original(*a))[1])
    q = torch.randn(1, 1, 4, 8, device=device, requires_grad=True)
    out, aux = fa.attention(q, q, q, return_aux=AuxRequest(probs=True), backend=kernel_backend)
    (out.sum() + aux.probs.square().sum() + fa.masked_softmax(q, backend=kernel_backend).square().sum()).backward()
    assert set(ran) == {*forwards, "attention_bwd", "softmax_fwd", "softmax_bwd"}


@pytest.mark.quick
def test_only_slopes_may_go_without_gradient(kernel_backend: str, device: torch.device) -> None:
    """Every input has a gradient on every backend, but for ALiBi slopes, which a kernel backend may refuse; then auto finds another."""
    problem = make_inputs(WITH_EVERYTHING, device).problem
    missing = set(input_names(problem)) - set(differentiable_inputs(problem, kernel_backend))
    assert missing <= {"alibi[1]"}
    q = torch.randn(1, 2, 4, 8, device=device)
    slopes = torch.ones(2, device=device, requires_grad=True)
    if missing:
        with pytest.raises(fa.UnsupportedError, match="ALiBi"):
            fa.attention(q, q, q, score_mods=(fa.ALiBi(slopes),), backend=kernel_backend)
    fa.attention(q, q, q, score_mods=(fa.ALiBi(slopes),)).square().sum().backward()
    assert slopes.grad.abs().sum() > 0


@pytest.mark.quick
def test_triton_refuses_float64(device: torch.device) -> None:
    q = torch.zeros(1, 1, 2, 8, dtype=torch.float64, device=device)
    with pytest.raises(fa.UnsupportedError, match="float64"):
        fa.attention(q, q, q, backend="triton")
    with pytest.raises(fa.UnsupportedError, match="float64"):
        fa.masked_softmax(q, backend="triton")


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    q, k, v = (torch.randn(1, 2, 9, 16, device=device, requires_grad=True) for _ in range(3))
    options = {"mask": fa.Causal(), "score_mods": (fa.Bias(torch.ones(9, 9, device=device)),), "backend": backend}
    with torch.autocast(device.type, dtype=dtype):
        out = fa.attention(q, k, v, **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out, fa.attention(*(t.to(dtype) for t in (q, k, v)), **options), rtol=0, atol=0)
    out.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.quick
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout(seed: int | None, use_reentrant: bool, backend: str, device: torch.device) -> None:
    base = [torch.randn(1, 2, 70, 16, device=device) for _ in range(3)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fa.attention(q, k, v, mask=fa.Causal(), dropout=fa.Dropout(0.4, seed), backend=backend)

    results = []
    for wrapped in (False, True):
        torch.manual_seed(5)
        leaves = [t.clone().requires_grad_() for t in base]
        out = checkpoint(run, *leaves, use_reentrant=use_reentrant) if wrapped else run(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


@pytest.mark.quick
def test_manual_seed_controls_dropout(backend: str, device: torch.device) -> None:
    q = torch.randn(1, 2, 33, 16, device=device)
    torch.manual_seed(3)
    first, second = (fa.attention(q, q, q, dropout=fa.Dropout(0.5), backend=backend) for _ in range(2))
    torch.manual_seed(3)
    again = fa.attention(q, q, q, dropout=fa.Dropout(0.5), backend=backend)
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.quick
def test_uninitialised_memory_really_is_poisoned() -> None:
    """Proof that the fixture works: every way the package allocates gives NaN."""
    like = torch.zeros(3)
    for tensor in (
        torch.empty(3),
        torch.empty_like(like),
        torch.empty_strided((3,), (1,)),
        like.new_empty(3),
        like.new_empty_strided((3,), (1,)),
    ):
        assert tensor.isnan().all()
    assert torch.empty(3, dtype=torch.int32).eq(torch.iinfo(torch.int32).max // 3).all()
    from fused_attn.layout import empty_out

    assert empty_out(torch.zeros(1, 2, 3, 4), 5).isnan().all()


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "transposed", "sliced", "stride0"])
def test_layouts_give_the_same_answer(layout: str, backend: str, device: torch.device) -> None:
    """The same numbers in any memory layout give the same results; gradients too come in any layout."""
    case = Case((2, 2, 1), (33, 65), (24, 20))
    inputs = make_inputs(case, device)
    values = [laid_out(t, layout) for t in inputs.problem.inputs]
    incoming = {n: laid_out(t, layout) for n, t in inputs.incoming.items()}
    got = run(Inputs(inputs.problem.with_inputs(tuple(values)), incoming), backend)
    plain = inputs.problem.with_inputs(tuple(t.clone(memory_format=torch.contiguous_format) for t in values))
    want = run(Inputs(plain, {n: t.clone(memory_format=torch.contiguous_format) for n, t in incoming.items()}), backend)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}")
