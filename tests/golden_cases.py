"""What the real Keras, TF-Keras, D2L and x-transformers computed: the cases of a folder, and how a result is held to them.

A folder holds pairs of ``<system>.npz`` and ``manifest_<system>.json``. Names of a case's tensors: ``in/`` inputs, ``mask/`` masks and
valid lengths, ``w/`` weights and ``buf/`` buffers under the package's names, ``aux/`` noise and keep masks, ``ct/`` cotangents; ``out/`` outputs;
``grad/x`` the gradient of sum(out * ct/out) by in/x or w/x, ``grad_s/`` of that plus sum(scores * ct/scores) (x-transformers: the
probabilities), ``grad_pre/`` of that plus sum(pre_softmax * ct/pre_softmax), ``grad_explicit/`` of sum(out_explicit * ct/out).
"""

from __future__ import annotations

import json
import os
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
                tensors = {name: _tensor(arrays, spec, name, stored) for name, stored in spec["tensors"].items()}
                yield Case(manifest["system"], spec, tensors)


def _tensor(arrays: Any, spec: dict[str, Any], name: str, stored: Any) -> Tensor:
    inherited = stored == "inherited"
    array = arrays[f"{spec['inherits']['case'] if inherited else spec['id']}/{name}"]
    return torch.from_numpy(array.astype(np.float32) if inherited and array.dtype == np.float64 else array)


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
