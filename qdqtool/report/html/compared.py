"""The page about a quantized model that was compared with its float one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import qdqtool
from qdqtool.report.html import accuracy, placed
from qdqtool.report.html.components import Cell, Column, Fact, Facts, Notice, Page, Part, Section, Table, Text, numbers
from qdqtool.report.latency import interval, milliseconds_of, why_slower
from qdqtool.report.layers import of_listing
from qdqtool.report.validation import Placing, Validation
from qdqtool.units import count, db, percent
from qdqtool.verification.comparison import Comparison
from qdqtool.verification.latency import Bench


def page(whole: Validation, *, reference: str, quantized: str, broken: Sequence[str] = ()) -> Page:
    """What a comparison found; ``broken``: the gates that the model did not pass, in words."""
    found = whole.comparison
    sections = [
        _summary(whole, broken),
        accuracy.outputs([("", found)]),
        _tensors(found),
        _kernels(found),
        *map(_placing, whole.placing),
        None if whole.latency is None else _latency(whole.latency),
    ]
    return Page(
        title=f"{quantized}: validation report",
        subtitle=f"Compared with {reference} on {count(found.samples, 'sample')}",
        sections=[section for section in sections if section is not None],
        footer=f"qdqtool {qdqtool.__version__}",
    )


def verdict(found: Comparison) -> str:
    """How near the models are, in a sentence."""
    worst = found.worst_db
    words = ["The outputs are equal" if worst == math.inf else f"The output keeps {db(worst)} SQNR"]
    told = accuracy.score(found)
    if told is not None:
        words.append(f"{found.metric} is {told[1]} where float has {told[0]} ({told[2]})")
    if found.agreement is not None:
        words.append(f"both models agree on {percent(100 * found.agreement)} of {count(found.samples, 'sample')}")
    return "; ".join(words) + "."


def _summary(whole: Validation, broken: Sequence[str]) -> Section:
    found = whole.comparison
    facts = accuracy.facts(found)
    ratios = {} if whole.latency is None else whole.latency.ratios
    facts += [Fact("Latency", f"{one.value:.2f}", f"of float, {interval(one)}") for one in ratios.values()]
    parts: list[Part] = [Text(verdict(found)), *(Notice(f"A gate failed: {line}.", "error") for line in broken)]
    parts += [Notice(found.warning)] if found.warning is not None else []
    return Section("summary", "Summary", [*parts, Facts(facts)])


def _tensors(found: Comparison) -> Section | None:
    """SQNR of every tensor that both models have, those that their own layer hurts most first."""
    if not found.tensors:
        return None
    names = list(found.tensors)
    columns = [
        numbers("Place"), Column("Tensor"), numbers("SQNR alone", "dB"), numbers("with all before", "dB"),
    ]  # fmt: skip
    ordered = sorted(enumerate(names, 1), key=lambda item: found.local.get(item[1], found.tensors[item[1]]))
    rows = [
        [
            accuracy.number(place),
            Cell(name),
            accuracy.decibels(found.local.get(name)),
            accuracy.decibels(found.tensors[name]),
        ]
        for place, name in ordered
    ]
    table = Table("tensors", "Tensors, the worst layers first", columns, rows, fold=40)
    lead = "Emulated, on the first samples: with the tensor's own layer quantized alone, and with everything before it."
    return Section(
        "tensors", "Tensors in between", [*accuracy.depth(found.local, found.tensors, names, names), table], lead
    )


def _kernels(found: Comparison) -> Section | None:
    """Which fused kernels differ from the Q/DQ nodes that they stand for."""
    if not found.kernels:
        return None
    columns = [
        Column("Fused kernel"), Column("Operator"), Column("Tensor"), numbers("On equal inputs", "dB"),
        numbers("Entries that differ", "%"), numbers("with all before", "dB"),
    ]  # fmt: skip
    rows = [
        [
            Cell(one.kernel), Cell(one.operator), Cell(one.tensor), accuracy.decibels(one.own_db),
            accuracy.number(100 * one.differing, "{:.2f}"), accuracy.decibels(one.total_db),
        ]
        for one in found.kernels
    ]  # fmt: skip
    table = Table("kernels", "Fused kernels", columns, rows, ("Operator",), fold=20)
    lead = (
        "What the runtime's fused kernels give, against the Q/DQ nodes that they stand for, the most different first."
    )
    return Section("kernels", "Fused kernels", [table], lead)


def _placing(one: Placing) -> Section:
    lines = [] if one.partition is None else [f"{one.partition}."]
    lines += ["Placement only: no GPU, nothing ran there."] if one.placement_only else []
    return placed.listed(of_listing(one.rows), one.provider, lines)


def _latency(found: Bench) -> Section:
    columns = [
        Column("Model"), numbers("Median"), numbers("90th percentile"), numbers("99th percentile"),
        numbers("Ratio"), numbers("95 % interval"),
    ]  # fmt: skip
    rows = []
    for name, one in found.latency.items():
        ratio = found.ratios.get(name)
        times = [Cell(milliseconds_of(ms), sort=ms) for ms in (one.p50, one.p90, one.p99)]
        value = accuracy.number(None if ratio is None else ratio.value, "{:.2f}")
        rows.append([Cell(name), *times, value, Cell("" if ratio is None else interval(ratio))])
    why = [Text(line.strip()) for name, ratio in found.ratios.items() for line in why_slower(found, name, ratio)]
    threads = f"{count(found.threads, 'pinned thread')}" if found.threads else "the runtime's own choice of threads"
    lead = f"{found.provider.upper()} provider, batch {found.batch}, {threads}, {count(found.rounds, 'run')} each."
    return Section("latency", "Latency", [Table("latency", "Latency", columns, rows), *why], lead)
