"""Starts Gluon kernels: compiled once per kind of arguments, then called without Triton's search for what is compiled already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .compat import takes_tensor_maps
from .descriptors import Meta, Tiles

_compiled: dict[tuple[Any, ...], Compiled] = {}


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], num_warps: int = 4) -> None:
    """Runs ``kernel(*args)`` on the device of the first argument, ``Tiles`` or a tensor.

    Args:
        kernel: made with ``gluon.jit``; ``gl.constexpr`` parameters come last.
        grid: up to three sizes.
        args: ``Tiles``, tensors, numbers, None, named tuples of those, and values of constexpr parameters.
        num_warps: of the default partition.
    """
    if 0 in grid:
        return
    first = args[0].tensor if isinstance(args[0], Tiles) else args[0]
    x, y, z = (*grid, 1, 1)[:3]
    start(kernel, (x, y, z), first.device, args, num_warps)


def start(
    kernel: Any, grid: tuple[int, int, int], device: torch.device, args: tuple[Any, ...], num_warps: int, num_stages: int | None = None
) -> Compiled:  # fmt: skip
    """The part of ``launch`` that needs a GPU; tests put another in its place."""
    with torch.cuda.device(device):
        key = (device.index, num_stages, *kinds(kernel, args, num_warps))
        compiled = _compiled.get(key)
        if compiled is None:
            compiled = _compiled[key] = Compiled.of(compile_for(kernel, args, num_warps, num_stages))
        metas = iter(compiled.metas)
        compiled.kernel[grid](*[flat for a in args for flat in (a.arguments(next(metas)) if isinstance(a, Tiles) else (a,))])
        return compiled


class Compiled(NamedTuple):
    """A kernel that takes tensor maps, and what it wants to know of each."""

    kernel: Any
    metas: tuple[Meta, ...]

    @classmethod
    def of(cls, kernel: Any) -> Compiled:
        return cls(takes_tensor_maps(kernel), tuple(_items(meta) for meta in kernel.metadata.tensordesc_meta or ()))


def _items(meta: dict[str, Any]) -> Meta:
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in meta.items())


def compile_for(kernel: Any, args: tuple[Any, ...], num_warps: int, num_stages: int | None = None) -> Any:
    """The kernel compiled for arguments of these kinds; see ``launch.run`` of the plain kernels on fusion. Those alone have ``num_stages``."""
    given = [a.descriptor() if isinstance(a, Tiles) else a for a in args]
    stages = {} if num_stages is None else {"num_stages": num_stages}
    return kernel.warmup(*given, grid=(1,), num_warps=num_warps, enable_fp_fusion=False, **stages)


def kinds(kernel: Any, args: tuple[Any, ...], num_warps: int) -> tuple[Any, ...]:
    """What decides the compiled code: the kernel, values of constexpr parameters, and of every other argument at least what Triton looks at."""
    given = zip(kernel.params, args, strict=True)
    return kernel, num_warps, *((type(a), a) if parameter.is_constexpr else kind(a) for parameter, a in given)


def kind(value: Any) -> Any:
    """What of an argument decides the compiled code."""
    of = _KINDS.get(type(value))
    if of is not None:
        return of(value)
    if isinstance(value, tuple):
        return type(value), *[kind(v) for v in value]
    if isinstance(value, Tensor):
        return _of_tensor(value)
    return value


def _of_tensor(value: Tensor) -> Any:
    return value.dtype, value.data_ptr() % 16 == 0


def _of_int(value: int) -> str:
    """What Triton specialises on, one letter each: 1, multiples of 16, beyond 32 bits, beyond 63."""
    return _INTEGERS[(value == 1) + 2 * (value % 16 == 0) + 4 * (not -(2**31) <= value < 2**31) + 8 * (value >= 2**63)]


_INTEGERS = tuple(f"int{i}" for i in range(16))
# By exact type: 10 us for a forward's forty values, where a chain of isinstance took 14; Triton's own search takes 21.
_KINDS: dict[type, Callable[[Any], Any]] = {
    Tiles: lambda value: value.kind,
    Tensor: _of_tensor,
    int: _of_int,
    float: lambda value: float,
    bool: lambda value: value,
    type(None): lambda value: None,
    tl.constexpr: lambda value: (tl.constexpr, type(value.value), value.value),
}
