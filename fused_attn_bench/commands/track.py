"""Find changes in the history: steps with their last good and first slow commit, slow drift, and where each series stands now."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fused_attn_bench import changes
from fused_attn_bench.changes import Change, Point, Series, Standing
from fused_attn_bench.codes import GOOD, UNDECIDED, WORSE
from fused_attn_bench.commands import outputs, selection
from fused_attn_bench.significance import ALPHA
from fused_attn_bench.text import seconds, table

HEADERS = ("case", "provider", "kind", "change", "p", "commits", "since", "time", "now against best")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which part of which history, and when to fail."""
    text = "exit with 1 when a series' newest level is slower than its best earlier one by at least that, with 3 when none has enough runs"
    parser.add_argument("--fail-on", type=selection.percentage, metavar="3%", help=text.replace("%", "%%"))
    outputs.add_json(parser)
    selection.add_filter(parser)
    selection.add_history(parser)


def run(args: argparse.Namespace) -> int:
    """0; 1 or 3 when --fail-on says so."""
    from tqdm import tqdm

    outputs.begin(args)
    histories = selection.history(args).points(selection.filtered(args))
    with tqdm(total=len(histories), unit="series", disable=None, leave=False) as bar:
        found = changes.find(histories, bar.update)
    standings = {key: changes.standing(histories[key], steps, len(histories)) for key, steps in found.items()}
    ended = changes.superseded(histories)
    judged = [key for key, points in histories.items() if len(points) >= 2 * changes.SEGMENT and key not in ended]
    slower = [key for key in judged if args.fail_on is not None and key in standings and standings[key].is_slower(args.fail_on)]
    lines = list(_lines(histories, found, standings, ended))
    long_enough = sum(len(p) >= 2 * changes.SEGMENT for p in histories.values())
    print(f"{len(histories)} series, {long_enough} of them with the {2 * changes.SEGMENT} runs that a change needs; {len(lines)} changes")
    if lines:
        print(table(HEADERS, [_row(line) for line in lines], left=3))
    if any(key in ended for key in found):
        print("  ended: another configuration of the device followed; such series never fail")
    for key in slower:
        s = standings[key]
        where = f"{seconds(s.level)}, the best earlier level was {seconds(s.best)} ({s.percent:+.1f}%)"
        print(f"slower: {key[1]}, {key[2]}: {where}")
    if args.fail_on is not None and not judged:
        print(f"undecided: no series has {2 * changes.SEGMENT} runs yet")
    outputs.write(args.json, map(outputs.line, lines))
    if slower:
        return WORSE
    return UNDECIDED if args.fail_on is not None and not judged else GOOD


def _lines(
    histories: Mapping[Series, Sequence[Point]],
    found: Mapping[Series, Sequence[Change]],
    standings: Mapping[Series, Standing],
    ended: set[Series],
) -> Iterator[dict[str, Any]]:
    """One record per change; the newest one of a series says where it stands."""
    for key, steps in found.items():
        points, stands = histories[key], standings[key]
        for change in steps:
            before, after = points[max(0, change.index - 1)], points[change.index if change.kind == changes.STEP else -1]
            newest = {"level": stands.level, "best": stands.best, "against_best": stands.percent, "against_best_p": stands.p}
            yield {
                "machine": key[0], "case": key[1], "provider": key[2], "kind": change.kind, "change": change.percent, "p": change.p,
                "last_before": before.commit, "first_after": after.commit, "since": after.time, "run": after.run, "median": after.median,
                "ended": key in ended, **(newest if change is steps[-1] else {}),
            }  # fmt: skip


def _row(line: Mapping[str, Any]) -> tuple[str, ...]:
    between = f"{line['last_before'][:10] or '-'} → {line['first_after'][:10] or '-'}"
    stands = "-"
    if "against_best" in line:
        chance = "" if line["against_best_p"] < ALPHA else ", within chance"
        stands = f"{line['against_best']:+.1f}%{chance}"
    figures = (f"{line['change']:+.1f}%", f"{line['p']:.1g}", between, line["since"], seconds(line["median"]))
    return (line["case"], line["provider"], line["kind"], *figures, f"{stands}, ended" if line["ended"] else stands)
