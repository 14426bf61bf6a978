"""Types of values that are no tensors (sequences, optionals, maps), of which the graph library keeps parts or fails.

They are told by the name of the value or node, which a loaded model uses for one alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import onnx

from qdqtool.graphs.scopes import bodies

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

_TENSORS = ("tensor_type", "sparse_tensor_type")


def find(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    """Types of all values that are no tensors, by name; control-flow bodies included."""
    others = (value for value in _values(graph) if value.type.WhichOneof("value") not in (None, *_TENSORS))
    # Copies: what refers to a part of the model's message would keep all of it.
    return {value.name: onnx.TypeProto.FromString(value.type.SerializeToString()) for value in others}


def hide(graph: gs.Graph) -> None:
    """Let the graph library take these values for ones of which nothing is known; it keeps their kind."""
    from qdqtool.graphs import graph as graphs

    for tensor in graphs.all_tensors(graph).values():
        if not graphs.is_constant(tensor) and tensor.type not in (None, *_TENSORS):
            tensor.dtype = tensor.shape = None


def restore(graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto]) -> None:
    """Give inputs and outputs of the graph and its bodies, of which nothing is known, their types again."""
    if not types:
        return
    for value in _values(graph):
        if value.name in types:
            value.type.CopyFrom(types[value.name])


def find_attributes(graph: onnx.GraphProto) -> dict[str, onnx.AttributeProto]:
    """Attributes that hold a type, by the name of their node (Optional has one); control-flow bodies included."""
    return {
        node.name: onnx.AttributeProto.FromString(attribute.SerializeToString())
        for inner in (graph, *bodies(graph))
        for node in inner.node
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.TYPE_PROTO
    }


def restore_attributes(graph: onnx.GraphProto, attributes: Mapping[str, onnx.AttributeProto]) -> None:
    """Give nodes these attributes again."""
    for node in (node for inner in (graph, *bodies(graph)) for node in inner.node) if attributes else ():
        if node.name in attributes:
            node.attribute.append(attributes[node.name])


def _values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    for inner in (graph, *bodies(graph)):
        yield from inner.input
        yield from inner.output
        yield from inner.value_info
