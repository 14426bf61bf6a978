"""What a run worked from and what it wrote, as sections of a page: ranges, data, bytes, time, the recipe."""

from __future__ import annotations

from collections.abc import Sequence

from qdqtool.recipe import Recipe
from qdqtool.report import calibration as adequacy
from qdqtool.report.histograms import MOST, TensorHistogram
from qdqtool.report.html import accuracy, plots
from qdqtool.report.html.components import Cell, Code, Column, Notice, Part, Plot, Section, Table, Text, numbers
from qdqtool.report.ledger import Ledger
from qdqtool.report.values import Report
from qdqtool.statistics.adequacy import Adequacy
from qdqtool.units import count, db, duration, percent


def ranges(found: Sequence[TensorHistogram], names: Sequence[str]) -> Section | None:
    """Histograms, and what calibrator ``names`` would choose; None where nothing was observed."""
    if not found:
        return None
    alt = (
        "Histogram of the values seen in one tensor, with the range in the model shaded; below it the range that each "
        "calibrator would choose."
    )
    picture = Plot(
        "histogram", plots.histogram(found[0], names), alt, "Tensor", [one.tensor for one in found], log=True
    )
    columns = [
        Column("Tensor"), numbers("Seen from"), numbers("to"), numbers("Range from"), numbers("up to"),
        Column("Chosen by"), numbers("Expected SQNR", "dB"), Column("Would do better"),
    ]  # fmt: skip
    rows = []
    for one in found:
        best = max(one.candidates, key=lambda candidate: candidate.sqnr_db, default=one.chosen)
        better = best if best.sqnr_db > one.chosen.sqnr_db + 0.05 else None
        ends = (one.lo, one.hi, one.chosen.lo, one.chosen.hi)
        rows.append([
            Cell(one.tensor), *(accuracy.number(end, "{:.4g}") for end in ends), Cell(one.chosen.calibrator),
            accuracy.decibels(one.chosen.sqnr_db),
            Cell("" if better is None else f"{better.calibrator}, {db(better.sqnr_db)}"),
        ])  # fmt: skip
    table = Table("ranges-table", "Ranges of tensors", columns, rows, fold=12)
    limit = f" Of more than {MOST} tensors, those with the most noise expected." if len(found) == MOST else ""
    told = f"{count(len(found), 'observed tensor')}, in the model's own units"
    lead = f"{told}; every calibrator with its default options.{limit}"
    return Section("ranges", "Ranges", [picture, table], lead)


def calibration(found: Adequacy | None, *, synthetic: bool) -> Section | None:
    """What the calibration data are worth; None where there were none."""
    if found is None or synthetic or not found.tensors:
        return None
    lines: list[Part] = [Text(f"{adequacy.summary(found)}.")] if adequacy.summary(found) else []
    lines += [Notice(line) for line in adequacy.findings(found)]
    columns = [
        Column("Tensor"), numbers("Stable after", "samples"), numbers("One sample's share", "%"),
        numbers("Chance to grow", "%"), Column("Least value in"), Column("Greatest value in"),
    ]  # fmt: skip
    ordered = sorted(found.tensors.items(), key=lambda item: -item[1].sole_share)
    rows = [
        [
            Cell(name), accuracy.number(one.stable_after), accuracy.number(100 * one.sole_share, "{:.0f}"),
            accuracy.number(100 * one.growth_chance, "{:.0f}"),
            *(Cell("several" if end is None else str(end)) for end in (one.lo_sample, one.hi_sample)),
        ]
        for name, one in ordered if one.content != "nothing"
    ]  # fmt: skip
    table = Table("adequacy", "How well ranges are known", columns, rows, fold=12)
    lead = "Whether the samples suffice, the least certain range first."
    return Section("calibration", "Calibration data", [*lines, table], lead)


def size(found: Ledger, float_bytes: int) -> Section:
    """Where the bytes of the file go; ``float_bytes``: of the float model."""
    rows = [
        [
            Cell(name),
            Cell(f"{number:,}", sort=number, share=number / found.total),
            Cell(percent(100 * number / found.total), sort=number),
        ]
        for name, number in found.parts.items()
    ]
    rows.append(
        [Cell("the whole file"), Cell(f"{found.total:,}", sort=found.total), Cell(percent(100), sort=found.total)]
    )
    columns = [Column("Part"), numbers("Size", "bytes"), numbers("Share")]
    ratio = found.total / max(float_bytes, 1)
    lead = f"Every byte of the file. It is {percent(100 * ratio)} of the float model's {float_bytes:,} bytes."
    return Section("size", "Size", [Table("ledger", "Bytes of the file", columns, rows)], lead)


def timings(report: Report) -> Section | None:
    """How long every pass took, the longest first."""
    total = report.seconds
    if not report.timings:
        return None
    rows = [
        [
            accuracy.number(place), Cell(one.pass_name),
            Cell(duration(one.seconds), sort=one.seconds, share=one.seconds / max(total, 1e-9)),
            accuracy.number(one.changes),
        ]
        for place, one in sorted(enumerate(report.timings, 1), key=lambda item: -item[1].seconds)
    ]  # fmt: skip
    columns = [numbers("Order"), Column("Pass"), numbers("Wall time"), numbers("Places changed")]
    table = Table("timings", "Time of passes", columns, rows, fold=12)
    return Section("time", "Time", [table], f"All passes took {duration(total)}.")


def recipe(report: Report) -> Section:
    """The recipe as TOML, to copy."""
    text = Recipe.of(report.recipe).to_toml()
    lead = "What was chosen. As a file, qdqtool quantize --recipe makes the same model of it."
    return Section("recipe", "Recipe", [Code(text, "toml")], lead)
