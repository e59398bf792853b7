"""Runs and their history as one HTML page that needs no network: the plotting library and the data are in it."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fused_attn_bench.page.contents import contents
from fused_attn_bench.page.source import read
from fused_attn_bench.results import Compared, Result

FOLDER = Path(__file__).parent / "templates"
# In the order in which they use each other.
SCRIPTS = ("core", "plots", "table", "case", "runs", "page")
# Bytes of data; a page of 6 MB has room for so many beside the plotting library.
MOST = 3_900_000


def build(
    history: Iterable[Result],
    run: str | None = None,
    compared: Sequence[Compared] = (),
    *,
    title: str = "Benchmarks",
    program: str = "fused-attn-bench",
) -> str:
    """The page of a run, by default the newest, and of the newest run of every other device.

    Args:
        history: results, oldest first; an iterator is read once, and only the shown runs are kept in memory.
        run: id of the run.
        compared: what comparisons found, oldest first.
        title: of the page.
        program: how the command line is called, for the commands that repeat a row.

    Raises:
        ResultsError: there is no such run.
    """
    import jinja2
    from markupsafe import Markup

    devices, data = read(history, run, program, compared), ""
    for part in (1, 2, 4, 8, 16):  # names and messages may be longer than the limits allow for
        data = _json(contents(devices, compared, title=title, program=program, part=part))
        if len(data.encode()) < MOST:
            break
    script = "\n".join((FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    library, version = _library()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page: str = environment.get_template("report.html").render(
        title=title,
        data=Markup(data),
        style=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        library=_packed(library),
        version=version,
        hashes=[_hash(script), _hash(library)],
    )
    return page


def _json(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element which it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@functools.cache
def _library() -> tuple[str, str]:
    """The script of Plotly and its version."""
    from plotly.offline import get_plotlyjs, get_plotlyjs_version

    return get_plotlyjs(), get_plotlyjs_version()


@functools.cache
def _packed(text: str) -> str:
    """Compressed, as text: Plotly's script takes 2 MB so instead of 4.8."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _hash(script: str) -> str:
    """By which the content security policy knows a script that may run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
