"""The pages of searches and repairs: what they say of results made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qdqtool.repairs.values import Goal
from qdqtool.report import folder
from tests.report.html.parsed import Parsed
from tests.report.html.results import repair, search


def test_search_page_shows_what_was_won_tried_and_measured(tmp_path: Path) -> None:
    files = folder.searched(tmp_path, search(), source="net.onnx")
    assert [path.name for path in files] == ["search.json", "search.html"]
    assert json.loads(files[0].read_text())["chosen"]["stem"] == "8"
    page = Parsed(files[1].read_text(encoding="utf-8"))
    assert page.problems == []
    assert "4.00 bits a weight in the mean, 4.0 kB, 25.0 dB SQNR, where 4 bits everywhere takes 4.0 kB" in page.text
    head, *rows = page.cells["sensitivity"]
    assert [title.strip() for title in head][4:7] == ["2 bits, alone dB", "4 bits, alone dB", "8 bits, alone dB"]
    assert rows[1] == ["<b>body</b>", "Conv", "4 bits", "100", "11.0", "23.0", "equal", "11.0", "23.0", "equal"]
    assert len(page.cells["trials"]) == 4
    assert "its weight is computed at run time" in page.text
    assert {"front", "sensitivity"} <= page.scripts.keys()


def test_a_search_that_ran_out_of_time_says_so(tmp_path: Path) -> None:
    _, page = folder.searched(tmp_path, search(complete=False, skipped=()), source="net.onnx")
    assert "The time was up" in Parsed(page.read_text()).text


def test_repair_page_shows_steps_errors_and_the_difference(tmp_path: Path) -> None:
    files = folder.repaired(tmp_path, repair(), reference="net.onnx", quantized="bad.onnx")
    assert [path.name for path in files] == ["repair.json", "repair.html"]
    page = Parsed(files[1].read_text(encoding="utf-8"))
    assert page.problems == []
    assert "1 step took the output from 12.0 dB to 30.0 dB SQNR." in page.text
    assert page.cells["steps"][1][:8] == [
        "1", "body", "Conv", "calibrator", "calibrator mse for <t0>", "12.0", "30.0", "31.0",
    ]  # fmt: skip
    assert page.cells["errors"][1][0] == "bodyhurts"
    assert page.cells["errors"][1][5] == "90.0"
    assert "[tensors.t0]" in page.text
    assert "it does not hurt" in page.text


@pytest.mark.parametrize(("least", "missed"), [(20.0, True), (10.0, False)])
def test_nothing_to_repair_and_goals(tmp_path: Path, least: float, missed: bool) -> None:
    found = repair(steps=False, goal=Goal(min_sqnr=least))
    page = Parsed(folder.repaired(tmp_path, found, reference="a", quantized="b")[1].read_text())
    assert "Nothing was repaired: the output keeps 12.0 dB SQNR." in page.text
    assert ("The goal was not reached" in page.text) == missed
    assert "steps" not in page.cells
