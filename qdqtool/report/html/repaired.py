"""The page about a model that was repaired: which layers hurt, what was changed, and what each step won."""

from __future__ import annotations

import qdqtool
from qdqtool.repairs.analysis import Analysis
from qdqtool.repairs.values import Repair
from qdqtool.report.html import accuracy, plots
from qdqtool.report.html.components import (
    Cell,
    Code,
    Column,
    Fact,
    Facts,
    Notice,
    Page,
    Part,
    Plot,
    Reasons,
    Section,
    Table,
    Text,
    numbers,
)
from qdqtool.units import count, db


def page(found: Repair, *, reference: str, quantized: str) -> Page:
    """What repairing ``quantized`` beside ``reference`` found out and did."""
    sections = [_summary(found), _steps(found), _layers(found), _left(found), _recipe(found)]
    return Page(
        title=f"{quantized}: repair report",
        subtitle=f"Repaired beside {reference}; steps chosen on {count(found.samples.choosing, 'sample')}, "
        f"reported on {found.samples.reporting} others of {found.samples.source}",
        sections=[section for section in sections if section is not None],
        footer=f"qdqtool {qdqtool.__version__}",
    )


def verdict(found: Repair) -> str:
    """What the repair won, in a sentence."""
    if not found.steps:
        return f"Nothing was repaired: the output keeps {db(found.given.worst_db)} SQNR."
    steps = count(len(found.steps), "step")
    return f"{steps} took the output from {db(found.given.worst_db)} to {db(found.after.worst_db)} SQNR."


def _summary(found: Repair) -> Section:
    facts = [
        Fact("SQNR of the output", db(found.after.worst_db), f"given {db(found.given.worst_db)}"),
        Fact("Steps kept", str(len(found.steps)), f"of {count(found.tries, 'try')}"),
        Fact("Left integers", f"{sum(step.macs for step in found.steps):,}", "multiply-accumulates a sample"),
        Fact("Grown by", f"{sum(step.bytes for step in found.steps):,}", "bytes"),
    ]
    if found.after.score is not None and found.goal.metric is not None:
        drop = "" if found.after.drop is None else f"{-found.after.drop:+.4g} against float"
        facts.insert(0, Fact(f"Score ({found.goal.metric})", f"{found.after.score:.4g}", drop))
    missed = found.goal.missed(found.after)
    parts: list[Part] = [Text(verdict(found))]
    parts += [Notice(f"The goal was not reached: {missed}.", "error")] if missed is not None else []
    return Section("summary", "Summary", [*parts, *(Notice(note, "note") for note in found.notes), Facts(facts)])


def _steps(found: Repair) -> Section | None:
    if not found.steps:
        return None
    columns = [
        numbers("Step"), Column("Layer"), Column("Operator"), Column("Remedy"), Column("Change"),
        numbers("SQNR before", "dB"), numbers("after", "dB"), numbers("in float", "dB"),
        numbers("MACs out of integers"), numbers("Growth", "bytes"),
    ]  # fmt: skip
    rows = [
        [
            accuracy.number(place), Cell(step.layer), Cell(step.op), Cell(step.remedy), Cell(step.change),
            *map(accuracy.decibels, (step.before_db, step.after_db, step.float_db)),
            accuracy.number(step.macs), accuracy.number(step.bytes),
        ]
        for place, step in enumerate(found.steps, 1)
    ]  # fmt: skip
    lead = "What was changed, with the SQNR of the worst output; in float: with that layer in float instead."
    return Section("steps", "Steps", [Table("steps", "Steps", columns, rows)], lead)


def _layers(found: Repair) -> Section:
    after = {layer.node: layer for layer in found.analysis_after.layers}
    columns = [
        Column("Layer"), Column("Operator"), numbers("Own", "dB"), numbers("Inherited", "dB"),
        numbers("Together", "dB"), numbers("Share of the noise", "%"), numbers("Own after repair", "dB"),
    ]  # fmt: skip
    rows = [
        [
            Cell(layer.node, state="warning", hint="hurts") if layer.hurts else Cell(layer.node), Cell(layer.op),
            *map(accuracy.decibels, (layer.own_db, layer.inherited_db, layer.total_db)),
            accuracy.number(100 * layer.share, "{:.1f}"),
            accuracy.decibels(after[layer.node].own_db if layer.node in after else None),
        ]
        for layer in found.analysis.worst_first()
    ]  # fmt: skip
    parts: list[Part] = [
        *_picture(found.analysis),
        Table("errors", "Error of each layer", columns, rows, ("Operator",), fold=40),
    ]
    lead = (
        "The error that each layer makes itself, and what it takes over, before the repair; marked are those that hurt."
    )
    return Section("layers", "Layers", parts, lead)


def _picture(found: Analysis) -> list[Part]:
    if len(found.layers) < 2:
        return []
    names = [layer.node for layer in found.layers]
    ends = (names, [layer.own_db for layer in found.layers], [layer.total_db for layer in found.layers])
    alt = "SQNR of what each layer puts out: its own error alone, and with everything before it."
    return [Plot("depth", plots.depth(*ends), alt)]


def _left(found: Repair) -> Section | None:
    groups: dict[str, list[str]] = {}
    for one in found.left:
        groups.setdefault(one.reason, []).append(one.layer)
    lead = "Layers that were looked at and left as they are."
    return Section("left", "Left alone", [Reasons(list(groups.items()))], lead) if groups else None


def _recipe(found: Repair) -> Section:
    parts: list[Part] = []
    if found.difference:
        parts += [Text("The changes, to paste into a recipe:"), Code(found.difference, "toml"), Text("All of it:")]
    return Section("recipe", "Recipe", [*parts, Code(found.recipe.to_toml(), "toml")])
