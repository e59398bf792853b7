"""What to know before a run's numbers are believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fused_attn_bench.quiet import doubts
from fused_attn_bench.results import Result


def warnings(results: Sequence[Result]) -> list[str]:
    """Sentences on one run: busy neighbours, what makes times doubtful, and what else is known of results."""
    timed = [r for r in results if r.samples]
    if not timed:
        return []
    found = []
    environment = timed[0].environment
    if environment.get("busy"):
        found.append(f"Measured beside {environment['busy']}; compared with such runs only.")
    doubtful = Counter(doubt for r in timed for doubt in doubts(r))
    found += [f"{_count(number, 'time')} {'are' if number > 1 else 'is'} no plain fact: {doubt}." for doubt, number in doubtful.items()]
    reasons = Counter(r.reason for r in timed if r.reason)
    found += [f"{_count(number, 'result')}: {reason}." for reason, number in reasons.items()]
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
