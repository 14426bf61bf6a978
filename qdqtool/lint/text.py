"""Findings as text for a terminal: per model its findings, errors first, each with place, reason and remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from qdqtool.lint.findings import Checked, Finding, Rule, Severity
from qdqtool.report.layout import grid, more
from qdqtool.units import count

_COLOURS: Final = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}
_SHOWN: Final = 8
"""Places of one rule that are listed before the rest is only counted."""


def page(models: Sequence[Checked]) -> RenderableType:
    """What was found in every model."""
    return Group(*(part for one in models for part in _model(one)))


def _model(checked: Checked) -> list[RenderableType]:
    target = "no target" if checked.target is None else f"target {checked.target}"
    head = Text.assemble((checked.path, "bold"), f"   {target}, {count(checked.conversions, 'Q/DQ node')}")
    groups: dict[tuple[Severity, str], list[Finding]] = {}
    for finding in checked.findings:
        groups.setdefault((finding.severity, finding.rule), []).append(finding)
    parts: list[RenderableType] = [head]
    for (severity, rule), findings in groups.items():
        title = f"\n{severity} {rule} {findings[0].name}"
        parts.append(Text.assemble((title, _COLOURS[severity]), f"  {findings[0].remedy}"))
        table = grid(2, justify="left")
        for finding in findings[:_SHOWN]:
            fixable = (" [--fix]", "green") if finding.fixable else ""
            table.add_row(Text(finding.place or "model"), Text.assemble(finding.message, fixable))
        parts += [table, *more(len(findings) - _SHOWN, "place", "--format json lists all")]
    parts.append(Text(f"\n{summary(checked)}\n", style="dim" if checked.findings else "green"))
    return parts


def summary(checked: Checked) -> str:
    """How many findings of each severity."""
    found = [count(n, severity) for severity in Severity if (n := checked.count(severity))]
    return ", ".join(found) or "clean"


def listing(rules: Iterable[Rule]) -> RenderableType:
    """Every rule with its severity and what must hold; marked where --fix mends it."""
    table = grid(3, justify="left")
    for rule in rules:
        mark = (" [--fix]", "green") if rule.fix is not None else ""
        name = Text.assemble((rule.id, "bold"), f" {rule.name}")
        table.add_row(name, Text(rule.severity, style=_COLOURS[rule.severity]), Text.assemble(rule.summary, mark))
    return table


def fixed(done: Mapping[str, int]) -> str:
    """What --fix mended, in a line."""
    if not done:
        return "nothing to mend"
    return "mended " + ", ".join(f"{rule} at {count(n, 'place')}" for rule, n in done.items())
