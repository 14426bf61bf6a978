"""The page about a search for the precision of every layer: what it found and tried, which layers are sensitive."""

from __future__ import annotations

import math
from collections.abc import Mapping

import qdqtool
from qdqtool.mixed_precision.results import Quality, SearchResult, Trial
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
from qdqtool.units import count, db, size


def page(found: SearchResult, *, source: str) -> Page:
    """What a search for the model ``source`` found."""
    sections = [_summary(found), _front(found), _layers(found), _trials(found), _skipped(found), _recipe(found)]
    widths = ", ".join(map(_bits, found.widths))
    return Page(
        title=f"{source}: search report",
        subtitle=f"Searched for {found.goal} among {widths} in {count(len(found.layers), 'layer')}",
        sections=[section for section in sections if section is not None],
        footer=f"qdqtool {qdqtool.__version__}",
    )


def verdict(found: SearchResult) -> str:
    """What the search won, in a sentence."""
    best, other = found.best, found.baseline
    words = f"{best.bits:.2f} bits a weight in the mean, {size(best.bytes)}, {db(best.holdout.sqnr_db)} SQNR"
    if other is None or other.uniform is None:
        return f"{words}."
    kept = f"takes {size(other.bytes)} and keeps {db(other.holdout.sqnr_db)}"
    return f"{words}, where {_bits(other.uniform)} everywhere {kept}."


def _summary(found: SearchResult) -> Section:
    best = found.best
    facts = [
        Fact("SQNR of the output", db(best.holdout.sqnr_db), f"on {count(best.holdout.samples, 'sample')} held out"),
        Fact("Size", size(best.bytes), f"float {size(found.float_bytes)}"),
        Fact("Bits of weights", f"{best.bits:.2f}", "in the mean"),
        Fact("Models tried", str(len(found.trials)), "each quantized and measured"),
    ]
    if best.holdout.score is not None and found.metric is not None:
        facts.insert(0, Fact(f"Score ({found.metric})", f"{best.holdout.score:.4g}", _drop(best.holdout)))
    if best.latency is not None:
        facts.append(Fact("Latency", f"{best.latency:.2f}", "of float"))
    notes: list[Part] = [Notice(note, "note") for note in found.notes]
    if not found.complete:
        notes.insert(0, Notice("The time was up before the search came to its end; run the same again to go on."))
    parts: list[Part] = [Text(verdict(found)), *notes, Facts(facts), Text(f"Samples: {found.split}.", quiet=True)]
    return Section("summary", "Summary", parts)


def _drop(quality: Quality) -> str:
    return "" if quality.drop is None else f"{-quality.drop:+.4g} against float"


def _front(found: SearchResult) -> Section | None:
    if len(found.trials) < 2:
        return None
    series = {
        "tried": _points(found.trials),
        "no other is smaller and better": _points(found.front),
        "chosen": _points((found.best,)),
    }
    alt = "SQNR over size of the models that were tried, on the samples by which assignments are chosen."
    tips = (("model", "@name"), *plots.POINT)
    item = plots.lines("front", series, ("size, kB", "SQNR, dB"), tips, points=("tried", "chosen"))
    return Section("front", "Size and accuracy", [Plot("front", item, alt)])


def _points(trials: tuple[Trial, ...]) -> dict[str, list[object]]:
    known = [trial for trial in trials if math.isfinite(trial.selection.sqnr_db)]
    return {
        "x": [trial.bytes / 1000 for trial in known],
        "y": [trial.selection.sqnr_db for trial in known],
        "name": [_named(trial) for trial in known],
    }


def _named(trial: Trial) -> str:
    return f"{_bits(trial.uniform)} everywhere" if trial.uniform else f"{trial.bits:.2f} bits in the mean"


def _layers(found: SearchResult) -> Section:
    """Sensitivity of every layer at every width, and the width chosen."""
    series = {_bits(w): [found.local_db.get(layer, {}).get(w) for layer in found.layers] for w in found.widths}
    alt = "SQNR of the outputs with one layer alone quantized at each width: where a line is low, bits matter."
    picture = Plot("sensitivity", plots.sensitivity(found.layers, series), alt)
    measured = [
        (found.local_db, width, f"{_bits(width)}, alone") for width in found.widths if _told(found.local_db, width)
    ] + [
        (found.cumulative_db, width, f"{_bits(width)}, with all before")
        for width in found.widths if _told(found.cumulative_db, width)
    ]  # fmt: skip
    columns = [
        Column("Layer"), Column("Operator"), Column("Chosen"), numbers("Weights", "elements"),
        *(numbers(title, "dB") for _, _, title in measured),
    ]  # fmt: skip
    rows = [
        [
            Cell(layer), Cell(found.operators.get(layer, "")), Cell(_bits(found.chosen.get(layer, ""))),
            accuracy.number(found.elements.get(layer)),
            *(accuracy.decibels(sqnr.get(layer, {}).get(width)) for sqnr, width, _ in measured),
        ]
        for layer in found.layers
    ]  # fmt: skip
    table = Table("sensitivity", "Sensitivity of layers", columns, rows, ("Operator", "Chosen"), fold=40)
    return Section("layers", "Layers", [picture, table], "How much each width of each layer costs.")


def _told(sqnr: Mapping[str, Mapping[str, float]], width: str) -> bool:
    """Whether a width was measured in most layers; a search that ran out of time leaves some out."""
    return 2 * sum(width in known for known in sqnr.values()) > len(sqnr)


def _bits(width: str) -> str:
    """A width in words: those of weights are numbers of bits."""
    return f"{width} bits" if width.isdigit() else width


def _trials(found: SearchResult) -> Section:
    columns = [
        numbers("Order"), Column("Model"), numbers("Size", "bytes"), numbers("Bits"),
        numbers("SQNR to choose by", "dB"), numbers("SQNR held out", "dB"), numbers("Score lost"),
        numbers("Latency", "of float"),
    ]  # fmt: skip
    rows = [
        [
            accuracy.number(place), Cell(_named(trial), state="good" if trial == found.best else ""),
            accuracy.number(trial.bytes), accuracy.number(trial.bits, "{:.2f}"),
            accuracy.decibels(trial.selection.sqnr_db), accuracy.decibels(trial.holdout.sqnr_db),
            accuracy.number(trial.holdout.drop, "{:+.4g}"), accuracy.number(trial.latency, "{:.2f}"),
        ]
        for place, trial in enumerate(found.trials, 1)
    ]  # fmt: skip
    lead = "Each was quantized as its recipe says, and measured; the one that was written is marked."
    return Section("trials", "Models tried", [Table("trials", "Models tried", columns, rows, fold=40)], lead)


def _skipped(found: SearchResult) -> Section | None:
    groups: dict[str, list[str]] = {}
    for skip in found.skipped:
        groups.setdefault(skip.reason, []).append(skip.node)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    lead = "Layers that were not searched, by reason."
    return Section("skipped", "Left alone", [Reasons(ordered)], lead) if groups else None


def _recipe(found: SearchResult) -> Section:
    lead = "Makes the best model again, with qdqtool quantize --recipe."
    return Section("recipe", "Recipe", [Code(found.recipe.to_toml(), "toml")], lead)
