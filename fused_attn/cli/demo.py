"""Takes a real sentence through a real pretrained encoder (MiniLM-L6) whose attention runs on fused_attn.

Shows that its embeddings, probabilities and gradients are those of the stock model, compares errors, memory and time
with plain torch and torch's SDPA on real token sequences, and writes a heatmap of the sentence's attention. Runs on a
GPU where there is one.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.cli import info
from fused_attn.cli.cases import Case, demo_cases, show_cases
from fused_attn.cli.encoder import ROUTED, STOCK, Encoded, Encoder
from fused_attn.cli.errors import CommandError, require_packages
from fused_attn.testing.comparison import Comparison, compare
from fused_attn_bench.judge import rounding
from fused_attn_bench.text import note, table

SENTENCE = "The animal didn't cross the street because it was too tired."
OTHERS = (
    "A weary dog stayed on its side of the road.",
    "Attention is computed without ever storing the matrix of scores.",
    "The committee postponed the vote on next year's budget.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to read, where to draw, how long to measure."""
    parser.add_argument("--sentence", default=SENTENCE, help=f"default: {SENTENCE}")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fused_attn_demo.png"),
        help="where the heatmap goes (default ./fused_attn_demo.png)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: the GPU where there is one",
    )
    parser.add_argument("--skip-timing", action="store_true", help="leave the comparison of errors, memory and time out")


def run(args: argparse.Namespace) -> int:
    """Prints everything; 1 when a result breaks the error rule."""
    require_packages("demo", "rich", "matplotlib")
    if not args.sentence.strip():
        raise CommandError("--sentence must hold at least one word; got an empty one")
    if args.out.suffix.lower() not in (".png", ".pdf", ".svg") or not args.out.absolute().parent.is_dir():
        raise CommandError(f"--out must be a .png, .pdf or .svg file in an existing folder; got {str(args.out)!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda needs a GPU that torch can see; python -m fused_attn info lists the devices")
    start, device = time.perf_counter(), torch.device(args.device)
    print(f"fused_attn {fa.__version__} on {info.cpu() if device.type == 'cpu' else info.gpu(device.index or 0)}\n")
    with progress(1, "loading MiniLM") as advance:
        encoder = Encoder(device)
        advance()
    agrees = show_sentence(encoder, args)
    if not args.skip_timing:
        agrees &= show_comparisons(encoder)
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")
    return 0 if agrees else 1


@contextmanager
def progress(steps: int, title: str) -> Iterator[Any]:
    """A progress bar on stderr that vanishes when done; yields a function: one step done, title of the next."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=steps)

        def advance(following: str = "") -> None:
            bar.update(task, advance=1, description=following)

        yield advance


def show_sentence(encoder: Encoder, args: argparse.Namespace) -> bool:
    """Tokens, similarities, agreement with the stock model, and the heatmap."""
    sentences = [args.sentence, *OTHERS]
    tokens = encoder.tokens(args.sentence)
    print(f"Sentence  {args.sentence}\nTokens    {' '.join(tokens)}\n")
    with progress(3, "stock model in float64") as advance:
        exact = encoder.double().encode(sentences, STOCK)
        advance("stock model in float32")
        stock = encoder.encode(sentences, STOCK)
        advance("attention on fused_attn")
        ours = encoder.encode(sentences, ROUTED)
        advance()
    print("Similarity to the sentence (cosine of MiniLM's embeddings, attention on fused_attn)")
    for sentence, similarity in zip(sentences[1:], (ours.embeddings[1:] @ ours.embeddings[0]).tolist(), strict=True):
        print(f"  {similarity:6.3f}  {sentence}")
    agrees = show_agreement(ours, stock, exact)
    draw(ours.probs[:, 0, :, : len(tokens), : len(tokens)], tokens, args)
    return agrees


def show_agreement(ours: Encoded, stock: Encoded, exact: Encoded) -> bool:
    """The error rule, for everything the model gives out."""
    rows, agrees = [], True
    for name, label in (
        ("embeddings", "sentence embeddings"), ("states", "token states, last layer"),
        ("probs", "attention probabilities, 6 layers x 12 heads"),
        ("gradient", "gradient of a similarity at the input embeddings"),
    ):  # fmt: skip
        truth: Tensor = getattr(exact, name)
        error, plain = (float((getattr(r, name).double() - truth).abs().max()) for r in (ours, stock))
        bound = 2 * plain + rounding(truth, ours.embeddings.dtype)
        agrees &= error <= bound
        rows.append((label, f"{error:.2e}", f"{plain:.2e}", f"{bound:.2e}", "yes" if error <= bound else "NO"))
    print("\nAgreement with the stock model: largest error against a float64 run of it")
    print(table(("", "fused_attn", "stock float32", "bound", "holds"), rows))
    print(note("bound: 2 x the stock model's own float32 error + one float32 rounding of the largest element."))
    return agrees


def draw(probs: Tensor, tokens: list[str], args: argparse.Namespace) -> None:
    """Heatmaps of three heads, [layers, heads, tokens, tokens] given."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from fused_attn.viz import label_tokens, show_heatmaps

    heads = sharpest_heads(probs)
    panels = torch.stack([probs[layer, head] for layer, head in heads])
    side = max(2.6, 0.17 * len(tokens) + 1.0)
    titles = [f"layer {layer + 1}, head {head + 1}" for layer, head in heads]
    figure = show_heatmaps(panels[None], "attended token", "attending token", titles, (len(heads) * side + 1.0, side + 1.0))
    label_tokens(figure, tokens, tokens)
    *maps, scale = figure.axes
    for panel in maps:
        panel.images[0].set_clim(0, 1)
    scale.set_ylabel("probability")
    figure.suptitle(f"MiniLM-L6 reads: {textwrap.shorten(args.sentence, 90)}")
    figure.set_layout_engine("compressed")
    figure.savefig(args.out, dpi=150)
    pyplot.close(figure)
    print(f"\nHeatmap of {'; '.join(titles)}: {args.out}")


def sharpest_heads(probs: Tensor, count: int = 3) -> list[tuple[int, int]]:
    """Of different layers, the heads with most weight on single words other than [CLS], [SEP] and the token itself."""
    inner = probs[..., 1:-1, 1:-1] * (1 - torch.eye(probs.shape[-1] - 2, device=probs.device, dtype=probs.dtype))
    best = inner.amax(-1).mean(-1) if inner.numel() else probs.amax((-1, -2))
    strength, head = best.max(1)
    return sorted((layer, int(head[layer])) for layer in strength.topk(min(count, len(strength))).indices.tolist())


def show_comparisons(encoder: Encoder) -> bool:
    """The table of errors, memory and time."""
    print()
    results: list[tuple[Case, Comparison]] = []
    cases = demo_cases(encoder)
    with progress(len(cases), cases[0].title) as advance:
        for i, case in enumerate(cases):
            results.append((case, compare(case.work(), case.effort)))
            advance(cases[min(i + 1, len(cases) - 1)].title)
    return show_cases(results)
