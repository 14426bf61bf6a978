"""What a rule of the linter is, and what it finds: plain values that every output format is made from."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qdqtool.lint.subject import Subject


class Severity(enum.StrEnum):
    """How bad a finding is; errors alone make the check fail."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Hit:
    """A place where a rule is broken.

    Attributes:
        message: what is wrong there, and what follows from it.
        node: name of the node, "" where it is about no node.
        tensor: name of the tensor, "" where it is about none.
        severity: where it differs from the rule's.
        fixable: whether the rule's fix would mend this place.
    """

    message: str
    node: str = ""
    tensor: str = ""
    severity: Severity | None = None
    fixable: bool = False


Check = Callable[["Subject"], Iterator[Hit]]
Fix = Callable[["Subject"], int]


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong with a Q/DQ graph.

    Attributes:
        id: what --select and --ignore take.
        name: in words, joined by hyphens.
        severity: of its findings, unless one says otherwise.
        summary: what must hold, in a sentence.
        remedy: what to do about a finding.
        check: finds the places; None where a comparison with a baseline does.
        fix: mends the fixable ones in place and returns how many; the model's outputs stay the same.
        of_target: whether it asks what the file is made for.
    """

    id: str
    name: str
    severity: Severity
    summary: str
    remedy: str
    check: Check | None = None
    fix: Fix | None = None
    of_target: bool = False


@dataclass(frozen=True)
class Finding:
    """A broken rule at one place of one model; ``node`` and ``tensor`` are "" where there is none to name."""

    rule: str
    name: str
    severity: Severity
    message: str
    remedy: str
    node: str = ""
    tensor: str = ""
    fixable: bool = False

    @staticmethod
    def of(rule: Rule, hit: Hit) -> Finding:
        """What a rule hit, with the rule's own words."""
        severity = hit.severity or rule.severity
        return Finding(rule.id, rule.name, severity, hit.message, rule.remedy, hit.node, hit.tensor, hit.fixable)

    @property
    def place(self) -> str:
        """Where, in words: ``node 'c0', tensor 'x'``."""
        named = (("node", self.node), ("tensor", self.tensor))
        return ", ".join(f"{what} {name!r}" for what, name in named if name)


@dataclass(frozen=True)
class Checked:
    """One model as the check left it.

    Attributes:
        path: its file.
        target: name of what it was checked for; None where rules of targets were left out.
        conversions: how many QuantizeLinear and DequantizeLinear nodes it has.
        findings: what was found, errors first.
        notes: what the check could not do, and why.
    """

    path: str
    target: str | None
    conversions: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def count(self, severity: Severity) -> int:
        """How many findings are of a severity."""
        return sum(finding.severity is severity for finding in self.findings)
