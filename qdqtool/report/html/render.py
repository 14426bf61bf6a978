"""A page as HTML: Jinja fills the template, Bokeh brings the JavaScript of its plots, all of it in one file."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

from qdqtool.report.files import write_text
from qdqtool.report.html.components import Page
from qdqtool.report.values import plain

FILE: Final = "report.html"
"""The page's name in the folder of a report."""


_ESCAPED: Final = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def render(page: Page) -> str:
    """The page as HTML; whatever a model calls its nodes is text in it, never markup."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qdqtool.report.html", "template"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["script_json"] = script_json
    return environment.get_template("page.html.j2").render(
        page=page,
        style=_own("page.css"),
        script=_own("page.js"),
        library=_bokeh() if page.has_plots else "",
    )


def write(page: Page, folder: Path, *, name: str = FILE) -> Path:
    """Write the page into a folder atomically; QdqError where that is not possible."""
    return write_text(render(page), folder / name)


def script_json(value: Any) -> str:
    """JSON that is safe inside of a script element: no character of it can end the element or open a comment."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPED)


@cache
def _own(name: str) -> str:
    return (resources.files("qdqtool.report.html") / "template" / name).read_text(encoding="utf-8")


@cache
def _bokeh() -> str:
    """The library itself, without its widgets, tables and WebGL."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw)
