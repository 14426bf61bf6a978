"""Findings for programs: JSON, JUnit XML and the annotations of GitHub Actions. SARIF has a module of its own.

JUnit has no official schema; the one of Jenkins's xunit plugin is followed, which pytest follows too. A model is a test
suite and a rule a test case, which fails where it found errors; warnings and notes are its output.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from xml.etree import ElementTree as ET

from qdqtool.lint import sarif
from qdqtool.lint.findings import Checked, Finding, Rule, Severity

Formatter = Callable[[Sequence[Checked], Sequence[Rule]], str]
_ANNOTATIONS: Final = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "notice"}


def to_json(models: Sequence[Checked], rules: Sequence[Rule]) -> str:
    """Every model with its findings and their number by severity."""
    listed = [
        {**dataclasses.asdict(one), "count": {severity: one.count(severity) for severity in Severity}} for one in models
    ]
    return json.dumps({"rules": [rule.id for rule in rules], "models": listed}, indent=2, allow_nan=False)


def to_junit(models: Sequence[Checked], rules: Sequence[Rule]) -> str:
    """A JUnit report."""
    root = ET.Element("testsuites", name="qdqtool check")
    totals = {"tests": 0, "failures": 0}
    for checked in models:
        failing = {finding.rule for finding in checked.findings if finding.severity is Severity.ERROR}
        counts = {"tests": len(rules), "failures": len(failing)}
        suite = ET.SubElement(root, "testsuite", {"name": _clean(checked.path), "errors": "0", **_texts(counts)})
        for rule in rules:
            _case(suite, rule, checked)
        totals = {key: totals[key] + counts[key] for key in totals}
    for key, text in _texts({**totals, "errors": 0}).items():
        root.set(key, text)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode")


def _texts(counts: Mapping[str, int]) -> dict[str, str]:
    return {key: str(number) for key, number in counts.items()}


def _case(suite: ET.Element, rule: Rule, checked: Checked) -> None:
    case = ET.SubElement(suite, "testcase", name=f"{rule.id} {rule.name}", classname=_clean(checked.path))
    found = [finding for finding in checked.findings if finding.rule == rule.id]
    errors = [finding for finding in found if finding.severity is Severity.ERROR]
    others = [finding for finding in found if finding.severity is not Severity.ERROR]
    if errors:
        failure = ET.SubElement(case, "failure", type=rule.name, message=_clean(line(errors[0])))
        failure.text = _clean("\n".join([*map(line, errors), errors[0].remedy]))
    if others:
        output = "\n".join([*(f"{one.severity}: {line(one)}" for one in others), others[0].remedy])
        ET.SubElement(case, "system-out").text = _clean(output)


def _clean(text: str) -> str:
    """Text without the control characters that XML cannot hold."""
    return "".join(c if c in "\t\n" or ord(c) >= 32 else "\ufffd" for c in text)


def to_github(models: Sequence[Checked], rules: Sequence[Rule]) -> str:
    """Workflow commands, which GitHub Actions shows beside the files."""
    lines = []
    for checked in models:
        for one in checked.findings:
            title = _property(f"{one.rule} {one.name}")
            command = f"{_ANNOTATIONS[one.severity]} file={_property(checked.path)},title={title}"
            lines.append(f"::{command}::{_data(f'{line(one)}. {one.remedy}')}")
    return "\n".join(lines)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def line(finding: Finding) -> str:
    """Place and reason."""
    return f"{finding.place}: {finding.message}" if finding.place else finding.message


FORMATS: Final[Mapping[str, Formatter]] = {
    "json": to_json,
    "junit": to_junit,
    "sarif": sarif.to_sarif,
    "github": to_github,
}
