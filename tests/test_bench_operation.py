"""Operations that anyone declares: errors are a sentence, and a provider that misbehaves harms nobody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_attn_bench import DeclarationError, Make, Operation, Problem, Refusal, Tolerance, compare, harness, tables
from fused_attn_bench.compare import Comparison
from fused_attn_bench.harness import Setup, measure
from fused_attn_bench.judge import Judge
from fused_attn_bench.operation import OPERATIONS, Provider, load
from fused_attn_bench.project import Project
from fused_attn_bench.results import Result
from fused_attn_bench.sides import Separate

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")
SOON = Setup(seconds=0.0, rounds=2, sample=0.0)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No operation but those of the test."""
    monkeypatch.setattr(harness, "WARM_UP", 0.0)
    before = dict(OPERATIONS)
    OPERATIONS.clear()
    yield
    OPERATIONS.clear()
    OPERATIONS.update(before)


def scaled(**more: object) -> Operation:
    """x * weight, of 4 rows."""
    options = {
        "axes": ("rows", "columns"),
        "inputs": lambda make, sizes: {"x": make.normal(sizes["rows"], sizes["columns"]), "weight": make.normal(sizes["columns"])},
        "reference": lambda x, weight: x * weight,
        "cases": ("plain/fwd/float32/4x8",),
        "gradients": True,
    }
    return Operation("scaled", **{**options, **more})  # type: ignore[arg-type]


def measured(operation: Operation, mode: str = "fwd", *providers: str) -> dict[str, Result]:
    case = operation.case(f"scaled/plain/{mode}/float32/4x8")
    return {r.provider: r for r in measure(case, providers or tuple(operation.providers), SOON)}


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_a_provider_is_held_to_the_reference(mode: str) -> None:
    operation = scaled()
    operation.provider("turned")(lambda x, weight: weight * x)
    operation.provider("off")(lambda x, weight: x * weight * 1.001)
    found = measured(operation, mode)
    assert {name: r.status for name, r in found.items()} == {"eager": "ok", "turned": "ok", "off": "wrong"}
    assert found["turned"].samples and not found["off"].samples


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_gradients_are_those_of_the_floating_inputs(mode: str) -> None:
    operation = Operation(
        "rows",
        ("count",),
        lambda make, sizes: {"table": make.normal(10, 4), "index": make.integers(10, sizes["count"])},
        lambda table, index: table[index],
        gradients=True,
    )
    problem = operation.of(operation.case(f"rows/plain/{mode}/float32/6"), CPU)
    results = operation.bind("eager", problem)()
    assert set(results) == {"out", *["dtable"] * (mode != "fwd")}
    assert not problem.judge()(results).broken


def throw(error: BaseException) -> Tensor:
    raise error


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def resized(x: Tensor, weight: Tensor) -> Tensor:
    out = x * weight if x.dim() == 2 else torch.zeros(4, 8)
    x.resize_(3)
    return out


def taken(x: Tensor, weight: Tensor) -> Tensor:
    out = x * weight if x.dim() == 2 else torch.zeros(4, 8)
    x.data = torch.zeros(0)
    return out


BAD = {
    "raises": (lambda x, weight: 1 / 0, "failed", "ZeroDivisionError: division by zero"),
    "ends a generator": (lambda x, weight: throw(GeneratorExit("end")), "failed", "GeneratorExit: end"),
    "says nothing": (lambda x, weight: throw(Unspeakable()), "failed", "Unspeakable: a message that cannot be read"),
    "colours": (lambda x, weight: throw(Refusal("\x1b[31mred\nsecond line")), "refused", "[31mred"),
    "double": (lambda x, weight: (x * weight).double(), "wrong", "dtype: out is torch.float64, must be torch.float32"),
    "complex": (lambda x, weight: (x * weight).to(torch.complex64), "wrong", "dtype: out is torch.complex64"),
    "resizes": (lambda x, weight: resized(x, weight), "wrong", "writes into its inputs: x"),
    "takes away": (lambda x, weight: taken(x, weight), "wrong", "writes into its inputs: x"),
    "exits": (lambda x, weight: exit(3), "failed", "SystemExit: 3"),
    "asserts": (lambda x, weight: throw(AssertionError()), "failed", "AssertionError: no message"),
    "refuses": (lambda x, weight: throw(Refusal("never")), "refused", "never"),
    "refuses without a word": (lambda x, weight: throw(Refusal()), "refused", "no reason given"),
    "text": (lambda x, weight: "x", "failed", "must return 1 tensor(s); got str 'x'"),
    "two": (lambda x, weight: (x, x), "failed", "must return 1 tensor(s)"),
    "nan": (lambda x, weight: x * torch.nan, "wrong", "out has NaN or infinity where float64 has none"),
    "inf": (lambda x, weight: x + torch.inf, "wrong", "out has NaN or infinity where float64 has none"),
    "short": (lambda x, weight: (x * weight)[:2], "wrong", "shape: out is [2, 8], must be [4, 8]"),
    "broadcast": (lambda x, weight: (x * weight)[:1], "wrong", "shape: out is [1, 8], must be [4, 8]"),
    "flat": (lambda x, weight: (x * weight).flatten(), "wrong", "shape: out is [32], must be [4, 8]"),
    "writes": (lambda x, weight: x.mul_(weight), "wrong", "writes into its inputs: x"),
    "writes both": (lambda x, weight: (weight.add_(1), x.mul_(weight - 1))[1], "wrong", "writes into its inputs: x, weight"),
    "writes and raises": (lambda x, weight: x.zero_() / "no", "failed", "TypeError"),
}


@pytest.mark.parametrize("kind", BAD)
def test_only_who_misbehaves_is_reported(kind: str) -> None:
    function, status, reason = BAD[kind]
    operation = scaled()
    operation.provider("before")(lambda x, weight: weight * x)
    operation.provider("bad")(function)
    operation.provider("after")(lambda x, weight: weight * x)
    found = measured(operation)
    assert (found["bad"].status, found["bad"].samples) == (status, ())
    assert reason in found["bad"].reason
    assert {name: r.status for name, r in found.items() if name != "bad"} == {"eager": "ok", "before": "ok", "after": "ok"}
    assert all(len(r.samples) == 2 for name, r in found.items() if name != "bad")
    for r in found.values():
        assert Result.from_json(r.to_json()) == r, "what is wrong can be kept"


def test_a_writer_spoils_no_graph_of_the_others() -> None:
    """In mode bwd the others' graphs hold the inputs, and torch refuses to use what has been written into since."""
    operation = scaled()

    def writes(x: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            weight.add_(1)
        return x * weight

    operation.provider("bad")(writes)
    found = measured(operation, "bwd", "eager", "bad")
    assert (found["eager"].status, found["bad"].status) == ("ok", "wrong")


def test_who_begins_to_write_while_timed_fails() -> None:
    operation, calls = scaled(), []

    def later(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(0)
        return x.mul_(weight) if len(calls) > 4 else x * weight

    operation.provider("bad")(later)
    found = measured(operation, "fwd", "eager", "bad")
    assert found["bad"].status == "failed" and found["bad"].reason == "while timed: RuntimeError: it wrote into its inputs"
    assert found["eager"].status == "ok" and len(found["eager"].samples) == 2


def test_special_values_of_the_exact_result_are_held_too() -> None:
    """log(0) is -inf and log(-1) NaN in the reference; a provider must give the same, and may."""
    operation = scaled(reference=lambda x, weight: (x.clamp(min=0.0) * 0 + x.sign()).log(), gradients=False)
    operation.provider("same")(lambda x, weight: x.sign().log())
    operation.provider("zero")(lambda x, weight: x.sign().log().nan_to_num(0.0, neginf=0.0))
    found = measured(operation)
    assert (found["eager"].status, found["same"].status, found["zero"].status) == ("ok", "ok", "wrong")


DECLARATIONS = {
    "two of a name": (lambda: (scaled(), scaled()), "there is an operation named scaled already"),
    "a name with a slash": (lambda: Operation("a/b", ("n",), dict, dict), "name must be different words"),
    "no axes": (lambda: scaled(axes=()), "axes must be different words"),
    "an axis twice": (lambda: scaled(axes=("n", "n")), "axes must be different words"),
    "no reference": (lambda: scaled(reference=None), "reference must be a function; got None"),
    "inputs are tensors": (lambda: scaled(inputs=torch.ones(3)), "inputs must be a function"),
    "an option of no axis": (lambda: scaled(options={"kv_len": "length"}), "take an axis' size (rows, columns)"),
    "eager is taken": (lambda: scaled().provider("eager")(print), "has a provider named eager already"),
    "a provider twice": (lambda: [scaled_once.provider("a")(print) for scaled_once in [scaled()] for _ in range(2)], "named a already"),
    "a provider's name": (lambda: scaled().provider("a+5%")(print), "must be a word"),
    "a case of two sizes": (lambda: scaled(cases=("plain/fwd/float32/4",)).defaults(CPU), "a case of scaled is scaled/plain/"),
    "a mode that is not there": (lambda: scaled(gradients=False, cases=("plain/bwd/float32/4x8",)).defaults(CPU), "a case of scaled is"),
    "no output has a gradient": (
        lambda: measured(scaled(reference=lambda x, weight: (x * weight).argmax(-1)), "fwd+bwd"),
        "with gradients=True an output must depend on a floating input so that it has a gradient; out has none. Leave gradients out.",
    ),
    "inputs give a list": (lambda: measured(scaled(inputs=lambda make, sizes: [1])), "inputs must return tensors by name; got list '[1]'"),
    "flops are text": (
        lambda: measured(scaled(flops=lambda problem: "many")),
        "flops must return a number that is not negative; got 'many'",
    ),
    "bytes are negative": (lambda: measured(scaled(bytes=lambda problem: -1)), "bytes must return a number"),
    "inputs raise": (
        lambda: measured(scaled(inputs=lambda make, sizes: {"x": make.normal(sizes["no such size"])})),
        "scaled: inputs must be a function from (make, sizes) to tensors by name; for scaled/plain/fwd/float32/4x8 it raised KeyError: 'no such size'",
    ),
    "inputs exit": (lambda: measured(scaled(inputs=lambda make, sizes: exit(0))), "it raised SystemExit: 0"),
    "a metric raises": (
        lambda: measured(scaled(metrics={"m": lambda problem, results: problem.sizes["n"]})),
        "scaled: metric m must be a function from (problem, results) to a number; it raised KeyError: 'n'",
    ),
    "a metric is a text": (lambda: measured(scaled(metrics={"m": lambda problem, results: "x"})), "metric m must be a function"),
    "a default raises": (
        lambda: [op.provider("p", default=lambda device: 1 / 0)(print) and op.runs(CPU) for op in [scaled()]],
        "scaled: default of provider p must be a function from a device to True or False; it raised ZeroDivisionError: division by zero",
    ),
    "a default is no function": (
        lambda: [op.provider("p", default=True)(print) and op.runs(CPU) for op in [scaled()]],
        "default of provider p must be a function",
    ),
    "cases exit": (lambda: scaled(cases=lambda device: exit(0)).defaults(CPU), "got SystemExit: 0"),
    "bytes exit": (lambda: measured(scaled(bytes=lambda problem: exit(0))), "it raised SystemExit: 0"),
    "axes are a text": (lambda: scaled(axes="rows"), "axes must be a tuple of words; got 'rows'"),
    "gradients are a text": (lambda: scaled(gradients="yes"), "gradients must be True or False"),
    "flops are a number": (lambda: scaled(flops=3), "flops must be a function of the problem; got 3"),
    "flops raise": (lambda: measured(scaled(flops=lambda problem: {}["n"])), "flops must be a function of the problem; it raised KeyError"),
    "a tolerance is a number": (lambda: measured(scaled(tolerance=lambda problem: 1e-3)), "tolerance must return a Tolerance; got float"),
    "a metric is named as a column": (lambda: scaled(metrics={"time": max}), "metrics must not be named as a column"),
    "metrics are a list": (lambda: scaled(metrics=[1]), "metrics must be functions by name"),
    "there are no cases": (lambda: scaled(cases=None).defaults(CPU), "cases must be names, or a function"),
    "cases raise": (
        lambda: scaled(cases=lambda device: 1 / 0).defaults(CPU),
        "cases must be names, or a function from a device to them; got Zero",
    ),
}


@pytest.mark.parametrize("kind", DECLARATIONS)
def test_a_mistake_in_a_declaration_is_a_sentence(kind: str) -> None:
    make, sentence = DECLARATIONS[kind]
    with pytest.raises(ValueError, match=r"must|already|a case of") as raised:
        make()
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_files_that_do_not_run(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    for text, sentence in (
        ("import nothing_of_the_kind", "it raised ModuleNotFoundError"),
        ("x = (", "it raised SyntaxError"),
        ("exit(0)", "it raised SystemExit: 0"),
    ):
        path.write_text(text)
        with pytest.raises(DeclarationError, match=sentence):
            load(path)
    with pytest.raises(DeclarationError, match="are declared in Python files"):
        load(tmp_path / "absent.py")


def test_a_file_imports_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels_of_mine.py").write_text("def double(x):\n    return x + x\n")
    (tmp_path / "declared.py").write_text(
        "from fused_attn_bench import Operation\nfrom kernels_of_mine import double\n"
        "op = Operation('double', ('n',), lambda make, sizes: {'x': make.normal(sizes['n'])}, lambda x: 2 * x)\nop.provider('sum')(double)\n"
    )
    load(tmp_path / "declared.py")
    load(tmp_path / "declared.py")
    assert {*OPERATIONS["double"].providers} == {"eager", "sum"}


def test_values_are_the_same_every_time_and_in_every_mode() -> None:
    operation = scaled()
    first, second = (operation.of(operation.case(f"scaled/plain/{mode}/float32/4x8"), CPU) for mode in ("fwd", "bwd"))
    assert all(first.tensors[name].equal(second.tensors[name]) for name in ("x", "weight"))
    other = operation.of(operation.case("scaled/plain/fwd/float32/8x4"), CPU)
    assert not other.tensors["x"].flatten().equal(first.tensors["x"].flatten())


def test_options_take_an_axis_size_unless_they_are_given() -> None:
    operation = scaled(options={"group": "columns"})
    assert operation.sizes(operation.case("scaled/plain/fwd/float32/4x8")) == {"rows": 4, "columns": 8, "group": 8}
    assert operation.sizes(operation.case("scaled/plain/fwd/float32/4x8,group=2")) == {"rows": 4, "columns": 8, "group": 2}


def test_work_is_counted() -> None:
    operation = scaled()
    forward, both = (operation.of(operation.case(f"scaled/plain/{mode}/float32/4x8"), CPU) for mode in ("fwd", "fwd+bwd"))
    assert forward.bytes == 4 * (32 + 8 + 32), "x, weight, out"
    assert both.bytes == forward.bytes + 4 * (32 + 8 + 32) + 4 * (32 + 8), "all again with the gradient that arrives, and two that leave"
    assert forward.flops == 0
    assert scaled_again().flops == 32


def scaled_again() -> Problem:
    OPERATIONS.clear()
    operation = scaled(flops=lambda problem: problem.tensors["x"].numel())
    return operation.of(operation.case("scaled/plain/fwd/float32/4x8"), CPU)


def test_metrics_and_tolerances_of_one_s_own() -> None:
    operation = scaled(
        metrics={"largest": lambda problem, results: results["out"].abs().max(), "rows/s": lambda problem, results: problem.sizes["rows"]},
        tolerance=lambda problem: Tolerance(absolute=0.5),
    )
    operation.provider("near")(lambda x, weight: x * weight + 0.4)
    operation.provider("far")(lambda x, weight: x * weight + 0.6)
    found = measured(operation)
    assert found["near"].status == "ok" and found["near"].metrics["rows/s"] == 4.0 and found["near"].metrics["largest"] > 0
    assert found["far"].status == "wrong"


@pytest.mark.parametrize("value", [lambda problem, results: float("nan"), lambda problem, results: results["out"].sum() / 0])
def test_a_metric_that_is_none_is_its_provider_s(value: object) -> None:
    operation = scaled(metrics={"m": value})
    found = measured(operation)
    assert found["eager"].status == "failed" and "metric m " in found["eager"].reason


def test_where_memory_is_short_only_the_case_fails() -> None:
    """torch on a CPU has a RuntimeError for it, a GPU a class of its own."""
    for error in (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), MemoryError()):
        OPERATIONS.clear()
        found = measured(scaled(inputs=lambda make, sizes, error=error: throw(error)))
        assert found["eager"].status == "failed" and type(error).__name__ in found["eager"].reason


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit(), KeyError("x")])
def test_a_reference_that_raises_is_told(error: BaseException) -> None:
    operation = scaled(reference=lambda x, weight: throw(error))
    operation.provider("mine")(lambda x, weight: x * weight)
    found = measured(operation)
    assert {r.status for r in found.values()} == {"failed"} and all(type(error).__name__ in r.reason for r in found.values())


def test_exceptions_that_refuse() -> None:
    operation = scaled(refusals=(KeyError,))
    operation.provider("bad")(lambda x, weight: {}["kernel"])
    assert measured(operation)["bad"].status == "refused"


def test_what_ran_is_observed() -> None:
    seen: list[str] = []

    @contextmanager
    def observe() -> Iterator[list[str]]:
        seen.clear()
        yield seen

    operation = scaled(observe=observe)

    @operation.prepared("kernel")
    def prepare(problem: Problem) -> object:
        seen.append("tile=64")
        return lambda x, weight: (seen.append("fast"), x * weight)[1]

    found = measured(operation)["kernel"]
    assert (found.backend, found.config) == ("fast", "tile=64")


def test_make_gives_the_case_s_dtype() -> None:
    operation = scaled()
    make = Make(operation.case("scaled/plain/fwd/bfloat16/4x8"), CPU, torch.Generator().manual_seed(0))
    assert make.normal(2, 3).dtype == torch.bfloat16 and make.integers(5, 7).max() < 5


def test_an_exit_of_what_is_measured_is_no_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fused_attn_bench.__main__ import main

    path = tmp_path / "mine.py"
    for text in ("exit(0)", "import sys\nsys.exit()"):
        path.write_text(text)
        assert main(["cases", "--load", str(path)]) == 2
        assert f"{path} must run; it raised SystemExit" in capsys.readouterr().err
    monkeypatch.setattr("fused_attn_bench.commands.cases.run", lambda args: exit(0))
    assert main(["cases"]) == 4
    assert "what is measured must not end Python" in capsys.readouterr().err


def test_what_a_file_prints_is_in_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fused_attn_bench.__main__ import main

    (tmp_path / "mine.py").write_text(
        "from fused_attn_bench import Operation\nprint('hello')\n"
        "Operation('said', ('n',), lambda make, sizes: {'x': make.normal(sizes['n'])}, lambda x: 2 * x, cases=('plain/fwd/float32/8',))\n"
    )
    assert main(["cases", "--load", str(tmp_path / "mine.py"), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert "hello" in err and "hello" not in out and "said/plain" in out


CRASHES = """
import os
import traceback
from pathlib import Path

from fused_attn_bench import Operation

print("said while it is imported", flush=True)
os.write(1, b"said beside Python\\n")
twice = Operation(
    "twice", ("n",), lambda make, sizes: {"x": make.normal(sizes["n"])}, lambda x: 2 * x, cases=[f"plain/fwd/float32/{n}" for n in (3, 4, 5, 6)]
)


@twice.provider("mine")
def mine(x):
    begun = Path(__file__).with_name("begun")
    timed = len(x) == 5 and any(frame.name == "sample" for frame in traceback.extract_stack())
    if len(x) == 4 or timed:  # at once, and while it is timed
        os._exit(7)
    if len(x) == 6 and begun.is_file():  # in the second launch, which it begins
        os._exit(8)
    if len(x) == 6:
        begun.touch()
    return x + x
"""


def test_who_crashes_its_process_ends_its_case_only(tmp_path: Path) -> None:
    """Of commits and of check, which measure in processes of their own: a new one goes on with the others, whatever the file prints."""
    (tmp_path / "mine.py").write_text(CRASHES)
    project = Project(root=tmp_path)
    load(tmp_path / "mine.py")
    sides = Separate(("eager", "mine"), SOON, project, [tmp_path / "mine.py"])
    cases = OPERATIONS["twice"].defaults(CPU)
    found = {c.case: c for c in compare.compare(sides, cases, SOON, compare.Plan(2, 2))}
    assert [(c.a.status, c.b.status) for c in found.values()] == [("ok", "ok"), *[("ok", "failed")] * 3]
    codes = [c.reason.partition("ended with code ")[2][:1] for c in found.values()]
    assert codes == ["", "7", "7", "8"] and all(c.reason.startswith("mine: ") for c in list(found.values())[1:])
    assert found[cases[2].name].b.reason.startswith("while timed")
    (tmp_path / "mine.py").write_text("import os\nos._exit(3)")
    with sides.launch() as make:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the process of the measuring ended with code 3"):
                make(cases[0], 0)


def hooked(x: Tensor, weight: Tensor) -> Tensor:
    x.register_hook(lambda gradient: 2 * gradient)
    return x * weight


def graded(x: Tensor, weight: Tensor) -> Tensor:
    (x * weight).sum().backward()
    return x.requires_grad_(False) * weight


def arriving(x: Tensor, weight: Tensor) -> Tensor:
    out = x * weight
    out.register_hook(lambda gradient: gradient.mul_(2))
    return out


@pytest.mark.parametrize("mode", ["bwd", "fwd+bwd"])
@pytest.mark.parametrize("provider", [hooked, graded, arriving])
def test_what_a_provider_leaves_on_its_inputs_is_its_own(provider: Callable[..., Tensor], mode: str) -> None:
    operation = scaled()
    operation.providers = {"bad": Provider(lambda problem: provider, lambda device: True), **operation.providers}
    operation.provider("turned")(lambda x, weight: weight * x)
    found = measured(operation, mode)
    assert found.pop("bad").status != "ok" and {r.status for r in found.values()} == {"ok"}


def test_a_square_input_that_is_turned_is_told() -> None:
    operation = Operation("square", ("rows",), lambda make, sizes: {"x": make.normal(sizes["rows"], sizes["rows"])}, lambda x: x + x.mT)
    operation.provider("turns")(lambda x: x + x.t_())
    operation.provider("after")(lambda x: x.mT + x)
    found = measure(operation.case("square/plain/fwd/float32/4"), ("turns", "after"), SOON)
    assert [r.status for r in found] == ["wrong", "ok"] and "writes into its inputs: x" in found[0].reason


def test_truth_values_are_equal_or_wrong() -> None:
    operation = scaled(reference=lambda x, weight: x > 0, gradients=False)
    operation.provider("same")(lambda x, weight: ~(x <= 0))
    operation.provider("one-off")(lambda x, weight: (x > 0).logical_xor(torch.arange(8) == 3))
    found = measured(operation)
    assert {name: r.status for name, r in found.items()} == {"eager": "ok", "same": "ok", "one-off": "wrong"}
    assert "breaks the error rule in out" in found["one-off"].reason and found["eager"].error == 0.0


def test_a_truth_value_that_rounding_turns_is_left_out_and_no_other() -> None:
    exact, plain = torch.tensor([True, False, True]), torch.tensor([True, True, True])
    judge = Judge({"out": exact}, {"out": plain})
    assert not judge({"out": exact}).broken and not judge({"out": plain}).broken and judge({"out": ~exact}).broken == ("out",)


def test_large_integers_are_held_exactly() -> None:
    exact = torch.tensor([2**60, 1])
    assert Judge({"out": exact}, {"out": exact})({"out": exact + torch.tensor([1, 0])}).broken == ("out",)


def test_complex_results_are_held_with_both_parts() -> None:
    operation = scaled(reference=lambda x, weight: torch.fft.fft(x * weight), gradients=False)
    operation.provider("real")(lambda x, weight: torch.fft.fft(x * weight).real + 0j)
    operation.provider("full")(lambda x, weight: torch.fft.fft(weight * x))
    assert {name: r.status for name, r in measured(operation).items()} == {"eager": "ok", "real": "wrong", "full": "ok"}


@pytest.mark.parametrize("mode", ["bwd", "fwd+bwd"])
def test_gradients_go_through_the_outputs_that_have_one(mode: str) -> None:
    """Values and places of the largest three, and a figure that is detached."""

    def largest(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        values, places = (x * weight).topk(3)
        return places, values, values.detach().mean()

    operation = scaled(reference=largest, outputs=("places", "values", "mean"))
    operation.provider("again")(largest)
    operation.provider("other")(lambda x, weight: largest(x, 1.001 * weight))
    problem = operation.of(operation.case(f"scaled/plain/{mode}/float32/4x8"), CPU)
    assert set(operation.bind("again", problem)()) == {"places", "values", "mean", "dx", "dweight"} and len(problem.incoming) == 1
    found = measured(operation, mode)
    assert {name: r.status for name, r in found.items()} == {"eager": "ok", "again": "ok", "other": "wrong"}


def test_a_reference_that_is_nan_says_so() -> None:
    """Whatever is NaN there counts as right, also a provider that computes nothing."""
    operation = scaled(reference=lambda x, weight: (x * weight).log() * 0, gradients=False)
    operation.provider("nothing")(lambda x, weight: (x * weight).log() * 0)
    found = measured(operation)
    for result in found.values():
        assert result.status == "ok" and result.reason.startswith("the reference itself is NaN in ") and "% of out" in result.reason
    assert "the reference itself is NaN" in tables.results(list(found.values()))
    compared = Comparison("scaled/plain/fwd/float32/4x8", found["eager"], found["nothing"])
    assert [remark.count("the reference itself") for remark in compared.remarks] == [1]


def test_nan_that_an_input_has_needs_no_word() -> None:
    inputs = {"inputs": lambda make, sizes: {"x": make.normal(4, 8).masked_fill(torch.arange(8) == 3, torch.nan), "weight": make.normal(8)}}
    assert [(r.status, r.reason) for r in measured(scaled(**inputs)).values()] == [("ok", "")]
