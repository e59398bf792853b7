"""The launch of the Hopper kernels through Triton's own launcher, of which only the C part and the GPU are stood for.

``python -m tests.hopper_driver`` in a process without TRITON_INTERPRET, with any Triton, prints how many launches reached the C part
with arguments of the form that it was made for.
"""

from __future__ import annotations

import contextlib
import functools
import re
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

import fused_attn as fa
from fused_attn.backends.base import Forward
from fused_attn.backends.triton.hopper import keep, launch, rows
from fused_attn.problem import AttentionProblem
from tests import aot, hopper, hopper_forward

MAP = "a tensor map"
launches: list[tuple[Any, ...]] = []


def _form(value: Any) -> Any:
    """Tuples within the arguments; True where a tensor map stands."""
    return [_form(v) for v in value] if isinstance(value, (tuple, list)) else value is MAP


def _launch(*args: Any) -> None:
    """Triton 3.7 and later: what each argument is, then the types of those that are passed on, come before the arguments."""
    annotations, types, values = args[-3:]
    left = iter(types)

    def form(annotation: tuple[str, Any]) -> Any:
        kind, nested = annotation
        return [form(a) for a in nested] if kind == "tuple" else kind == "kernel" and next(left) == "nvTmaDesc"

    assert [form(a) for a in annotations] == _form(values), (types, values)
    launches.append(values)


def _launcher_of(src: str, **_: Any) -> Any:
    """Triton 3.6: a module is compiled per signature, whose source holds the format of its arguments."""
    types = re.search(r'ParseTuple\(args, "(.*?)"', src)[1][len(nvidia._BASE_ARGS_FORMAT) :]
    maps = {int(i) for i in re.findall(r"tma_ptr(\d+) = getTmaDesc", src)}

    def launch(*args: Any) -> None:
        place, stack = 0, [[]]
        for letter in types:
            if letter == "(":
                stack.append([])
            elif letter == ")":
                stack[-2].append(stack.pop())
            else:
                stack[-1].append(place in maps)
                place += 1
        values = args[nvidia._BASE_ARGS_FORMAT_LEN :]
        assert stack == [_form(values)], (types, values)
        launches.append(values)

    return SimpleNamespace(launch=functools.partial(launch))


class _Driver(aot._Driver):
    """A Hopper GPU that launches nothing; ``functools.partial`` because the launcher of C is no Python function either."""

    launcher_cls = nvidia.CudaLauncher
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *args: (1, 2, 0, 0, 1024),
        unload_module=lambda module: None,
        build_signature_metadata=tuple,
        launch=functools.partial(_launch),
        fill_tma_descriptor=lambda *args: MAP,
        fill_tma_descriptor_tiled=lambda *args: MAP,
    )


def main() -> None:
    aot.target(hopper.CHIP, hopper=True)
    driver.set_active(_Driver(hopper.CHIP))
    torch.cuda.device = contextlib.nullcontext
    nvidia.compile_module_from_src = _launcher_of
    nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = "constexpr", "kernel", "tuple"
    nvidia.PyKernelArg = lambda nested_tuple, type: (type, nested_tuple)
    nvidia.library_dirs = list
    case, request = hopper_forward.Case(q_len=129, kv_len=136), fa.AuxRequest(probs=True, entropy=True)
    call = AttentionProblem.check(*hopper_forward.inputs_of(case), hopper_forward.options_of(case)).lower()
    shape = call.shape[:3]
    for _ in range(2):  # the second time Triton has the kernels that were taken apart, and our launch has forgotten them
        keep.pack(torch.rand(1, 1, 64, 64) < 0.5)
        rows.attention_aux(call, Forward(call.q, torch.zeros(shape), torch.ones(2, *shape)), request)
        launch._compiled.clear()
    print(len(launches))


if __name__ == "__main__":
    main()
