"""How much of a model's arithmetic runs in integers, counted in multiply-accumulates (MACs).

    Conv             |y| · C_in/group · |kernel|        ConvTranspose    |x| · C_out/group · |kernel|
    MatMul, Gemm     |y| · K                            LSTM, GRU, RNN   D·T·N · g·H·(I + H), g = 4, 3, 1

with |t| the number of elements of t, K the length of the axis summed over, D directions, T steps, N sequences, I inputs
and H hidden units. Everything else makes no products worth counting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import onnx

from qdqtool.graphs import model as models
from qdqtool.graphs.scopes import bodies

if TYPE_CHECKING:
    from qdqtool.data.fit import Feeds

_GATES: Final = {"LSTM": 4, "GRU": 3, "RNN": 1}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one sample.

    Attributes:
        total: of all layers.
        integer: of those that run in integers.
        layers: by node; a layer in a loop's body counts once.
        unknown: layers whose shapes are not known.
    """

    total: int
    integer: int
    layers: Mapping[str, int]
    unknown: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of all that runs in integers, 0 to 1; 0 where there are none."""
        return self.integer / self.total if self.total else 0.0


def count(proto: onnx.ModelProto, integer: Iterable[str], feeds: Feeds | None = None) -> Macs:
    """Count a model's multiply-accumulates.

    Args:
        proto: the model, float or with Q/DQ nodes.
        integer: names of the nodes that run in integers.
        feeds: one sample, which tells the size of symbolic dimensions; without, these count as 1.
    """
    shapes = _shapes(proto, feeds)
    layers: dict[str, int] = {}
    unknown = []
    for node in (node for graph in (proto.graph, *bodies(proto.graph)) for node in graph.node):
        if node.domain not in ("", "ai.onnx") or node.op_type not in _COUNTED:
            continue
        found = _macs(node, shapes)
        if found is None:
            unknown.append(node.name)
        else:
            layers[node.name] = found
    running = sum(layers.get(name, 0) for name in integer)
    return Macs(sum(layers.values()), running, layers, tuple(unknown))


def _shapes(proto: onnx.ModelProto, feeds: Feeds | None) -> dict[str, Shape]:
    """Shapes of tensors by name, as far as inference finds them."""
    light = models.without_large_constants(proto)
    for value in light.graph.input:
        if value.type.HasField("tensor_type"):
            fed = None if feeds is None else feeds.get(value.name)
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if fed is not None and axis < fed.ndim:
                    dim.dim_value = fed.shape[axis]
                elif not dim.HasField("dim_value"):
                    dim.dim_value = 1
    for graph in (light.graph, *bodies(light.graph)):
        del graph.value_info[:]  # of symbolic dimensions, which the inputs' sizes now settle
        for value in graph.output:
            value.type.tensor_type.ClearField("shape")
    try:
        light = onnx.shape_inference.infer_shapes(light, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {}
    known: dict[str, Shape] = {}
    for graph in (light.graph, *bodies(light.graph)):
        known |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.tensor_type.HasField("shape"):
                known[value.name] = tuple(max(d.dim_value, 1) for d in value.type.tensor_type.shape.dim)
    return known


def _macs(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
    """Those of one layer; None where a shape that tells them is missing."""
    read, made = ([shapes.get(name) for name in names] for names in (node.input, node.output))
    x, weight = read[0], read[1] if len(read) > 1 else None
    if node.op_type in _GATES:
        recurrence = read[2] if len(read) > 2 else None
        if x is None or weight is None or recurrence is None:
            return None
        return x[0] * x[1] * math.prod(weight) + x[0] * x[1] * math.prod(recurrence)
    if weight is None or x is None:
        return None
    if node.op_type == "ConvTranspose":  # (C_in, C_out/group, *kernel)
        return math.prod(x) * math.prod(weight[1:])
    return None if made[0] is None else math.prod(made[0]) * _summed(node, x, weight)


def _summed(node: onnx.NodeProto, x: Sequence[int], weight: Sequence[int]) -> int:
    """How many products each element of the output sums."""
    if node.op_type == "Conv":
        return math.prod(weight[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return x[0] if transposed else x[-1]


_COUNTED: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", *_GATES})
