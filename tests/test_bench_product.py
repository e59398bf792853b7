"""The tool as a user has it: installed, called from a folder of the user's own, on an operation and a repository of the user's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.peers, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "bench" / "rmsnorm.py"
SOON = ("--device", "cpu", "--seconds", "0")
SMALL = ("--case", "rmsnorm/plain/fwd/float32/8x16")
Tool = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip would put into site-packages, without the checkout beside it."""
    checkout, found = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("site")
    for name in ("fused_attn", "fused_attn_bench"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "csrc").mkdir()
    code = "from setuptools import build_meta; build_meta.build_wheel('made')"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    (wheel,) = (checkout / "made").iterdir()
    zipfile.ZipFile(wheel).extractall(found)
    return found


@pytest.fixture
def tool(site: Path, tmp_path: Path) -> Tool:
    """``fused-attn-bench`` with the arguments, in a repository of the user's own, and the exit code that it must have."""
    (tmp_path / "repository").mkdir()

    def run(*arguments: object, code: int | tuple[int, ...] = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site), "FUSED_ATTN_BENCHMARKS": str(tmp_path / "h.sqlite"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "fused_attn_bench", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path / "repository", env=environment, capture_output=True, text=True, check=False)
        assert done.returncode in (code if isinstance(code, tuple) else (code,)), done.stdout + done.stderr
        return done

    return run


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, tool: Tool) -> Path:
    """Two commits of the example; in the second one provider begins to sleep."""
    root = tmp_path / "repository"
    git(root, "init", "-q", "-b", "main")
    for tag, more in (("fast", ""), ("slow", "    __import__('time').sleep(0.02)\n")):
        (root / "rmsnorm.py").write_text(EXAMPLE.read_text().replace("    return x * torch", f"{more}    return x * torch"))
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", tag)
        git(root, "tag", tag)
    return root


def test_the_wheel_has_what_the_page_is_made_of(site: Path) -> None:
    names = {path.name for path in (site / "fused_attn_bench" / "templates").iterdir()}
    assert {"report.html", "report.css", "core.js"} <= names
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    assert "fused-attn-bench = fused_attn_bench.__main__:main" in entry.read_text()


def test_the_engine_needs_no_attention(site: Path, tmp_path: Path) -> None:
    code = "import sys, fused_attn_bench.worker, fused_attn_bench.compare; print(*sys.modules, fused_attn_bench.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert str(site) in done.stdout and "fused_attn" not in done.stdout.split()


def test_an_operation_of_one_s_own(tool: Tool, tmp_path: Path) -> None:
    ran = tool("run", "--load", EXAMPLE, *SMALL, *SOON, "--rounds", "2").stdout
    assert all(name in ran for name in ("torch", "dot", "eager"))
    assert "none is declared. Name a Python file" in tool("run", code=2).stderr
    tool("check", tmp_path / "b.jsonl", "--update", "--of", "dot", "--load", EXAMPLE, *SMALL, *SOON, "--launches", "3")
    # Calls of a few microseconds on whatever machine this is: decided or not, nothing is slower by a factor of ten.
    checked = tool("check", tmp_path / "b.jsonl", "--fail-on", "900%", "--load", EXAMPLE, *SOON, "--launches", "3", code=(0, 3))
    assert "rmsnorm/plain/fwd/float32/8x16" in checked.stdout
    tool("report", "--out", tmp_path / "page.html")
    assert "rmsnorm/plain/fwd/float32/8x16" in (tmp_path / "page.html").read_text()


def test_commits_of_one_s_own_repository(tool: Tool, repository: Path) -> None:
    options = ("--of", "dot", "--load", "rmsnorm.py", *SMALL, *SOON, "--launches", "3", "--fail-on", "100%")
    assert "slower" in tool("compare", "fast", "slow", *options, code=1).stdout
    (repository / "rmsnorm.py").write_text(EXAMPLE.read_text())
    assert "faster" in tool("compare", "slow", ".", *options).stdout, "the working copy, with what is not committed"
    assert "first slow" in tool("bisect", "fast", "slow", *options[:-2]).stdout


def test_code_of_the_working_copy_is_not_taken_for_a_commit_s(tool: Tool, repository: Path) -> None:
    """A file outside of the repository imports a module that only the working copy has: both sides would measure that one."""
    (repository / "later.py").write_text("def double(x):\n    return x + x\n")
    (repository / "declared.py").write_text(
        f"import sys\n\nsys.path.append({str(repository)!r})\nfrom later import double\nfrom fused_attn_bench import Operation\n\n"
        "op = Operation('double', ('n',), lambda make, sizes: {'x': make.normal(sizes['n'])}, lambda x: 2 * x)\nop.provider('sum')(double)\n"
    )
    done = tool(
        "compare", "fast", "slow", "--load", "declared.py", "--case", "double/plain/fwd/float32/8", *SOON, "--launches", "3", code=4
    )
    assert "later.py would be measured instead of the commit's" in done.stdout
