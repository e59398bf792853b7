"""The page's data and markup: complete, escaped, without network, and small however long the history is."""

from __future__ import annotations

import html.parser
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as cli
from fused_attn_bench import plots, report
from fused_attn_bench.history import History
from fused_attn_bench.page import contents, notes, rows
from fused_attn_bench.results import Result, ResultsError
from tests.bench_page import EVIL, LENGTHS, compared, data_of, history

pytestmark = pytest.mark.quick


class Parser(html.parser.HTMLParser):
    """Collects tags with their attributes, and fails on a tag that is not closed in order."""

    VOID = frozenset({"meta", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag


@pytest.fixture(scope="module")
def page() -> str:
    return report.build(history(), compared=compared(), title="Kernels of ours", program="measure")


@pytest.fixture(scope="module")
def parsed(page: str) -> Parser:
    parser = Parser()
    parser.feed(page)
    return parser


@pytest.fixture(scope="module")
def data(page: str) -> dict[str, Any]:
    return data_of(page)


def test_the_page_is_well_formed(parsed: Parser) -> None:
    assert parsed.open == []
    ids = [attributes["id"] for _, attributes in parsed.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = {attributes.get("aria-labelledby") for _, attributes in parsed.seen} - {None}
    assert labels <= set(ids)


def test_the_page_needs_no_network(page: str, parsed: Parser) -> None:
    for tag, attributes in parsed.seen:
        assert tag not in ("iframe", "object", "embed", "img", "base")
        for name in ("src", "href", "xlink:href", "action"):
            target = attributes.get(name) or ""
            assert target.startswith(("#", "data:")) or not target, (tag, target)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    policy = next(a["content"] for t, a in parsed.seen if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    (scripts,) = re.findall(r"script-src ([^;]+)", policy)
    assert [source[:8] for source in scripts.split()] == ["'sha256-"] * 2, "two scripts, by their hashes, and nothing else"
    assert len(page) < 3e6 and re.search(r"plotly.js \d+\.\d+\.\d+, © Plotly, Inc., MIT", page)


def test_text_is_escaped(page: str, data: dict[str, Any]) -> None:
    assert EVIL not in page and page.count("<script>") == 1
    assert f"mine{EVIL}" in [row["cells"][1] for row in data["devices"][0]["rows"]], "what was escaped reads as it was"
    titled = report.build(history()[-1:], title=f"<i>{EVIL}")
    assert "<i>" not in titled and data_of(titled)["title"] == f"<i>{EVIL}"


def test_everything_is_there(data: dict[str, Any]) -> None:
    assert data["title"] == "Kernels of ours" and [d["name"] for d in data["devices"]] == ["a chip", "another"]
    device, other = data["devices"]
    assert len(device["rows"]) == 11 and len(device["runs"]) == 20 and device["runs"][device["run"]]["id"] == "run19"
    assert {(c["kind"], c["provider"]) for c in device["changes"]} == {("step", "fused_attn")} and len(device["changes"]) == len(LENGTHS)
    assert all(29 < c["percent"] < 31 and device["runs"][c["run"]]["id"] == "run10" for c in device["changes"])
    assert [(s["name"], len(s["rows"])) for s in device["sweeps"]] == [("attention/causal/fwd/float32/1x4xNx64", 9)]
    assert [c["verdict"] for c in device["comparisons"]] == ["slower"] and other["comparisons"] == []
    pythons = [device["environments"][run["env"]]["python"] for run in device["runs"][-2:]]
    assert pythons == ["3.13", "3.14"] and len(device["environments"]) == 2
    assert other["warnings"] == ["Measured beside 2 busy processes; compared with such runs only."] and device["warnings"] == []
    assert other["columns"][-2:] == ["rows/s", "status"] and other["rows"][0]["cells"][-2] == ["5.12e+06", pytest.approx(5.12e6)]
    assert other["samples"][0]["sm_mhz"] == [1980] * 4 and other["samples"][0]["us"] == [100] * 4
    (series,) = [s for s in device["series"] if s[:2] == ["attention/causal/fwd/float32/1x4x256x64", "sdpa"]]
    assert series[3] == list(range(20)) and series[4][0] == pytest.approx(1.1 * 256**2 * 1e-2, rel=0.02), "medians in µs"


def test_a_row_has_the_command_that_repeats_it(data: dict[str, Any]) -> None:
    by_provider = {row["cells"][1]: row["command"] for row in data["devices"][1]["rows"]}
    tail = "--device cuda --timer events --busy 2"
    assert by_provider == {
        "fused_attn": f"measure run --case softmax/masked/fwd/float32/8x8x64x64 --provider fused_attn eager {tail}",
        "eager": f"measure run --case softmax/masked/fwd/float32/8x8x64x64 --provider eager {tail}",
    }
    assert rows.command(Result("x;rm", "y z"), "measure", False) == "measure run --case 'x;rm' --provider 'y z'"


def test_a_page_of_almost_nothing() -> None:
    blank = Result("softmax/masked/fwd/bfloat16/1x1x4x8", "sdpa", "refused", "has no softmax", run="r", time="1", environment={})
    (device,) = data_of(report.build([blank]))["devices"]
    assert device["rows"][0]["cells"][-1] == "refused: has no softmax" and device["series"] == [] and device["sweeps"] == []
    odd = replace(blank, case="<b>no case", samples=(1.0,), status="ok", reason="", flops=1.0, bytes=1.0, roofs=(1.0, 1.0))
    assert data_of(report.build([odd]))["devices"][0]["rows"][0]["tags"] == ["", "", "", "", "sdpa", "ok"], "a name that is no case's"
    for run in (None, "nothing"):
        with pytest.raises(ResultsError, match=r"(It has none yet|holds none. Measure some): measure run"):
            report.build([], run, program="measure")


def test_a_long_history_is_cut_and_the_page_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"POINTS": 60, "SAMPLES": 60, "ROWS": 10, "SEARCHED_RUNS": 3}.items():
        monkeypatch.setattr(contents, name, value)
    first, second = data_of(report.build(iter(history()), "run05"))["devices"]
    assert [run["id"] for run in first["runs"]] == ["run05", "run18", "run19"], "the shown run and the newest, 9 points each, of 30"
    assert len(first["rows"]) == 5 and first["samples"][0]["step"] == 1 and len(second["rows"]) == 2
    assert first["left_out"] == ["17 older runs of 20", "4 of the run's 9 results"]
    (whole,) = data_of(report.build([r for r in history() if r.run in ("run18", "run19")]))["devices"]
    assert whole["samples"][0]["step"] == 1 and "older runs" not in str(whole["left_out"])
    monkeypatch.setattr(contents, "SAMPLES", 20)
    thinned = data_of(report.build([r for r in history() if r.run == "run19"]))["devices"][0]
    assert thinned["samples"][0]["step"] == 3 and len(thinned["samples"][0]["us"]) == 2 and "all but one in 3" in thinned["left_out"][-1]


def test_a_page_is_never_much_larger_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages of any length: fewer results are shown, and the page says so."""
    monkeypatch.setattr(report, "MOST", 60_000)
    monkeypatch.setattr(contents, "ROWS", 40)
    long = [Result(f"a/b/fwd/float32/{i + 1}", "mine", "failed", 9000 * "x", run="r", time="1", environment={}) for i in range(40)]
    (device,) = data_of(report.build(long))["devices"]
    assert len(device["rows"]) == 5 and device["left_out"] == ["35 of the run's 40 results"]


def test_what_to_know_before_numbers_are_believed() -> None:
    def said(sensors: dict[str, Any], **more: Any) -> str:
        telemetry = ({"sm_mhz": 1980, "load": 1.0},) * 3 + ({"sm_mhz": 1980, "load": 1.0, **sensors},)
        fields: dict[str, Any] = {"samples": (1.0, 1.0, 1.01, 1.01), "telemetry": telemetry, "environment": {"threads": "2"}, **more}
        return " ".join(notes.warnings([Result("a", "b", **fields)]))

    assert said({}) == "" and notes.warnings([Result("a", "b", "failed")]) == []
    assert said({"throttled": ["SwPowerCap"]}) == "1 time is no plain fact: the GPU throttled (SwPowerCap)."
    assert (
        said({"sm_mhz": 1900}) == "1 time is no plain fact: the clock was not locked: it moved by more than 3%."
        and said({"sm_mhz": 1970}) == ""
    )
    assert said({}, marks=("other processes used 1.3 cores",)) == "1 time is no plain fact: other processes used 1.3 cores."
    assert said({}, samples=(1.0, 1.0, 2.0, 2.0)) == "1 time is no plain fact: times spread by more than ± 20%."
    assert "faster than the measured roofs allow" in said({}, bytes=4.0, roofs=(2.0, 1.0))
    assert said({}, reason="noisy") == "1 result: noisy."


def test_figures_for_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    History(tmp_path / "h.sqlite").add(history())
    paths = ["--db", str(tmp_path / "h.sqlite"), "--out", str(tmp_path / "p.html"), "--plots", str(tmp_path / "plots")]
    assert cli.main(["report", *paths]) == 0
    made = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert made == [f"{n}.{k}" for n in ("roofline", "speedups", "sweep-attention-causal-fwd-float32-1x4xNx64") for k in ("png", "svg")]
    assert (tmp_path / "plots" / "roofline.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "plots" / "speedups.svg").read_text()
    assert "attention/causal/fwd/float32/1x4x256x64" in drawn and "times faster than eager" in drawn
    assert str(tmp_path / "p.html") in capsys.readouterr().out
    assert data_of((tmp_path / "p.html").read_text())["title"] == "fused_attn benchmarks"
    assert cli.main(["report", *paths[:4], "--title", "Mine & others"]) == 0
    assert "<h1>Mine &amp; others</h1>" in (tmp_path / "p.html").read_text()


def test_a_provider_keeps_its_colour() -> None:
    looks = plots.look(["eager", "sdpa", "fused_attn:cpu", "fused_attn"])
    assert next(iter(looks)) == "fused_attn" and len({colour for colour, _ in looks.values()}) == 4
    many = plots.look([f"p{i}" for i in range(8)])
    assert len(set(many.values())) == 8


def test_runs_are_told_apart() -> None:
    device = data_of(report.build(history(), "run03"))["devices"][0]
    assert device["runs"][device["run"]]["id"] == "run03"
    assert data_of(report.build(history(), "gpu0"))["devices"][0]["name"] == "another", "the run's device comes first"


def test_a_history_of_comparisons_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = compared()
    stamp = {"run": "c1", "time": "2026-02-01T00:00:00+00:00", "timer": "wall"}
    History(tmp_path / "h.sqlite").add([replace(one, **stamp)])
    paths = ["--db", str(tmp_path / "h.sqlite"), "--out", str(tmp_path / "p.html"), "--plots", str(tmp_path / "figures")]
    assert cli.main(["report", *paths]) == 0
    (device,) = data_of((tmp_path / "p.html").read_text())["devices"]
    assert device["name"] == "a chip" and device["rows"] == [] and device["runs"][device["run"]]["id"] == "c1"
    assert [c["verdict"] for c in device["comparisons"]] == ["slower"]
    elsewhere = replace(one, **stamp, environment={"device": "a third"})
    assert [d["name"] for d in data_of(report.build(history(), compared=[elsewhere]))["devices"]] == ["a chip", "another", "a third"]
    assert cli.main(["report", *paths, "--since", "2027-01-01"]) == 2
    assert "the history must hold results or comparisons" in capsys.readouterr().err


def test_a_part_of_the_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What other commands are asked for as well: the newest runs, a time, cases; and one run by name."""
    History(tmp_path / "h.sqlite").add(history())
    paths = ["--db", str(tmp_path / "h.sqlite"), "--out", str(tmp_path / "p.html")]

    def shown(*options: str) -> tuple[list[str], set[str]]:
        assert cli.main(["report", *paths, *options]) == 0
        devices = data_of((tmp_path / "p.html").read_text())["devices"]
        return [run["id"] for device in devices for run in device["runs"]], {row["cells"][0] for row in devices[0]["rows"]}

    assert shown("--last", "2")[0] == ["run18", "run19"]
    assert shown("--since", "2026-01-19")[0] == ["run18", "run19"]
    assert shown("--case", "*x512x*")[1] == {"attention/causal/fwd/float32/1x4x512x64"}
    assert shown("--run", "latest") == shown("--run", "run19") == shown()
    assert cli.main(["report", *paths, "--run", "none"]) == 2
    assert "the run must be latest or one of the history's" in capsys.readouterr().err
