"""The pages in a browser: no errors, plots drawn, sorting and filtering, a phone, the dark, paper.

Chromium is the program that the variable QDQTOOL_CHROMIUM names, or the first of the usual names on the path.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qdqtool.report import folder
from tests.report.html.results import repair, search

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("QDQTOOL_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason=f"no {', '.join(NAMES)} on the path, and QDQTOOL_CHROMIUM is not set"),
    pytest.mark.xdist_group("browser"),
]
PHONE = {"width": 375, "height": 800}
DRAWN = """name => {
    const canvases = [...document.querySelectorAll(`[data-plot=${name}] .canvas *`)].flatMap(inner);
    function inner(node) {
        const own = node.shadowRoot ? [...node.shadowRoot.querySelectorAll("*")].flatMap(inner) : [];
        return node.tagName === "CANVAS" ? [node] : own;
    }
    return canvases.some((canvas) => canvas.width > 0
        && canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value > 0));
}"""


@dataclass
class Opened:
    """A page in the browser, and what went wrong in it."""

    page: Page
    problems: list[str]

    def draw(self, *names: str) -> None:
        """Bring plots into view and wait for them."""
        for name in names:
            self.page.locator(f"[data-plot={name}]").scroll_into_view_if_needed()
            self.page.wait_for_selector(f"[data-plot={name}][data-drawn]", timeout=60_000)
            self.page.wait_for_function(DRAWN, arg=name, timeout=60_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


Open = Callable[..., Opened]


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Open]:
    """Open a page, that of a finished run where none is named, with options of the browser's context."""
    contexts = []

    def show(path: Path = page, **options: Any) -> Opened:
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        found = Opened(context.new_page(), [])
        found.page.on("pageerror", lambda error: found.problems.append(str(error)))
        found.page.on(
            "console", lambda line: found.problems.append(line.text) if line.type in ("error", "warning") else None
        )
        found.page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:", "blob:")) else found.problems.append(request.url)
            ),
        )
        found.page.goto(path.as_uri())
        return found

    yield show
    for context in contexts:
        context.close()


def texts(cells: Locator) -> list[str]:
    return [text.strip() for text in cells.all_inner_texts()]


def column(page: Page, table: str, index: int) -> list[str]:
    return texts(page.locator(f"#table-{table} tbody tr:visible td:nth-child({index}) .t"))


def test_opens_without_errors_and_draws_its_plots(opened: Open) -> None:
    found = opened()
    found.draw("depth", "histogram")
    assert found.problems == []


def test_pages_of_searches_and_repairs_do_too(opened: Open, tmp_path: Path) -> None:
    _, searched = folder.searched(tmp_path, search(), source="net.onnx")
    _, repaired = folder.repaired(tmp_path, repair(), reference="net.onnx", quantized="bad.onnx")
    for path, plots in ((searched, ("front", "sensitivity")), (repaired, ("depth",))):
        found = opened(path)
        found.draw(*plots)
        assert found.problems == []


def test_a_number_column_sorts_both_ways_and_empty_cells_stay_last(opened: Open) -> None:
    page = opened().page
    header = page.locator("#table-layers th[data-title=MACs] button")
    header.click()
    down = column(page, "layers", 4)
    known = [int(text.replace(",", "")) for text in down if text]
    assert len(known) == 3
    assert known == sorted(known, reverse=True)
    assert down[3:] == [""] * (len(down) - 3)
    header.click()
    assert column(page, "layers", 4) == [f"{number:,}" for number in sorted(known)] + down[3:]
    assert page.locator("#table-layers th[data-title=MACs]").get_attribute("aria-sort") == "ascending"


def test_a_text_column_sorts_by_its_text(opened: Open) -> None:
    page = opened().page
    page.locator("#table-layers th[data-title=Operator] button").press("Enter")
    operators = column(page, "layers", 2)
    assert operators == sorted(operators)
    assert operators[0] == "Add"


def test_search_and_filters_leave_what_fits(opened: Open) -> None:
    page = opened().page
    page.locator("#table-layers [data-filter=Operator]").select_option("Conv")
    assert column(page, "layers", 2) == ["Conv", "Conv"]
    page.locator("#table-layers [data-search]").fill("SECOND")
    assert column(page, "layers", 1) == ["second"]
    assert page.locator("#table-layers [data-count]").inner_text() == "1 of 8 rows"
    page.locator("#table-layers [data-search]").fill("nowhere")
    assert column(page, "layers", 1) == []


def test_long_tables_unfold(opened: Open) -> None:
    page = opened().page
    rows = page.locator("#table-timings tbody tr")
    assert page.locator("#table-timings tbody tr:visible").count() == 12 < rows.count()
    page.locator("#table-timings [data-more]").click()
    assert page.locator("#table-timings tbody tr:visible").count() == rows.count()


def test_another_tensor_and_logarithmic_counts(opened: Open) -> None:
    found = opened()
    found.draw("histogram")
    figure = found.page.locator("[data-plot=histogram]")
    told = figure.locator("[data-told]").inner_text()
    figure.locator("[data-choose]").select_option(index=1)
    assert figure.locator("[data-told]").inner_text() != told
    before = figure.screenshot()
    figure.locator("[data-log]").check()
    find = "Bokeh.documents.map((held) => held.get_model_by_name('{}')).find(Boolean)"
    assert found.page.evaluate(f"[{find.format('log')}.visible, {find.format('linear')}.visible]") == [True, False]
    found.page.wait_for_function("() => new Promise(requestAnimationFrame)")
    assert figure.screenshot() != before
    assert found.problems == []


def test_nodes_called_like_markup_do_nothing(opened: Open) -> None:
    page = opened().page
    assert page.locator("#table-layers tbody td").first.inner_text().startswith("<script>alert(")
    assert page.evaluate("document.querySelectorAll('td script').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_in_one_direction_only(opened: Open, scheme: str) -> None:
    found = opened(viewport=PHONE, color_scheme=scheme)
    found.draw("depth", "histogram")
    assert found.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert found.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(opened: Open, scheme: str) -> None:
    page = opened(color_scheme=scheme).page
    ratios = page.evaluate("""() => {
        const parse = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map(Number);
        const light = (colour) => parse(colour).map((part) => part / 255)
            .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
            .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
        const ground = light(getComputedStyle(document.body).backgroundColor);
        return ["body", ".lead", ".facts .note", "nav a", "figcaption", ".unit", "td", "footer p"].map((selector) => {
            const text = light(getComputedStyle(document.querySelector(selector)).color);
            return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
        });
    }""")
    assert min(ratios) >= 4.5


def test_plots_follow_the_colour_scheme(opened: Open) -> None:
    found = opened(color_scheme="light")
    found.draw("depth")
    models = "Bokeh.documents[0]._all_models.values()"
    colour = f"{models}.find((model) => model.type === 'LinearAxis').major_label_text_color"
    light = found.page.evaluate(colour)
    found.page.emulate_media(color_scheme="dark")
    found.page.wait_for_function(f"(light) => {colour} !== light", arg=light)


def test_paper_has_everything(opened: Open) -> None:
    found = opened()
    assert len(found.page.pdf()) > 20_000
    rows = found.page.locator("#table-timings tbody tr")
    assert all(row.is_visible() for row in rows.all())
    assert found.problems == []
