"""What ptxas made, read off SASS text: the loops over score tiles, their instructions and their tensor products."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# A lane's share of 64 x 64 scores among 4 warps.
EXPONENTIALS = 32
_WIDTH = re.compile(r"^STS\S*?\.(64|128|U8|U16)\b")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\S* R\d+, (gdesc|R)")


@dataclass(frozen=True)
class Loop:
    """One loop over score tiles, of one warp.

    Args:
        lines: its instructions in order.
    """

    lines: tuple[str, ...]

    @property
    def kinds(self) -> Counter[str]:
        """Instructions by name; of MUFU and WARPGROUP by function."""
        return Counter(kind(line) for line in self.lines)

    @property
    def products(self) -> list[tuple[int, bool]]:
        """Of every tensor product of 64 rows and 16 terms: columns, and whether A comes from shared memory."""
        return [(int(found[1]), found[2] == "gdesc") for line in self.lines if (found := _PRODUCT.search(line))]

    @property
    def local(self) -> int:
        """Accesses to local memory."""
        return self.kinds["LDL"] + self.kinds["STL"]

    @property
    def waits(self) -> int:
        """Waits for products: more of them than written means that ptxas ran the products one after the other."""
        return self.kinds["WARPGROUP.DEPBAR"]

    @property
    def mufu(self) -> int:
        """Instructions of the unit for exponentials."""
        return sum(count for name, count in self.kinds.items() if name.startswith("MUFU"))

    @property
    def shared_bytes(self) -> int:
        """What a warp's loads and stores take of shared memory's bandwidth, without conflicts."""
        return sum(_moved(line) for line in self.lines)


def kind(line: str) -> str:
    """An instruction's name.

    Example:
        >>> kind("@!P0 MUFU.EX2 R4, R5"), kind("UTMALDG.4D [UR8], [UR4]")
        ('MUFU.EX2', 'UTMALDG')
    """
    name = re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]
    base = name.split(".")[0]
    return ".".join(name.split(".")[:2]) if base in ("MUFU", "WARPGROUP") else base


def _moved(line: str) -> int:
    """Bytes of shared memory's bandwidth. Loads of up to 64 bits count 128 of them: in these kernels lanes share most of what they load."""
    text = re.sub(r"^@!?U?P\w+\s+", "", line)
    if text.startswith(("STSM", "LDSM")):
        return 128 * int(re.search(r"M88\.(\d)", text)[1]) if "M88." in text else 128
    if text.startswith(("LDS.", "LDS ")):
        return 256 if text.startswith("LDS.128") else 128
    if not text.startswith(("STS.", "STS ")):
        return 0
    width = _WIDTH.match(text)
    return 32 * ({"64": 8, "128": 16, "U8": 1, "U16": 2}[width[1]] if width else 4)


def functions(text: str) -> Iterator[list[tuple[int, str]]]:
    """Addresses and instructions of every function."""
    body: list[tuple[int, str]] = []
    for line in text.splitlines():
        if re.match(r"\s*Function : ", line):
            if body:
                yield body
            body = []
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            body.append((int(found[1], 16), found[2].strip()))
    if body:
        yield body


def _backward_branches(body: list[tuple[int, str]]) -> set[tuple[int, int]]:
    """(first, last) instruction numbers that a branch repeats."""
    at = {address: i for i, (address, _) in enumerate(body)}
    found = set()
    for i, (address, line) in enumerate(body):
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", line)
        if target and (to := int(target[1], 16)) <= address and to in at:
            found.add((at[to], i))
    return found


def main_loops(text: str) -> list[Loop]:
    """Loops over score tiles, shortest first: one per consumer and kind of tile.

    Waiting on a barrier branches backwards as well, from code that lies behind the loop; such ranges overlap a loop already found.
    """
    loops = []
    for body in functions(text):
        taken: list[tuple[int, int]] = []
        for low, high in sorted(_backward_branches(body), key=lambda r: r[1] - r[0]):
            loop = Loop(tuple(line for _, line in body[low : high + 1]))
            free = all(high < a or low > b for a, b in taken)
            if free and len(loop.products) >= 4 and loop.kinds["MUFU.EX2"] >= EXPONENTIALS:
                taken.append((low, high))
                loops.append(loop)
    return sorted(loops, key=lambda loop: len(loop.lines))


def register_budgets(text: str) -> list[int]:
    """What USETMAXREG gives and takes, in order of size.

    Example:
        >>> register_budgets("USETMAXREG.DEALLOC.CTAPOOL 0x18 ; USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;")
        [24, 240]
    """
    return sorted({int(n, 16) for n in re.findall(r"USETMAXREG\S*\s+(?:UP\d+,\s*)?(0x[0-9a-f]+)", text)})


def copies(text: str) -> dict[str, int]:
    """Bulk loads, stores and sums of tiles in the whole kernel."""
    return {name: len(re.findall(rf"\b{name}\b", text)) for name in ("UTMALDG", "UTMASTG", "UTMAREDG")}
