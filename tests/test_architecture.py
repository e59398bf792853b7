"""The rules of DESIGN.md on imports, sizes and words, read off the source."""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

import fused_attn as fa
from fused_attn import build_cpu

pytestmark = pytest.mark.quick

ROOT = Path(fa.__file__).parent.parent
PACKAGE = ROOT / "fused_attn"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)
NAMES = [str(p.relative_to(ROOT)) for p in FILES]
# The measuring engine: the same rules of size, words and signatures.
ENGINE = ROOT / "fused_attn_bench"
ENGINE_FILES = sorted(p for p in ENGINE.rglob("*.py") if "__pycache__" not in p.parts)
BOTH = [*FILES, *ENGINE_FILES]
BOTH_NAMES = [str(p.relative_to(ROOT)) for p in BOTH]
PROJECT = [
    p
    for folder in ("fused_attn", "fused_attn_bench", "tests", "benchmarks", "examples")
    for p in sorted((ROOT / folder).rglob("*.py"))
    if "__pycache__" not in p.parts
]
TEXTS = [
    p
    for p in (
        *PROJECT,
        *sorted((ROOT / "csrc").rglob("*.*")),
        *(p for p in sorted((ROOT / "tests").rglob("*.*")) if p.suffix in (".cpp", ".cu", ".h", ".ini", ".map", ".md")),
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        *ROOT.glob("*.py"),
        *ROOT.glob("Makefile"),
    )
    if p.name != "test_architecture.py"
]
NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())
CPU_NATIVE = [p for p in NATIVE if p.parent.name == "cpu"]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

# Lower may not import higher; one number is one layer.
LAYERS = {
    "build": 0, "build_cpu": 1, "checks": 0, "fingerprint": 0, "kernel_dropout": 0, "kernel_score": 0, "targets": 1, "allowed_products": 1, "mask_rules": 1, "pytrees": 1, "lowering": 2, "layout": 2, "batching": 2, "flops": 2,
    "mask_base": 3, "auxiliary": 3, "dropout": 3, "score_mods": 3, "mask_documents": 4, "mask_mod": 4, "masks": 5, "scoring": 5, "normalizers": 5, "selective": 5,
    "parts": 3, "merging": 3, "placements": 4, "paged_call": 3, "caches": 4, "modifiers": 6, "vocabulary": 7, "problem": 7,
    "backends.base": 8, "backends.eager": 9, "backends.cpu": 9, "backends.triton": 9, "backends.cuda": 9, "backends": 10, "statistics": 10, "picked": 10, "paged_aux": 10, "ops": 11, "torch_sdpa": 11,
    "autograd": 12, "paged": 12, "query_blocks": 13, "sharded": 13, "composed": 14, "functional": 15, "decoding": 16, "integrations": 16, "nn": 16, "distributed": 16, "viz": 16, "testing": 16, "cli": 17, "__main__": 18, "__init__": 18,
}  # fmt: skip
BACKENDS = {"backends.eager", "backends.cpu", "backends.triton", "backends.cuda"}


@cache
def tree(path):
    return ast.parse(path.read_text())


def part(module):
    """The entry of LAYERS that a dotted name below ``fused_attn`` belongs to; None for one that is not listed."""
    pieces = module.split(".")
    return next((key for n in range(len(pieces), 0, -1) if (key := ".".join(pieces[:n])) in LAYERS), None)


def module_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def running(path):
    """Every node of a file but those for type checking."""
    skipped = {
        id(n)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for n in ast.walk(node)
    }
    return [node for node in ast.walk(tree(path)) if id(node) not in skipped]


def imports(path):
    """Dotted names below ``fused_attn`` that a file imports, at any depth but for type checking."""
    package = ["fused_attn", *path.relative_to(PACKAGE).parts[:-1]]
    for node in running(path):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("fused_attn.") for a in node.names if a.name.startswith("fused_attn."))
        elif isinstance(node, ast.ImportFrom):
            source = (
                [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else (node.module or "").split(".")
            )
            if source[0] == "fused_attn":
                yield from (".".join([*source[1:], a.name]) for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_import_arrows(path):
    here = part(module_of(path))
    assert here is not None, f"give {path.name} a layer in LAYERS"
    for module in imports(path):
        there = part(module)
        if (
            there is None
            or there == here
            or (here, there) in (("__init__", there), ("autograd", "backends.eager"), ("functional", "backends.eager"))
        ):
            continue
        assert LAYERS[there] < LAYERS[here] or LAYERS[here] >= LAYERS["integrations"], f"{here} imports {there}"
        assert not ({here, there} <= BACKENDS), f"the backend {here} imports the backend {there}"


# Of fused_attn_bench: a module may import those of its own rank or below. What measures knows nothing of what keeps and shows.
ENGINE_RANKS = (
    ("case", "codes", "files", "text", "judge", "measure", "timers", "busy", "sass", "significance"),
    ("environment", "roofs", "problem", "quick"),
    ("clocks",),
    ("operation",),
    ("planted", "project", "results", "submodules"),
    ("database", "quiet"),
    ("changes",),
    ("harness", "history", "limits"),
    ("worker",),
    ("sides",),
    ("compare",),
    ("baseline", "bisection", "tables", "plots"),
    ("page",),
    ("report",),
    ("commands", "__init__", "__main__"),
)


def engine_rank(module):
    return next(rank for rank, names in enumerate(ENGINE_RANKS) if module in names)


@pytest.mark.parametrize("path", ENGINE_FILES, ids=[str(p.relative_to(ROOT)) for p in ENGINE_FILES])
def test_the_engine_knows_no_attention(path):
    here = path.relative_to(ENGINE).with_suffix("").parts[0]
    for node in running(path):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            assert name.partition(".")[0] not in ("fused_attn", "benchmarks", "tests"), f"{path.name} imports {name}"
            if isinstance(node, ast.ImportFrom) and name.partition(".")[0] == "fused_attn_bench":
                below = [name.split(".")[1]] if "." in name else [a.name for a in node.names if (ENGINE / f"{a.name}.py").is_file()]
                assert all(engine_rank(there) <= engine_rank(here) for there in below), f"{here} imports {below}"


def test_only_tests_and_commands_of_fused_attn_use_the_engine():
    users = [n for n, p in zip(NAMES, FILES, strict=True) if "fused_attn_bench" in p.read_text()]
    assert [n for n in users if not n.startswith(("fused_attn/testing/", "fused_attn/cli/"))] == []


def test_importing_the_package_is_light():
    code = "import sys, torch; before = set(sys.modules); import fused_attn; print(*sorted(m for m in sys.modules if m not in before))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    assert "fused_attn.functional" in loaded
    heavy = {"triton", "rich", "matplotlib", "transformers", "numpy", "tqdm", "keras", "scipy", "sympy"} | {
        "fused_attn.nn",
        "fused_attn.integrations",
        "fused_attn.testing",
        "fused_attn_bench",
    }
    assert not heavy & ({m.split(".")[0] for m in loaded} | set(loaded))
    assert not [m for m in loaded if m.startswith(("fused_attn.backends.triton", "fused_attn._C", "torch._dynamo", "torch._inductor"))]


def test_file_sizes():
    sizes = {name: len(path.read_text().splitlines()) for name, path in zip(BOTH_NAMES, BOTH, strict=True)}
    assert {n: s for n, s in sizes.items() if s > 400} == {}
    assert statistics.median(sizes.values()) <= 150


def is_jit(node):
    return any("jit" in ast.unparse(d) for d in node.decorator_list)


def functions(path):
    return [n for n in ast.walk(tree(path)) if isinstance(n, FUNCTION)]


def length(node):
    """Lines of a function without its docstring."""
    doc = node.body[0] if ast.get_docstring(node) is not None else None
    return node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)


def test_function_lengths():
    plain = sorted(length(n) for p in BOTH for n in functions(p) if not is_jit(n))
    assert statistics.median(plain) <= 15
    assert plain[int(len(plain) * 0.95)] <= 60
    assert {n.name: length(n) for p in FILES for n in functions(p) if is_jit(n) and length(n) > 150} == {}


def test_at_most_six_parameters_after_functional():
    exempt = (
        "functional.py",
        "fused_attn/decoding.py",
        "distributed/__init__.py",
        "integrations/",
        "nn/",
    )  # public functions, and other libraries' signatures
    crowded = []
    for name, path in zip(BOTH_NAMES, BOTH, strict=True):
        for node in functions(path):
            given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls", "ctx")]
            if (
                len(given) > 6
                and not is_jit(node)
                and not any(e in name for e in exempt)
                and "triton" not in path.parts
                and path.name not in ("ops.py", "autograd.py")
            ):
                crowded.append(f"{name}:{node.lineno} {node.name}")
    assert crowded == []


def public(path):
    """Public functions, classes and methods of public classes of a file; what lies inside one backend's folder is its own business."""
    if PACKAGE / "backends" in path.parents[1:] and path.name != "__init__.py":
        return
    for node in tree(path).body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (n for n in node.body if isinstance(n, FUNCTION) and not n.name.startswith("_"))


def inherits_a_contract(path, node):
    """Whether a method fills in one that a base class documents (a mask's ``keep``, a backend's ``attention_fwd``, an aux field's default)."""
    return any(isinstance(c, ast.ClassDef) and node in c.body for c in tree(path).body)


@pytest.mark.parametrize("path", BOTH, ids=BOTH_NAMES)
def test_public_names_are_documented_and_typed(path):
    assert ast.get_docstring(tree(path))
    undocumented = [n.name for n in public(path) if ast.get_docstring(n) is None and not inherits_a_contract(path, n)]
    overloads = [n.name for n in public(path) if isinstance(n, FUNCTION) and any("overload" in ast.unparse(d) for d in n.decorator_list)]
    assert [n for n in undocumented if n not in overloads] == []
    untyped = []
    for node in public(path):
        if isinstance(node, FUNCTION) and not is_jit(node):
            arguments = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            if node.returns is None or any(a.annotation is None for a in arguments):
                untyped.append(node.name)
    assert untyped == []


def test_public_names():
    assert len(fa.__all__) <= 32
    assert sorted(fa.__all__) == sorted(set(fa.__all__))
    for name in fa.__all__:
        assert getattr(fa, name).__doc__, name


def test_no_drawers():
    assert [n for n in BOTH_NAMES if re.search(r"(^|[/_])(utils?|common|helpers?|misc)([/_.]|$)", n)] == []


CONCEPTS = {
    "softcap": r"softcap",
    "alibi": r"alibi",
    "window": r"sliding_?window",
    "documents": r"documents",
    "dropout": r"0xD2511F53|MULTIPLIERS|philox",
}


@pytest.mark.parametrize("concept", CONCEPTS)
def test_a_concept_lives_in_at_most_four_files(concept):
    code = {
        name: " ".join(
            t.string for t in tokenize.generate_tokens(io.StringIO(p.read_text()).readline) if t.type in (tokenize.NAME, tokenize.NUMBER)
        )
        for name, p in zip(NAMES, FILES, strict=True)
    }
    skipped = (
        "fused_attn/testing",
        "fused_attn/cli",
        "fused_attn/__init__",
        "fused_attn/__main__",
        "fused_attn/nn",
        "fused_attn/integrations",
    )
    holders = [n for n, text in code.items() if re.search(CONCEPTS[concept], text, re.IGNORECASE) and not n.startswith(skipped)]
    assert len(holders) <= 4, holders


STEMS = ("attention_fwd", "attention_aux", "attention_bwd", "softmax_fwd", "softmax_bwd")


@pytest.mark.parametrize("stem", STEMS)
def test_one_stem_per_op(stem):
    import torch

    from fused_attn import ops
    from fused_attn.backends.base import Backend

    assert hasattr(torch.ops.fused_attn, stem)
    assert callable(getattr(ops, stem))
    assert callable(getattr(Backend, stem))
    assert f'm.def("{stem}(' in (ROOT / "csrc" / "bindings.cpp").read_text()


def comments(path):
    return [
        (t.start[0], t.string.lstrip("# "))
        for t in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        if t.type == tokenize.COMMENT
    ]


def looks_like_code(text):
    """Whether a comment parses as a statement that does something: an assignment, a call, an import, a return, a block's head."""
    if re.match(r"(if|for|while|with|def|class|elif|else|try)\b.*:$", text):
        return True
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return False
    acts = (ast.Assign, ast.AugAssign, ast.Import, ast.ImportFrom, ast.Return, ast.Assert, ast.Raise, ast.Delete)
    return any(isinstance(n, acts) or (isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)) for n in body)


@pytest.mark.parametrize("path", PROJECT, ids=[str(p.relative_to(ROOT)) for p in PROJECT])
def test_no_dead_comments(path):
    code = [
        f"{path.name}:{line} {text}"
        for line, text in comments(path)
        if looks_like_code(text) and not text.startswith(("type:", "noqa", "fmt:"))
    ]
    assert code == []
    assert [f"{path.name}:{line}" for line, text in comments(path) if re.search(r"\b(TODO|FIXME|XXX)\b", text)] == []


@pytest.mark.parametrize("path", TEXTS, ids=[str(p.relative_to(ROOT)) for p in TEXTS])
def test_text_is_free_of_this_machine(path):
    text = path.read_text()
    assert re.findall(r"(?<![\w.])/(?:work|home|root|Users|tmp/w)/\S*", text) == []
    assert re.findall(r"https?://(?:\d+\.\d+\.\d+\.\d+|localhost|[\w.-]*(?:registry|mirror|artifactory|nexus|proxy)[\w.-]*)\S*", text) == []


# The layers of csrc/: a file may include those of its own rank or below.
NATIVE_LAYERS = ("cpu/", "include/fused_attn/ptx/", "include/fused_attn/", "cuda/", "bindings.cpp")


def native_file(included):
    return included if included.startswith(("cuda/", "cpu/")) else f"include/{included}"


@pytest.mark.parametrize("path", CPU_NATIVE, ids=[str(p.relative_to(ROOT)) for p in CPU_NATIVE])
def test_the_cpu_library_stands_by_itself(path):
    """Plain C++ below csrc/cpu: no Torch, no OpenMP at compile time, nothing of the GPUs' sources; units include headers alone."""
    text = path.read_text()
    assert path.suffix in (".cpp", ".h"), "the builder takes .cpp and .h"
    for included in re.findall(r'#include "([^"]+)"', text):
        assert included.startswith("cpu/") and included.endswith(".h"), f"{path.name} includes {included}"
        assert included != "cpu/choice.h" or path.name == "library.cpp", "kernels do not choose"
    assert not re.search(r"#include <(torch|ATen|c10|omp)|^#pragma omp", text, re.M)
    if path.suffix == ".cpp" and path.name not in build_cpu.ONCE:
        assert re.search(r"FUSED_ATTN_ISA(::| \{)", text) and "namespace {" in text, (
            "kernels are a file's own, passes are their instruction set's"
        )


def native_layer(name):
    """params.h and tensor.cuh are what everything stands on; launch.h is what the launchers promise the bindings."""
    if name.endswith(("/params.h", "/tensor.cuh", "cuda/configs.h")):
        return -1
    if name.endswith("/launch.h"):
        return 2
    return next(i for i, prefix in enumerate(NATIVE_LAYERS) if name.startswith(prefix))


@pytest.mark.parametrize("path", NATIVE, ids=[str(p.relative_to(ROOT)) for p in NATIVE])
def test_native_layers_and_sizes(path):
    name, text = str(path.relative_to(ROOT / "csrc")), path.read_text()
    assert len(text.splitlines()) <= 500
    assert text.startswith("// "), "say what the file is for"
    for included in re.findall(r'#include "([^"]+)"', text):
        there = native_file(included)
        assert (ROOT / "csrc" / there).is_file()
        assert native_layer(there) <= native_layer(name), f"{name} includes {included}"
    assert name == "bindings.cpp" or not re.search(r"#include <(torch|ATen|c10)", text)
    assert not re.search(r"^\s*//\s*[\w\[\]().>*&-]+\s*[=(].*;\s*$", text, re.M), "no commented-out code"


def test_no_dead_device_functions():
    """Every function and type of csrc/ is named at least twice."""
    text = "\n".join(re.sub(r"//.*", "", p.read_text()) for p in NATIVE)
    defined = set(re.findall(r"__device__[\w\s&*<>,:]*?\b(\w+)\(", text)) | set(re.findall(r"^(?:struct|class) (\w+)", text, re.M))
    unused = {name for name in defined if len(re.findall(rf"\b{name}\b", text)) < 2}
    assert len(defined) > 40 and unused == set()


FACTORIES = (
    "arange", "as_tensor", "empty", "empty_strided", "eye", "frombuffer", "full", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn",
    "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "hann_window",
)  # fmt: skip


@pytest.mark.parametrize("path", BOTH, ids=BOTH_NAMES)
def test_every_tensor_is_made_on_a_named_device(path):
    """A factory without ``device=`` follows torch's default device, which the caller's tensors need not be on."""
    calls = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    homeless = [
        f"{path.name}:{n.lineno} {ast.unparse(n.func)}"
        for n in calls
        if ast.unparse(n.func.value) == "torch" and n.func.attr in FACTORIES and "device" not in {k.arg for k in n.keywords}
    ]
    assert homeless == []
    # What is made on import belongs to whatever mode is in force then (inference, fake tensors).
    outside = [n for top in tree(path).body if not isinstance(top, (*FUNCTION, ast.ClassDef)) for n in ast.walk(top) if n in calls]
    assert not [n for n in outside if ast.unparse(n.func.value) == "torch" and n.func.attr.split("_like")[0] in FACTORIES]
    # Under another name a factory would escape the rule above.
    assert not [
        n
        for n in ast.walk(tree(path))
        if isinstance(n, ast.ImportFrom) and n.module == "torch" and {a.name for a in n.names} & set(FACTORIES)
    ]


def test_backends_call_the_kernels_of_torch_and_not_its_patchable_attribute():
    calls = [
        n
        for n, p in zip(NAMES, FILES, strict=True)
        if "backends" in n and re.search(r"(?:functional|F)\.scaled_dot_product_attention", p.read_text())
    ]
    assert calls == []
