"""The page about quantized models that were checked: findings by rule and severity, with what to do about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import qdqtool
from qdqtool.lint.findings import Checked, Finding, Rule, Severity
from qdqtool.lint.text import summary
from qdqtool.report.html import accuracy
from qdqtool.report.html.components import Cell, Column, Fact, Facts, Notice, Page, Section, State, Table, Text, numbers
from qdqtool.units import count

_STATES: Final[Mapping[Severity, State]] = {
    Severity.ERROR: "error",
    Severity.WARNING: "warning",
    Severity.NOTE: "note",
}


def page(models: Sequence[Checked], rules: Sequence[Rule]) -> Page:
    """What ``check`` found in one model or several by these rules."""
    title = models[0].path if len(models) == 1 else count(len(models), "model")
    targets = ", ".join(dict.fromkeys(one.target or "no target" for one in models))
    sections = [_summary(models), _findings(models), _rules(models, rules)]
    return Page(
        title=f"{title}: check report",
        subtitle=f"Checked by {count(len(rules), 'rule')} for {targets}",
        sections=[section for section in sections if section is not None],
        footer=f"qdqtool {qdqtool.__version__}",
    )


def _summary(models: Sequence[Checked]) -> Section:
    totals = {severity: sum(one.count(severity) for one in models) for severity in Severity}
    facts = [Fact(f"{severity}s".capitalize(), str(number)) for severity, number in totals.items()]
    fixable = sum(finding.fixable for one in models for finding in one.findings)
    facts.append(Fact("Mended by --fix", str(fixable)))
    facts.append(Fact("Q/DQ nodes", f"{sum(one.conversions for one in models):,}"))
    lines = [Text(f"{one.path}: {summary(one)}.") for one in models]
    notes = [Notice(f"{one.path}: {note}", "note") for one in models for note in one.notes]
    return Section("summary", "Summary", [*lines, *notes, Facts(facts)])


def _findings(models: Sequence[Checked]) -> Section | None:
    rows = [_row(one.path, finding) for one in models for finding in one.findings]
    if not rows:
        return None
    columns = [Column("Severity"), Column("Rule"), Column("Place"), Column("Finding"), Column("Model")]
    filters = ["Severity", "Rule", *(["Model"] if len(models) > 1 else [])]
    table = Table("findings", "Findings, errors first", columns, rows, filters, fold=100)
    return Section("findings", "Findings", [table], "Errors first, each with its remedy.")


def _row(path: str, finding: Finding) -> list[Cell]:
    order = list(Severity).index(finding.severity)
    remedy = finding.remedy + (" (--fix does it)" if finding.fixable else "")
    return [
        Cell(str(finding.severity), sort=order, state=_STATES[finding.severity]),
        Cell(f"{finding.rule} {finding.name}"),
        Cell(finding.place or "model"),
        Cell(finding.message, hint=remedy),
        Cell(path),
    ]


def _rules(models: Sequence[Checked], rules: Sequence[Rule]) -> Section:
    found = Counter(finding.rule for one in models for finding in one.findings)
    rows = [
        [Cell(rule.id), Cell(rule.name), Cell(str(rule.severity)), accuracy.number(found[rule.id]), Cell(rule.summary)]
        for rule in rules
    ]
    columns = [
        Column("Rule"),
        Column("Name"),
        Column("Severity"),
        numbers("Findings"),
        Column("What must hold"),
    ]
    return Section(
        "rules", "Rules", [Table("rules-table", "Rules", columns, rows, ("Severity",))], "What was looked for."
    )
