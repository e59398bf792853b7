"""A case's tensors on a device, its exact result and its work; what an operation's functions are given."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_attn_bench.case import Case
from fused_attn_bench.judge import Judge, Results, Tolerance
from fused_attn_bench.text import first_line

if TYPE_CHECKING:
    from fused_attn_bench.operation import Operation

FORWARD, BACKWARD, BOTH = "fwd", "bwd", "fwd+bwd"
MODES = (FORWARD, BACKWARD, BOTH)
Function = Callable[..., Any]


class DeclarationError(ValueError):
    """An operation, or something of it, is not declared as it must be."""


class Refusal(Exception):
    """Why a provider cannot compute a case: ``raise Refusal("has no backward")``."""


@contextmanager
def declared(said: str) -> Iterator[None]:
    """What runs a function of a declaration: what it raises is a mistake of the declaration, an exit too.

    Args:
        said: what the function must be; what it raised follows.

    Raises:
        DeclarationError: it raised; the message is one sentence.
        MemoryError, RuntimeError: there is not enough memory, which is no mistake of the declaration.
    """
    try:
        yield
    except (DeclarationError, KeyboardInterrupt):
        raise
    except BaseException as error:
        # On a CPU torch has no class of its own for it.
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in first_line(error):
            raise
        raise DeclarationError(f"{said}{first_line(error)}") from error


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
        return torch.randn(shape, generator=self.generator, device="cpu").to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers in [0, high), as indices are."""
        return torch.randint(high, shape, generator=self.generator, device="cpu").to(self.device)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ValueError: torch has none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"the dtype must be one of torch's, like float32 or bfloat16; got {name!r}")
    return found


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
        with declared(f"{case.op}: inputs must be a function from (make, sizes) to tensors by name; for {case.name} it raised "):
            made = operation.inputs(self._make(case.name), self.sizes)
        if not isinstance(made, Mapping) or not made or not all(isinstance(t, Tensor) for t in made.values()):
            raise DeclarationError(f"{case.op}: inputs must return tensors by name; got {_shown(made)}")
        self.tensors: Results = self._leaves_of(made)
        self._originals = {name: t.detach().clone() for name, t in self.tensors.items()}
        # What providers were given: views of the tensors, each provider's its own.
        self._lent: list[Results] = []

    def _make(self, seed: str) -> Make:
        """The generator of values depends on the operation, variant and sizes, so that modes and dtypes have the same ones."""
        words = seed.split("/")
        seeded = torch.Generator().manual_seed(zlib.crc32("/".join((*words[:2], *words[4:])).encode()))
        return Make(self.case, self.device, seeded)

    def _leaves_of(self, tensors: Mapping[str, Tensor]) -> Results:
        """Views that are leaves of a graph, with nothing on them that others left there; a write through one is seen by all."""
        needs = self.case.mode != FORWARD
        return {name: t.detach().requires_grad_(needs and t.is_floating_point()) for name, t in tensors.items()}

    @property
    def leaves(self) -> Results:
        """The tensors that have gradients."""
        return _floating(self.tensors)

    @cached_property
    def incoming(self) -> tuple[Tensor, ...]:
        """Gradients that arrive at the outputs that have one, in their order; none in a forward pass.

        Raises:
            DeclarationError: no output has one.
        """
        if self.case.mode == FORWARD:
            return ()
        if not any(self.differentiable):
            raise DeclarationError(
                f"{self.case.op}: with gradients=True an output must depend on a floating input so that it has a gradient; "
                f"{', '.join(self.output_names)} has none. Leave gradients out."
            )
        make = self._make(f"{self.case.name}/incoming")
        return tuple(make.normal(*shape) for shape, has in zip(self.output_shapes, self.differentiable, strict=True) if has)

    @cached_property
    def _returned(self) -> tuple[tuple[tuple[int, ...], bool], ...]:
        """Of what the reference returns, shapes and whether it has a gradient."""
        with torch.set_grad_enabled(self.case.mode != FORWARD):
            return tuple((tuple(t.shape), t.requires_grad) for t in self.outputs_of(self.plain(*self._leaves_of(self.tensors).values())))

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of what the reference returns."""
        return tuple(shape for shape, _ in self._returned)

    @property
    def differentiable(self) -> tuple[bool, ...]:
        """Whether each output has a gradient; integers and what is detached have none."""
        return tuple(has for _, has in self._returned)

    def gradients(self, outputs: Sequence[Tensor], leaves: Sequence[Tensor], incoming: Sequence[Tensor], again: bool = False) -> Any:
        """Of the leaves, through the outputs that have one; ``again`` keeps the graph."""
        through = [t for t, has in zip(outputs, self.differentiable, strict=True) if has]
        return torch.autograd.grad(through, leaves, incoming, retain_graph=again)

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
        """Writes the original values into tensors that have others, and gives lent ones back what was taken from them; returns their names."""
        changed = self._rewritten()
        for lent in self._lent:
            for name, tensor in lent.items():
                if _place(tensor) != _place(self.tensors[name]):
                    tensor.data = self.tensors[name].data
                    changed.append(name)
        return [name for name in self.tensors if name in changed]

    def _rewritten(self) -> list[str]:
        changed = []
        for name, original in self._originals.items():
            tensor = self.tensors[name]
            if tensor.shape != original.shape or tensor.dtype != original.dtype or tensor.device != original.device:
                tensor.data = original.clone()
            elif not torch.equal(_bits(tensor), _bits(original)):
                tensor.detach().copy_(original)
            else:
                continue
            changed.append(name)
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
        # Of its own: a hook, a gradient or another requires_grad that one provider leaves on a tensor is not the others'.
        lent = self._leaves_of(self.tensors)
        self._lent.append(lent)
        tensors, leaves = tuple(lent.values()), tuple(_floating(lent).values())
        incoming = tuple(t.clone() for t in self.incoming)  # a backward pass may write into what arrives
        if self.case.mode == FORWARD:
            return lambda: self.results(self.outputs_of(forward(*tensors)))
        if self.case.mode == BOTH:

            def both() -> Results:
                outputs = self.outputs_of(forward(*tensors))
                return self.results(outputs, self.gradients(outputs, leaves, incoming))

            return both
        outputs = self.outputs_of(forward(*tensors))
        return lambda: self.results(outputs, self.gradients(outputs, leaves, incoming, again=True))

    def reference(self, dtype: torch.dtype) -> Results:
        """The definition's results, computed in ``dtype``."""
        tensors = [t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in self.tensors.values()]
        outputs = self.outputs_of(self.plain(*tensors))
        leaves = [t for t in tensors if t.is_floating_point()]
        grads = self.gradients(outputs, leaves, [t.to(dtype) for t in self.incoming]) if self.incoming else ()
        return self.results(outputs, grads)

    def judge(self) -> Judge:
        """Holds results to the error rule."""
        exact = self.reference(torch.float64)
        return Judge(exact, self.reference(dtype_of(self.case.dtype)), self.tolerance, self._unexplained(exact))

    def _unexplained(self, exact: Results) -> str:
        """What is said of NaN in the exact results that no input explains; empty where there is none."""
        if not all(t.isfinite().all() for t in self.tensors.values()):
            return ""
        parts = {name: 100 * float(t.isnan().double().mean()) for name, t in exact.items() if t.numel()}
        found = ", ".join(f"{part:.3g}% of {name}" for name, part in parts.items() if part)
        return (
            f"the reference itself is NaN in {found}, and every input is finite: who is NaN there as well counts as right" if found else ""
        )

    @property
    def tolerance(self) -> Tolerance:
        """As declared; else rounding is that of a sum along the largest axis."""
        if self.operation.tolerance is not None:
            declared = self._declared("tolerance")
            if not isinstance(declared, Tolerance):
                raise DeclarationError(f"{self.case.op}: tolerance must return a Tolerance; got {_shown(declared)}")
            return declared
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
        value = default if getattr(self.operation, what) is None else self._declared(what)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise DeclarationError(f"{self.case.op}: {what} must return a number that is not negative; got {value!r}")
        return float(value)

    def _declared(self, what: str) -> Any:
        """What the operation's function of that name says of this problem."""
        with declared(f"{self.case.op}: {what} must be a function of the problem; it raised "):
            return getattr(self.operation, what)(self)

    def metrics(self, results: Results) -> dict[str, float]:
        """The operation's own figures.

        Raises:
            DeclarationError: one raised, or gave something else than a number.
            RuntimeError: one is not finite, as the provider's result may make it; the message names it.
        """
        found = {}
        for name, function in self.operation.metrics.items():
            with declared(f"{self.case.op}: metric {name} must be a function from (problem, results) to a number; it raised "):
                value = float(function(self, results))
            if not math.isfinite(value):
                raise RuntimeError(f"metric {name} must be a finite number; got {value}")
            found[name] = value
        return found


def _floating(tensors: Mapping[str, Tensor]) -> Results:
    return {name: t for name, t in tensors.items() if t.is_floating_point()}


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where and how a tensor lies in memory: what it has in common with a view of all of it."""
    return tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride()


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes, among which NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _shown(value: object) -> str:
    """Enough of a value to recognise it."""
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {str(value)[:60]!r}"
