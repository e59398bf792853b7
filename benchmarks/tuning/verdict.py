"""Which candidate of an entry is the fastest, and by more than the noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tuning.candidates import Entry
from fused_attn_bench.significance import MIN_EFFECT, blocks

# Standard errors, and multiples of what the present tiles differ from themselves by, that an effect must exceed: with a dozen candidates two
# errors would be exceeded by chance in every fourth entry.
ERRORS, TWICE = 3.0, 2.0


@dataclass(frozen=True)
class Timed:
    """A candidate's time beside that of the present tiles.

    Args:
        tiles: what was timed.
        effect: log of the ratio of times to the present tiles', the mean over calls (so a geometric mean of ratios) of medians over A B B A blocks.
        error: its standard error.
        ratios: of each call.
        milliseconds: of each call, the median.
    """

    tiles: Any
    effect: float
    error: float
    ratios: dict[str, float]
    milliseconds: dict[str, float]

    @property
    def ratio(self) -> float:
        return math.exp(self.effect)


@dataclass(frozen=True)
class Verdict:
    """What was found of one entry.

    Args:
        entry: which.
        timed: the present tiles first, then the fastest first.
        noise: log of the ratio that the present tiles have to themselves, timed twice.
        refused: why others were not timed.
    """

    entry: Entry
    timed: tuple[Timed, ...]
    noise: float
    refused: dict[Any, str]

    def faster(self, candidate: Timed) -> bool:
        """Whether it beats the present tiles by more than 1 %, three standard errors, and twice what these differ from themselves by."""
        return -candidate.effect > max(MIN_EFFECT, ERRORS * candidate.error, TWICE * abs(self.noise))

    @property
    def best(self) -> Timed | None:
        """The fastest of those that beat the present tiles, else these; None where they were refused and nothing was timed against them."""
        if not self.timed:
            return None
        return min(filter(self.faster, self.timed[1:]), key=lambda t: t.effect, default=self.timed[0])


def verdict(entry: Entry, chosen: Sequence[Any], times: dict[str, list[list[float]]], refused: dict[Any, str]) -> Verdict:
    """What times say.

    Args:
        entry: which.
        chosen: the present tiles, the candidates, and the present tiles again.
        times: of each call, seconds per round of each of the chosen.
        refused: why others were not timed.
    """
    timed = [_timed(tiles, i, times) for i, tiles in enumerate(chosen)]
    first, *others, again = timed
    return Verdict(entry, (first, *sorted(others, key=lambda t: t.effect)), again.effect, refused)


def _timed(tiles: Any, place: int, times: dict[str, list[list[float]]]) -> Timed:
    of_calls = {call: blocks(taken[0], taken[place]) for call, taken in times.items()}
    medians = {call: statistics.median(logs) for call, logs in of_calls.items()}
    # Of a median, from the median distance to it: what one disturbed round does to a mean of squares is no noise of the others.
    errors = [
        1.2533 * 1.4826 * statistics.median(abs(x - medians[call]) for x in logs) / math.sqrt(len(logs)) for call, logs in of_calls.items()
    ]
    ratios = {call: math.exp(x) for call, x in medians.items()}
    milliseconds = {call: 1e3 * statistics.median(taken[place]) for call, taken in times.items()}
    return Timed(tiles, statistics.fmean(medians.values()), math.hypot(*errors) / len(errors), ratios, milliseconds)
