"""What is measured: an operation is declared once, with its inputs, its reference, its cases and who computes it."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_attn_bench.case import Case
from fused_attn_bench.judge import Results, Tolerance
from fused_attn_bench.problem import FORWARD, MODES, DeclarationError, Function, Make, Problem, Refusal, declared, dtype_of

# The provider that every operation has: its reference at the case's own dtype.
REFERENCE = "eager"
# Of a result, as the terminal and the page show it; an operation's own metrics follow.
COLUMNS = ("case", "provider", "backend", "time", "±", "host", f"vs {REFERENCE}", "TFLOP/s", "GB/s", "of roof", "faults", "peak", "error")
T = TypeVar("T", bound=Function)


@dataclass(frozen=True)
class Provider:
    """One that computes an operation.

    Args:
        prepare: from a problem to the function that is timed, which takes the problem's tensors.
        runs_by_default: whether a plain run on a device has it.
    """

    prepare: Callable[[Problem], Function]
    runs_by_default: Callable[[torch.device], bool]


@dataclass(eq=False)
class Operation:
    """An operation that can be measured; making one makes it known.

    Args:
        name: the first part of its cases' names.
        axes: names of the sizes in a case's shape, in order.
        inputs: from ``(make, sizes)`` to the tensors by name, in the order in which functions take them; ``sizes`` maps each axis (and
            option) to its size.
        reference: the definition in plain torch, from the tensors to one tensor or a tuple of them; computed in float64 it is what every
            provider is held to, at the case's dtype it is the provider "eager". None where ``problem`` overrides ``plain``.
        cases: names without the operation of those in a plain run, or a function from the device to them: "plain/fwd/float32/64x1024".
        variants: what there is of it; a case names one.
        options: further sizes by name; each has a default, an axis whose size it takes.
        gradients: whether backward passes are measured too; gradients are those of all floating inputs.
        outputs: names of what the reference returns.
        flops: from a problem to the operations of one pass; none by default.
        bytes: from a problem to the least that has to move; by default every tensor once, twice in a backward pass.
        tolerance: from a problem to how far a result may be from float64; by default twice the reference's own error and rounding.
        metrics: figures of your own by name, from ``(problem, results)`` to a number; one whose name ends in "/s" is an amount per
            call, and shown per second.
        problem: class of the problems, for an operation that holds more than tensors.
        refusals: exceptions that mean that a provider cannot compute a case, besides ``Refusal``.
        observe: a context in whose list the running code notes what ran: names, or "stage=configuration".

    Raises:
        DeclarationError: a part is not as it must be.

    Example:
        >>> from fused_attn_bench.operation import OPERATIONS, Operation
        >>> double = Operation("double", ("rows",), lambda make, sizes: {"x": make.normal(sizes["rows"])}, lambda x: 2 * x)
        >>> @double.provider("sum")
        ... def twice(x):
        ...     return x + x
        >>> problem = double.of(double.case("double/plain/fwd/float32/8"), torch.device("cpu"))
        >>> problem.judge()(double.bind("sum", problem)()).broken
        ()
        >>> del OPERATIONS["double"]
    """

    name: str
    axes: tuple[str, ...]
    inputs: Callable[[Make, Mapping[str, int]], Mapping[str, Tensor]]
    reference: Function | None = None
    cases: Sequence[str] | Callable[[torch.device], Sequence[str]] = ()
    variants: Sequence[str] = ("plain",)
    options: Mapping[str, str] = field(default_factory=dict)
    gradients: bool = False
    outputs: tuple[str, ...] = ("out",)
    flops: Callable[[Any], float] | None = None
    bytes: Callable[[Any], float] | None = None
    tolerance: Callable[[Any], Tolerance] | None = None
    metrics: Mapping[str, Callable[[Any, Results], float]] = field(default_factory=dict)
    problem: type[Problem] | None = None
    refusals: tuple[type[Exception], ...] = ()
    observe: Callable[[], AbstractContextManager[list[str]]] = lambda: nullcontext([])
    providers: dict[str, Provider] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for what in ("axes", "outputs", "variants"):
            if isinstance(getattr(self, what), str):
                raise DeclarationError(
                    f"{self.name}: {what} must be a tuple of words; got {getattr(self, what)!r}. Write ({getattr(self, what)!r},)."
                )
        self.axes, self.outputs, self.variants = tuple(self.axes), tuple(self.outputs), tuple(self.variants)
        for what, names in (("name", (self.name,)), ("axes", self.axes), ("variants", self.variants), ("outputs", self.outputs)):
            if (
                not names
                or not all(isinstance(n, str) and re.fullmatch(r"[A-Za-z_][\w.-]*", n) for n in names)
                or len({*names}) < len(names)
            ):
                raise DeclarationError(
                    f"an operation's {what} must be different words of letters, digits and _; got {names} for {self.name!r}"
                )
        for what, function in (("inputs", self.inputs), ("reference", self.reference or self.problem)):
            if not callable(function):
                raise DeclarationError(f"{self.name}: {what} must be a function; got {function!r}")
        for what in ("flops", "bytes", "tolerance"):
            if getattr(self, what) is not None and not callable(getattr(self, what)):
                raise DeclarationError(f"{self.name}: {what} must be a function of the problem; got {getattr(self, what)!r}")
        if not isinstance(self.metrics, Mapping) or not all(map(callable, self.metrics.values())):
            raise DeclarationError(f"{self.name}: metrics must be functions by name; got {self.metrics!r}")
        taken = [name for name in self.metrics if name in (*COLUMNS, "status")]
        if taken:
            raise DeclarationError(f"{self.name}: metrics must not be named as a column that every result has; got {', '.join(taken)}")
        if not isinstance(self.gradients, bool):
            raise DeclarationError(f"{self.name}: gradients must be True or False; got {self.gradients!r}")
        unknown = {axis for axis in self.options.values() if axis not in self.axes}
        if unknown or {*self.options} & {*self.axes}:
            raise DeclarationError(
                f"{self.name}: options must have names of their own and take an axis' size ({', '.join(self.axes)}); got {dict(self.options)}"
            )
        if self.name in OPERATIONS:
            raise DeclarationError(f"there is an operation named {self.name} already; give this one another name")
        self.add(REFERENCE, lambda problem: problem.plain)
        OPERATIONS[self.name] = self

    @property
    def modes(self) -> tuple[str, ...]:
        """Those that it has."""
        return MODES if self.gradients else (FORWARD,)

    def provider(self, name: str, default: Callable[[torch.device], bool] = lambda device: True) -> Callable[[T], T]:
        """Registers the decorated function, which takes the problem's tensors and returns what the reference does.

        Args:
            name: as shown.
            default: whether a plain run on a device has it.
        """

        def register(function: T) -> T:
            self.add(name, lambda problem: function, default)
            return function

        return register

    def prepared(self, name: str, default: Callable[[torch.device], bool] = lambda device: True) -> Callable[[T], T]:
        """Registers the decorated function, which takes the problem and returns the function that is timed: to compile, to build a mask."""

        def register(prepare: T) -> T:
            self.add(name, prepare, default)
            return prepare

        return register

    def add(self, name: str, prepare: Callable[[Any], Function], default: Callable[[torch.device], bool] = lambda device: True) -> None:
        """What both decorators do.

        Raises:
            DeclarationError: the name is taken, or not one.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][\w.:-]*", name):
            raise DeclarationError(f"{self.name}: a provider's name must be a word of letters, digits and ._:-; got {name!r}")
        if name in self.providers:
            raise DeclarationError(f"{self.name} has a provider named {name} already; give this one another name")
        self.providers[name] = Provider(prepare, default)

    def case(self, name: str | Case) -> Case:
        """A case by its name.

        Raises:
            ValueError: it is none of this operation's.
        """
        case = Case.parse(name) if isinstance(name, str) else name
        dtype_of(case.dtype)
        if (
            case.op != self.name
            or case.variant not in self.variants
            or case.mode not in self.modes
            or len(case.shape) != len(self.axes)
            or any(key not in self.options for key, _ in case.options)
        ):
            sizes = "x".join(self.axes) + "".join(f"[,{key}=]" for key in self.options)
            raise ValueError(
                f"a case of {self.name} is {self.name}/{'|'.join(self.variants)}/{'|'.join(self.modes)}/DTYPE/{sizes}; got {case.name!r}"
            )
        return case

    def sizes(self, case: Case) -> dict[str, int]:
        """Each axis' and option's size."""
        sizes = dict(zip(self.axes, case.shape, strict=True))
        return sizes | {key: sizes[axis] for key, axis in self.options.items()} | dict(case.options)

    def defaults(self, device: torch.device) -> list[Case]:
        """The cases of a plain run."""
        with declared(f"{self.name}: cases must be names, or a function from a device to them; got "):
            names = list(self.cases(device) if callable(self.cases) else self.cases)
        return list(dict.fromkeys(self.case(f"{self.name}/{name}") for name in names))

    def runs(self, device: torch.device) -> list[str]:
        """The providers of a plain run.

        Raises:
            DeclarationError: one's ``default`` raised.
        """
        found = []
        for name, provider in self.providers.items():
            with declared(f"{self.name}: default of provider {name} must be a function from a device to True or False; it raised "):
                if provider.runs_by_default(device):
                    found.append(name)
        return found

    def of(self, case: Case, device: torch.device) -> Problem:
        """A case's problem."""
        return (self.problem or Problem)(self, self.case(case), device)

    def bind(self, name: str, problem: Problem) -> Callable[[], Results]:
        """What is timed: the provider on the problem, in the case's mode.

        Raises:
            Refusal: it cannot compute the case.
        """
        if name not in self.providers:
            raise Refusal(f"has no {self.name}")
        return problem.caller(self.providers[name].prepare(problem))


OPERATIONS: dict[str, Operation] = {}
# Files that ``load`` ran: twice would declare everything twice.
_LOADED: set[Path] = set()


def operation(name: str) -> Operation:
    """The operation of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in OPERATIONS:
        known = ", ".join(OPERATIONS) or "none: name a Python file that declares one with --load"
        raise ValueError(f"an operation must be one of those declared ({known}); got {name!r}")
    return OPERATIONS[name]


def case_of(name: str) -> Case:
    """A case by name, if an operation has it.

    Raises:
        ValueError: none has.
    """
    case = Case.parse(name)
    return operation(case.op).case(case)


def problem_of(case: Case, device: torch.device) -> Problem:
    """The problem of a case."""
    return operation(case.op).of(case, device)


def provider_names() -> list[str]:
    """Every provider of every operation once, the reference last."""
    names = dict.fromkeys(name for op in OPERATIONS.values() for name in op.providers)
    return sorted(names, key=lambda name: name == REFERENCE)


def load(path: Path) -> None:
    """Runs a Python file that declares operations or adds providers; one of a package is imported as its module.

    Raises:
        DeclarationError: there is no such file, or it raised; the message says what.
    """
    if not path.is_file() or path.suffix != ".py":
        raise DeclarationError(f"operations and providers are declared in Python files; got {path}, which is none")
    if path.resolve() in _LOADED:
        return
    folder, names = path.resolve().parent, [path.stem]
    while (folder / "__init__.py").is_file():
        folder, names = folder.parent, [folder.name, *names]
    # What it imports from its own folder is found behind everything else.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        with declared(f"{path} must run; it raised "):
            if len(names) > 1:
                importlib.import_module(".".join(names))
                _LOADED.add(path.resolve())
                return
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            # Triton and torch.compile look a function's source up through its module.
            sys.modules.setdefault(path.stem, module)
            spec.loader.exec_module(module)
            _LOADED.add(path.resolve())
    except DeclarationError as error:
        raise DeclarationError(f"{path}: {error}") from None
