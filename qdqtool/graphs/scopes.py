"""Control-flow bodies of an ONNX graph: a walk over them, and one copy of what they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import onnx

_HOLDS_GRAPHS: Final = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """All control-flow bodies under a graph."""
    for node in graph.node:
        for body in held(node):
            yield body
            yield from bodies(body)


def held(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The control-flow bodies of one node."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


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


def make_names_unique(graph: onnx.GraphProto) -> None:
    """Give every tensor of the model a name that no other graph of it defines; those of the top graph stay.

    Two branches may use one name for two tensors, which then could not be told apart by name.
    """
    inner = list(bodies(graph))
    if inner:
        names = {name for one in (graph, *inner) for name in _defined(one)}
        _rename_bodies(graph, {}, set(_defined(graph)), names)


def _defined(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    yield from (name for node in graph.node for name in node.output if name)


def _rename_bodies(graph: onnx.GraphProto, outer: Mapping[str, str], taken: set[str], names: set[str]) -> None:
    """Rename in the bodies of a graph what is defined elsewhere too.

    Args:
        graph: its own tensors have their names.
        outer: names as the bodies have them -> as they are now.
        taken: names that are given; they grow.
        names: every name of the model, which a new one must not be; they grow.
    """
    for node in graph.node:
        for body in held(node):
            own = {}
            for name in dict.fromkeys(_defined(body)):
                own[name] = _fresh(name, names) if name in taken else name
                taken.add(own[name])
            changed = {old: new for old, new in {**outer, **own}.items() if old != new}
            _apply(body, changed)
            _rename_bodies(body, changed, taken, names)


def _fresh(name: str, names: set[str]) -> str:
    count = 1
    while f"{name}_{count}" in names:
        count += 1
    names.add(f"{name}_{count}")
    return f"{name}_{count}"


def _apply(graph: onnx.GraphProto, changed: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = changed.get(value.name, value.name)
    for constant in graph.initializer:
        constant.name = changed.get(constant.name, constant.name)
    for tensor in graph.sparse_initializer:
        tensor.values.name = changed.get(tensor.values.name, tensor.values.name)
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name in changed:
                    names[index] = changed[name]


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
