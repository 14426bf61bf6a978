"""How near the quantized model is to the float one, as parts of a page: outputs, the task's score, tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qdqtool.report.html import plots
from qdqtool.report.html.components import Cell, Column, Fact, Part, Plot, Section, Table, Text, numbers
from qdqtool.units import count, db, percent
from qdqtool.verification.comparison import Comparison

_PERCENT = frozenset({"top1", "top5"})
SQNR = "SQNR: power of the float values over the power of the error; 25 to 45 dB is usual at 8 bits, 6 dB are one bit."


def decibels(value: float | None) -> Cell:
    """A cell for an SQNR; without noise it sorts above all others."""
    if value is None:
        return Cell("")
    return Cell("equal" if value == math.inf else f"{value:.1f}", sort=max(min(value, 1e9), -1e9))


def number(value: float | None, form: str = "{:,}") -> Cell:
    """A cell for a number; empty where there is none."""
    return Cell("") if value is None else Cell(form.format(value), sort=value)


def score(found: Comparison) -> tuple[str, str, str] | None:
    """The task's score of the float and of the quantized model, and the change in words; None where there is none."""
    if found.metric is None or found.float_score is None or found.quantized_score is None:
        return None
    change = round(found.quantized_score - found.float_score, 6) + 0.0  # no -0.00
    if found.metric in _PERCENT:
        return percent(found.float_score), percent(found.quantized_score), f"{change:+.2f} points"
    return f"{found.float_score:.4g}", f"{found.quantized_score:.4g}", f"{change:+.4g}"


def chance(found: Comparison) -> str:
    """Whether the change of the score may be chance, with its interval; "" where that is not known."""
    if found.difference is None or not found.difference.value:
        return ""
    verdict = "more than chance" if found.difference.significant else "may be chance"
    return f"95 % interval {found.difference.lo:+.2f} to {found.difference.hi:+.2f}: {verdict}"


def facts(found: Comparison) -> list[Fact]:
    """Score, SQNR and agreement."""
    kept = []
    told = score(found)
    if told is not None:
        kept.append(Fact(f"Score ({found.metric})", told[1], f"float {told[0]}, {told[2]}"))
    kept.append(
        Fact("SQNR of the output", db(found.worst_db), f"emulated {db(min(found.emulated.values(), default=math.inf))}")
    )
    if found.agreement is not None:
        kept.append(Fact("Agreement", percent(100 * found.agreement), f"of {count(found.samples, 'sample')}"))
    return kept


def outputs(rows: Sequence[tuple[str, Comparison]]) -> Section:
    """The SQNR of every output, fused and emulated, on each set of samples."""
    columns = [Column("Output"), Column("Samples"), numbers("Fused", "dB"), numbers("Emulated", "dB")]
    cells = [
        [Cell(name), Cell(f"{found.samples} {origin}".strip()), decibels(value), decibels(found.emulated.get(name))]
        for origin, found in rows
        for name, value in found.fused.items()
    ]
    parts: list[Part] = [Table("outputs", "SQNR of every output", columns, cells, fold=20)]
    for _, found in rows:
        told = score(found)
        if told is not None:
            parts.append(
                Text(f"{found.metric}: {told[0]} in float, {told[1]} quantized, {told[2]}. {chance(found)}".strip())
            )
    parts.append(Text("Fused: as the runtime runs it. Emulated: every Q and DQ as written, in float.", quiet=True))
    provider = rows[0][1].provider.upper()
    return Section("accuracy", "Accuracy", parts, f"Against the float model, on the {provider} provider. {SQNR}")


def depth(
    local: Mapping[str, float], cumulative: Mapping[str, float], names: Sequence[str], tensors: Sequence[str]
) -> list[Part]:
    """SQNR along the network: ``names`` of layers and the ``tensors`` that they put out, in the graph's order."""
    known = [(n, t) for n, t in zip(names, tensors, strict=True) if t in cumulative or t in local]
    if len(known) < 2:
        return []
    ends = (
        [name for name, _ in known],
        [local.get(tensor) for _, tensor in known],
        [cumulative.get(tensor) for _, tensor in known],
    )
    alt = (
        "SQNR of what each layer puts out, in the order of the graph: quantized alone, and with everything before it "
        "quantized. Where the lower line falls and the upper one is low, that layer makes the noise; where only the "
        "lower one is low, it is inherited."
    )
    return [Plot("depth", plots.depth(*ends), alt)]
