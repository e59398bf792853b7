"""The page: complete, escaped, without network, and usable in a real browser by mouse, keyboard and phone."""

from __future__ import annotations

import html.parser
import math
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import __main__ as cli
from fused_attn_bench import plots, report
from fused_attn_bench.history import History
from fused_attn_bench.results import Result, ResultsError

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

EVIL = "<script>document.title='owned'</script>&\"'$x^2$"
ENVIRONMENT = {"device": "a chip", "torch": "2.13", "triton": "3.7", "python": "3.13", "commit": "abcdef0123456789"}
LENGTHS = (256, 512, 1024)


def history(last: float = 1.3) -> list[Result]:
    """Twenty runs of three lengths by three providers; fused_attn becomes slower in the middle, and eager's environment changes at the end."""
    chance, results = random.Random(0), []
    for run in range(20):
        environment = ENVIRONMENT | {"commit": f"{run:040x}"} | ({"python": "3.14"} if run == 19 else {})
        for length in LENGTHS:
            for name, factor in (("fused_attn", 1.0 if run < 10 else last), ("eager", 4.0), ("sdpa", 1.1)):
                times = tuple(factor * length**2 * 1e-8 * math.exp(chance.gauss(0, 0.01)) for _ in range(6))
                results.append(
                    Result(
                        f"attention/causal/fwd/float32/1x4x{length}x64", name, samples=times, error=1e-7 * length, plain_error=2e-7, peak=length * 1000,
                        flops=2 * 4 * length**2 * 64, bytes=16 * length * 256, roofs=(4e10, 2e11), backend="cpu" if name == "fused_attn" else "",
                        run=f"run{run:02}", time=f"2026-01-{run + 1:02}T00:00:00+00:00", timer="wall", environment=environment,
                    )
                )  # fmt: skip
    blank = {"run": "run19", "time": results[-1].time, "environment": results[-1].environment}
    results.append(Result("softmax/masked/fwd/bfloat16/1x1x4x8", "sdpa", "refused", "has no softmax", **blank))
    results.append(Result("softmax/masked/fwd/bfloat16/1x1x4x8", f"mine{EVIL}", "wrong", f"before timing: {EVIL}", error=0.5, **blank))
    return results


class Parser(html.parser.HTMLParser):
    """Collects tags with their attributes, and fails on a tag that is not closed in order."""

    VOID = frozenset({"meta", "link", "input", "use", "path"})

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
    return report.build(history())


@pytest.fixture(scope="module")
def parsed(page: str) -> Parser:
    parser = Parser()
    parser.feed(page)
    return parser


@pytest.mark.quick
def test_the_page_is_well_formed(parsed: Parser) -> None:
    assert parsed.open == []
    ids = [attributes["id"] for _, attributes in parsed.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = {attributes.get("aria-labelledby") for _, attributes in parsed.seen} - {None}
    assert labels <= set(ids)


@pytest.mark.quick
def test_the_page_needs_no_network(page: str, parsed: Parser) -> None:
    for tag, attributes in parsed.seen:
        assert tag not in ("iframe", "object", "embed", "img", "base")
        for name in ("src", "href", "xlink:href", "action"):
            target = attributes.get(name) or ""
            assert target.startswith(("#", "data:")) or not target, (tag, target)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    policy = next(a["content"] for t, a in parsed.seen if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


@pytest.mark.quick
def test_text_is_escaped(page: str, parsed: Parser) -> None:
    assert EVIL not in page and page.count("<script>") == 1
    assert any((a.get("data-provider") or "") == f"mine{EVIL}" for _, a in parsed.seen), "what was escaped reads as it was"


@pytest.mark.quick
def test_everything_is_there(page: str) -> None:
    for text in ("Speed against plain torch", "Roofline", "Length sweeps", "History", "Environment", "has no softmax", "(changed)", "3.14"):
        assert text in page
    assert page.count("step of +") == len(LENGTHS), "a change per length of the provider that became slower"
    assert "+30." in page or "+29." in page
    assert "4.0" in page


@pytest.mark.quick
def test_a_page_of_almost_nothing() -> None:
    blank = Result("softmax/masked/fwd/bfloat16/1x1x4x8", "sdpa", "refused", "has no softmax", run="r", time="1", environment={})
    page = report.build([blank])
    assert "has no softmax" in page and "Roofline" not in page and "Length sweeps" not in page and "The first run on this device" in page
    for run in (None, "nothing"):
        with pytest.raises(ResultsError, match=r"It has none yet: python -m benchmarks run"):
            report.build([], run)


@pytest.mark.quick
def test_figures_for_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    History(tmp_path / "h.sqlite").add(history())
    assert (
        cli.main(["report", "--db", str(tmp_path / "h.sqlite"), "--out", str(tmp_path / "p.html"), "--plots", str(tmp_path / "plots")]) == 0
    )
    made = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert made == [f"{n}.{k}" for n in ("roofline", "speedups", "sweep-attention-causal-fwd-float32-1x4xNx64") for k in ("png", "svg")]
    assert (tmp_path / "plots" / "roofline.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "plots" / "speedups.svg").read_text()
    assert "attention/causal/fwd/float32/1x4x256x64" in drawn and "times faster than eager" in drawn
    assert str(tmp_path / "p.html") in capsys.readouterr().out


@pytest.mark.quick
def test_a_provider_keeps_its_colour() -> None:
    looks = plots.look(["eager", "sdpa", "fused_attn:cpu", "fused_attn"])
    assert next(iter(looks)) == "fused_attn" and len({colour for colour, _ in looks.values()}) == 4
    many = plots.look([f"p{i}" for i in range(8)])
    assert len(set(many.values())) == 8


BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
MISSING = "" if BROWSER and DRIVER else "chromium (or google-chrome) and chromedriver were not both found on PATH"
_here = pytest.mark.skipif(bool(MISSING), reason=MISSING or "never")


def browser_test(test: Any) -> Any:
    """A test that talks to a browser, where there is one."""
    return pytest.mark.peers(_here(test))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, page: str) -> Iterator[Chrome]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    folder = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text(page, encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for switch in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
    ):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.get((folder / "page.html").as_uri())
    yield driver
    driver.quit()


@pytest.fixture
def fresh(browser: Chrome) -> Chrome:
    browser.set_window_size(1200, 900)
    browser.refresh()
    return browser


def shown(driver: Chrome, column: int) -> list[str]:
    script = "return [...document.querySelectorAll('#results tbody tr')].filter(r => !r.hidden).map(r => r.cells[arguments[0]].textContent)"
    texts: list[str] = driver.execute_script(script, column)
    return texts


def find(driver: Chrome, selector: str) -> Any:
    return driver.find_element("css selector", selector)


@browser_test
def test_no_script_but_ours_runs_and_nothing_is_complained_of(fresh: Chrome) -> None:
    assert fresh.title == "fused_attn benchmarks, a chip"
    assert fresh.get_log("browser") == []
    assert len(shown(fresh, 0)) == 11 and find(fresh, "#count").text == "11 of 11 results"


@browser_test
def test_filters(fresh: Chrome) -> None:
    from selenium.webdriver.support.ui import Select

    Select(find(fresh, "select[name=provider]")).select_by_visible_text("fused_attn")
    assert set(shown(fresh, 1)) == {"fused_attn"} and find(fresh, "#count").text == "3 of 11 results"
    find(fresh, "input[name=search]").send_keys("X1024X")
    assert shown(fresh, 0) == ["attention/causal/fwd/float32/1x4x1024x64"]
    headings = [h.text for h in fresh.find_elements("css selector", ".bars h3") if h.is_displayed()]
    assert headings == ["attention/causal/fwd/float32/1x4x1024x64"], "bars follow the filters, and their headings with them"
    find(fresh, "button[type=reset]").click()
    fresh.execute_async_script("setTimeout(arguments[0], 50)")
    assert len(shown(fresh, 0)) == 11


@browser_test
def test_sorting(fresh: Chrome) -> None:
    column = report.COLUMNS.index("time")
    button = fresh.find_elements("css selector", "#results th button")[column]

    def numbers() -> list[float | None]:
        script = "return [...document.querySelectorAll('#results tbody tr')].map(r => r.cells[arguments[0]].dataset.value ?? null)"
        return [None if x is None else float(x) for x in fresh.execute_script(script, column)]

    for direction, reverse in (("ascending", False), ("descending", True)):
        button.click()
        values = numbers()
        timed = [v for v in values if v is not None]
        assert timed == sorted(timed, reverse=reverse) and values[-2:] == [None, None], "what has no time stays last"
        assert fresh.find_elements("css selector", "#results th")[column].get_attribute("aria-sort") == direction
    fresh.find_elements("css selector", "#results th button")[1].click()
    assert shown(fresh, 1) == sorted(shown(fresh, 1), key=str.lower)
    assert [th.get_attribute("aria-sort") for th in fresh.find_elements("css selector", "#results th")].count("none") == len(
        report.COLUMNS
    ) - 1


@browser_test
def test_the_keyboard_reaches_everything(fresh: Chrome) -> None:
    from selenium.webdriver.common.keys import Keys

    script = "const e = document.activeElement; return e.id || e.name || e.textContent.trim() || e.className"
    reached, body = [], find(fresh, "body")
    body.send_keys(Keys.TAB)
    for _ in range(40):
        reached.append(fresh.execute_script(script))
        fresh.switch_to.active_element.send_keys(Keys.TAB)
    assert reached[:3] == ["Skip to the results", "theme", "search"]
    assert set(report.COLUMNS) <= set(reached)
    heading = fresh.find_elements("css selector", "#results th button")[0]
    heading.send_keys(Keys.ENTER)
    assert fresh.find_elements("css selector", "#results th")[0].get_attribute("aria-sort") == "ascending"
    outline = fresh.execute_script("arguments[0].focus(); return getComputedStyle(arguments[0]).outlineStyle", heading)
    assert outline == "solid"


def contrast(driver: Chrome, selector: str) -> float:
    """WCAG's contrast of an element's text with the page."""
    found = [
        driver.execute_script(f"return getComputedStyle(document.querySelector(arguments[0])).{name}", where)
        for where, name in ((selector, "color"), ("body", "backgroundColor"))
    ]
    lights = []
    for text in found:
        channels = [int(x) / 255 for x in re.findall(r"\d+", text)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@browser_test
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(fresh: Chrome, scheme: str) -> None:
    fresh.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = fresh.execute_script(ground)
    assert (before == "rgb(255, 255, 255)") == (scheme == "light")
    for selector in ("body", "p", ".wrong td:last-child", ".differs", "figure svg text"):
        assert contrast(fresh, selector) >= 4.5, selector
    find(fresh, "#theme").click()
    assert fresh.execute_script(ground) != before
    assert contrast(fresh, "p") >= 4.5
    find(fresh, "#theme").click()
    assert fresh.execute_script(ground) == before


@browser_test
def test_on_a_phone(fresh: Chrome) -> None:
    """360 CSS pixels wide: the page itself does not scroll sideways, tables do."""
    fresh.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
    try:
        width = fresh.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width == [360, 360]
        assert fresh.execute_script("const s = document.querySelector('#results .scroll'); return s.scrollWidth > s.clientWidth")
        sizes = fresh.execute_script(
            "return [...document.querySelectorAll('p, td, .bar, h3')].map(e => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 13
    finally:
        fresh.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.quick
def test_runs_are_told_apart() -> None:
    results = history()
    assert "run run03" in report.build(results, "run03")
    other = [replace(r, run="other", time="2027", environment={**ENVIRONMENT, "device": "another"}) for r in results[:3]]
    assert "The first run on this device" in report.build([*results, *other])
