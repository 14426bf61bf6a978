"""Where every layer runs, as parts of a page: the table of layers, the map of the graph, bits, what was left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qdqtool.passes_api import Skip
from qdqtool.report.html.accuracy import decibels, number
from qdqtool.report.html.components import (
    Cell,
    Column,
    Map,
    Part,
    Reasons,
    Section,
    Strip,
    Strips,
    Table,
    Text,
    Tile,
    numbers,
)
from qdqtool.report.layers import WORDS, Layer
from qdqtool.units import count

ROWS = 2000
"""Layers in the table before the rest is left to the JSON: a page must open at once."""
_WIDEST = 16.0
_COLUMNS = (
    Column("Layer"),
    Column("Operator"),
    Column("Runs as"),
    numbers("MACs"),
    numbers("Weights", "bits"),
    numbers("Activations", "bits"),
    numbers("SQNR alone", "dB"),
    numbers("with all before", "dB"),
    numbers("Constants", "bytes"),
)


def layers(found: Sequence[Layer]) -> Section:
    """The table of all nodes."""
    nodes = [layer for layer in found if layer.runs != "conversion"]
    parts: list[Part] = [
        Table("layers", "Layers", _COLUMNS, [_row(layer) for layer in nodes[:ROWS]], ("Operator", "Runs as"), fold=30)
    ]
    if len(nodes) > ROWS:
        parts.append(Text(f"The first {ROWS} of {count(len(nodes), 'node')}; report.json has them all.", quiet=True))
    lead = (
        "Every node in the order of the graph, with the reason where it does not run in integers. SQNR is that of what "
        "it puts out, emulated: quantized alone, and with everything before it quantized."
    )
    return Section("layers", "Layers", parts, lead)


def _row(layer: Layer) -> list[Cell]:
    return [
        Cell(layer.name),
        Cell(layer.op),
        _runs(layer),
        number(layer.macs),
        _bits(layer.weight_bits),
        _bits(layer.activation_bits),
        decibels(layer.local_db),
        decibels(layer.cumulative_db),
        number(layer.bytes or None),
    ]


def _runs(layer: Layer) -> Cell:
    """Where a node runs; below it the kernel, or why there is none and what helps."""
    why = [] if layer.runs == "gone" else [layer.kernel, layer.reason, layer.remedy]
    return Cell(WORDS[layer.runs], state=layer.runs, hint=". ".join(filter(None, why)))


def _bits(bits: float | None) -> Cell:
    return Cell("") if bits is None else Cell(f"{bits:.3g}", sort=bits)


def placement(found: Sequence[Layer], summary: Sequence[str]) -> Section:
    """The graph as tiles, what is left between them, and lines about all of it."""
    parts: list[Part] = [tiles(found), *(Text(line) for line in summary), *conversions(found)]
    lead = "The graph in order, a tile a node. Q and DQ that vanished into integer kernels are not shown."
    return Section("placement", "Placement", parts, lead)


def listed(found: Sequence[Layer], provider: str, summary: Sequence[str]) -> Section:
    """Where every node runs on a provider: tiles, and a table of the nodes."""
    columns = [Column("Node"), Column("Operator"), Column("Runs as")]
    rows = [[Cell(one.name), Cell(one.op), _runs(one)] for one in found if one.runs != "conversion"]
    table = Table(f"nodes-{provider}", "Where nodes run", columns, rows[:ROWS], ("Operator", "Runs as"), fold=30)
    parts: list[Part] = [tiles(found), *(Text(line) for line in summary), table, *conversions(found, provider)]
    return Section(f"placement-{provider}", f"Placement on {provider.upper()}", parts)


def tiles(found: Sequence[Layer]) -> Map:
    """The graph in order, a tile a node."""
    totals = Counter(layer.runs for layer in found)
    legend = [(state, words, totals[state]) for state, words in WORDS.items() if totals[state]]
    shown = [
        Tile(one.runs, ": ".join(filter(None, (f"{one.op} {one.name}", one.kernel or one.reason)))) for one in found
    ]
    alt = "The graph in order, a tile a node: " + ", ".join(f"{total} {words}" for _, words, total in legend)
    return Map(alt, shown[:ROWS], legend)


def conversions(found: Sequence[Layer], provider: str = "") -> list[Part]:
    """Q/DQ pairs that are left in the graph that runs, and why."""
    left = [
        [Cell(one.name), Cell(one.op), Cell(one.reason, hint=one.remedy)] for one in found if one.runs == "conversion"
    ]
    columns = [Column("Tensor"), Column("Conversions"), Column("Why they are left")]
    name = "-".join(filter(None, ("conversions", provider)))
    return [Table(name, "Conversions left in the graph that runs", columns, left, fold=12)] if left else []


def bits(found: Sequence[Layer]) -> Section | None:
    """Bits of weights by layer, and of each channel where they differ; None where no weight is in integers."""
    rows = []
    for layer in found:
        if layer.weight_bits is None or not layer.macs:
            continue
        each = layer.channel_bits or (layer.weight_bits,)
        levels = [(min(one / _WIDEST, 1.0), f"{one:g} bits") for one in each]
        rows.append(Strip(layer.name, f"{layer.weight_bits:.3g} bits", levels))
    if not rows:
        return None
    weights = [layer for layer in found if layer.weight_bits is not None and layer.macs]
    split = sum(bool(layer.channel_bits) for layer in weights)
    if not split and len({row.figure for row in rows}) == 1:
        return Section("bits", "Bits", [Text(f"Weights of all {count(len(rows), 'layer')} have {rows[0].figure}.")])
    lead = f"Weights of {count(len(weights), 'layer')}" + (
        f", {split} of them with bits of each channel" if split else ""
    )
    return Section("bits", "Bits", [Strips("Bits of weights by layer", rows[:ROWS], ("0 bits", "16 bits"))], f"{lead}.")


def skipped(found: Sequence[Skip], done: frozenset[str], planners: frozenset[str]) -> Section | None:
    """What was left alone and why, the most frequent reason first; nodes in ``done`` run in integers after all."""
    groups: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
    for skip in found:
        planned = skip.pass_name in planners
        if not (planned and skip.node in done):
            reason = skip.reason if planned else f"{skip.pass_name}: {skip.reason}"
            groups[planned].setdefault(reason, []).append(skip.node)
    parts: list[Part] = []
    for planned, reasons in groups.items():
        if reasons:
            ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
            total = count(sum(map(len, reasons.values())), "node")
            parts.append(Text(f"{'Stayed float' if planned else 'Left as they were by preparation'}: {total}."))
            parts.append(Reasons(ordered))
    return (
        Section("skipped", "Left alone", parts, "What was not quantized or not simplified, by reason.")
        if parts
        else None
    )
