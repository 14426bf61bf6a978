"""Findings in SARIF 2.1.0, which code hosts and editors read.

Static Analysis Results Interchange Format (SARIF) Version 2.1.0, OASIS Standard, 27 March 2020.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, Final
from urllib.parse import quote

import qdqtool
from qdqtool.lint.findings import Checked, Finding, Rule

_SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def to_sarif(models: Sequence[Checked], rules: Sequence[Rule]) -> str:
    """One run over all models."""
    index = {rule.id: number for number, rule in enumerate(rules)}
    driver = {
        "name": "qdqtool",
        "version": qdqtool.__version__,
        "semanticVersion": qdqtool.__version__,
        "rules": [_rule(rule) for rule in rules],
    }
    run = {
        "tool": {"driver": driver},
        "artifacts": [{"location": {"uri": uri(checked.path)}} for checked in models],
        "results": [_result(checked, number, finding, index) for number, checked in enumerate(models)
                    for finding in checked.findings],
        "columnKind": "unicodeCodePoints",
    }  # fmt: skip
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, allow_nan=False)


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": rule.summary},
        "help": {"text": rule.remedy},
        "defaultConfiguration": {"level": str(rule.severity)},
    }


def _result(checked: Checked, number: int, finding: Finding, index: dict[str, int]) -> dict[str, Any]:
    # A binary file has no lines, but GitHub shows results with a region alone.
    physical = {"artifactLocation": {"uri": uri(checked.path), "index": number}, "region": {"startLine": 1}}
    places = (("node", finding.node), ("tensor", finding.tensor))
    logical = [{"fullyQualifiedName": name, "kind": kind} for kind, name in places if name]
    location: dict[str, Any] = {"physicalLocation": physical}
    if logical:
        location["logicalLocations"] = logical
    place = f"{finding.place}: " if finding.place else ""
    identity = "\0".join((finding.rule, PurePath(checked.path).name, finding.node, finding.tensor))
    return {
        "ruleId": finding.rule,
        "ruleIndex": index[finding.rule],
        "level": str(finding.severity),
        "message": {"text": f"{place}{finding.message}. {finding.remedy}"},
        "locations": [location],
        "partialFingerprints": {"place/v1": hashlib.sha256(identity.encode()).hexdigest()},
    }


def uri(path: str) -> str:
    """A path as a URI reference: relative where the path is, for a reader at the same root."""
    found = Path(path)
    return found.as_uri() if found.is_absolute() else quote(found.as_posix())
