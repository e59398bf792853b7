"""The README's picture: attention of a real sentence, and what returning probabilities costs in memory. Written by ``make picture``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fused_attn as fa
from fused_attn.cli.demo import SENTENCE
from fused_attn.cli.encoder import ROUTED, Encoder
from fused_attn.viz import label_tokens
from fused_attn_bench.measure import peak_bytes

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# Plain torch takes 3.3 GiB at 16384 keys with one head, and a minute under the profiler.
EAGER_UP_TO = 8192
ROWS = 16
CPU = torch.device("cpu")
Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Output and probabilities in plain torch."""
    probs = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return probs @ v, probs


def all_probabilities(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out, aux = fa.attention(q, k, v, return_aux=fa.AuxRequest(probs=True))
    return out, aux.probs


def some_probabilities(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    request = fa.AuxRequest(probs=True, rows=torch.arange(ROWS))
    out, aux = fa.attention(q, k, v, return_aux=request)
    return out, aux.probs


LINES: dict[str, tuple[Call, dict[str, Any]]] = {
    "plain torch, probabilities": (eager, {"color": "#b2182b", "marker": "s"}),
    "fused_attn, probabilities": (all_probabilities, {"color": "#2166ac", "marker": "o"}),
    f"fused_attn, probabilities of {ROWS} rows": (some_probabilities, {"color": "#67a9cf", "marker": "o"}),
    "fused_attn, output alone": (lambda q, k, v: (fa.attention(q, k, v),), {"color": "#053061", "marker": "o", "linestyle": ":"}),
    "SDPA, output alone: it returns no more": (
        lambda q, k, v: (scaled_dot_product_attention(q, k, v),),
        {"color": "#7f7f7f", "marker": "x", "linestyle": "--"},
    ),
}


def peak(call: Call, length: int) -> int:
    """Bytes alive at once beyond the inputs, forward and backward through everything returned; float32, [1, 1, length, 64]."""
    inputs = [t.requires_grad_() for t in torch.randn(3, 1, 1, length, 64).unbind(0)]

    def step() -> None:
        returned = call(*inputs)
        torch.autograd.grad(sum(t.sum() for t in returned), inputs)

    return peak_bytes(step, CPU)[1]


def draw_sentence(panel: Any, figure: Any) -> None:
    """The head of MiniLM that knows best what the pronoun means."""
    encoder = Encoder(CPU)
    tokens = encoder.tokens(SENTENCE)
    probs = encoder.encode([SENTENCE, SENTENCE], ROUTED).probs[:, 0]
    meant = probs[:, :, tokens.index("it"), tokens.index("animal")]
    layer, head = divmod(int(meant.argmax()), probs.shape[1])
    image = panel.imshow(probs[layer, head].numpy(), cmap="Reds", vmin=0, vmax=1)
    panel.set_title(f'What does "it" mean? MiniLM, layer {layer + 1}, head {head + 1}', fontsize=10)
    panel.set_xlabel("attended token")
    panel.set_ylabel("attending token")
    figure.colorbar(image, ax=panel, shrink=0.7, label="probability")
    label_tokens(figure, tokens, tokens)


def draw_memory(panel: Any) -> None:
    """Peak memory against length, both axes in powers of two."""
    for label, (call, style) in LINES.items():
        lengths = [n for n in LENGTHS if call is not eager or n <= EAGER_UP_TO]
        peaks = [peak(call, n) / 2**20 for n in lengths]
        print(label, *(f"{n}: {mib:.1f} MiB" for n, mib in zip(lengths, peaks, strict=True)), sep="  ")
        panel.loglog(lengths, peaks, base=2, label=label, markersize=5, **style)
    panel.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    ticks = [2**n for n in range(0, 13, 2)]
    panel.set_yticks(ticks, [f"{t} MiB" if t < 1024 else f"{t // 1024} GiB" for t in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.set_xlabel("length (1 head of 64, float32, CPU)")
    panel.set_title("Peak memory, forward and backward", fontsize=10)
    panel.legend(fontsize=8)


def main() -> None:
    """Measures and draws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "first-screen.png")
    args = parser.parse_args()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="compressed")
    draw_sentence(left, figure)
    draw_memory(right)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
