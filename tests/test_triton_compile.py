"""Every Triton configuration compiles for every chip of the table, spills next to nothing, fits the chip's shared memory and rounds as written."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fused_attn.backends.triton import config
from tests import matrix, same_code

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def _configurations() -> Iterator[Any]:
    """Every entry of the table. One per chip and dtype, and all of sm_90's 16-bit ones, in every run; of those, one of sm_80 and one of sm_90 here.

    The others stand beside other packages' tests: they take 20 to 30 seconds each, and docs/matrix.md holds what all of them gave.
    """
    for chip, dtype, size in itertools.product(config.SHARED_MEMORY, ("bfloat16", "float32"), config.HEAD_SIZES):
        every_run = size == {"bfloat16": 128, "float32": 64}[dtype] or (chip, dtype) == (90, "bfloat16")
        here = (chip, dtype, size) in ((80, "float32", 64), (90, "bfloat16", 128))
        marks = [] if here else [pytest.mark.peers] if every_run else [pytest.mark.exhaustive, *_later(chip)]
        yield pytest.param(chip, dtype, size, id=f"sm_{chip}-{dtype}-{size}", marks=marks)


def _later(chip: int) -> list[Any]:
    """What marks a compilation for a chip after sm_90."""
    return [pytest.mark.peers] if chip > 90 else []


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "dtype", "head_size"), _configurations())
def test_attention_compiles_without_spills(chip: int, dtype: str, head_size: int) -> None:
    (report,) = matrix.compiled(None, [f"{chip}:{dtype}:{head_size}"])
    kernels = report["kernels"]
    names = {kernel["kernel"] for kernel in kernels}
    stages = ("fwd", "rows", "columns", "bwd_delta", "bwd_dq", "bwd_dkdv", "bwd_bias")
    assert names >= {f"_attention_{stage}_kernel" for stage in stages}
    assert not matrix.complaints(chip, kernels)
    if (chip, dtype) == (90, "bfloat16") and head_size < 256:
        plain = {kernel["kernel"]: kernel["HGMMA"] for kernel in kernels[: len(kernels) // 2]}
        assert plain["_attention_fwd_kernel"] and plain["_attention_bwd_dq_kernel"] and plain["_attention_bwd_dkdv_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "dtype"),
    [
        pytest.param(chip, dtype, marks=pytest.mark.peers if (chip, dtype) == (90, "bfloat16") else pytest.mark.exhaustive)
        for chip in config.SHARED_MEMORY
        for dtype in ("bfloat16", "float32")
    ],
)
def test_additive_attention_compiles_without_spills(chip: int, dtype: str) -> None:
    (report,) = matrix.compiled(None, [f"{chip}:{dtype}:additive"])
    kernels = report["kernels"]
    stages = ("fwd", "rows", "columns", "bwd_delta", "bwd_dq", "bwd_dkdv", "bwd_bias", "bwd_weight")
    assert {kernel["kernel"] for kernel in kernels} >= {f"_attention_{stage}_kernel" for stage in stages}
    assert not matrix.complaints(chip, kernels)


@pytest.mark.slow
@pytest.mark.parametrize("chip", [pytest.param(chip, marks=_later(chip)) for chip in config.SHARED_MEMORY])
def test_softmax_compiles_without_spills(chip: int) -> None:
    (report,) = matrix.compiled(None, [f"{chip}:bfloat16:softmax"])
    kernels = report["kernels"]
    assert {kernel["kernel"] for kernel in kernels} == {"_softmax_fwd_kernel", "_softmax_bwd_kernel", "_softmax_bwd_bias_kernel"}
    assert not matrix.complaints(chip, kernels)


@pytest.mark.slow
@pytest.mark.peers
def test_the_triton_that_torch_brings_today() -> None:
    """torch 2.14 pins Triton 3.8, which keeps more in registers than its neighbours: the places where that showed, on each chip."""
    for report in matrix.compiled("3.8.0", ["80:float32:64", "90:float32:64", "100:bfloat16:128", "120:bfloat16:64"]):
        assert not matrix.complaints(int(report["combination"].partition(":")[0]), report["kernels"]), report["combination"]


ROUNDING = """
import hashlib
import torch
from fused_attn.backends import get
from tests import aot

aot.target(90)
get("triton").attention_fwd(aot.problem(torch.bfloat16, 16, "everything"))
aot.compile_softmax(torch.bfloat16, (100,))
for name, kernel in aot.compiled:
    print(name, hashlib.sha256(kernel.asm["ptx"].encode()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.peers
def test_the_environment_does_not_decide_how_results_are_rounded(tmp_path: Path) -> None:
    """One kernel of every place that starts some, compiled afresh under both settings of Triton's default for a * b + c."""

    def code(fusion: str) -> list[str]:
        variables = matrix.environment(None) | {"TRITON_CACHE_DIR": str(tmp_path / fusion), "TRITON_DEFAULT_FP_FUSION": fusion}
        done = subprocess.run([sys.executable, "-c", ROUNDING], capture_output=True, text=True, env=variables, cwd=matrix.ROOT, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    contracted = code("1")
    assert {line.split()[0] for line in contracted} >= {"_attention_fwd_kernel", "_tile_summary_kernel", "_softmax_fwd_kernel"}
    assert code("0") == contracted


@pytest.mark.slow
@pytest.mark.peers
def test_whether_a_checkout_has_the_same_code_is_seen(tmp_path: Path) -> None:
    for folder in ("fused_attn", "tests"):
        shutil.copytree(matrix.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    combinations = ["90:bfloat16:softmax"]
    assert same_code.differences(tmp_path, None, combinations) == []
    changed = tmp_path / "fused_attn" / "backends" / "triton" / "masks.py"
    text = changed.read_text()
    changed.write_text(text.replace("    end = start + sizes.kv_len\n", "    end = start + sizes.kv_len - 1\n"))
    assert changed.read_text() != text
    assert same_code.differences(tmp_path, None, combinations) == [f"{None} {combinations[0]}"]


@pytest.mark.quick
def test_kernels_start_in_one_place() -> None:
    """Where how a kernel rounds is said."""
    folder = Path(config.__file__).parent
    assert [p.name for p in folder.rglob("*.py") for _ in re.findall(r"\w\[\(.*,\)\]\(", p.read_text())] == ["launch.py"]


def _nones(function: ast.FunctionDef) -> set[str]:
    """Names to which a function gives None somewhere."""
    found = set()
    for assignment in (node for node in ast.walk(function) if isinstance(node, ast.Assign)):
        for target in assignment.targets:
            split = isinstance(target, ast.Tuple) and isinstance(assignment.value, ast.Tuple)
            pairs = zip(target.elts, assignment.value.elts, strict=True) if split else [(target, assignment.value)]
            found |= {ast.unparse(to) for to, value in pairs if ast.unparse(value) == "None"}
    return found


@pytest.mark.quick
def test_no_device_function_returns_none_among_others() -> None:
    """Triton 3.6, which not every run of the tests has, asks each returned value for its type."""
    found = []
    for path in Path(config.__file__).parent.rglob("*.py"):
        for function in (f for f in ast.walk(ast.parse(path.read_text())) if isinstance(f, ast.FunctionDef)):
            if any(ast.unparse(d) in ("triton.jit", "gluon.jit") for d in function.decorator_list):
                given = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
                returned = {ast.unparse(e) for value in given for e in (value.elts if isinstance(value, ast.Tuple) else [value])}
                found += [f"{path.name} {function.name}: {name}" for name in returned & (_nones(function) | {"None"})]
    assert found == []


@pytest.mark.quick
@pytest.mark.parametrize("version", config._EXCEPTIONS_OF, ids=str)
def test_an_exception_says_something_else_than_the_table(version: tuple[int, int]) -> None:
    table = {
        (chip, *which, size): tile
        for chip, rows in config._TABLE.items()
        for which, row in rows.items()
        for size, tile in zip(config.HEAD_SIZES, row, strict=True)
    }
    table |= {
        (chip, f"{stage} by columns", heavy, bits, size): tile
        for chip, heavy in itertools.product(config._TABLE, (False, True))
        for (stage, bits), row in config._BY_COLUMNS.items()
        for size, tile in zip(config.HEAD_SIZES, row, strict=True)
    }
    for special, general in ((config._EXCEPTIONS, table), (config._EXCEPTIONS_OF[version], table | config._EXCEPTIONS)):
        assert [place for place, tile in special.items() if general[place] == tile] == []
