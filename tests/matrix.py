"""Which versions the package was seen working with: every configuration compiled by every Triton, and the tests under other versions.

``make matrix`` runs ``python -m tests.matrix``: it installs each Triton beside the environment's own, compiles and tests what was not
yet seen with the present sources (results are kept below build/triton, so a run that was cut off goes on), and writes docs/matrix.md.
``python -m tests.matrix torch PYTHON...`` runs the tests with other environments' torch and puts each one's row there.
"""

from __future__ import annotations

import ast
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fused_attn.backends.triton import config

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "matrix.md"
KEPT = ROOT / "build" / "triton"
# What each Triton runs beside, where the environment's own version does not do: 3.6's interpreter takes tensors as loop bounds, which
# numpy refuses from 2.4 on.
VERSIONS: dict[str, tuple[str, ...]] = {"3.6.0": ("numpy>=2,<2.4",), "3.7.1": (), "3.8.0": (), "3.9.0": ()}
ENDS = (min(VERSIONS), max(VERSIONS))
# ptxas counts a stack frame for indexed arrays as well; this much is not a spill in a loop.
MAX_STACK = 64
COLUMNS = (
    *(f"{dtype}:{what}" for dtype, what in itertools.product(("bfloat16", "float32"), (*config.HEAD_SIZES, "additive", "sigmoid"))),
    "bfloat16:softmax",
)
INTERPRETED = (
    "test_attention",
    "test_softmax",
    "test_normalizers",
    "test_additive",
    "test_extension",
    "test_bug_classes_contract",
    "test_bug_classes_masks",
    "test_bug_classes_numerics",
)
WITH_TORCH = ("test_attention", "test_softmax", "test_sdpa", "test_compile", "test_definition", "test_vocabulary", "test_errors")
BEFORE_TORCH = "## torch\n"
BEFORE_HOPPER = "## Hopper\n"
KERNELS = ROOT / "fused_attn" / "backends" / "triton"
HOPPER = KERNELS / "hopper"


def sources() -> str:
    """A hash of what decides the plain kernels' compiled code, which choosing a backend does not; Hopper's have a record of their own."""
    return digest(p for p in (*KERNELS.glob("*.py"), ROOT / "tests" / "aot.py") if p.name != "__init__.py")


def digest(paths: Iterable[Path]) -> str:
    """A hash of files of Python without comments, docstrings, sentences and spaces, and of tables of tiles without reasons and measurements."""
    found = hashlib.sha256()
    for path in sorted(paths):
        text = path.read_text()
        found.update((_tiles(text) if path.suffix == ".json" else "".join(_code(text))).encode())
    return found.hexdigest()[:16]


def _tiles(text: str) -> str:
    tables = json.loads(text).items()
    return json.dumps({table: {name: entry["tiles"] for name, entry in entries.items()} for table, entries in tables}, sort_keys=True)


def _code(text: str) -> Iterator[str]:
    """The tokens that mean something, the same in every Python."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    comments = dict(t.start for t in tokens if t.type == tokenize.COMMENT)
    # What refusals say to people; later Pythons take f-strings apart, so those count.
    sentences: dict[int, list[str]] = {}
    for token in tokens:
        if token.type == tokenize.STRING and " " in token.string and token.string[0] in "\"'":
            sentences.setdefault(token.start[0], []).append(token.string)
    for number, line in enumerate(text.splitlines(), 1):
        if number not in docstrings:
            code = line[: comments.get(number)]
            for sentence in sentences.get(number, []):
                code = code.replace(sentence, "", 1)
            yield "".join(code.split())


def complaints(chip: int, kernels: list[dict[str, Any]]) -> list[str]:
    """The kernels that spill, do not fit the chip's shared memory or were compiled to a trap."""
    limit = config.SHARED_MEMORY[chip]
    return [
        str(kernel)
        for kernel in kernels
        if kernel["STACK"] > MAX_STACK or kernel["LOCAL"] > 0 or kernel["shared"] > limit or kernel["traps"]
    ]


def install(version: str) -> Path:
    """A folder with this Triton (190 MB to load), once; PYTHONPATH puts it before the environment's own."""
    folder = KEPT / version
    if not (folder / ".done").is_file():
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "-qq",
            "--no-deps",
            "--upgrade",
            "--target",
            str(folder),
        ]
        subprocess.run([*command, f"triton=={version}", *VERSIONS[version]], check=True)
        (folder / ".done").touch()
    return folder


def environment(version: str | None, interpret: bool = False) -> dict[str, str]:
    """Variables under which a new process runs this Triton, or the environment's own."""
    dropped = ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION")
    variables = {name: value for name, value in os.environ.items() if name not in dropped}
    if version is not None:
        variables["PYTHONPATH"] = str(install(version))
    return variables | ({"TRITON_INTERPRET": "1"} if interpret else {})


def compiled(version: str | None, combinations: list[str]) -> Iterator[dict[str, Any]]:
    """What one fresh process, in which Triton does not interpret, compiled: {"combination", "kernels"} as each is ready.

    Triton 3.9 warns where nobody says how a * b + c is rounded; that ends the process.
    """
    command = [sys.executable, "-W", "error:TRITON_DEFAULT_FP_FUSION", "-m", "tests.aot", *combinations]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(version)) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


class Results:
    """One JSON line per finished part, of the present sources: the plain kernels', or those that ``of`` is a digest of."""

    def __init__(self, folder: Path, of: str = "") -> None:
        self.path = folder / f"{of or sources()}.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.parts: dict[str, Any] = dict(json.loads(line) for line in lines)

    def add(self, name: str, value: Any) -> None:
        self.parts[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps([name, value]) + "\n")
        print(name, flush=True)


def compile_missing(version: str, results: Results) -> None:
    """Every chip and column that no earlier run has seen."""
    wanted = [f"{chip}:{column}" for chip, column in itertools.product(config.SHARED_MEMORY, COLUMNS)]
    missing = [combination for combination in wanted if f"{version} {combination}" not in results.parts]
    for line in compiled(version, missing) if missing else ():
        results.add(f"{version} {line['combination']}", line["kernels"])


def suite(command: list[str], variables: dict[str, str], selection: tuple[str, ...], *options: str) -> str:
    """What pytest's last line counts, with the names of the tests that failed."""
    files = [f"tests/{name}.py" for name in selection]
    done = subprocess.run(
        [*command, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-rfE", *files, *options],
        cwd=ROOT, env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout.splitlines()[-1] if done.stdout else "")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    return ", ".join([*counts, *failed]) or f"ended with status {done.returncode}"


def cell(chip: int, kernels: list[dict[str, Any]]) -> str:
    """Most registers / most bytes of stack of a combination's kernels; what breaks a bound is said."""
    worst = f"{max(k['REG'] for k in kernels)}/{max(k['STACK'] for k in kernels)}"
    return worst if not complaints(chip, kernels) else f"FAILS {worst}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def page(results: Results) -> str:
    """The part of docs/matrix.md that depends on the Triton sources."""
    rows = [
        [version, f"sm_{chip}", *(cell(chip, results.parts[f"{version} {chip}:{column}"]) for column in COLUMNS)]
        for version, chip in itertools.product(VERSIONS, config.SHARED_MEMORY)
    ]
    suites = [[version, results.parts[f"{version} beside"], results.parts[f"{version} suite"]] for version in ENDS]
    return f"""# Versions seen working

Written by `make matrix`; `tests/test_matrix.py` holds it to the present sources. Sources: `{sources()}`.

## Triton, compiled ahead of time

Every kernel of attention (plain and with every kind of operand, forward, auxiliary outputs and backward) per element type and head size,
of additive attention at every head size, of sigmoid attention, and of the softmax: most registers per thread / most bytes of stack. The bound
is {MAX_STACK} bytes of stack, no local memory, no traps, and the chip's shared memory; a cell that breaks it says FAILS.

{table(["Triton", "chip", *(c.replace(":", " ") for c in COLUMNS)], rows)}

## Triton's interpreter

`pytest -m quick -k triton` on {", ".join(f"`{name}`" for name in INTERPRETED)},
with the oldest and the newest; those between run under torch below.

{table(["Triton", "beside", "tests"], suites)}

"""


BESIDE = "import platform, numpy, torch; print(f'Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}')"


def make() -> None:
    """All versions, then the page; what stands below, torch and Hopper, stays as it is."""
    results = Results(KEPT / "results")
    for version in VERSIONS:
        install(version)
    # One process per core: compiling is a single thread's work.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda version: compile_missing(version, results), VERSIONS))
    for version in ENDS:
        if f"{version} suite" not in results.parts:
            variables = environment(version, interpret=True)
            beside = subprocess.run([sys.executable, "-c", BESIDE], env=variables, capture_output=True, text=True, check=True)
            results.add(f"{version} beside", beside.stdout.strip())
            results.add(f"{version} suite", suite([sys.executable], variables, INTERPRETED, "-m", "quick", "-k", "triton"))
    kept = PAGE.read_text().partition(BEFORE_TORCH)[2] if PAGE.is_file() else ""
    PAGE.write_text(page(results) + BEFORE_TORCH + kept)


def add_torch(pythons: list[str]) -> None:
    """One row per environment, by its version of torch."""
    for python in pythons:
        code = "import platform, torch, triton; print(torch.__version__, triton.__version__, platform.python_version())"
        versions = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        row = [*versions, suite([python], environment(None), WITH_TORCH, "-m", "quick", "-n", "2")]
        head, mark, kept = PAGE.read_text().partition(BEFORE_TORCH)
        kept, *hopper = kept.partition(BEFORE_HOPPER)
        after = "\n" + "".join(hopper) if any(hopper) else ""
        rows = [line.strip("| ").split(" | ") for line in kept.splitlines() if re.match(r"\| \d", line)]
        rows = sorted([*(r for r in rows if r[:3] != versions), row], key=lambda r: [int(n) for n in re.findall(r"\d+", r[0])])
        files = ", ".join(f"`{name}`" for name in WITH_TORCH)
        PAGE.write_text(f"{head}{mark}\n`pytest -m quick` on {files}.\n\n{table(['torch', 'Triton', 'Python', 'tests'], rows)}\n{after}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["torch"]:
        add_torch(sys.argv[2:])
    else:
        make()
