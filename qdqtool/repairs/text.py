"""What ``qdqtool repair`` shows: where the error is made, what was changed, what it gained, the recipe's change."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qdqtool.repairs.analysis import Analysis
from qdqtool.repairs.values import Figures, Repair, Step
from qdqtool.report.layout import grid, head, more
from qdqtool.units import count, db, quantity, size

_LAYERS = 8
"""Layers listed before the rest is only counted."""


def page(found: Repair, model: str, quantized: str, written: Sequence[str] = ()) -> RenderableType:
    """The whole page, for a terminal."""
    samples = found.samples
    parts: list[RenderableType] = [
        Text.assemble((f"{quantized} against {model}", "bold"), f"   {_summary(found)}"),
        Text(
            f"chosen on {count(samples.choosing, 'sample')}, measured on {samples.reporting} others of "
            f"{samples.source}; {count(found.tries, 'model')} quantized",
            style="dim",
        ),
        head("Where the error is made", "SQNR of a layer's output; the worst of their own first"),
        _errors(found.analysis),
        *more(len(found.analysis.layers) - _LAYERS, "layer", "--json lists all"),
    ]
    if found.steps:
        parts += [head("Steps", "SQNR of the worst output"), _steps(found.steps)]
    if found.left:
        parts += [head("Left as they are", count(len(found.left), "layer")), _left(found)]
    if found.difference:
        parts += [head("Change of the recipe", ""), Text(found.difference.rstrip())]
    missed = found.goal.missed(found.after)
    if missed is not None:
        parts.append(Text(f"\nThe goal is not reached: {missed}", style="yellow"))
    if written:
        parts.append(Text(f"\nWrote {', '.join(written)}", style="bold green"))
    return Group(*parts)


def _summary(found: Repair) -> str:
    if not found.changed:
        return f"{_figures(found.given)}: nothing to repair" if not found.goal.missed(found.after) else "not repaired"
    return f"{_figures(found.given)} -> {_figures(found.after)}, {count(len(found.steps), 'step')}"


def _figures(figures: Figures) -> str:
    score = "" if figures.score is None else f", score {figures.score:.2f}"
    return f"{db(figures.worst_db)} (± {figures.error_db:.1f}){score}"


def _titles(table: Table, *titles: str) -> None:
    table.add_row(*(Text(title, style="dim") for title in titles))


def _errors(found: Analysis) -> Table:
    table = grid(6)
    _titles(table, "layer", "operator", "own", "inherited", "total", "share of noise")
    for one in found.worst_first()[:_LAYERS]:
        style = "yellow" if one.hurts else ""
        figures = (db(value) for value in (one.own_db, one.inherited_db, one.total_db))
        table.add_row(Text(one.node, style=style), one.op, *figures, f"{100 * one.share:.0f} %")
    return table


def _steps(steps: Sequence[Step]) -> Table:
    table = grid(6, justify="left")
    _titles(table, "layer", "remedy", "before", "after", "in float", "cost")
    for one in steps:
        row = (db(one.before_db), db(one.after_db), db(one.float_db), _cost(one))
        table.add_row(Text(one.layer or "all"), Text.assemble(one.change, (f" ({one.remedy})", "dim")), *row)
    return table


def _cost(step: Step) -> str:
    """What a step costs in words: arithmetic that leaves integers, and bytes."""
    macs = f"{quantity(abs(step.macs))} MACs {'out of' if step.macs > 0 else 'back in'} integers" if step.macs else ""
    grown = f"{'+' if step.bytes > 0 else '-'}{size(abs(step.bytes))}" if step.bytes else ""
    return ", ".join(filter(None, (macs, grown))) or "nothing"


def _left(found: Repair) -> Table:
    table = grid(2, justify="left")
    for one in found.left[:_LAYERS]:
        table.add_row(Text(one.layer), Text(one.reason))
    if len(found.left) > _LAYERS:
        table.add_row(Text(f"and {len(found.left) - _LAYERS} more", style="dim"), Text("--json lists all", style="dim"))
    return table
