"""The page in a real browser: by mouse, keyboard and phone, from its address, on paper and in files."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fused_attn_bench import report
from fused_attn_bench.page import rows
from tests.bench_page import EVIL, LENGTHS, compared, history, long_named

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
MISSING = "" if BROWSER and DRIVER else "chromium (or google-chrome) and chromedriver were not both found on PATH"
_here = pytest.mark.skipif(bool(MISSING), reason=MISSING or "never")


def browser_test(test: Any) -> Any:
    """A test that talks to a browser, where there is one."""
    return pytest.mark.peers(_here(test))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("browser")
    page = report.build(history(), compared=compared(), title="Kernels of ours", program="measure")
    (made / "page.html").write_text(page, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Chrome]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

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
        "--force-prefers-reduced-motion",
        f"--user-data-dir={folder / 'profile'}",
    ):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    yield driver
    driver.quit()


@browser_test
def test_a_page_of_comparisons_only(browser: Chrome, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(report.build([], compared=compared()), encoding="utf-8")
    browser.get_log("browser")
    opened(browser, tmp_path)
    assert "slower" in find(browser, "#compared").text and "1 slower" in find(browser, "#verdicts").text
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def fresh(browser: Chrome, folder: Path) -> Chrome:
    browser.set_window_size(1200, 900)
    return opened(browser, folder)


def opened(driver: Chrome, folder: Path, fragment: str = "") -> Chrome:
    """The page at an address, with every figure drawn."""
    driver.get("about:blank")
    driver.get(f"{(folder / 'page.html').as_uri()}{fragment}")
    until(driver, "return ready")
    driver.execute_script("redraw(true)")
    return driver


def until(driver: Chrome, condition: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 20, poll_frequency=0.02).until(lambda d: d.execute_script(condition))


def choose(driver: Chrome, name: str, value: str) -> None:
    """Selects an option by its value, as a user does, and waits until the page shows it."""
    from selenium.webdriver.support.ui import Select

    Select(find(driver, f"[name={name}]")).select_by_value(value)
    until(driver, f"return document.querySelector('[name={name}]').value === {json.dumps(value)} && address().includes('{name}=')")
    driver.execute_script("redraw(true)")


def shown(driver: Chrome, column: int, table: str = "table") -> list[str]:
    script = "return [...document.querySelectorAll(`#${arguments[1]} tbody tr`)].filter(r => !r.hidden).map(r => r.cells[arguments[0]].textContent)"
    texts: list[str] = driver.execute_script(script, column, table)
    return texts


def drawn(driver: Chrome, figure: str) -> list[str]:
    """Names of a figure's traces."""
    names: list[str] = driver.execute_script("return document.getElementById(arguments[0]).data.map(t => t.name ?? '')", figure)
    return names


def find(driver: Chrome, selector: str) -> Any:
    return driver.find_element("css selector", selector)


FIRST = f"attention/causal/fwd/float32/1x4x{LENGTHS[0]}x64"


@browser_test
def test_no_script_but_ours_runs_and_nothing_is_complained_of(fresh: Chrome) -> None:
    assert fresh.title == "Kernels of ours" and fresh.get_log("browser") == []
    assert len(shown(fresh, 0)) == 11 and find(fresh, "#count").text == "11 of 11 results"
    for figure in ("time", "figure", "history", "samples", "difference", "roofline"):
        assert fresh.execute_script("return document.querySelectorAll(`#${arguments[0]} svg`).length", figure) > 0, figure
    assert "1.3" not in find(fresh, "#means").text and "fused_attn" in find(fresh, "#means").text
    assert "3 slower, 0 faster" in find(fresh, "#verdicts").text and "1 slower" in find(fresh, "#verdicts").text
    assert f"mine{EVIL}" in shown(fresh, 1)


@browser_test
def test_filters_act_on_table_and_figures(fresh: Chrome) -> None:
    assert drawn(fresh, "time") == ["fused_attn", "eager", "sdpa"] and drawn(fresh, "figure") == ["fused_attn", "sdpa"]
    choose(fresh, "provider", "fused_attn")
    assert set(shown(fresh, 1)) == {"fused_attn"} and find(fresh, "#count").text == "3 of 11 results"
    assert drawn(fresh, "time") == drawn(fresh, "figure") == ["fused_attn"] and set(drawn(fresh, "roofline")) == {"", "fused_attn"}
    assert set(shown(fresh, 1, "differences")) == {"fused_attn"}
    find(fresh, "input[name=search]").send_keys("X1024X")
    until(fresh, "return state.search === 'X1024X'")
    assert shown(fresh, 0) == ["attention/causal/fwd/float32/1x4x1024x64"] == shown(fresh, 0, "changed")
    assert fresh.execute_script("redraw(true); return byId('time').data[0].x.length") == 1
    find(fresh, "button[type=reset]").click()
    fresh.execute_async_script("setTimeout(arguments[0], 300)")  # what was typed comes back no later
    assert len(shown(fresh, 0)) == 11 and fresh.execute_script("return location.hash") in ("", "#")


@browser_test
def test_the_address_keeps_the_view(fresh: Chrome, folder: Path) -> None:
    choose(fresh, "provider", "sdpa")
    choose(fresh, "over", "commit")
    choose(fresh, "figure", "GB/s")
    fresh.find_elements("css selector", "#table th button")[report_column("time")].click()
    fragment = fresh.execute_script("return location.hash")
    assert set(fragment[1:].split("&")) == {"provider=sdpa", "over=commit", "figure=GB%2Fs", "sort=time"}
    again = opened(fresh, folder, fragment)
    assert set(shown(again, 1)) == {"sdpa"} and find(again, "[name=over]").get_property("value") == "commit"
    assert again.execute_script("return byId('figure').layout.xaxis.title.text") == "GB/s"
    assert find(again, "#table th[aria-sort=ascending]").text.startswith("time")
    assert again.execute_script("set({provider: 'gone'}); controls(); return document.querySelector('[name=provider]').value") == "gone"
    assert shown(again, 1) == []


def report_column(name: str) -> int:
    return rows.COLUMNS.index(name)


@browser_test
def test_sorting(fresh: Chrome) -> None:
    column = report_column("time")
    button = fresh.find_elements("css selector", "#table th button")[column]
    for direction, reverse in (("ascending", False), ("descending", True)):
        button.click()
        texts = shown(fresh, column)
        times = [float(text.split()[0]) * {"ms": 1e-3, "µs": 1e-6}[text.split()[1]] for text in texts if text != "-"]
        assert times == sorted(times, reverse=reverse) and texts[-2:] == ["-", "-"], "what has no time stays last"
        assert fresh.find_elements("css selector", "#table thead th")[column].get_attribute("aria-sort") == direction
    fresh.find_elements("css selector", "#table th button")[1].click()
    assert shown(fresh, 1) == sorted(shown(fresh, 1), key=str.lower)
    orders = [th.get_attribute("aria-sort") for th in fresh.find_elements("css selector", "#table thead th")]
    assert orders.count("none") == len(rows.COLUMNS) and orders[1] == "ascending", "all but one, and the command's column"


@browser_test
def test_downloads_hold_what_is_shown(fresh: Chrome, folder: Path) -> None:
    choose(fresh, "provider", "sdpa")
    for kind in ("csv", "json"):
        find(fresh, f"[data-download={kind}]").click()
    until_file(folder / "results-run19.csv")
    lines = list(csv.DictReader((folder / "results-run19.csv").open(encoding="utf-8", newline="")))
    whole = [r for r in history() if (r.run, r.provider) == ("run19", "sdpa")]
    assert [line["case"] for line in lines] == [r.case for r in whole]
    assert [float(line["seconds"]) for line in lines if line["seconds"]] == [r.median for r in whole if r.median], "in full precision"
    assert lines[-1]["status"] == "refused" and lines[-1]["said"] == "refused: has no softmax" and lines[0]["commit"] == f"{19:040x}"
    until_file(folder / "results-run19.json")
    first = json.loads((folder / "results-run19.json").read_text(encoding="utf-8"))[0]
    assert first["samples"] == pytest.approx(whole[0].samples, rel=1e-4) and first["variant"] == "causal"


@browser_test
def test_no_text_of_a_download_is_a_formula(fresh: Chrome) -> None:
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("x")', "plain - text", "0.1", ""]
    script = "return csv(arguments[0], [arguments[0], [-1.5, 0, 1e-7, null]])"
    head, line, numbers = csv.reader(fresh.execute_script(script, texts).splitlines(keepends=True))
    assert head == line == [f"'{text}" for text in texts[:7]] + texts[7:]
    assert numbers == ["-1.5", "0", "1e-7", ""]


def until_file(path: Path) -> None:
    """Until a download is complete: the browser renames it then."""
    end = time.monotonic() + 10
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.02)
    assert path.is_file()


@browser_test
def test_two_runs_differ_where_they_do(fresh: Chrome) -> None:
    assert [find(fresh, f"[name={side}]").get_property("value") for side in "ab"] == ["run18", "run19"], "the newest and the one before"
    choose(fresh, "a", "run02")
    choose(fresh, "b", "run15")
    verdicts = dict(
        zip(zip(shown(fresh, 0, "differences"), shown(fresh, 1, "differences"), strict=True), shown(fresh, 7, "differences"), strict=True)
    )
    assert len(verdicts) == 9 and verdicts[FIRST, "fused_attn"] == "slower"
    assert all(found == "slower" for (_, name), found in verdicts.items() if name == "fused_attn")
    assert {found for (_, name), found in verdicts.items() if name != "fused_attn"} == {"within the noise"}
    percent = float(shown(fresh, 4, "differences")[0].rstrip(" %"))
    assert 27 < percent < 33
    x, bars = fresh.execute_script("const t = byId('difference').data.find(t => t.name === 'fused_attn'); return [t.x, t.error_x.array]")
    assert all(27 < value < 33 for value in x) and all(0 < bar < 10 for bar in bars)
    choose(fresh, "by", "commit")
    choose(fresh, "b", f"{10:040x}")
    assert all(value < 33 for value in fresh.execute_script("return byId('difference').data[0].x"))
    fresh.execute_script("set({by: 'run', a: 'run18', b: 'run19'})")
    changed = find(fresh, "#environment tbody tr.differs").text
    assert "3.13" in changed and "3.14 (changed)" in changed


@browser_test
def test_devices(fresh: Chrome) -> None:
    assert find(fresh, "#warnings").text == ""
    choose(fresh, "device", "another")
    assert shown(fresh, 1) == ["fused_attn", "eager"] and "beside 2 busy processes" in find(fresh, "#about").text
    assert "Measured beside 2 busy processes" in find(fresh, "#warnings").text
    assert fresh.execute_script("return byId('samples').layout.annotations.map(a => a.text)") == [
        "<b>fused_attn</b>", "<b>eager</b>", "<b>clock, MHz</b>", "<b>power, W</b>",
    ]  # fmt: skip
    choose(fresh, "figure", "rows/s")
    assert fresh.execute_script("return byId('figure').data.map(t => t.x[0])") == pytest.approx([512 / 1e-4, 512 / 3e-4])
    assert find(fresh, "#comparisons").is_displayed() is False and fresh.get_log("browser") == []


@browser_test
def test_the_history_shows_changes_and_leads_to_the_runs(fresh: Chrome) -> None:
    assert fresh.execute_script("return byId('history').layout.shapes.length") == 1
    texts = fresh.execute_script("return byId('history').layout.annotations.map(a => a.text)")
    assert any(re.fullmatch(r"\+(29|30|31)(\.\d+)? %", text) for text in texts)
    low, high = fresh.execute_script("return byId('history')._fullLayout.yaxis.range")
    assert low > 0.5e-3 * 256**2 * 1e-5 and high < 2 * low, "zoomed to the data"
    find(fresh, "#changed tbody td a").click()
    until(fresh, "return state.a === 'run09' && state.b === 'run10'")
    fresh.execute_script("byId('results').scrollIntoView()")
    find(fresh, "#table tbody tr:nth-child(5) a").click()
    assert fresh.execute_script("return [state.case, document.activeElement.id]") == ["attention/causal/fwd/float32/1x4x512x64", "one"]


@browser_test
def test_the_keyboard_reaches_everything(fresh: Chrome) -> None:
    from selenium.webdriver.common.keys import Keys

    script = "const e = document.activeElement; return e.id || e.name || e.textContent.trim() || e.className"
    reached = []
    find(fresh, "body").send_keys(Keys.TAB)
    for _ in range(45):
        reached.append(fresh.execute_script(script))
        fresh.switch_to.active_element.send_keys(Keys.TAB)
    assert reached[:4] == ["Skip to the results", "device", "theme", "in the history"]
    assert {"search", "provider", "figure", *rows.COLUMNS[1:]} <= set(reached)
    heading = fresh.find_elements("css selector", "#table th button")[1]
    heading.send_keys(Keys.ENTER)
    assert fresh.find_elements("css selector", "#table thead th")[1].get_attribute("aria-sort") == "ascending"
    outline = fresh.execute_script("arguments[0].focus(); return getComputedStyle(arguments[0]).outlineStyle", heading)
    assert outline == "solid"


@browser_test
def test_a_point_of_the_history_is_selected_by_keyboard(fresh: Chrome) -> None:
    from selenium.webdriver.common.keys import Keys

    compared_runs = "return [state.by, ...chosenRuns()]"
    runs = find(fresh, "[name=point]")
    names = [option.text for option in runs.find_elements("css selector", "option")]
    assert len(names) == 19 and names[0].endswith("run19") and names[-1].endswith("run01"), "all but the first, newest first"
    find(fresh, "[name=over]").send_keys(Keys.TAB)
    assert fresh.switch_to.active_element == runs and runs.accessible_name == "Run"
    for element in (runs, find(fresh, "#before")):
        assert fresh.switch_to.active_element == element
        assert fresh.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
        element.send_keys(*[Keys.DOWN] * 9 if element == runs else [], Keys.TAB)
    find(fresh, "#before").send_keys(Keys.ENTER)
    assert fresh.execute_script(compared_runs) == ["run", "run09", "run10"]
    assert fresh.execute_script("return document.activeElement.id") == "two" and "run10" in find(fresh, "[name=b] option:checked").text
    fresh.execute_script("set({a: '', b: ''}); redraw(true); byId('history').emit('plotly_click', {points: [{customdata: [10]}]})")
    assert fresh.execute_script(compared_runs) == ["run", "run09", "run10"], "as a click on the point does"
    choose(fresh, "device", "another")
    assert [option.text for option in runs.find_elements("css selector", "option")] == ["2026-01-11 00:00, abcdef0123456789, gpu1"]
    fresh.execute_script("set({case: 'none'})")
    assert not find(fresh, "#points").is_displayed()


def contrast(driver: Chrome, selector: str, what: str = "color") -> float:
    """WCAG's contrast of an element's text with the page."""
    found = [
        driver.execute_script(f"return getComputedStyle(document.querySelector(arguments[0])).{name}", where)
        for where, name in ((selector, what), ("body", "backgroundColor"))
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
    fresh.execute_script("redraw(true)")
    for selector in ("body", "p", ".wrong td:nth-last-child(2)", "#changed a", ".slower td", ".differs td"):
        assert contrast(fresh, selector) >= 4.5, selector
    assert contrast(fresh, "#time .xtick text", "fill") >= 4.5
    find(fresh, "#theme").click()
    fresh.execute_script("redraw(true)")
    assert fresh.execute_script(ground) != before
    assert contrast(fresh, "p") >= 4.5 and contrast(fresh, "#time .xtick text", "fill") >= 4.5
    find(fresh, "#theme").click()
    assert fresh.execute_script(ground) == before


@contextlib.contextmanager
def screen(driver: Chrome, width: int) -> Iterator[None]:
    """So many CSS pixels; a phone where there are few."""
    metrics = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 640}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@browser_test
def test_names_in_the_roofline_do_not_stand_on_each_other(browser: Chrome, tmp_path: Path) -> None:
    """Cases of one shape lie at one place: one of them is named there."""
    results = [r for r in history() if r.run == "run19" and r.samples]
    results += [dataclasses.replace(r, case=r.case.replace("causal", "plain")) for r in results]
    (tmp_path / "page.html").write_text(report.build(results), encoding="utf-8")
    with screen(browser, 1400):
        opened(browser, tmp_path)
        texts = browser.execute_script("return byId('roofline').data.flatMap(t => t.mode === 'markers+text' ? t.text : []).filter(Boolean)")
        assert sorted(texts) == sorted(f"1x4x{length}x64" for length in LENGTHS)


OUTSIDE = """
const boxes = [...document.querySelectorAll("body *:not(script)")].filter(e => !e.closest(".scroll > *")).map(e => [e, e.getBoundingClientRect()]);
return boxes.filter(([e, box]) => box.right > document.documentElement.clientWidth + 1).map(([e, box]) => `${e.closest(".plot")?.id} ${e.tagName} ${box.right} ${e.textContent.slice(0, 40)}`);
"""


@browser_test
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("letter", ["W", "漢"])
def test_names_of_any_length_leave_the_page_as_wide_as_its_screen(browser: Chrome, tmp_path: Path, width: int, letter: str) -> None:
    letters, base = 300 * letter, compared()[0]
    results = long_named(letters)
    decided = dataclasses.replace(base, case=results[0].case, a=letters, b=letters, reason=letters)
    page = report.build(results, compared=[decided], title=letters, program=letters)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    with screen(browser, width):
        for view in ("#over=commit&by=commit", f"#figure={letters}/s&provider=mine{letters}&search={letters}", ""):
            opened(browser, tmp_path, view)
            assert browser.execute_script("const page = document.documentElement; return page.scrollWidth - page.clientWidth") == 0
            assert browser.execute_script(OUTSIDE) == []
            assert browser.get_log("browser") == []
        label, hover = browser.execute_script("const a = byId('time').layout.annotations[0]; return [a.text, a.hovertext]")
        assert len(label) < 80 and label.startswith("attention") and "…" in label and label.endswith("1x4x256x64")
        assert hover.replace("<br>", "") == results[0].case and max(map(len, hover.split("<br>"))) <= 60
        bars = browser.execute_script("return byId('time').data.map(t => [t.name, t.customdata[0].replaceAll('<br>', '')])")
        assert all(len(name) < 60 for name, _ in bars) and bars[1][1].startswith(f"mine{letters}: ")
        cells = browser.execute_script(
            "return [...document.querySelectorAll('#table tr:nth-child(2) > *')].map(e => [e.title, e.textContent])"
        )
        assert all(title == text for title, text in cells if letters in text) and cells[0][0] == results[1].case
        assert browser.execute_script("return Math.max(...[...document.querySelectorAll('td, th')].map(e => e.clientWidth))") < 1200


TICKS = """
const labels = [...document.querySelectorAll(`#${arguments[0]} .xtick text`)].map(e => [e.getBoundingClientRect(), e.textContent]);
return labels.map(([r, text]) => [r.left, r.right, text]).sort((x, y) => x[0] - y[0]);
"""


@browser_test
@pytest.mark.parametrize("width", [360, 390, 1400])
@pytest.mark.parametrize("ratio", [1.002, 1.26, 3.0, 8.0, 4000.0])
def test_ticks_have_room_for_their_labels(browser: Chrome, folder: Path, width: int, ratio: float) -> None:
    with screen(browser, width):
        opened(browser, folder)
        script = """
            const columns = device().columns, at = columns.indexOf("vs eager"), rows = shownRows().filter(row => value(row, "vs eager"));
            rows.forEach((row, i) => (row.cells[at] = ["", arguments[0] ** (i % 2 ? 1 : -0.5)]));
            redraw(true);
        """
        browser.execute_script(script, ratio)
        for figure in ("figure", "time"):
            ticks = browser.execute_script(TICKS, figure)
            gaps = [right[0] - left[1] for left, right in itertools.pairwise(ticks)]
            assert len(ticks) >= 3 and min(gaps) >= 4, ticks
        assert all(text.endswith("×") for *_, text in browser.execute_script(TICKS, "figure"))


@browser_test
def test_on_a_phone(browser: Chrome, folder: Path) -> None:
    """360 CSS pixels wide: the page itself does not scroll sideways, tables do, and their heads and first columns stay."""
    with screen(browser, 360):
        opened(browser, folder)
        width = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width == [360, 360]
        places = browser.execute_script(
            "const s = document.querySelector('#results .scroll'); s.scrollTo(150, 60); const [a, b, c] = [s, s.querySelector('tbody th'), s.querySelector('thead th')]"
            ".map(e => e.getBoundingClientRect()); return [s.scrollLeft, b.left - a.left, c.top - a.top]"
        )
        assert places[0] > 100 and max(map(abs, places[1:])) <= 1.5
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('p, td, label, h3')].map(e => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 13
