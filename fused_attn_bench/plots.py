"""Figures of results for papers (PNG, SVG), and the colours and marks that the page shares with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fused_attn_bench.case import Case, parsed
from fused_attn_bench.operation import REFERENCE
from fused_attn_bench.results import Result
from fused_attn_bench.tables import reference_median

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart; without their yellow, which is invisible on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = "osD^vP*X"
# The same marks as the page's plotting library names them.
PLOTLY_MARKS = dict(zip(MARKS, ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "x"), strict=True))
T = TypeVar("T")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, so that a page can be searched and read aloud; ids must not change from run to run.
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "fused_attn", "text.parse_math": False, "font.family": "sans-serif"}
    )
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _plain_ticks(axes: Axes) -> None:
    """Powers of ten as numbers: their usual form is mathematical text, which is switched off for the sake of names with dollar signs."""
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def look(providers: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a mark for each provider, the same in every figure."""
    names = sorted(set(providers), key=lambda n: (not n.startswith("fused_attn"), n))
    return {name: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i, name in enumerate(names)}


def speedups(results: Sequence[Result]) -> Figure:
    """Bars: how many times faster than plain torch each provider is on each case."""
    timed = [r for r in results if r.median and r.provider != REFERENCE and reference_median(r, results)]
    cases, looks = list(dict.fromkeys(r.case for r in timed)), look([r.provider for r in results])
    providers = [name for name in looks if any(r.provider == name for r in timed)]
    figure, axes = _figure(8, 1.2 + 0.16 * len(cases) * (len(providers) + 1))
    for i, provider in enumerate(providers):
        mine = [r for r in timed if r.provider == provider]
        places = [cases.index(r.case) + (i - (len(providers) - 1) / 2) * 0.8 / len(providers) for r in mine]
        ratios = [(reference_median(r, results) or 0.0) / (r.median or 1.0) for r in mine]
        axes.barh(places, ratios, 0.8 / len(providers), color=looks[provider][0], label=provider)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(f"times faster than {REFERENCE}")
    if providers:
        axes.legend(frameon=False, ncols=len(providers), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def roofline(results: Sequence[Result]) -> Figure:
    """Achieved rate over arithmetic intensity, under the roofs that were measured in the same run (Williams et al., 2009)."""
    placed = [r for r in results if r.median and r.flops and r.roofs]
    figure, axes = _figure(6.4, 4.2)
    looks = look([r.provider for r in results])
    for copy, matmul in dict.fromkeys((r.roofs[0], r.roofs[1]) for r in placed):
        dtype = next(Case.parse(r.case).dtype for r in placed if r.roofs == (copy, matmul))
        ridge, right = matmul / copy, matmul / copy * 300
        axes.loglog([ridge / 30, ridge, right], [matmul / 30 / 1e9, matmul / 1e9, matmul / 1e9], color="black", linewidth=1)
        label = f"{dtype}: {matmul / 1e12:.3g} TFLOP/s, copy {copy / 1e9:.3g} GB/s"
        axes.annotate(label, (right, matmul / 1e9), (0, 4), textcoords="offset points", ha="right", fontsize=8)
    for provider, (colour, mark) in looks.items():
        mine = [(r.flops / r.bytes, r.flops / r.median / 1e9) for r in placed if r.provider == provider and r.median]
        if mine:
            axes.loglog(*zip(*mine, strict=True), mark, color=colour, label=provider, markersize=5, alpha=0.8)
    axes.set_xlabel("operations per byte that has to move")
    axes.set_ylabel("GFLOP/s")
    _plain_ticks(axes)
    if placed:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def families(results: Sequence[Result]) -> dict[str, tuple[int, list[Result]]]:
    """Timed results that differ in one size alone, and which of the shape's it is, where it has three values or more."""
    found: dict[str, tuple[int, list[Result]]] = {}
    for r in filter(lambda r: r.median, results):
        case = parsed(r.case)
        if case is None:
            continue
        for axis in range(len(case.shape)):
            sizes = ["N" if i == axis else str(size) for i, size in enumerate(case.shape)]
            options = [f"{key}={size}" for key, size in case.options]
            name = "/".join((case.op, case.variant, case.mode, case.dtype, ",".join(("x".join(sizes), *options))))
            found.setdefault(name, (axis, []))[1].append(r)
    return {name: (axis, rs) for name, (axis, rs) in found.items() if len({r.case for r in rs}) >= 3}


def sweep(name: str, axis: int, results: Sequence[Result], looks: Mapping[str, tuple[str, str]]) -> Figure:
    """Time over one size, a line per provider."""
    figure, axes = _figure(5.2, 3.6)
    for provider, (colour, mark) in looks.items():
        mine = sorted((Case.parse(r.case).shape[axis], r.median * 1e3) for r in results if r.provider == provider and r.median)
        if mine:
            axes.loglog(*zip(*mine, strict=True), f"{mark}-", color=colour, label=provider, markersize=5)
    sizes = sorted({Case.parse(r.case).shape[axis] for r in results})
    _plain_ticks(axes)
    axes.set_xticks(sizes, map(str, sizes))
    low, high = axes.get_ylim()
    axes.set_yticks([t for e in range(-4, 7) for d in (1, 2, 5) if low <= (t := d * 10.0**e) <= high])
    axes.set_xlabel("N")
    axes.set_ylabel("ms")
    axes.set_title(name, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def save(results: Sequence[Result], folder: Path) -> list[Path]:
    """Writes every figure of a run as PNG and SVG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    looks = look([r.provider for r in results])
    figures: dict[str, Callable[[], Figure]] = {"speedups": lambda: speedups(results), "roofline": lambda: roofline(results)}
    for name, (axis, members) in families(results).items():
        figures[f"sweep-{name.replace('/', '-')}"] = functools.partial(sweep, name, axis, members, looks)
    written = []
    for name, make in figures.items():
        figure = make()
        for kind in ("png", "svg"):
            written.append(folder / f"{name}.{kind}")
            figure.savefig(written[-1], dpi=160, facecolor="white")
    return written
