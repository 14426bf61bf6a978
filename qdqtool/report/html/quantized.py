"""The page about a model that was quantized: the summary first, then what it was made from and where it runs."""

from __future__ import annotations

import math
from collections import Counter

from qdqtool import registry
from qdqtool.report import calibration, terminal
from qdqtool.report.html import accuracy, details, placed, plots
from qdqtool.report.html.components import (
    Fact,
    Facts,
    Notice,
    Page,
    Section,
    Text,
)
from qdqtool.report.page_data import PageData
from qdqtool.report.placed import fits, target_of
from qdqtool.report.values import Report
from qdqtool.units import count, db, percent, quantity, size


def page(report: Report, data: PageData, *, source: str, output: str) -> Page:
    """Everything a run found out.

    Args:
        report: of the run.
        data: what a page shows beside it.
        source: name of the float model.
        output: name of the quantized one.
    """
    target = target_of(report.recipe)
    names = list(registry.catalogue("calibrators"))
    sections = [
        _summary(report),
        _accuracy(report, data),
        placed.layers(data.layers),
        placed.placement(data.layers, _work(report)),
        placed.bits(data.layers),
        details.ranges(data.histograms, names),
        details.calibration(report.calibration, synthetic=report.synthetic),
        details.size(data.ledger, report.sizes.float_bytes),
        placed.skipped(report.skipped, frozenset(report.layers) - frozenset(report.weight_only), terminal.PLANNERS),
        details.timings(report),
        details.recipe(report),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return Page(
        title=f"{output}: quantization report",
        subtitle=f"Made from {source} for {target.name}, {report.recipe['precision']}, "
        f"{count(report.samples, 'calibration sample')}",
        sections=[section for section in sections if section is not None],
        data={"histograms": [plots.histogram_data(one, names) for one in data.histograms]} if data.histograms else {},
        footer=f"{versions}. SHA-256 of the float model: {report.float_sha256}",
    )


def verdict(report: Report) -> str:
    """What became of the model, in a sentence."""
    sizes = report.sizes
    ratio = sizes.float_bytes / max(sizes.quantized_bytes, 1)
    words = [f"The file is {ratio:.2f} times smaller" if ratio >= 1 else f"The file is {1 / ratio:.2f} times larger"]
    measured = report.evaluation or report.verification
    if measured is None:
        words.append("what that costs in accuracy was not measured")
    else:
        worst = measured.worst_db
        words.append(
            "its output equals the float model's" if worst == math.inf else f"its output keeps {db(worst)} SQNR"
        )
        told = accuracy.score(measured)
        if told is not None:
            chance = "" if measured.difference is None or not measured.difference.value else (
                ", more than chance" if measured.difference.significant else ", which may be chance"
            )  # fmt: skip
            words.append(f"{measured.metric} changes by {told[2]}{chance}")
    if report.placement is not None and report.placement.planned:
        left = len(report.placement.floats)
        planned = count(report.placement.planned, "planned kernel")
        words.append(f"all {planned} run in integers" if not left else f"{left} of {planned} run in float after all")
    return "; ".join(words) + "."


def _summary(report: Report) -> Section:
    sizes, macs = report.sizes, report.macs
    measured = report.evaluation or report.verification
    facts = [] if measured is None else accuracy.facts(measured)
    facts.append(Fact("Size", size(sizes.quantized_bytes), f"float {size(sizes.float_bytes)}"))
    if report.kernels:
        total = sum(report.kernels.values())
        facts.append(Fact("Integer kernels", str(report.integer_kernels), f"of {count(total, 'operator')} that run"))
    if macs is not None and macs.total:
        facts.append(
            Fact("Work in integers", percent(100 * macs.share), f"of {quantity(macs.total)} multiply-accumulates")
        )
    return Section("summary", "Summary", [Text(verdict(report)), *_warnings(report), Facts(facts)])


def _warnings(report: Report) -> list[Notice]:
    found = []
    if report.synthetic:
        found.append(Notice("Synthetic data: ranges come from random samples. Do not ship this file.", "error"))
    target, measured = target_of(report.recipe), report.evaluation or report.verification
    if measured is not None and not fits(target, measured.provider):
        provider = measured.provider.upper()
        found.append(Notice(f"The file is made for {target.name}; accuracy here is the {provider} provider's."))
    if report.calibration is not None and not report.synthetic:
        if not report.calibration.settled:
            found.append(Notice(f"Calibration data: {calibration.summary(report.calibration)}."))
        found += [Notice(line) for line in calibration.findings(report.calibration)]
    return [*found, *(Notice(note, "note") for note in report.notes)]


def _accuracy(report: Report, data: PageData) -> Section | None:
    rows = [("of calibration", report.verification), ("of evaluation", report.evaluation)]
    known = [(origin, found) for origin, found in rows if found is not None]
    if not known:
        return None
    shown = accuracy.outputs(known)
    nodes = [layer for layer in data.layers if layer.cumulative_db is not None or layer.local_db is not None]
    local = {layer.tensor: layer.local_db for layer in nodes if layer.local_db is not None}
    cumulative = {layer.tensor: layer.cumulative_db for layer in nodes if layer.cumulative_db is not None}
    along = accuracy.depth(local, cumulative, [n.name for n in nodes], [n.tensor for n in nodes])
    return Section(shown.id, shown.title, [*along, *shown.parts], shown.lead)


def _work(report: Report) -> list[str]:
    lines = []
    if report.partition is not None:
        lines.append(f"{report.partition}.")
    others = Counter(report.kernels)
    if others:
        listed = ", ".join(f"{op} {number}" for op, number in others.most_common())
        lines.append(f"Operators in the graph that runs: {listed}.")
    return lines
