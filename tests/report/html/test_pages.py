"""The pages without a browser: what stands in them, that nothing is loaded, and that names are only names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qdqtool.lint import linting
from qdqtool.lint.rules import RULES
from qdqtool.passes_api import Skip
from qdqtool.planning.target import target
from qdqtool.recipe import Recipe
from qdqtool.report import folder
from qdqtool.report.html import quantized, render
from qdqtool.report.html.components import Page
from qdqtool.report.validation import Validation, placed
from qdqtool.verification.comparison import Comparison, compare
from qdqtool.verification.latency import Bench, Latency, Ratio
from tests.builders import feeds
from tests.report.html.parsed import Parsed
from tests.report.runs import EVIL, Again, Run, network

SECTIONS = [
    "summary",
    "accuracy",
    "layers",
    "placement",
    "bits",
    "ranges",
    "calibration",
    "size",
    "skipped",
    "time",
    "recipe",
]
BENCH = Bench(
    "cpu", 2, 1, 300,
    latency={"float": Latency(4, 5, 6, 4), "quantized": Latency(2, 3, 4, 2)},
    ratios={"quantized": Ratio(0.5, 0.45, 0.55)},
    work={},
)  # fmt: skip


@pytest.fixture(scope="module")
def parsed(page: Path) -> Parsed:
    return Parsed(page.read_text(encoding="utf-8"))


def shown(run: Run) -> Page:
    return quantized.page(run.report, run.data, source="a.onnx", output="b.onnx")


def test_sections_stand_in_order_with_a_link_each(parsed: Parsed) -> None:
    sections = [given["id"] for tag, given in parsed.attributes if tag == "section"]
    assert sections == SECTIONS
    links = [given["href"] for tag, given in parsed.attributes if tag == "a"]
    assert links[1:] == [f"#{name}" for name in SECTIONS]


def test_tags_fit_and_ids_are_unique(parsed: Parsed) -> None:
    assert parsed.problems == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.html.startswith("<!DOCTYPE html>")
    named = [given["aria-labelledby"] for _, given in parsed.attributes if "aria-labelledby" in given]
    assert set(named) <= set(parsed.ids)


def test_nothing_is_loaded_from_elsewhere(parsed: Parsed) -> None:
    for tag, given in parsed.attributes:
        assert not given.keys() & {"src", "srcset", "action", "data"}, tag
        assert given.get("href", "#").startswith(("#", "data:")), tag
    assert "@import" not in parsed.html
    assert "url(" not in parsed.html.split("</style>")[0]


def test_the_page_is_small(parsed: Parsed) -> None:
    assert len(parsed.html) < 2_000_000


def test_names_are_escaped_wherever_they_stand(parsed: Parsed) -> None:
    assert EVIL in parsed.text
    assert "<script>alert" not in parsed.html
    assert parsed.tags["script"] == 2 + sum(name.startswith(("data-", "depth", "histogram")) for name in parsed.scripts)


def test_summary_says_it_in_a_sentence(parsed: Parsed, finished: Run) -> None:
    verdict = quantized.verdict(finished.report)
    assert verdict in parsed.text
    assert "SQNR" in verdict
    assert "planned kernels run in integers" in verdict


def test_layers_have_all_columns(parsed: Parsed, finished: Run) -> None:
    head, *rows = parsed.cells["layers"]
    assert [title.strip() for title in head] == [
        "Layer", "Operator", "Runs as", "MACs", "Weights bits", "Activations bits", "SQNR alone dB",
        "with all before dB", "Constants bytes",
    ]  # fmt: skip
    assert [row[0] for row in rows] == [layer.name for layer in finished.data.layers if layer.runs != "conversion"]
    conv = rows[2]
    assert conv[1] == "Conv"
    assert conv[2].startswith("integer kernel")
    assert conv[3:6] == ["36,864", "8", "8"]


def test_the_ledger_sums_to_the_file(parsed: Parsed, finished: Run) -> None:
    _, *parts, whole = parsed.cells["ledger"]
    sizes = [int(part[1].replace(",", "")) for part in parts]
    assert sum(sizes) == int(whole[1].replace(",", "")) == finished.report.sizes.quantized_bytes


def test_the_recipe_makes_the_same_model_again(parsed: Parsed, finished: Run) -> None:
    import tomllib

    text = parsed.html.split('<code class="language-toml">')[1].split("</code>")[0].replace("&#34;", '"')
    assert Recipe.of(tomllib.loads(text)) == finished.state.recipe


def test_histograms_come_as_data(parsed: Parsed, finished: Run) -> None:
    found = parsed.data("data-histograms")
    assert [one["tensor"] for one in found] == [one.tensor for one in finished.data.histograms]
    options = [given for tag, given in parsed.attributes if tag == "option" and given.get("value", "").isdigit()]
    assert len(options) == len(found)


def test_what_does_not_exist_has_no_section(again: Again) -> None:
    found = [section.id for section in shown(again(precision="w4a16")).sections]
    assert "ranges" not in found
    assert "calibration" not in found
    assert "size" in found


def test_bits_of_channels_are_shown_where_they_differ(again: Again) -> None:
    run = again(precision="w4a8", bits_per_channel="weights")
    second = next(layer for layer in run.data.layers if layer.name == "second")
    assert len(second.channel_bits) == 8
    assert sum(second.channel_bits) / 8 == second.weight_bits == 4
    page = Parsed(render.render(shown(run)))
    for bits in second.channel_bits:
        assert f'title="{bits} bits"' in page.html
    assert "with bits of each channel" in page.text


def test_warnings_stand_in_the_summary(finished: Run) -> None:
    run = replace(finished, report=replace(finished.report, synthetic=True, notes=("a note",)))
    text = Parsed(render.render(shown(run))).text
    assert "Do not ship this file" in text
    assert "a note" in text


def test_what_was_skipped_is_grouped_by_reason(finished: Run) -> None:
    skipped = tuple(Skip("plan", f"node{index}", "too <odd>") for index in range(3))
    run = replace(finished, report=replace(finished.report, skipped=skipped))
    text = Parsed(render.render(shown(run))).text
    assert "3 too <odd> node0, node1, node2" in text


def test_script_json_cannot_end_its_element() -> None:
    value = {"a": ["</script><!--", "\u2028", float("inf"), None]}
    text = render.script_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": ["</script><!--", "\u2028", "inf", None]}


def test_validation_page_shows_gates_tensors_and_the_score(finished: Run, tmp_path: Path) -> None:
    reference = network(EVIL)
    found = compare(reference, finished.proto, feeds(reference, 8, seed=5))
    found = replace(found, metric="top1", float_score=80.0, quantized_score=79.0)
    whole = Validation(found, placed(finished.proto, "b.onnx", "cpu"), BENCH)
    broken = found.broken(min_sqnr=90.0)
    files = folder.compared(tmp_path, whole, reference="a.onnx", quantized="<b>.onnx", broken=broken)
    assert json.loads(files[0].read_text())["samples"] == 8
    parsed = Parsed(files[1].read_text(encoding="utf-8"))
    assert parsed.problems == []
    sections = [given["id"] for tag, given in parsed.attributes if tag == "section"]
    assert sections == ["summary", "accuracy", "tensors", "kernels", "placement-cpu", "latency"]
    assert parsed.cells["latency"][2][1:] == ["2.00 ms", "3.00 ms", "4.00 ms", "0.50", "0.45 to 0.55"]
    assert len(parsed.cells["nodes-cpu"]) == 1 + len(reference.graph.node)
    assert "A gate failed" in parsed.text
    assert "below --min-sqnr 90 dB" in parsed.text
    assert "-1.00 points" in parsed.text
    assert len(parsed.cells["tensors"]) == 1 + len(found.tensors)
    worst = [row[2] for row in parsed.cells["tensors"][1:]]
    assert float(worst[0]) == min(float(value) for value in worst if value not in ("", "equal"))


def test_a_gate_that_holds_is_not_mentioned(tmp_path: Path) -> None:
    found = Comparison(4, {"y": 30.0}, {"y": 31.0})
    _, page = folder.compared(tmp_path, Validation(found, ()), reference="a", quantized="b")
    assert "gate" not in Parsed(page.read_text()).text


def test_check_page_groups_findings_with_remedies(finished: Run, tmp_path: Path) -> None:
    broken = finished.proto.__class__()
    broken.CopyFrom(finished.proto)
    scale = next(node.input[1] for node in broken.graph.node if node.op_type == "DequantizeLinear")
    tensor = next(tensor for tensor in broken.graph.initializer if tensor.name == scale)
    tensor.raw_data = b"\0" * len(tensor.raw_data)
    given = {"bad": broken, "good": finished.proto}
    models = [linting.check(proto, target("cpu"), path=name) for name, proto in given.items()]
    errors = [finding for finding in models[0].findings if finding.severity == "error"]
    assert errors
    files = folder.checked(tmp_path, models, RULES)
    parsed = Parsed(files[1].read_text(encoding="utf-8"))
    assert parsed.problems == []
    first = parsed.cells["findings"][1]
    assert first[0] == "error"
    assert errors[0].rule in first[1]
    assert errors[0].remedy in first[3]
    assert len(parsed.cells["findings"]) == 1 + sum(len(one.findings) for one in models)
    assert len(parsed.cells["rules-table"]) == 1 + len(RULES)
    assert len(parsed.html) < 100_000, "a page without plots needs no library"
