"""What the real Keras, TF-Keras, D2L and x-transformers computed: the cases of a folder, and how a result is held to them.

A folder holds pairs of ``<system>.npz`` and ``manifest_<system>.json``. Names of a case's tensors: ``in/`` inputs, ``mask/`` masks and
valid lengths, ``w/`` weights and ``buf/`` buffers under the package's names, ``aux/`` noise and keep masks, ``ct/`` cotangents; ``out/`` outputs;
``grad/x`` the gradient of sum(out * ct/out) by in/x or w/x, ``grad_s/`` of that plus sum(scores * ct/scores) (x-transformers: the
probabilities), ``grad_pre/`` of that plus sum(pre_softmax * ct/pre_softmax), ``grad_explicit/`` of sum(out_explicit * ct/out).

``python -m tests.golden_cases FOLDER`` writes the selection that ``tests/golden`` holds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent / "golden"
# What a runner of a system's classes takes and gives: a case, and every tensor of it that begins with out/ or grad.
Runner = Callable[["Case"], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One case: ``spec`` is its entry in the manifest, tensors are by their full names."""

    system: str
    spec: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def id(self) -> str:
        return f"{self.system}/{self.spec['id']}"

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names begin with ``prefix/``, by the rest of their names."""
        return {name.partition("/")[2]: t for name, t in self.tensors.items() if name.partition("/")[0] == prefix}

    @property
    def expected(self) -> dict[str, Tensor]:
        """What a runner must give. ``grad_cpuflash_artifact`` is a fault of torch's on record."""
        wanted = ("out", "grad", "grad_s", "grad_pre", "grad_explicit")
        return {name: t for name, t in self.tensors.items() if name.partition("/")[0] in wanted}

    def tolerance(self, name: str) -> dict[str, float]:
        """How near the package itself came: rtol and atol. What Keras' fused path computes in float32 for float64 has bounds of its own."""
        fused = self.spec.get("fused_path") and (name == "out/out" or name.startswith("grad/"))
        bounds: dict[str, float] = self.spec["tolerance_fused" if fused else "tolerance"]["out" if name.startswith("out/") else "grad"]
        return bounds


def folders() -> list[Path]:
    """The committed selection, and the folder that ``FUSED_ATTN_GOLDEN`` names."""
    further = os.environ.get("FUSED_ATTN_GOLDEN")
    return [HERE, *([Path(further)] if further else [])]


def cases(folder: Path) -> Iterator[Case]:
    """Every case of a folder; a tensor that is inherited is the float64 sibling's."""
    for path in sorted(folder.glob("manifest_*.json")):
        manifest = json.loads(path.read_text())
        with np.load(folder / manifest["file"]) as arrays:
            for spec in manifest["cases"]:
                yield Case(manifest["system"], spec, dict(_tensors(arrays, spec)))


def _tensors(arrays: Any, spec: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, stored in spec["tensors"].items():
        inherited = stored == "inherited"
        array = arrays[f"{spec['inherits']['case'] if inherited else spec['id']}/{name}"]
        if array.dtype.kind != "U":  # layer types are words
            yield name, torch.from_numpy(array.astype(np.float32) if inherited and array.dtype == np.float64 else array)


def gradients(loss: Tensor, leaves: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The gradients of a sum by named leaves as ``prefix/name``, zeros where the sum does not depend on one."""
    grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {f"{prefix}/{name}": torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), grads, strict=True)}


def hold(case: Case, got: dict[str, Tensor]) -> None:
    """Every expected tensor is there, in shape and dtype, within the tolerance."""
    missing = sorted(set(case.expected) - set(got))
    assert missing == [], f"{case.id}: the runner gives no {missing}"
    for name, want in case.expected.items():
        torch.testing.assert_close(
            got[name].detach(), want, **case.tolerance(name), equal_nan=True, msg=lambda text, n=name: f"{case.id} {n}: {text}"
        )


# Bytes of tensors that the selection takes of a system; all systems and their manifests stay below 1 MB.
BUDGET = 90_000


def select(source: Path, target: Path) -> None:
    """Writes a selection of a folder: of each system, the cases that add the most options not yet seen, per byte."""
    for path in sorted(source.glob("manifest_*.json")):
        manifest = json.loads(path.read_text())
        siblings: dict[str, list[dict[str, Any]]] = {}
        for spec in manifest["cases"]:
            siblings.setdefault(spec["id"].rpartition(".")[0], []).append(spec)
        with np.load(source / manifest["file"]) as arrays:
            stored = {base: {f"{s['id']}/{n}": arrays[f"{s['id']}/{n}"] for s in specs for n in s["tensors"] if s["tensors"][n] != "inherited"}
                      for base, specs in siblings.items()}  # fmt: skip
        chosen = _cover({base: _options(specs) for base, specs in siblings.items()}, {b: 1 + _size(t) for b, t in stored.items()})
        manifest["cases"] = [spec for base in siblings if base in chosen for spec in siblings[base]]
        (target / path.name).write_text(json.dumps(manifest, separators=(",", ":")) + "\n")
        np.savez_compressed(target / manifest["file"], **{name: t for base in chosen for name, t in stored[base].items()})


def _options(specs: list[dict[str, Any]]) -> set[str]:
    """What a case exercises: its target, its arguments with their values, and which inputs and masks it has."""
    given = {f"{name}={json.dumps(value)}" for spec in specs for part in ("ctor", "call") for name, value in spec[part].items()}
    tensors = {name for spec in specs for name in spec["tensors"] if name.startswith(("in/", "mask/", "aux/"))}
    return {spec["target"] for spec in specs} | given | tensors


def _size(tensors: dict[str, Any]) -> int:
    return sum(t.nbytes for t in tensors.values())


def _cover(options: dict[str, set[str]], sizes: dict[str, int]) -> set[str]:
    """Cases in the order of new options per byte, while the budget lasts."""
    chosen: set[str] = set()
    left, spent = set().union(*options.values()), 0
    while left:
        affordable = [b for b in options if options[b] & left and spent + sizes[b] <= BUDGET]
        if not affordable:
            break
        best = max(affordable, key=lambda b: len(options[b] & left) / sizes[b])
        chosen.add(best)
        left -= options[best]
        spent += sizes[best]
    return chosen


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    select(Path(sys.argv[1]), HERE)
