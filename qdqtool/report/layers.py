"""Every node of a quantized model with what became of it: where it runs, why and what helps, bits, bytes, noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx

from qdqtool.graphs.links import CONVERSIONS, Links
from qdqtool.passes_api import State
from qdqtool.planning.plan import Key, params_of
from qdqtool.report.placed import fits, target_of
from qdqtool.report.values import Report
from qdqtool.verification.listing import Fate, Placed

Runs = Literal["integer", "planned", "compiled", "float", "moved", "gone", "conversion"]
WORDS: Mapping[Runs, str] = {
    "integer": "integer kernel",
    "planned": "planned for integers",
    "compiled": "compiled by TensorRT",
    "float": "float",
    "moved": "on another provider",
    "gone": "part of another",
    "conversion": "conversion left",
}


@dataclass(frozen=True)
class Layer:
    """One node.

    Attributes:
        name, op: of the node.
        runs: where.
        kernel: the operator that does its work in the graph that runs, where it is an integer kernel.
        reason: why it runs where it does, where that is not in integers.
        remedy: what would change that, where something does.
        tensor: what it puts out.
        macs: multiply-accumulates for one sample; None where it makes none.
        weight_bits, activation_bits: of what it reads in integers; None: float.
        channel_bits: of each output channel of its weight, where they differ.
        local_db, cumulative_db: SQNR of what it puts out, with it alone quantized and with all before it.
        bytes: of its constants in the file.
    """

    name: str
    op: str
    runs: Runs
    kernel: str = ""
    reason: str = ""
    remedy: str = ""
    tensor: str = ""
    macs: int | None = None
    weight_bits: float | None = None
    activation_bits: float | None = None
    channel_bits: tuple[int, ...] = ()
    local_db: float | None = None
    cumulative_db: float | None = None
    bytes: int = 0


def layers(state: State, report: Report, proto: onnx.ModelProto, sizes: Mapping[str, int]) -> tuple[Layer, ...]:
    """All nodes in the graph's order, bodies of control flow behind their node; ``sizes``: bytes by node."""
    rows = _Rows(report)
    macs = report.macs.layers if report.macs is not None else {}
    measured = report.evaluation if report.evaluation is not None else report.verification
    local = {} if measured is None else measured.local
    cumulative = {} if measured is None else {**measured.emulated, **measured.tensors}
    found: list[Layer] = []
    constants: dict[str, Layer] = {}  # what becomes of them is shown before their reader
    for node in _nodes(proto):
        output = next(filter(None, node.output), "")
        if node.op_type in CONVERSIONS:
            for left in rows.conversions(node, output):
                if node.op_type == "QuantizeLinear":
                    found.append(left)
                else:
                    constants[output] = left
            continue
        found += [constants.pop(name) for name in node.input if name in constants]
        weight, activation, channels = _bits(state, node)
        found.append(
            Layer(
                node.name, node.op_type, *rows.place(node.name),
                tensor=output,
                macs=macs.get(node.name),
                weight_bits=weight,
                activation_bits=activation,
                channel_bits=channels,
                local_db=local.get(output),
                cumulative_db=cumulative.get(output),
                bytes=sizes.get(node.name, 0),
            )
        )  # fmt: skip
    return (*found, *constants.values())


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for links in Links.of(proto.graph).everywhere():
        yield from links.graph.node


class _Rows:
    """The rows of a report's listing, by what they are about."""

    def __init__(self, report: Report) -> None:
        self.nodes = {row.name: row for row in report.listing if row.kind == "node"}
        self.pairs = {(row.operator, row.name): row for row in report.listing if row.kind == "pair"}
        elsewhere = report.verification is not None and not fits(target_of(report.recipe), report.verification.provider)
        self.elsewhere = report.placement is None and elsewhere
        self.planned = frozenset(report.layers) if self.elsewhere else frozenset()

    def place(self, name: str) -> tuple[Runs, str, str, str]:
        """Where a node runs, its integer kernel, why it has none, and what would change that."""
        row = self.nodes.get(name)
        if name in self.planned:
            return "planned", "", "", ""
        if row is None:
            return "float", "", "where it runs was not asked", ""
        kernel = row.kernel if row.state == Fate.INTEGER else ""
        return _RUNS[row.state], kernel, row.reason, row.remedy

    def conversions(self, node: onnx.NodeProto, output: str) -> list[Layer]:
        """A Q/DQ pair, or a constant's DequantizeLinear, that is left in the graph that runs; else nothing."""
        quantizes = node.op_type == "QuantizeLinear"
        name = node.input[0] if quantizes else node.input[0].removesuffix("_quantized")
        row = self.pairs.get(("Q/DQ" if quantizes else "DQ", name))
        if row is None or not row.kernel or self.elsewhere:
            return []
        return [Layer(name, row.kernel, "conversion", reason=row.reason, remedy=row.remedy, tensor=output)]


def of_listing(rows: Iterable[Placed]) -> tuple[Layer, ...]:
    """Nodes as a listing has them, and behind them the Q/DQ pairs that are left."""
    nodes, left = [], []
    for row in rows:
        if row.kind == "node":
            kernel = row.kernel if row.state == Fate.INTEGER else ""
            nodes.append(Layer(row.name, row.operator, _RUNS[row.state], kernel, row.reason, row.remedy))
        elif row.kernel:
            left.append(Layer(row.name, row.kernel, "conversion", reason=row.reason, remedy=row.remedy))
    return (*nodes, *left)


_RUNS: Mapping[str, Runs] = {
    Fate.INTEGER: "integer", Fate.FLOAT: "float", Fate.PART: "gone", Fate.COMPILED: "compiled", Fate.MOVED: "moved",
}  # fmt: skip


def _bits(state: State, node: onnx.NodeProto) -> tuple[float | None, float | None, tuple[int, ...]]:
    """Bits of a node's weight and of its activations, None where they are float; of each channel where they differ."""
    weight = activation = None
    channels: tuple[int, ...] = ()
    for index, tensor in enumerate(node.input):
        key = _planned(state, node, index, tensor)
        params = None if key is None else (state.params or {}).get(key)
        if key is None or params is None or params_of(params).spec.format.name == "int32":
            continue
        found = params_of(params)
        if state.plan is None or key not in state.plan.constants:
            activation = found.mean_bits if activation is None else activation
        elif weight is None:
            weight = found.mean_bits
            channels = () if found.channel_bits is None else tuple(found.channel_bits.tolist())
    return weight, activation, channels


def _planned(state: State, node: onnx.NodeProto, index: int, tensor: str) -> Key | None:
    """The key whose parameters an input is quantized by; its tensor has another name behind Q/DQ."""
    if state.plan is None:
        return None
    name = tensor.removesuffix("_dequantized")
    key = state.plan.activation_of(node.name, index, name)
    return None if key is None else state.plan.resolve(key)
