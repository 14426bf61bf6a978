"""Machine formats: valid by their schemas, complete, and true to what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import numpy as np
import pytest
import xmlschema

from qdqtool.lint import linting, machine, subject, text
from qdqtool.lint.findings import Checked, Severity
from qdqtool.lint.rules import RULES, chosen
from qdqtool.planning.target import TARGETS
from qdqtool.report import terminal
from tests.lint.models import model, values

SCHEMAS = Path(__file__).parent / "schemas"
SARIF = json.loads((SCHEMAS / "sarif-2.1.0-rtm.5.json").read_text(encoding="utf-8"))
BROKEN = {
    "rs": np.array(0, np.float32), "left": np.ones(3, np.float32), "bs": 2 * values()["bs"], "extra": np.ones(4)
}  # fmt: skip


def models() -> list[Checked]:
    """One model with errors and warnings, one with a name that needs escapes, one that is clean."""
    target = TARGETS["cpu"]
    return [
        linting.check(subject.load(model(BROKEN)), target, path="models/a b.onnx"),
        linting.check(subject.load(model({"<&\x01": np.ones(2)})), target, path="100%,x:y.onnx"),
        linting.check(subject.load(model()), target, path="clean.onnx"),
    ]


def sarif(found: list[Checked]) -> Any:
    return json.loads(machine.FORMATS["sarif"](found, RULES))


@pytest.mark.parametrize("found", [models(), models()[2:], []], ids=["findings", "clean", "nothing"])
def test_sarif_is_valid(found: list[Checked]) -> None:
    jsonschema.Draft4Validator.check_schema(SARIF)
    jsonschema.Draft4Validator(SARIF).validate(sarif(found))


def test_the_sarif_schema_refuses_what_is_wrong() -> None:
    log = sarif(models())
    log["runs"][0]["results"][0]["level"] = "bad"
    assert not jsonschema.Draft4Validator(SARIF).is_valid(log)


def test_sarif_says_what_where_and_how_bad() -> None:
    found = models()
    (run,) = sarif(found)["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [rule.id for rule in RULES]
    assert len(run["results"]) == sum(len(one.findings) for one in found)
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
    first = next(result for result in run["results"] if result["ruleId"] == "QDQ001")
    (location,) = first["locations"]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "models/a%20b.onnx"
    assert [one["fullyQualifiedName"] for one in location["logicalLocations"]] == ["out_q", "r"]
    assert first["level"] == "error"
    assert "its scale is zero" in first["message"]["text"]


def test_fingerprints_do_not_depend_on_the_folder() -> None:
    prints = []
    for path in ("a/m.onnx", "/b/m.onnx"):
        found = linting.check(subject.load(model(BROKEN)), TARGETS["cpu"], path=path)
        prints.append([result["partialFingerprints"] for result in sarif([found])["runs"][0]["results"]])
    assert prints[0] == prints[1]
    assert len({json.dumps(one) for one in prints[0]}) == len(prints[0])


def test_junit_is_valid_and_counts() -> None:
    found = models()
    report = machine.FORMATS["junit"](found, RULES)
    xmlschema.XMLSchema(SCHEMAS / "junit-10.xsd").validate(report)
    root = ET.fromstring(report)
    assert int(root.get("tests", "")) == 3 * len(RULES)
    failing = {case.get("name", "").split()[0] for case in root.iter("testcase") if case.find("failure") is not None}
    assert failing == {f.rule for one in found for f in one.findings if f.severity is Severity.ERROR}
    assert int(root.get("failures", "")) == len(failing) == 2
    outputs = [case.findtext("system-out") or "" for case in root.iter("testcase")]
    assert any("warning: tensor 'left': nothing reads this constant" in output for output in outputs)
    assert any("'<&\ufffd'" in output or "<&" in output for output in outputs)


def test_json_holds_everything() -> None:
    found = models()
    read = json.loads(machine.FORMATS["json"](found, chosen(["QDQ001"])))
    assert read["rules"] == ["QDQ001"]
    assert [one["path"] for one in read["models"]] == [one.path for one in found]
    assert read["models"][0]["count"] == {"error": 3, "warning": 3, "note": 0}
    assert read["models"][0]["findings"][0].keys() >= {"rule", "severity", "message", "remedy", "node", "tensor"}
    assert read["models"][2]["findings"] == []


def test_github_escapes() -> None:
    lines = machine.FORMATS["github"](models(), RULES).splitlines()
    assert lines[0].startswith("::error file=models/a b.onnx,title=QDQ001 invalid-scale::node 'out_q', tensor 'r': ")
    assert lines[-1].startswith("::warning file=100%25%2Cx%3Ay.onnx,title=QDQ009 unused-initializer::")
    assert machine.FORMATS["github"](models()[2:], RULES) == ""


def test_text_lists_errors_first_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.console().print(text.page(models()))
    shown = capsys.readouterr().out
    assert shown.index("error QDQ001") < shown.index("error QDQ007") < shown.index("warning QDQ009")
    assert "3 errors, 3 warnings" in shown
    assert shown.rstrip().endswith("clean")
    assert "[--fix]" in shown


def test_long_lists_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    found = linting.check(subject.load(model({f"n{i}": np.ones(1) for i in range(20)})), TARGETS["cpu"])
    terminal.console().print(text.page([found]))
    assert "and 12 places more; --format json lists all" in capsys.readouterr().out
