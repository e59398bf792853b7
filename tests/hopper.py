"""Compiles and simulates the Hopper kernels without a GPU, through the library's own launch code.

``simulate(**options)`` makes every launch of this process, plain Triton kernels included, run on the simulator (options as ``cusim.defaults``:
``async_mode="late" | "early" | "random"``, ``sched``, ``seed`` ...); ``compile_only()`` makes it compile. Use a process without TRITON_INTERPRET.
``compiled`` holds (kernel's name, compiled kernel) in the order of the launches.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fused_attn.backends.triton.hopper import launch
from fused_attn.backends.triton.hopper.descriptors import Tiles
from tests import aot, simulated

CHIP = 90
SWIZZLES = (0, 32, 64, 128)
compiled = aot.compiled
_kernels: dict[Any, Any] = {}
_options: dict[str, Any] = {}


def _compile(kernel: Any, args: tuple[Any, ...], num_warps: int) -> Any:
    key = launch.kinds(kernel, args, num_warps)
    if key not in _kernels:
        _kernels[key] = launch.compile_for(kernel, args, num_warps)
    compiled.append((kernel.fn.__name__, _kernels[key]))
    return _kernels[key]


def _start_compiled(kernel: Any, grid: tuple[int, int, int], device: torch.device, args: tuple[Any, ...], num_warps: int) -> None:
    _compile(kernel, args, num_warps)


def _map(tiles: Tiles, meta: dict[str, Any]) -> list[Any]:
    """The parameters of a descriptor: map, sizes, strides."""
    cusim = importlib.import_module("cusim")
    descriptor, element = tiles.descriptor(), tiles.tensor.element_size()
    sizes, strides = list(descriptor.shape), list(descriptor.strides)
    in_bytes = [s * element for s in strides[-2::-1]]
    box = list(meta["block_size"])[::-1]
    name = str(tiles.tensor.dtype).removeprefix("torch.")
    made = cusim.tensor_map(tiles.tensor, box, SWIZZLES[meta["swizzle"]], dims=sizes[::-1], strides=in_bytes, elem=name)
    return [made, *sizes, *strides]


def _start_simulated(kernel: Any, grid: tuple[int, int, int], device: torch.device, args: tuple[Any, ...], num_warps: int) -> None:
    made = _compile(kernel, args, num_warps)
    metas = iter(made.metadata.tensordesc_meta or ())
    flat: list[Any] = []
    for value, signature in zip(args, made.src.signature.values(), strict=True):
        flat += _map(value, next(metas)) if isinstance(value, Tiles) else simulated._runtime_arguments(value, signature)
    importlib.import_module("cusim.triton").launch(made, grid, flat, **_options)


def compile_only(chip: int = CHIP) -> None:
    """From here on every Triton launch of this process compiles for the chip."""
    aot.target(chip, hopper=True)
    launch.start = _start_compiled


def simulate(chip: int = CHIP, **options: Any) -> None:
    """From here on every Triton launch of this process is compiled for the chip and simulated."""
    simulated.simulate(chip, hopper=True)
    _options.clear()
    _options.update(options)
    launch.start = _start_simulated
