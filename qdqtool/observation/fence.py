"""Nodes that keep the runtime from fusing across a tensor, so that its bits do not depend on what else is observed.

The runtime fuses a node with the next one only where nobody else reads what is between them, and what is fused may
round elsewhere: the sum of a residual block, for one, is then computed inside of the convolution. An output of the
model is read by somebody. So without more, observing one tensor would change the last bits of others, and statistics of
a few tensors would not be those of all. A fence is a reader that costs nothing: a Size, whose result nobody fetches.

A tensor needs no fence where that would change nothing: one that follows from another
(:mod:`qdqtool.observation.derive`) and is not observed for that reason, and one between a convolution and the
activation function that alone reads it, which rounds alike in either form. Where such a tensor is observed all the same
(a recipe may exclude the activation function), it is fenced too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

import onnx

from qdqtool.graphs.scopes import bodies
from qdqtool.observation.bodies import computed_inside, expose
from qdqtool.observation.derive import all_derivations

_PREFIX: Final = "qdqtool.observation.fence."
_FUSED_ALIKE: Final = frozenset({"Clip", "LeakyRelu", "Relu"})


def fences(proto: onnx.ModelProto, observed: Iterable[str], follows: Iterable[str] | None = None) -> frozenset[str]:
    """Names of the tensors that get a fence where these are observed: mostly the same ones whatever is observed.

    Args:
        proto: the model.
        observed: names of tensors.
        follows: the tensors that follow from others, where the caller knows them.
    """
    everywhere = (proto.graph, *bodies(proto.graph))
    values = (value for graph in everywhere for value in (*graph.value_info, *graph.output))
    floats = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    return frozenset(floats - _bare(proto, everywhere, follows)) | frozenset(observed)


def _bare(proto: onnx.ModelProto, everywhere: Sequence[onnx.GraphProto], follows: Iterable[str] | None) -> set[str]:
    nodes = [node for graph in everywhere for node in graph.node]
    readers = Counter(name for node in nodes for name in node.input)
    readers.update(output.name for graph in everywhere for output in graph.output)
    constants = {tensor.name for graph in everywhere for tensor in graph.initializer}
    convolved = {node.output[0] for node in nodes if node.op_type == "Conv"}
    fused = {
        node.input[0]
        for node in nodes
        if node.op_type in _FUSED_ALIKE and readers[node.input[0]] == 1 and constants.issuperset(node.input[1:])
    }
    return {*(all_derivations(proto) if follows is None else follows)} | (convolved & fused)


def add_fences(proto: onnx.ModelProto, names: frozenset[str]) -> None:
    """Put fences behind those of the named tensors that nodes of the model compute; each is an output of the model."""
    inside = {_PREFIX + name for body in bodies(proto.graph) for name in _fence(body, names)}
    expose(proto.graph, dict.fromkeys(inside, onnx.TensorProto.INT64))
    fenced = _fence(proto.graph, names)
    proto.graph.output.extend(_size(_PREFIX + name) for name in fenced)
    given = [name for node in proto.graph.node for name in node.output if name in inside]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, None) for n in given)


def _fence(graph: onnx.GraphProto, names: frozenset[str]) -> list[str]:
    """Put fences behind tensors that nodes of this graph compute themselves; returns which."""
    nodes, fenced = [], []
    for node in graph.node:
        nodes.append(node)
        inside = {*computed_inside(node)}  # given out by the node for the sake of observation
        for name in names.intersection(node.output) - inside:
            nodes.append(onnx.helper.make_node("Size", [name], [_PREFIX + name]))
            fenced.append(name)
    copied = onnx.GraphProto(node=nodes, value_info=[_size(_PREFIX + name) for name in fenced])
    del graph.node[:]
    graph.node.extend(copied.node)
    graph.value_info.extend(copied.value_info)
    return fenced


def _size(name: str) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [])


def without_fences(outputs: Iterable[str]) -> list[str]:
    """Those of a model's outputs that are no fences."""
    return [name for name in outputs if not name.startswith(_PREFIX)]
