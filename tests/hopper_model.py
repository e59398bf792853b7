"""The static model of the Hopper kernels, from counts alone: what each unit of a multiprocessor works per loop trip, and which one is the bound.

``python -m tests.hopper_model`` prints the section of docs/performance.md; ``make hopper`` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.hopper_counts import CONFIGURATIONS, Configuration, recorded
from tests.matrix import ROOT, table

PAGE = ROOT / "docs" / "performance.md"
MARK = "## Hopper, from counts alone\n"
# The Triton whose code is looked at.
TRITON = "3.7"
# Of one multiprocessor per clock, from NVIDIA's figures for H100 (989 TFLOP/s dense in 16 bits at 1830 MHz, 132 of them): multiply-adds of
# tensor cores, warp instructions, results of the unit for exponentials, bytes of shared memory.
TENSOR, ISSUE, MUFU, SHARED = 2048, 4, 16, 128
WARP, WARPS = 32, 4
SHOWN = [
    f"{direction} {dim} {what}"
    for direction, dims, whats in (
        ("forward", (64, 128, 256), ("plain", "bias", "softcap", "alibi", "dropout")),
        ("backward", (64, 128), ("plain", "bias", "softcap", "alibi", "dropout")),
    )
    for dim in dims
    for what in whats
    if f"{direction} {dim} {what}" in CONFIGURATIONS
]


@dataclass(frozen=True)
class Model:
    """Clocks of one multiprocessor for a trip of all consumers through the loop over full tiles.

    Args:
        tensor: for the products.
        issue: for warp instructions, the worst consumer's taken for all.
        mufu: for exponentials, tanh and reciprocals.
        products: for what products read of shared memory.
        moved: for what bulk copies, loads and stores move there.
    """

    tensor: float
    issue: float
    mufu: float
    products: float
    moved: float

    @property
    def units(self) -> dict[str, float]:
        return {"tensor cores": self.tensor, "issue": self.issue, "exponentials": self.mufu, "shared memory": self.products + self.moved}

    @property
    def bound(self) -> str:
        """The unit that works longest; of several, the first."""
        return max(self.units, key=lambda name: self.units[name])

    @property
    def fraction(self) -> float:
        """Of the tensor cores' rate, if the units overlapped perfectly."""
        return self.tensor / max(self.units.values())


def copied(configuration: Configuration, tiles: float) -> float:
    """Bytes that bulk copies move per trip, which all consumers share.

    Forward: a tile of keys and values, and of a dense 16-bit bias one per consumer. Backward: a tile of queries and of gradients of the output, two float32 numbers per row, and the float32
    tile of dq that is added to global memory.
    """
    c, rows = configuration, 64 * tiles
    head, value = c.padded
    if c.direction == "forward":
        return rows * (head + value) * 2 + (c.what == "bias") * c.consumers * 64 * rows * 2
    return rows * ((head + value) * 2 + 2 * 4 + head * 4)


def of(configuration: Configuration, counts: dict[str, Any]) -> Model:
    """The model of a configuration, given its counts."""
    consumers, adds, read = configuration.consumers, 0, 0
    for shape, number in counts["products"].items():
        size, _, place = shape.partition(" ")
        columns = int(size.split("x")[1])
        adds += number * 64 * columns * 16
        read += number * 2 * 16 * (columns + 64 * (place == "shared"))
    own = counts["shared_bytes"] * WARPS * consumers
    return Model(
        tensor=consumers * adds / TENSOR,
        issue=consumers * WARPS * max(counts["loops"]) / ISSUE,
        mufu=consumers * WARPS * counts["mufu"] * WARP / MUFU,
        products=consumers * read / SHARED,
        moved=(own + copied(configuration, counts["tiles"])) / SHARED,
    )


def section(record: dict[str, Any]) -> str:
    """The text of docs/performance.md."""
    rows = []
    for name in SHOWN:
        counts = record[TRITON][name]
        model = of(CONFIGURATIONS[name], counts)
        clocks = [f"{value:.0f}" for value in model.units.values()]
        rows.append(
            [name, f"{CONFIGURATIONS[name].consumers} x {counts['tiles']:.0f}", *clocks, model.bound, f"{100 * model.fraction:.0f} %"]
        )
    head = ["kernel, head size", "tiles of 64 x 64", *Model(0, 0, 0, 0, 0).units, "bound", "of the tensor cores' rate, at most"]
    return f"""{MARK}
An estimate, made by `make hopper` from SASS of Triton {TRITON}; what a chip showed stands [above](#hopper-measured).

- Counted: instructions, tensor products and exponentials in the loop over full tiles, the worst consumer's taken for all of them
  (`tests/hopper_counts.json`); bytes that products read of shared memory, from their shapes; bytes of tiles that are copied.
- Estimated: rates per clock of a multiprocessor, {TENSOR} multiply-adds in the tensor cores, {ISSUE} warp instructions, {MUFU} exponentials,
  {SHARED} bytes of shared memory; that a warp's load takes one clock of it (lanes share rows' statistics) and its stores no more than their
  bytes; that units overlap perfectly. Not in it: latencies, conflicts of shared memory's banks, global memory, masked
  tiles, prologue and epilogue, the grid's tail. A kernel reaches less than the last column says.
- Measured: nothing. `python -m benchmarks.gpu_check` measures where there is a GPU.

Clocks of a multiprocessor per trip of all consumers through the loop, bfloat16:

{table(head, rows)}
"""


def put(text: str) -> None:
    """Replaces the page's section, its last one, or adds it."""
    PAGE.write_text(PAGE.read_text().partition(MARK)[0].rstrip() + "\n\n" + text)


if __name__ == "__main__":
    print(section(recorded()))
