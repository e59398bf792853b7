"""What is measured: an operation is declared once, with its inputs, its reference, its cases and who computes it."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_attn_bench.case import Case
from fused_attn_bench.judge import Judge, Results, Tolerance

FORWARD, BACKWARD, BOTH = "fwd", "bwd", "fwd+bwd"
MODES = (FORWARD, BACKWARD, BOTH)
# The provider that every operation has: its reference at the case's own dtype.
REFERENCE = "eager"
Function = Callable[..., Any]
T = TypeVar("T", bound=Function)


class DeclarationError(ValueError):
    """An operation, or something of it, is not declared as it must be."""


class Refusal(Exception):
    """Why a provider cannot compute a case: ``raise Refusal("has no backward")``."""


@dataclass(frozen=True)
class Make:
    """Makes the inputs of a case: the same values every time, from a seed of the case's own.

    Args:
        case: whose.
        device: where.
        generator: on the CPU, for values of another kind.
    """

    case: Case
    device: torch.device
    generator: torch.Generator

    @property
    def dtype(self) -> torch.dtype:
        """That of the case."""
        return dtype_of(self.case.dtype)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values in the case's dtype, which is what caches and clocks are sensitive to."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers in [0, high), as indices are."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ValueError: torch has none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"the dtype must be one of torch's, like float32 or bfloat16; got {name!r}")
    return found


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
        names = self.cases(device) if callable(self.cases) else self.cases
        return list(dict.fromkeys(self.case(f"{self.name}/{name}") for name in names))

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


class Problem:
    """The tensors of a case on a device.

    Args:
        operation: which.
        case: one of its cases.
        device: where.
    """

    def __init__(self, operation: Operation, case: Case, device: torch.device) -> None:
        self.operation, self.case, self.device = operation, case, device
        self.sizes = operation.sizes(case)
        made = operation.inputs(self._make(case.name), self.sizes)
        if not isinstance(made, Mapping) or not made or not all(isinstance(t, Tensor) for t in made.values()):
            raise DeclarationError(f"{case.op}: inputs must return tensors by name; got {_shown(made)}")
        needs = case.mode != FORWARD
        self.tensors: Results = {n: t.detach().requires_grad_(needs and t.is_floating_point()) for n, t in made.items()}
        self._originals = {name: t.detach().clone() for name, t in self.tensors.items()}

    def _make(self, seed: str) -> Make:
        """The generator of values depends on the operation, variant and sizes, so that modes and dtypes have the same ones."""
        words = seed.split("/")
        seeded = torch.Generator().manual_seed(zlib.crc32("/".join((*words[:2], *words[4:])).encode()))
        return Make(self.case, self.device, seeded)

    @property
    def leaves(self) -> Results:
        """The tensors that have gradients."""
        return {name: t for name, t in self.tensors.items() if t.is_floating_point()}

    @cached_property
    def incoming(self) -> tuple[Tensor, ...]:
        """Gradients that arrive at the outputs; none in a forward pass."""
        if self.case.mode == FORWARD:
            return ()
        make = self._make(f"{self.case.name}/incoming")
        return tuple(make.normal(*shape) for shape in self.output_shapes)

    @cached_property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of what the reference returns."""
        with torch.no_grad():
            return tuple(tuple(t.shape) for t in self.outputs_of(self.plain(*self.tensors.values())))

    @contextmanager
    def kept(self) -> Iterator[list[str]]:
        """After the block the tensors hold what they held when they were made; the list then names those that were written into.

        Graphs that other providers recorded stay valid: as far as they can see nothing has been written.
        """
        written: list[str] = []
        with torch.autograd.grad_mode._unsafe_preserve_version_counter(tuple(self.tensors.values())):
            try:
                yield written
            finally:
                written += self.restore()

    def restore(self) -> list[str]:
        """Writes the original values into tensors that have others; returns their names."""
        changed = [n for n, t in self.tensors.items() if not torch.equal(_bits(t), _bits(self._originals[n]))]
        for name in changed:
            self.tensors[name].detach().copy_(self._originals[name])
        return changed

    @property
    def versions(self) -> tuple[int, ...]:
        """Grow when one of torch's operations writes into a tensor."""
        return tuple(t._version for t in self.tensors.values())

    @property
    def output_names(self) -> tuple[str, ...]:
        """As declared."""
        return self.operation.outputs

    def outputs_of(self, returned: Any) -> tuple[Tensor, ...]:
        """What a function returned, as a tuple of tensors as long as the declared outputs.

        Raises:
            TypeError: it is something else.
        """
        outputs = tuple(returned) if isinstance(returned, tuple | list) else (returned,)
        if len(outputs) != len(self.output_names) or not all(isinstance(t, Tensor) for t in outputs):
            raise TypeError(f"a function of {self.case.op} must return {len(self.output_names)} tensor(s); got {_shown(returned)}")
        return outputs

    def results(self, outputs: Sequence[Tensor], grads: Sequence[Tensor] = ()) -> Results:
        """Outputs and gradients by name."""
        named = dict(zip(self.output_names, (t.detach() for t in outputs), strict=True))
        return named | {f"d{name}": g for name, g in zip(self.leaves, grads, strict=False)}

    def plain(self, *tensors: Tensor) -> Any:
        """The definition, in the dtype of what it is given."""
        assert self.operation.reference is not None
        return self.operation.reference(*tensors)

    def caller(self, forward: Function) -> Callable[[], Results]:
        """A forward function in the case's mode."""
        tensors, leaves = tuple(self.tensors.values()), tuple(self.leaves.values())
        if self.case.mode == FORWARD:
            return lambda: self.results(self.outputs_of(forward(*tensors)))
        if self.case.mode == BOTH:

            def both() -> Results:
                outputs = self.outputs_of(forward(*tensors))
                return self.results(outputs, torch.autograd.grad(outputs, leaves, self.incoming))

            return both
        outputs = self.outputs_of(forward(*tensors))
        return lambda: self.results(outputs, torch.autograd.grad(outputs, leaves, self.incoming, retain_graph=True))

    def reference(self, dtype: torch.dtype) -> Results:
        """The definition's results, computed in ``dtype``."""
        tensors = [t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in self.tensors.values()]
        outputs = self.outputs_of(self.plain(*tensors))
        leaves = [t for t in tensors if t.is_floating_point()]
        grads = torch.autograd.grad(outputs, leaves, [t.to(dtype) for t in self.incoming]) if self.incoming else ()
        return self.results(outputs, grads)

    def judge(self) -> Judge:
        """Holds results to the error rule."""
        return Judge(self.reference(torch.float64), self.reference(dtype_of(self.case.dtype)), self.tolerance)

    @property
    def tolerance(self) -> Tolerance:
        """As declared; else rounding is that of a sum along the largest axis."""
        if self.operation.tolerance is not None:
            return self.operation.tolerance(self)
        return Tolerance(terms=max(self.case.shape))

    @property
    def flops(self) -> float:
        """Floating-point operations of a call; 0 where none are declared."""
        return self._number("flops", 0.0)

    @property
    def bytes(self) -> float:
        """The least that a call has to move."""
        forward = sum(t.nbytes for t in self.tensors.values())
        size = dtype_of(self.case.dtype).itemsize
        outputs = sum(math.prod(shape) for shape in self.output_shapes) * size
        # A backward pass reads everything and the gradients that arrive, and writes those that leave.
        backward = forward + outputs + sum(t.nbytes for t in self.leaves.values())
        moved = {FORWARD: forward + outputs, BACKWARD: backward, BOTH: forward + outputs + backward}[self.case.mode]
        return self._number("bytes", float(moved))

    @property
    def needed(self) -> float:
        """Bytes that the check holds at once: about six times what the results take in float64."""
        elements = sum(t.numel() for t in self.tensors.values()) + sum(math.prod(shape) for shape in self.output_shapes)
        return 6 * 8.0 * elements

    def _number(self, what: str, default: float) -> float:
        function = getattr(self.operation, what)
        value = default if function is None else function(self)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise DeclarationError(f"{self.case.op}: {what} must return a number that is not negative; got {value!r}")
        return value

    def metrics(self, results: Results) -> dict[str, float]:
        """The operation's own figures.

        Raises:
            DeclarationError: one is no number.
        """
        found = {}
        for name, function in self.operation.metrics.items():
            value = function(self, results)
            if isinstance(value, bool) or not isinstance(value, int | float | Tensor) or not math.isfinite(value):
                raise DeclarationError(f"{self.case.op}: metric {name} must be a finite number; got {_shown(value)}")
            found[name] = float(value)
        return found


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes, among which NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _shown(value: object) -> str:
    """Enough of a value to recognise it."""
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {str(value)[:60]!r}"


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
    except Exception as error:
        raise DeclarationError(f"{path} must run; it raised {type(error).__name__}: {error}") from error
