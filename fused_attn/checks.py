"""Checks that many arguments share. Every message says what must hold, what was got, and what to do."""

from __future__ import annotations

import operator
import sys
from typing import Any, cast

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_PLAIN = (Tensor, torch.nn.Parameter)
# Widths and offsets stay below these so that kernels may add them to an index in 32 bits.
MAX_WIDTH, MAX_OFFSET = 2**30, 2**29


def is_traced() -> bool:
    """Whether torch.jit.trace records the call."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def captured(tensor: Tensor) -> bool:
    """Whether values cannot be looked at: a compiler, tracer, transform, dispatch mode, tensor subclass or the meta device has the call."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
        or torch._C._len_torch_dispatch_stack() > 0
        or type(tensor) not in _PLAIN
        or tensor.is_meta
    )


def can_look(tensor: Tensor) -> bool:
    """Whether looking at values waits for no device and breaks no graph."""
    return tensor.device.type == "cpu" and not captured(tensor)


def has_finite_products(a: Tensor, b: Tensor, factor: float = 1.0) -> bool:
    """Whether no product of rows of a and b, times a factor, is NaN or overflows: none exceeds that of the norms (Cauchy and Schwarz).

    Example:
        >>> has_finite_products(torch.ones(2, 3), torch.ones(4, 3))
        True
        >>> has_finite_products(torch.tensor([1e30]), torch.tensor([1e30])), has_finite_products(torch.ones(1), torch.tensor([torch.nan]))
        (False, False)
    """
    dtype = torch.float32 if a.dtype.itemsize < 4 else a.dtype
    norms = [torch.linalg.vector_norm(t, dtype=dtype).item() for t in (a, b)]
    return bool(norms[0] * norms[1] * abs(factor) <= torch.finfo(dtype).max)


def described(value: object) -> str:
    """A short name for a wrong argument: a tensor's dtype and shape, a scalar's value, otherwise the type.

    Example:
        >>> described(torch.zeros(2, 3)), described("soft"), described([1, 2])
        ('torch.float32 [2, 3]', "'soft'", 'list')
    """
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.layout}" if value.is_nested or value.layout != torch.strided else f"{value.dtype} {list(value.shape)}"
    return repr(value)[:60] if value is None or isinstance(value, (bool, int, float, complex, str)) else type(value).__name__


def require_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], what: str, advice: str) -> Tensor:
    """A dense tensor of one of the dtypes; ``what`` and ``advice`` complete the message."""
    if is_causal_bias(value):
        raise TypeError(
            f"{name} must hold its values; got a CausalBias, which holds none. "
            "Write Causal() and q_offset=, or pass it to scaled_dot_product_attention as attn_mask."
        )
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        raise TypeError(f"{name} must be {what}; got {described(value)}. {advice}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(
            f"{name} must be a dense (strided) tensor; got a {'nested' if value.is_nested else value.layout} one. Convert it with .to_dense() or pad it."
        )
    return value


def _loaded(module: str, name: str) -> tuple[type, ...]:
    """A class of torch's for ``isinstance``, () before its module is imported: importing these takes seconds, and no instance exists."""
    return () if module not in sys.modules else (getattr(sys.modules[module], name),)


def is_causal_bias(value: object) -> bool:
    """Whether this is torch's ``CausalBias``, a tensor of whatever lay in memory whose meaning is in its attributes.

    Example:
        >>> from torch.nn.attention.bias import causal_lower_right
        >>> is_causal_bias(causal_lower_right(2, 3)), is_causal_bias(torch.ones(2, 3))
        (True, False)
    """
    return value is not None and type(value) not in _PLAIN and isinstance(value, _loaded("torch.nn.attention.bias", "CausalBias"))


def is_sharded(value: object) -> bool:
    """Whether this is a DTensor, of which a process holds a part.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    return type(value) not in _PLAIN and isinstance(value, _loaded("torch.distributed.tensor", "DTensor"))


def own_rows(tensor: Any) -> Tensor:
    """The rows that a process can check: its own of a DTensor divided along the first dimension alone, all of them otherwise."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    rows: Tensor = tensor.to_local() if all(p.is_replicate() or p.is_shard(0) for p in tensor.placements) else tensor.full_tensor()
    return rows


def reduced(tensor: Tensor, mesh: Any, operation: str) -> Tensor:
    """The "sum" or "min" of what all ranks of a mesh have; compilers follow it."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    shares = DTensor.from_local(tensor, mesh, [Partial(operation)] * mesh.ndim, run_check=False)
    return shares.redistribute(placements=[Replicate()] * mesh.ndim).to_local()


def require_own_data(name: str, value: object) -> None:
    """Refuses a DTensor where every tensor must be this process' own."""
    inner: Any = value
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling() and isinstance(value, Tensor):
        while torch._C._functorch.is_functorch_wrapped_tensor(inner):
            inner = torch._C._functorch.get_unwrapped(inner)
    if is_sharded(inner):
        within, instead = (
            ("", "call attention with q, k and v that are DTensors too")
            if inner is value
            else (" within a torch.func transform", "transform a function of local tensors")
        )
        raise TypeError(f"{name} must be a tensor of this process; got a DTensor{within}. Pass .to_local(), or {instead}.")


def require_integer(name: str, value: object, minimum: int) -> int:
    """An int in [minimum, MAX_WIDTH], from an int or anything that is one."""
    value = as_integer(name, value, "Pass a Python integer.")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}; got {value}. Count keys or positions from {minimum} on.")
    if value > MAX_WIDTH:
        raise ValueError(f"{name} must be <= 2**30; got {value}. Pass the sequence length (or None, where allowed) for no limit.")
    return value


def as_integer(name: str, value: object, advice: str) -> int:
    """An int, or anything that is one (numpy's integers, symbolic sizes)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__") or getattr(value, "shape", ()) != ():
        raise TypeError(f"{name} must be an int; got {described(value)}. {advice}")
    return value if isinstance(value, torch.SymInt) else operator.index(value)  # type: ignore[return-value]


def as_number(name: str, value: object, advice: str) -> float:
    """A finite float, or anything that is one (ints, numpy's scalars)."""
    plain = isinstance(value, (float, torch.SymFloat))
    if not plain and (isinstance(value, (bool, str, Tensor)) or not hasattr(value, "__float__") or getattr(value, "shape", ()) != ()):
        raise TypeError(f"{name} must be a number; got {described(value)}. {advice}")
    try:
        number: Any = value if plain else float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = float("inf")
    if not -torch.inf < number < torch.inf:  # also for symbolic floats
        raise ValueError(f"{name} must be finite; got {described(value)}. {advice}")
    return number  # type: ignore[no-any-return]


def require_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """A tensor where the inputs are; a device without an index, as ``torch.device("cuda")``, stands for any of its type."""
    require_own_data(name, tensor)
    if tensor.device != device and (device.index is not None or tensor.device.type != device.type):
        raise ValueError(f"{name} must be on the inputs' device {device}; got {tensor.device}. Move it with .to({str(device)!r}).")


def require_true(holds: Tensor, message: str, subject: Tensor) -> Tensor:
    """``subject``, where ``holds`` is True; where values cannot be looked at yet, the device checks it when it gets there."""
    if is_sharded(subject):
        # All ranks raise, or none.
        holds = reduced(holds.all().to(torch.int32), cast(Any, subject).device_mesh, "min") == 1
    if torch.compiler.is_compiling():
        if not torch._C._are_functorch_transforms_active():  # eager runs what a transform sees, and needs no such promise
            torch._assert_async(holds, message)
        return subject
    if is_traced():  # a trace drops operators whose result nobody uses
        return torch._functional_assert_async(holds, message, subject)
    while torch._C._functorch.is_functorch_wrapped_tensor(holds):
        holds = torch._C._functorch.get_unwrapped(holds)
    if not captured(holds):
        if not bool(holds.all()):
            raise ValueError(message)
    elif not holds.is_meta:
        torch._assert_async(holds, message)
    return subject


def require_shape(name: str, tensor: Tensor, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    """A tensor of one of the shapes, where the inputs are."""
    # Size by size: under a compiler with symbols for sizes, one tuple is not "in" others.
    if not any(len(shape) == tensor.dim() and all(a == b for a, b in zip(tensor.shape, shape, strict=True)) for shape in shapes):
        wanted = " or ".join(dict.fromkeys(str(list(s)) for s in shapes))
        raise ValueError(f"{name} must have shape {wanted} for these inputs; got {list(tensor.shape)}. Reshape or expand it.")
    require_device(name, tensor, device)


def require_broadcast(name: str, tensor: Tensor, shape: tuple[int, ...], layout: str, device: torch.device) -> None:
    """A tensor that broadcasts to a shape without widening it, where the inputs are."""
    require_broadcastable(name, tensor, shape, layout)
    require_device(name, tensor, device)


def require_broadcastable(name: str, tensor: Tensor, shape: tuple[int, ...], layout: str) -> None:
    """A tensor that broadcasts to a shape without widening it."""
    got = tuple(tensor.shape)
    if len(got) > len(shape) or any(not (n == 1 or n == full) for n, full in zip(reversed(got), reversed(shape), strict=False)):
        raise ValueError(
            f"{name} must broadcast to {layout} = {list(shape)}; got {list(got)}. Insert size-1 dimensions where it should repeat."
        )
