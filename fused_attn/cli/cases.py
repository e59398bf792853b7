"""The demo's attention workloads, made from a real text, and the table of what came out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import fused_attn as fa
from fused_attn.cli.encoder import Encoder
from fused_attn.masks import Mask
from fused_attn.testing.comparison import EAGER, FUSED, SDPA, Comparison
from fused_attn.testing.workload import Workload
from fused_attn_bench.measure import Effort
from fused_attn_bench.quick import Entry
from fused_attn_bench.text import note, ratio, seconds, size, table

LAYER, HEADS = 2, 4
# Lewis Carroll, Alice's Adventures in Wonderland (1865), the first sentences.
TEXT = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once
or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it,
"and what is the use of a book," thought Alice, "without pictures or conversations?" So she was considering in
her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether the
pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when
suddenly a White Rabbit with pink eyes ran close by her. There was nothing so very remarkable in that; nor did
Alice think it so very much out of the way to hear the Rabbit say to itself, "Oh dear! Oh dear! I shall be
late!"
"""


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    title: str
    work: Callable[[], Workload]
    effort: Effort


def demo_cases(encoder: Encoder) -> list[Case]:
    """Attention of a few heads of MiniLM over 4 x 512 packed tokens, and of one head over 16384."""
    dtype = torch.bfloat16 if encoder.device.type == "cuda" else torch.float32
    q, k, v = (t[:, :HEADS].to(dtype) for t in encoder.projections(TEXT, 4, LAYER))
    far = (q[:, :1].repeat(1, 1, 8, 1), k[:, :1].repeat(1, 1, 8, 1), v[:, :1].repeat(1, 1, 8, 1))
    packed = fa.Documents(torch.arange(q.shape[2], device=encoder.device) // 512)
    local = fa.Causal() & fa.SlidingWindow(255, 0)
    named: tuple[tuple[str, Mask | None, bool, bool], ...] = (
        ("fwd", None, False, False),
        ("fwd, probabilities returned", None, True, False),
        ("fwd+bwd", None, False, True),
        ("fwd+bwd, probabilities returned", None, True, True),
        ("fwd+bwd, Causal()", fa.Causal(), False, True),
        ("fwd+bwd, 4 packed Documents(ids)", packed, False, True),
        ("fwd+bwd, Causal() & SlidingWindow(255, 0)", local, False, True),
    )
    cases = [
        Case(title, functools.partial(Workload, (q, k, v), mask, probs, backward), Effort(1.5, rounds=3))
        for title, mask, probs, backward in named
    ]
    return [
        *cases,
        Case(
            "the same, L=16384",
            functools.partial(Workload, far, local, False, True),
            Effort(0.0, rounds=1),
        ),
    ]


def show_cases(results: Sequence[tuple[Case, Comparison]]) -> bool:
    """Prints the table and its notes; whether fused_attn held the error rule everywhere."""
    shape = results[0][0].work().grid.shape
    dtype = str(results[0][0].work().inputs[0].dtype).removeprefix("torch.")
    print(
        f"Attention of MiniLM's layer {LAYER + 1} on a real text: [batch, heads, L] = {list(shape[:3])} (last row [1, 1, 16384]), {dtype}"
    )
    headers = ("case", "backend", "error", "of eager", "time", "vs eager", "vs SDPA", "peak", "of eager", "of SDPA")
    print(table(headers, [_row(case, comparison) for case, comparison in results], left=2))
    for text in _notes(results):
        print(note(text))
    return all(not comparison.entries[FUSED].reason for _, comparison in results)


def _row(case: Case, comparison: Comparison) -> tuple[str, ...]:
    ours, eager, sdpa = (comparison.entries[name] for name in (FUSED, EAGER, SDPA))
    error = "-" if ours.verdict is None else f"{ours.verdict.error:.1e}"
    plain = "-" if ours.verdict is None else f"{ours.verdict.plain_error:.1e}"
    time = seconds(ours.timing.median) if ours.timing else "wrong"
    speeds = tuple("-" if (r := comparison.ratio(name)) is None else ratio(r) for name in (EAGER, SDPA))
    return (
        case.title,
        comparison.explanation.chosen,
        error,
        plain,
        time,
        *speeds,
        *(_peak(e) for e in (ours, eager, sdpa)),
    )


def _peak(entry: Entry) -> str:
    return "-" if entry.peak is None else size(entry.peak)


def _notes(results: Sequence[tuple[Case, Comparison]]) -> list[str]:
    lines: dict[str, None] = {}
    for _, comparison in results:
        chosen = comparison.explanation.chosen
        order = [row.backend for row in comparison.explanation.rows]
        passed = [f"{row.backend}: {row.reason}" for row in comparison.explanation.rows if row.reason]
        lines[f"backend {chosen}: the first of {' → '.join(order)} that can run" + "".join(f"; {why}" for why in passed) + "."] = None
    entries = ((name, entry.reason) for _, comparison in results for name, entry in comparison.entries.items())
    reasons = {f"-: {name} {reason}." for name, reason in entries if reason}
    return [
        *lines,
        "error: largest absolute difference from float64 among everything returned; of eager: that of plain torch. "
        "Only what errs by at most 2 x of eager + sqrt(L) roundings is timed.",
        "time: median of fused_attn's calls; vs: the other's median over it, calls taken in turns. Eager and SDPA "
        "get their dense masks ready-made.",
        "peak: most bytes of tensors alive at once beyond the inputs, from torch's record of every allocation, operators' own included.",
        *sorted(reasons),
    ]
