"""The table of docs/backends.md, what runs where: every feature asked of every target by ``explain(on=)``.

``python -m tests.capabilities`` (``make table``) writes it; ``tests/test_capabilities.py`` holds the page to it. A feature is one line of
``features``: what a caller writes, and the options that say it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import fused_attn as fa
from fused_attn.backends import EAGER, Explanation, Target
from fused_attn.masks import from_mask_mod
from fused_attn.normalizers import TopK
from fused_attn.score_mods import ScoreMod
from fused_attn.scoring import Scoring

PAGE = Path(__file__).resolve().parents[1] / "docs" / "backends.md"
BEGIN, END = "<!-- written by `make table` -->\n", "<!-- end of what `make table` writes -->\n"
# Columns: chips that answer alike stand in one; where they do not, ``cells`` says so.
TARGETS: dict[str, tuple[Target, ...]] = {
    "CPU": (Target("cpu"),),
    "GPU": tuple(Target(f"sm_{chip}", library=False) for chip in (80, 86, 89, 90, 100, 120)),
    "GPU, with the CUDA library": tuple(Target(f"sm_{chip}") for chip in (80, 86, 89, 100, 120)),
    "H100, with the CUDA library": (Target("sm_90"),),
}
LENGTH, HEADS = 2048, 8  # enough scores that the CPU does not prefer eager for their small number


@dataclass(frozen=True)
class Feature:
    """A row: what is asked for, as options of ``attention``; q, k and v are bfloat16 of head size 64 unless told.

    Where ``note`` is given, the row is about what a note that begins so says.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 64
    requires_grad: bool = True
    under: AbstractContextManager[Any] = field(default_factory=nullcontext)
    note: str = ""


@dataclass(frozen=True, eq=False)
class Own(ScoreMod):
    """A modification of a user's, without device functions."""

    name = "capabilities_own"

    def apply(self, scores: Tensor, grid: Any) -> Tensor:
        return scores


@dataclass(frozen=True, eq=False)
class OwnScoring(Scoring):
    """A scoring of a user's, without device functions."""

    name = "capabilities_own_scoring"

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT


def seen(*shape: int, dtype: torch.dtype = torch.float32, learned: bool = True) -> Tensor:
    """One element seen as a whole tensor: asking costs no memory."""
    return torch.zeros((), dtype=dtype).expand(shape).requires_grad_(learned)


def features() -> Iterator[Feature]:
    """The rows, in order; add a line for what is new."""
    everything = fa.AuxRequest(probs=True, scores=True, lse=True, max_scores=True, column_sums=True, entropy=True)
    square = (1, HEADS, LENGTH, LENGTH)
    yield Feature("nothing else, float16 or bfloat16")
    yield Feature("nothing else, float32", dtype=torch.float32)
    yield Feature("nothing else, float64", dtype=torch.float64)
    yield Feature("head size 257 or more", head_dim=320)
    yield Feature("any mask of one run of keys per query", {"mask": fa.Causal() & fa.ValidLengths(torch.tensor([LENGTH - 1]))})
    yield Feature("any other mask, `from_mask_mod` too", {"mask": from_mask_mod(lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 3 > 0)})
    yield Feature("`SoftCap`", {"score_mods": (fa.SoftCap(30.0),)})
    yield Feature("`ALiBi`", {"score_mods": (fa.ALiBi(seen(HEADS, learned=False)),)})
    yield Feature("`ALiBi`, learned slopes", {"score_mods": (fa.ALiBi(seen(HEADS)),)})
    yield Feature("`Bias`, learned", {"score_mods": (fa.Bias(seen(*square)),)})
    yield Feature("`DecayBias`, learned", {"score_mods": (fa.DecayBias(seen(1, HEADS, LENGTH)),)})
    yield Feature("nine modifications", {"score_mods": (fa.SoftCap(30.0),) * 9})
    yield Feature("a modification of your own, no device functions", {"score_mods": (Own(),)})
    yield Feature("`DotProduct`, `NegativeL2`, learned scale", {"scoring": fa.NegativeL2(seen())})
    yield Feature("`Additive`, learned weight", {"scoring": fa.Additive(seen(HEADS, 64))})
    yield Feature("a scoring of your own, no device functions", {"scoring": OwnScoring()})
    yield Feature("`Selective`", {"score_mods": (fa.SoftCap(30.0), fa.Selective()), "mask": fa.Causal()})
    yield Feature("`Sigmoid`", {"normalizer": fa.Sigmoid()})
    yield Feature("`TopK`, `Hard`, `Gumbel`, `TalkingHeads`, a normaliser of your own", {"normalizer": TopK(8)})
    yield Feature("empty rows uniform or as the softmax", {"empty_rows": "softmax", "mask": fa.Causal()})
    yield Feature("sinks, learned", {"sinks": seen(HEADS)})
    yield Feature("dropout", {"dropout": fa.Dropout(0.1, seed=7)})
    yield Feature("every auxiliary output", {"return_aux": everything})
    yield Feature("probabilities of some rows and heads", {"return_aux": fa.AuxRequest(probs=True, rows=torch.tensor([0, 9]))})
    yield Feature("forward-mode AD, `torch.func`", under=forward_ad.dual_level())
    yield Feature("double backward", note="double backward recomputes through eager")


def explained(feature: Feature, target: Target) -> Explanation:
    """What ``explain`` says of a feature on a target."""
    with feature.under:
        q = seen(1, HEADS, LENGTH, feature.head_dim, dtype=feature.dtype, learned=feature.requires_grad)
        return fa.explain(q, q, q, on=target, **feature.options)


def cells(feature: Feature) -> list[str]:
    """The backend that ``auto`` takes in each column, and each backend's refusals, once."""
    answers = {column: [explained(feature, target) for target in targets] for column, targets in TARGETS.items()}
    if feature.note:
        notes = [note for found in answers.values() for answer in found for note in answer.notes if note.startswith(feature.note)]
        return [feature.name, *([f"`{EAGER}`"] * len(answers) if len(notes) == sum(map(len, answers.values())) else []), notes[0]]
    chosen = [" or ".join(dict.fromkeys(f"`{answer.chosen}`" for answer in found)) for found in answers.values()]
    refused: dict[str, list[str]] = {}
    for answer in answers["GPU, with the CUDA library"] + answers["CPU"]:
        for row in answer.rows:
            if row.reason and row.backend != EAGER and not row.reason.startswith(ELSEWHERE):
                refused.setdefault(row.reason, []).append(f"`{row.backend}`")
    return [feature.name, *chosen, "; ".join(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in refused.items())]


# What a backend says of tensors on the other kind of device is in the table above this one.
ELSEWHERE = ("it runs on", "tensors are on the CPU", "can run, but only when asked for: the cpu backend")


def table() -> str:
    """The table in Markdown."""
    head = ["you ask for, gradients included", *TARGETS, "who refuses, and why"]
    rows = [head, ["---"] * len(head), *map(cells, features())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows).replace("|  |", "| |")


def written(text: str) -> str:
    """The page with the present table between its marks."""
    mark = re.compile(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", re.DOTALL)
    assert len(mark.findall(text)) == 1, "the page must have the marks of make table once"
    return mark.sub(lambda _: f"\n{table()}\n", text)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
