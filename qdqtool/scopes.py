"""Control-flow bodies of an ONNX graph: a walk over them, and one copy of what they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx

_HOLDS_GRAPHS: Final = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """All control-flow bodies under a graph."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
                yield from bodies(attribute.g)


def read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node and the bodies in it read."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type not in _HOLDS_GRAPHS:
            continue
        for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inner in body.node:
                yield from read_by(inner)
            yield from (output.name for output in body.output)


def hoist_shared_constants(graph: onnx.GraphProto) -> None:
    """Keep one copy of a constant that several bodies read, in the top graph; the export gives every reader its own."""
    inner = list(bodies(graph))
    if not inner:
        return
    known = {tensor.name: tensor for tensor in graph.initializer}
    everywhere = (graph, *inner)
    made = {name for g in everywhere for node in g.node for name in node.output}
    made |= {value.name for g in everywhere for value in g.input} - known.keys()
    seen: dict[str, onnx.TensorProto] = {}
    shared: dict[str, onnx.TensorProto] = {}
    for tensor in (tensor for body in inner for tensor in body.initializer):
        other = known.get(tensor.name) or seen.setdefault(tensor.name, tensor)
        if other is not tensor and other == tensor and tensor.name not in made:
            shared[tensor.name] = other
    differing = {t.name for body in inner for t in body.initializer if t.name in shared and t != shared[t.name]}
    graph.initializer.extend(shared[name] for name in shared if name not in differing and name not in known)
    for body in inner:
        own = [t for t in body.initializer if t.name not in shared or t.name in differing]
        if len(own) < len(body.initializer):
            kept = [_copied(tensor) for tensor in own]  # the messages die with the field
            del body.initializer[:]
            body.initializer.extend(kept)


def _copied(tensor: onnx.TensorProto) -> onnx.TensorProto:
    copied = onnx.TensorProto()
    copied.CopyFrom(tensor)
    return copied
