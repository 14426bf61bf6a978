"""Where a quantized model runs, as text: kernels in integers, those that were planned and are none, fallen nodes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from qdqtool.graphs.macs import Macs
from qdqtool.planning.target import Target, known_target
from qdqtool.planning.target_file import resolve
from qdqtool.report.layout import by_reason, head, more, operators
from qdqtool.report.values import Report
from qdqtool.runtime import PROVIDERS
from qdqtool.units import count, listed, percent, quantity
from qdqtool.verification.listing import Fate, Placed, counts
from qdqtool.verification.partition import Partition
from qdqtool.verification.placement import Placement, is_integer_kernel

_ALSO: Mapping[str, tuple[str, ...]] = {"cuda": ("tensorrt",)}
"""Providers on which figures of a target's file are its own, beside the provider that it is made for."""


_NAMES = re.compile(r"'[^']*'")
REASONS = 12
"""Reasons listed before the rest is only counted."""


def target_of(recipe: Mapping[str, object]) -> Target:
    """The target of a recipe's plain values, which hold a name or a table."""
    return resolve(recipe["target"])


def fits(target: Target, provider: str) -> bool:
    """Whether a figure of the provider is one of the target."""
    return target.providers[:1] == PROVIDERS[provider][:1] or provider in _ALSO.get(target.name, ())


def integers(report: Report) -> list[RenderableType]:
    """What runs in integers, what was to and does not and why, and what fell to another provider."""
    target = target_of(report.recipe)
    provider = report.verification.provider.upper() if report.verification else "CPU"
    found = {op: n for op, n in report.kernels.items() if is_integer_kernel(op)}
    others = {op: n for op, n in report.kernels.items() if op not in found}
    total = count(sum(report.kernels.values()), "operator")
    runs = f"{sum(found.values())} of {total} in the graph that the {provider} provider runs"
    if not target.for_cpu:
        planned = Counter(report.layers.values())
        title = f"Placed for integers on {target.name}"
        parts: list[RenderableType] = [
            head(title, f"{count(planned.total(), 'operator')}: {operators(planned)}"),
            Text(f"  Integer kernels here: {runs}", style="dim"),
            Text(f"  {_unverified(target, report)}", style="dim"),
        ]
    else:
        parts = [head("In integers", runs), Text(f"  {operators(found)}")]
        parts += [Text(f"  others: {operators(others)}", style="dim")] if others else []
        parts += _verified(report.placement) if report.placement is not None else []
    return [*parts, *_work(report.macs), *_partition(report.partition)]


def listed_rows(rows: Sequence[Placed]) -> list[RenderableType]:
    """Every node and Q/DQ pair: how many run where, and those that are no integer kernel by reason, with the remedy."""
    parts: list[RenderableType] = []
    for kind, states in counts(rows).items():
        if states:
            line = ", ".join(f"{number} {state}" for state, number in sorted(states.items(), key=lambda item: -item[1]))
            title = {"node": "Where nodes run", "pair": "Where Q/DQ pairs went"}[kind]
            groups = sorted(_reasons(row for row in rows if row.kind == kind).items(), key=lambda item: -len(item[1]))
            parts += [head(title, line), by_reason(dict(groups[:REASONS]))]
            parts += more(len(groups) - REASONS, "reason", "--json lists all")
    return parts


def _reasons(rows: Iterable[Placed]) -> dict[str, list[str]]:
    """Reason and remedy, without the names in them -> the rows that they are of."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row.state != Fate.INTEGER:
            remedy = f"; to change it, {row.remedy}" if row.remedy else ""
            reason = f"{row.state}, {row.provider.removesuffix('ExecutionProvider')}: {row.reason}{remedy}"
            groups.setdefault(_NAMES.sub("...", reason), []).append(row.name or f"a {row.operator} without a name")
    return groups


def _work(macs: Macs | None) -> list[RenderableType]:
    """How much of the arithmetic the integer kernels do."""
    if macs is None or not macs.total:
        return []
    missing = f"; {count(len(macs.unknown), 'layer')} of unknown shape left out" if macs.unknown else ""
    return [
        Text(
            f"  {percent(100 * macs.share)} of {quantity(macs.total)} multiply-accumulates a sample{missing}",
            style="dim",
        )
    ]


def _unverified(target: Target, report: Report) -> str:
    """What cannot be known of a file made for a runtime that is not here to ask."""
    if target == known_target("cuda") and not report.weight_only:
        return "The CUDA provider has no integer kernels for them; which TensorRT makes, only TensorRT tells."
    runtime = target.providers[0] if target.providers else target.name
    return f"Checked and loaded here; which of them become integer kernels, only {runtime} tells."


def _verified(found: Placement) -> list[RenderableType]:
    planned = count(found.planned, "planned kernel")
    gone = f"; {len(found.gone)} of them need none any more: {listed(found.gone)}" if found.gone else ""
    if not found.floats:
        return [Text(f"  all {planned} run in integers{gone}" if found.planned else "  no kernel was planned")]
    running = found.planned - len(found.floats)
    groups: dict[str, list[str]] = {}
    for node, reason in found.floats.items():
        groups.setdefault(reason, []).append(node)
    line = f"  {running} of {planned} run in integers{gone}; these do not:"
    return [Text(line, style="yellow"), by_reason(groups)]


def _partition(found: Partition | None) -> list[RenderableType]:
    if found is None:
        return []
    line = f"  {found}"
    if found.fallen:
        line += f"; on the CPU: {listed(list(found.fallen))}"
    return [Text(line, style="yellow" if found.fallen or found.copies else "dim")]
